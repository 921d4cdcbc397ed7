"""Everything traces whole, gives the eager answer, and its operators keep torch's rules."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorda
from anchorda._ops import choice
from tests.oracles import draw

NUM_CLASSES = 4

_margins = anchorda.AnchorPseudoLabeler(torch.tensor([0.1, 0.2, 0.3, 0.4]))
_relative_margins = anchorda.AnchorPseudoLabeler(0.2, relative=True)
_probabilities = anchorda.ProbabilityPseudoLabeler(0.5)
_discriminative = anchorda.DiscriminativeLoss(label_smoothing=0.1)
_accumulator = anchorda.CategoryAnchors(NUM_CLASSES, 3, momentum=0.1)
_other = anchorda.CategoryAnchors(NUM_CLASSES, 3, momentum=0.1)
_covariance = anchorda.WithinClassCovariance(NUM_CLASSES, 3)
_variances = anchorda.ClassVariances(NUM_CLASSES, 3)
_clusters = anchorda.AnchorClusters(NUM_CLASSES, 3, 2)
_confusion = anchorda.ConfusionMatrix(NUM_CLASSES)
_quality = anchorda.PseudoLabelQuality(NUM_CLASSES)
_calibrator = anchorda.ScoreCalibrator(NUM_CLASSES)
_everything = anchorda.AnchorPseudoLabeler(float("-inf"))


def _update_anchors(features: Tensor, labels: Tensor, logits: Tensor, anchors: Tensor) -> Tensor:
    del logits
    for accumulator in (_accumulator, _other):
        accumulator.reset()
    _accumulator.update(features, labels)
    _other.update_sums(anchors, torch.tensor([1, 0, 2, 3]))
    _accumulator.merge(_other)
    return _accumulator.compute()


def _moments(features: Tensor, labels: Tensor, logits: Tensor, anchors: Tensor) -> list[Tensor]:
    del logits, anchors
    for state in (_covariance, _variances):
        state.reset()
        state.update(features, labels)
    return [_covariance.compute(), *_variances.compute()]


def _cluster(features: Tensor, labels: Tensor, logits: Tensor, anchors: Tensor) -> Tensor:
    del logits, anchors
    _clusters.reset()
    for _ in range(2):
        _clusters.update(features, labels)
        _clusters.step()
    return _clusters.compute()


def _evaluate(features: Tensor, labels: Tensor, logits: Tensor, anchors: Tensor) -> list[Tensor]:
    del features, anchors
    predictions = logits.argmax(dim=1)
    for evaluation in (_confusion, _quality):
        evaluation.reset()
        evaluation.update(predictions, labels)
    ratios = [_quality.coverage(), _quality.precision(), _quality.recall()]
    return [_confusion.iou(), _confusion.mean_iou(), _confusion.accuracy(), *ratios]


def _calibrate(features: Tensor, labels: Tensor, logits: Tensor, anchors: Tensor) -> list[Tensor]:
    del logits
    _calibrator.reset()
    nearest, margins = _everything(features, anchors)
    _calibrator.update(nearest, margins, labels)
    return [_calibrator.min_score_for_coverage(0.5), *_calibrator.curve()]


def _combine(features: Tensor, labels: Tensor, logits: Tensor, anchors: Tensor) -> Tensor:
    first, second = _margins(features, anchors).labels, _probabilities(logits).labels
    agreed = anchorda.combine_pseudo_labels(first, second)
    return anchorda.combine_pseudo_labels(agreed, labels, "union")


def several(anchors: Tensor) -> Tensor:
    """Return anchors (C, 2, D) from one of each class."""
    return torch.stack([anchors, anchors.flip(0)], dim=1)


Case = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
CASES: dict[str, Case] = {
    "class_sums": lambda x, y, z, a: anchorda.class_sums(x, y, NUM_CLASSES),
    "image_centroids": lambda x, y, z, a: anchorda.image_centroids(x, y, NUM_CLASSES),
    "keep_correct": lambda x, y, z, a: anchorda.keep_correct(y, z),
    "resize_nearest": lambda x, y, z, a: anchorda.resize_labels(y, (3, 2)),
    "resize_majority": lambda x, y, z, a: anchorda.resize_labels(y, (3, 2), mode="majority"),
    "anchor_distances": lambda x, y, z, a: anchorda.anchor_distances(x, a),
    "relative": lambda x, y, z, a: _relative_margins(x, a),
    "margins": lambda x, y, z, a: _margins(x, a),
    "probabilities": lambda x, y, z, a: _probabilities(z),
    "combine": _combine,
    "CategoryAnchors": _update_anchors,
    "evaluation": _evaluate,
    "ScoreCalibrator": _calibrate,
    "margin_limits": lambda x, y, z, a: anchorda.margin_limits(a),
    "anchor_health": lambda x, y, z, a: anchorda.anchor_health(a, y[:, 0, 0].sum().expand(4)).drift,
    "euclidean": lambda x, y, z, a: anchorda.AnchorDistanceLoss()(x, y, a),
    "squared": lambda x, y, z, a: anchorda.AnchorDistanceLoss("squared")(x, y, a),
    "smooth_l1": lambda x, y, z, a: anchorda.AnchorDistanceLoss("smooth_l1", average="class")(
        x, y, a
    ),
    "contrastive": lambda x, y, z, a: anchorda.AnchorContrastiveLoss()(x, y, a),
    "several": lambda x, y, z, a: _margins(x, several(a)),
    "several, euclidean": lambda x, y, z, a: anchorda.AnchorDistanceLoss()(x, y, several(a)),
    "several, contrastive": lambda x, y, z, a: anchorda.AnchorContrastiveLoss()(x, y, several(a)),
    "several, distances": lambda x, y, z, a: anchorda.anchor_distances(x, several(a)),
    "contrastive_cosine": lambda x, y, z, a: anchorda.anchor_contrastive_loss(
        x, y, a, similarity="cosine", pixel_weights=z[:, 0].sigmoid()
    ),
    "probabilities_of_anchors": lambda x, y, z, a: anchorda.anchor_probabilities(x, a),
    "consistency": lambda x, y, z, a: anchorda.anchor_consistency_loss(x, z.softmax(1), a),
    "distribution": lambda x, y, z, a: anchorda.anchor_distribution_loss(x, y, a, a.abs()),
    "symmetric": lambda x, y, z, a: anchorda.symmetric_cross_entropy(z, y),
    "information": lambda x, y, z, a: anchorda.information_maximization_loss(z),
    "feature_distance": lambda x, y, z, a: anchorda.feature_distance_loss(
        x, x.detach() + 1, y, classes=[0, 3]
    ),
    "moments": _moments,
    "AnchorClusters": _cluster,
    "sinkhorn": lambda x, y, z, a: anchorda.sinkhorn_assignments(z.movedim(1, -1).flatten(0, -2)),
    "soft_class_sums": lambda x, y, z, a: anchorda.soft_class_sums(x, z.softmax(1)),
    "discriminant": lambda x, y, z, a: anchorda.linear_discriminant(
        a, torch.eye(3, device=a.device)
    ).logits(x),
    "whitening": lambda x, y, z, a: anchorda.whitening_matrix(a.nan_to_num().T @ a.nan_to_num()),
    "rectify": lambda x, y, z, a: anchorda.rectify(z.softmax(1), z.flip(0).softmax(1)),
    "discriminative": lambda x, y, z, a: _discriminative(z, y),
}


# Their state is made on the CPU.
WITH_STATE = {
    *("CategoryAnchors", "ScoreCalibrator", "evaluation", "moments", "AnchorClusters"),
    *("margins", "combine", "several", "relative", "probabilities"),
}


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def arguments(height: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    problem = draw((2, height, 4), num_classes=NUM_CLASSES, dtype=dtype)
    problem.anchors[3] = torch.nan
    problem.features.requires_grad_()
    problem.logits.requires_grad_()
    return list(problem)


def tensors(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same_as_eager(compiled: Case, case: Case, inputs: list[Tensor]) -> None:
    """Results, and the gradients of those that have one, of two equal calls."""
    answers: list[list[Tensor | None]] = []
    for function in (case, compiled):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        results = tensors(function(*leaves))
        loss = sum(r.nan_to_num(0.0, 0.0, 0.0).sum() for r in results if r.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()
        answers.append([*(r.detach() for r in results), *(t.grad for t in leaves)])
    torch.testing.assert_close(answers[1], answers[0], equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_traces_whole_and_once_for_all_sizes(name: str) -> None:
    compiled = torch.compile(CASES[name], fullgraph=True, backend="aot_eager")
    # The second height makes heights a variable.
    for height, recompiles in ((5, True), (7, True), (8, False), (11, False)):
        with torch._dynamo.config.patch(error_on_recompile=not recompiles):
            assert_same_as_eager(compiled, CASES[name], arguments(height))


def test_module_state_survives_compilation() -> None:
    features, labels, _, anchors = (t.detach() for t in arguments())
    eager = anchorda.CategoryAnchors(NUM_CLASSES, 3, max_count=10)
    compiled = anchorda.CategoryAnchors(NUM_CLASSES, 3, max_count=10)
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        eager.update(features, labels)
        update(features, labels)
    assert torch.equal(compiled.counts, eager.counts)
    torch.testing.assert_close(compiled.means, eager.means, rtol=0, atol=1e-15)
    labeler = anchorda.AnchorPseudoLabeler(0.2)
    expected = labeler(features, anchors)
    labeler.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(labeler(features, anchors).labels, expected.labels)


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for inductor"
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # of torch's own code
def test_training_step_under_inductor() -> None:
    def step(features: Tensor, labels: Tensor, logits: Tensor, anchors: Tensor) -> Tensor:
        pseudo = _margins(features, anchors).labels
        pull = anchorda.anchor_distance_loss(features, pseudo, anchors)
        return pull + anchorda.discriminative_loss(logits, labels)

    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    assert_same_as_eager(compiled, step, arguments())


OPERATORS: list[tuple[str, Callable[[list[Tensor]], tuple[Any, ...]]]] = [
    ("class_sums", lambda p: (p[0].detach(), p[1], NUM_CLASSES)),
    ("soft_class_sums", lambda p: (p[0].detach(), p[2].detach().softmax(dim=1))),
    ("scatter", lambda p: (p[0].detach(), p[1], p[3], True)),
    ("scatter", lambda p: (p[0].detach(), p[1], p[3], False)),
    ("quadratic_forms", lambda p: (p[0], p[3], p[3][:2])),
    (
        "quadratic_forms_backward",
        lambda p: (p[2].detach().float(), p[0].detach(), p[3], p[3][:0]),
    ),
    ("map_distances", lambda p: (p[0], p[0].detach() + 1)),
    (
        "map_distances_backward",
        lambda p: (
            *(torch.randn(2, 5, 4), torch.rand(2, 5, 4)),
            *(p[0].detach(), p[0].detach() + 1),
        ),
    ),
    ("image_sums", lambda p: (p[0], p[1], NUM_CLASSES)),
    ("image_sums_backward", lambda p: (torch.randn(2, NUM_CLASSES, 3), p[0].detach(), p[1])),
    ("anchor_distances", lambda p: (p[0], p[3])),
    (
        "anchor_distances_backward",
        lambda p: (p[2].detach(), p[2].detach().abs().float(), p[0].detach(), p[3]),
    ),
    ("nearest_anchors", lambda p: (p[0].detach(), p[3])),
    ("pixel_losses", lambda p: (p[0], p[1].clamp(-1, 3), p[3], "euclidean")),
    (
        "pixel_losses_backward",
        lambda p: (
            *(torch.randn(2, 5, 4), torch.rand(2, 5, 4)),
            *(p[0].detach(), p[1].clamp(-1, 3), p[3], "smooth_l1"),
        ),
    ),
    ("contrastive_losses", lambda p: (p[0], p[1].clamp(-1, 3), p[3], 2.0)),
    (
        "contrastive_losses_backward",
        lambda p: (
            *(torch.randn(2, 5, 4), p[2].detach().abs().float()),
            *(p[0].detach(), p[1].clamp(-1, 3), p[3], 2.0),
        ),
    ),
]


@pytest.mark.parametrize("few", [0, choice._FEW_ELEMENTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "select"), OPERATORS, ids=[name for name, _ in OPERATORS])
# The check of torch 2.14 warns of itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_the_rules(
    name: str,
    select: Callable[[list[Tensor]], tuple[Any, ...]],
    dtype: torch.dtype,
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "_FEW_ELEMENTS", few)
    problem = arguments(dtype=dtype)
    # All classes seen: the check compares gradients of all results, and takes NaN for different.
    inputs = select([*problem[:3], problem[3].nan_to_num(1.0)])
    torch.library.opcheck(getattr(torch.ops.anchorda, name).default, inputs)
    if any(of_anchors in name for of_anchors in ("anchor", "pixel", "contrastive")):
        inputs = select([*problem[:3], several(problem[3].nan_to_num(1.0))])
        torch.library.opcheck(getattr(torch.ops.anchorda, name).default, inputs)


def test_results_on_the_meta_device_have_the_shapes_and_dtypes_of_real_ones() -> None:
    inputs = [t.detach() for t in arguments()]
    for name, case in CASES.items():
        if name in WITH_STATE:
            continue
        real, fake = tensors(case(*inputs)), tensors(case(*(t.to("meta") for t in inputs)))
        assert [(r.shape, r.dtype) for r in real] == [(f.shape, f.dtype) for f in fake], name
        assert all(f.is_meta for f in fake), name
