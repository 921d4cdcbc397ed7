"""The page on the released CAG-UDA code, with a model of its shapes and signatures."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracles
from tests.oracles import Array, flat, rows
from tests.recipes.pages import nearest, run_block

NUM_CLASSES, DIM = 19, 256
PAGE = "cag_uda.md"
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class DeepLab(nn.Module):
    """Four outputs, the last two at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, DIM, 4, stride=4), nn.ReLU())
        self.classifier = nn.Conv2d(DIM, NUM_CLASSES, 1)
        nn.init.orthogonal_(self.classifier.weight, gain=8)

    def forward(self, x: Tensor) -> Outputs:  # noqa: D102
        feat_cls = self.layers(5 * x)
        return feat_cls, feat_cls, feat_cls, self.classifier(feat_cls)


class CustomModel:
    """No module, as there; its networks are."""

    def __init__(self) -> None:
        self.PredNet_DP, self.BaseNet_DP = DeepLab().eval(), DeepLab()

    def forward(self, x: Tensor) -> Outputs:  # noqa: D102
        feat, feat_low, feat_cls, output = self.BaseNet_DP(x)
        return feat, feat_low, feat_cls, output

    def PredNet_Forward(self, x: Tensor) -> Outputs:  # noqa: D102, N802
        with torch.no_grad():
            feat, feat_low, feat_cls, output = self.PredNet_DP(x)
        return feat, feat_low, feat_cls, output


def draw_source(model: CustomModel) -> tuple[Tensor, Tensor]:
    """Return images whose labels mostly agree with the frozen network; some are ignored."""
    images = torch.randn(2, 3, 64, 96)
    predicted = model.PredNet_Forward(images)[3].argmax(dim=1)
    labels = predicted.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    wrong = torch.rand(labels.shape) < 0.3
    labels = torch.where(wrong, torch.randint(NUM_CLASSES, labels.shape), labels)
    return images, torch.where(torch.rand(labels.shape) < 0.1, 250, labels)


@pytest.fixture
def names() -> dict[str, Any]:
    model = CustomModel()
    source_x, source_label = draw_source(model)
    return {
        "model": model,
        "source_train_loader": [draw_source(model) for _ in range(2)],
        "source_x": source_x,
        "source_label": source_label,
        "target_x": torch.randn(2, 3, 64, 96),
    }


def by_hand(names: dict[str, Any]) -> Array:
    """Return the means over images of the means of classes of at least ten pixels."""
    batches = []
    for images, labels in names["source_train_loader"]:
        _, _, features, logits = names["model"].PredNet_Forward(images)
        for x, y, z in zip(features, labels, logits, strict=True):
            kept = oracles.keep_correct(nearest(y[None], (16, 24)), rows(z[None]), 250)
            batches.append(oracles.image_centroids(rows(x[None]), kept, NUM_CLASSES, 10, 250))
    return oracles.stream_anchors(batches, NUM_CLASSES, DIM, max_count=3000)[0]


def test_anchors_are_those_of_a_loop(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    expected = by_hand(names)
    assert 2 < np.isfinite(expected).all(axis=1).sum() < NUM_CLASSES
    np.testing.assert_allclose(names["centroids"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_labels_and_losses_of_a_step(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    model, target, ones = names["model"], names["target_x"], [1.0] * NUM_CLASSES
    _, _, features, logits = model.PredNet_Forward(target)
    minimum = [2.5] * NUM_CLASSES
    by_anchor, margins = oracles.margin_labels(rows(features), by_hand(names), minimum, False, 250)
    clear = np.abs(margins - 2.5) > 1e-4
    assert np.array_equal(flat(names["by_anchor"].labels)[clear], by_anchor[clear])
    by_probability, sure = oracles.probability_labels(rows(logits), [0.95] * NUM_CLASSES, 250)
    clear = np.abs(sure - 0.95) > 1e-5
    assert np.array_equal(flat(names["by_probability"].labels)[clear], by_probability[clear])
    for labels in (by_anchor, by_probability):
        assert 0 < (labels == 250).sum() < labels.size

    logits = model.forward(names["source_x"])[3]
    logits = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=True)
    source = oracles.cross_entropy(rows(logits), flat(names["source_label"]), ones, 0.0)
    assert names["loss"].source.item() == pytest.approx(source, rel=1e-5)
    logits = model.forward(target)[3]
    pseudo = [
        oracles.cross_entropy(rows(logits), flat(names[name].labels), ones, 0.0)
        for name in ("by_anchor", "by_probability")
    ]
    assert names["loss"].pseudo.item() == pytest.approx(sum(pseudo) / 2, rel=1e-5)
    assert names["loss"].distance > 0
    assert model.BaseNet_DP.layers[0].weight.grad.abs().sum() > 0
    assert model.PredNet_DP.layers[0].weight.grad is None
