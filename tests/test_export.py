"""A labeler with its anchors, exported by torch.export and to ONNX, for any size of its input."""

import io
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from anchorda import AnchorPseudoLabeler
from tests.oracles import draw


class Labeling(nn.Module):
    """A module to export: anchors in a buffer, and a labeler."""

    centroids: Tensor

    def __init__(self, centroids: Tensor, labeler: AnchorPseudoLabeler) -> None:
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.labeler = labeler

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels and scores of features (N, D, H, W)."""
        labels, scores = self.labeler(features, self.centroids)
        return labels, scores


# Both of torch 2.4: about any custom operator, which it exports right, and about its own loading.
@pytest.mark.filterwarnings("ignore:At pre-dispatch tracing:UserWarning")
@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
def test_exported_labeler(relative: bool, per_class: bool) -> None:
    centroids = torch.randn(4, 3)
    centroids[2] = math.nan
    margin = torch.tensor([0.1, 0.2, 0.3, 0.4]) if per_class else 0.2
    module = Labeling(centroids, AnchorPseudoLabeler(margin, relative=relative))
    sizes = {i: torch.export.Dim(name) for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    exported = torch.export.export(
        module, (torch.randn(2, 3, 8, 6),), dynamic_shapes={"features": sizes}
    )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for shape in ((2, 8, 6), (5, 17, 3), (1, 4, 31), (3, 64, 1), (1, 1, 1)):
        features = draw(shape, num_classes=4).features
        features[0, 1, 0, 0] = math.nan
        labels, scores = loaded(features)
        expected = module(features)
        assert torch.equal(labels, expected[0])
        assert torch.equal(scores, expected[1])
        assert labels[0, 0, 0] == 255
    # No size is special: not 1, nor that of the example; and the labels say something.
    labels, _ = loaded(draw((2, 30, 30), num_classes=4).features)
    assert {*labels.unique().tolist()} == {0, 1, 3, 255}


# Of the exporter about its own use of deprecated functions, and of the evaluator about NaN.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("relative", "several"), [(False, False), (True, True)])
def test_labeler_in_onnx(relative: bool, several: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnx.reference import ReferenceEvaluator

    centroids = torch.randn(4, 2, 3) if several else torch.randn(4, 3)
    centroids[2] = math.nan
    module = Labeling(centroids, AnchorPseudoLabeler([0.1, 0.2, 0.3, 0.4], relative=relative))
    sizes = {i: torch.export.Dim(name) for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    torch.onnx.export(
        module.eval(),
        (torch.randn(2, 3, 8, 6),),
        tmp_path / "labeler.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes={"features": sizes},
    )
    evaluator = ReferenceEvaluator(onnx.load(tmp_path / "labeler.onnx"))
    (name,) = evaluator.input_names
    for shape in ((2, 8, 6), (3, 17, 5)):
        features = draw(shape, num_classes=4).features
        features[0, 1, 0, 0] = math.nan
        features[0, 2, 0, 1] = -math.inf
        labels, scores = evaluator.run(None, {name: features.numpy()})
        expected = module(features)
        assert torch.equal(torch.from_numpy(labels), expected[0])
        assert {*expected[0].unique().tolist()} >= {0, 1, 3, 255}
        torch.testing.assert_close(torch.from_numpy(scores), expected[1], rtol=1e-6, atol=1e-6)
