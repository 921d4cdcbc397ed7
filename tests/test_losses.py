"""The losses and their gradients."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import anchorda
from anchorda._similarity import Similarity
from anchorda.losses import Average, Distance
from tests import oracles
from tests.oracles import BLOCKS, FLOATS, INTEGERS, LAYOUTS, SHAPES, draw, flat, lay_out, rows

# Measured: 1.7e-7 relative, a few roundings to float32.
RELATIVE_TOLERANCE = 2e-6
NAN, INF = math.nan, math.inf
Loss = Callable[..., Tensor]  # of features, labels and anchors, with pixel weights as an option
DISTANCE_OPTIONS = [
    {"distance": distance, "average": average}
    for distance in get_args(Distance)
    for average in get_args(Average)
]
SIMILARITIES: list[Similarity] = ["squared", "cosine", "dot"]  # besides the fused "euclidean"


def consistency_loss(
    x: Tensor, y: Tensor, a: Tensor, pixel_weights: Tensor | None = None
) -> Tensor:
    """Return the consistency with a teacher that is as sure as labels are."""
    classes = torch.arange(len(a)).view(-1, *[1] * (y.ndim - 1))
    seen = a.detach().isfinite().all(dim=1).view(classes.shape)
    teacher = ((y.long().unsqueeze(1) == classes) & seen).to(x.dtype)
    loss: Loss = anchorda.AnchorConsistencyLoss(0.7)
    return loss(x, teacher, a, pixel_weights=pixel_weights)


def distribution_loss(
    x: Tensor, y: Tensor, a: Tensor, pixel_weights: Tensor | None = None
) -> Tensor:
    loss: Loss = anchorda.AnchorDistributionLoss(1.3)
    return loss(x, y, a, a.abs(), pixel_weights=pixel_weights)


def reference_loss(x: Tensor, y: Tensor, a: Tensor, pixel_weights: Tensor | None = None) -> Tensor:
    """Return the distance to a constant map, for the classes that have an anchor."""
    classes = [c for c in range(len(a)) if a[c].isfinite().all()]
    loss: Loss = anchorda.FeatureDistanceLoss(classes=classes)
    return loss(x, torch.ones_like(x).requires_grad_(), y, pixel_weights=pixel_weights)


def symmetric_loss(
    logits: Tensor, labels: Tensor, anchors: Tensor, pixel_weights: Tensor | None = None
) -> Tensor:
    loss: Loss = anchorda.SymmetricCrossEntropyLoss(alpha=0.3)
    return loss(logits, labels, pixel_weights=pixel_weights)


FEATURE_LOSSES: list[Loss] = [
    *(anchorda.AnchorDistanceLoss(**options) for options in DISTANCE_OPTIONS),
    anchorda.AnchorContrastiveLoss(temperature=0.7),
    *(anchorda.AnchorContrastiveLoss(0.7, similarity=kind) for kind in SIMILARITIES),
    *(consistency_loss, distribution_loss, reference_loss),
]


def logit_loss(
    logits: Tensor, labels: Tensor, anchors: Tensor, pixel_weights: Tensor | None = None
) -> Tensor:
    """Return the discriminative loss, with the features of the others as its logits."""
    weight = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    return anchorda.discriminative_loss(
        logits, labels, weight=weight, label_smoothing=0.1, pixel_weights=pixel_weights
    )


LOGIT_LOSSES: list[Loss] = [logit_loss, symmetric_loss]
LOSSES: list[Loss] = [*FEATURE_LOSSES, *LOGIT_LOSSES]


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, of)
    return grad


def assert_losses(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    logits: Tensor,
    pixel_weights: Tensor | None = None,
) -> None:
    """Every loss with every option against its oracle."""
    x, y, a, z = rows(features), flat(labels), anchors.double().numpy(), rows(logits)
    w = None if pixel_weights is None else pixel_weights.double().flatten().numpy()
    weight = [0.5, 0.0, 2.0, 1.0, 3.0][: logits.shape[1]]
    pairs = [
        (
            anchorda.anchor_distance_loss(
                features, labels, anchors, pixel_weights=pixel_weights, **options
            ),
            oracles.distance_loss(x, y, a, options["distance"], options["average"], w),
        )
        for options in DISTANCE_OPTIONS
    ]
    for kind in get_args(Similarity):
        options = {"similarity": kind, "temperature": 0.3 if kind == "euclidean" else 1.7}
        loss = anchorda.anchor_contrastive_loss(
            features, labels, anchors, pixel_weights=pixel_weights, **options
        )
        pairs += [(loss, oracles.contrastive_loss(x, y, a, options["temperature"], w, kind))]
    # Cross-entropy needs two classes.
    for smoothing, of_class in itertools.product((0.0, 0.2), ([1.0] * len(weight), weight)):
        if len(weight) > 1:
            loss = anchorda.discriminative_loss(
                *(logits, labels),
                weight=None if of_class is not weight else torch.tensor(weight),
                label_smoothing=smoothing,
                pixel_weights=pixel_weights,
            )
            pairs += [(loss, oracles.cross_entropy(z, y, of_class, smoothing, w))]
    expected_dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    for loss, expected in pairs:
        assert loss.dtype == expected_dtype
        assert loss.shape == ()
        np.testing.assert_allclose(loss.item(), expected, rtol=RELATIVE_TOLERANCE, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "block_elements", "size"),
    oracles.pairwise(SHAPES, BLOCKS, [(3, 4), (1, 1), (6, 2)]),
    indirect=["block_elements"],
)
def test_any_shape(shape: Sequence[int], block_elements: int, size: tuple[int, int]) -> None:
    dim, num_classes = size
    features, labels, logits, anchors = draw(shape, dim, num_classes)
    before = [tensor.clone() for tensor in (features, labels, logits, anchors)]
    assert_losses(features, labels, anchors, logits)
    for tensor, copy in zip((features, labels, logits, anchors), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_elements", [7], indirect=True)
def test_any_layout_and_dtype(dtype: torch.dtype, layout: str, block_elements: int) -> None:
    features, labels, logits, anchors = draw((3, 4, 5), dtype=dtype)
    features, labels, logits = (lay_out(t, layout) for t in (features, labels, logits))
    assert_losses(features, labels, anchors.T.contiguous().T, logits)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    features, labels, logits, anchors = draw((2, 5, 3))
    labels = torch.where((labels >= 0) & (labels < 4), labels, 120).to(dtype)
    assert_losses(features, labels, anchors, logits)


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("unseen", [[1], [0, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("marker", [NAN, INF])
def test_unseen_class_contributes_nothing(unseen: list[int], marker: float) -> None:
    features, labels, logits, anchors = draw((2, 3, 4))
    anchors[unseen, 1] = marker
    assert_losses(features, labels, anchors, logits)
    features.requires_grad_()
    active = (labels >= 0) & (labels < 4) & ~torch.isin(labels, torch.tensor(unseen))
    for loss in FEATURE_LOSSES:
        grad = gradient(loss(features, labels, anchors), features)
        assert grad.isfinite().all()
        assert not torch.where(active[:, None], 0.0, grad).any()


@pytest.mark.parametrize(
    ("loss", "layout", "block_elements"),
    oracles.pairwise(LOSSES, LAYOUTS, BLOCKS),
    indirect=["block_elements"],
)
def test_gradient_in_float64(loss: Loss, layout: str, block_elements: int) -> None:
    features, labels, _, anchors = draw((2, 3, 2), dtype=torch.float64)
    anchors[1] = NAN
    features = lay_out(features, layout).detach().requires_grad_()
    labels = lay_out(labels, layout)

    def of_features(features: Tensor) -> Tensor:
        return loss(features, labels, anchors)

    # A reference of one's own: gradcheck disturbs an expanded input in all its places at once.
    if layout == "expanded":
        grad = gradient(of_features(features), features)
        copy = features.detach().clone().requires_grad_()
        torch.testing.assert_close(grad, gradient(of_features(copy), copy), rtol=0, atol=0)
    else:
        assert torch.autograd.gradcheck(of_features, features)


@pytest.mark.parametrize("average", get_args(Average))
@pytest.mark.parametrize("distance", get_args(Distance))
def test_gradient_exactly_at_an_anchor_is_zero(distance: Distance, average: Average) -> None:
    anchors = torch.randn(3, 64)
    features = anchors.clone().requires_grad_()
    loss = anchorda.anchor_distance_loss(
        features, torch.arange(3), anchors, distance=distance, average=average
    )
    assert loss.item() == 0
    assert not gradient(loss, features).any()


def test_gradient_of_the_contrastive_loss_at_an_anchor_is_that_of_the_others() -> None:
    anchors = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    features = torch.zeros(1, 2, requires_grad=True)
    loss = anchorda.anchor_contrastive_loss(features, torch.tensor([0]), anchors)
    # −∂/∂x of log p₀ is p₁ · ∂(d₀ − d₁)/∂x, where ∂d₀/∂x is 0 and ∂d₁/∂x is (−0.6, −0.8).
    other = 1 / (1 + math.exp(5))
    expected = torch.tensor([[0.6 * other, 0.8 * other]])
    torch.testing.assert_close(gradient(loss, features), expected)


@pytest.mark.parametrize(
    ("loss", "shape", "label"),
    oracles.pairwise(LOSSES, [(4,), (2, 3, 2), (0,), (2, 0, 3)], [-1, 255, 2]),
)
def test_nothing_active_is_a_zero_that_is_connected(
    loss: Loss, shape: Sequence[int], label: int
) -> None:
    problem = draw(shape)
    features = problem.features.requires_grad_()
    anchors = problem.anchors[:, :3].clone()
    anchors[2] = NAN
    if loss in LOGIT_LOSSES and label == 2:
        label = 3
    value = loss(features, torch.full(tuple(shape), label), anchors)
    assert value.item() == 0
    value.backward()
    assert features.grad is not None
    assert features.grad.shape == features.shape
    assert not features.grad.any()


def test_classes_without_weight_are_nothing_to_average() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    loss = anchorda.discriminative_loss(
        logits, torch.tensor([0, 0, 255]), weight=torch.tensor([0.0, 1.0])
    )
    assert loss.item() == 0
    assert not gradient(loss, logits).any()


@pytest.mark.parametrize(
    ("loss", "block_elements", "value"),
    oracles.pairwise(LOSSES, BLOCKS, [NAN, INF, -INF]),
    indirect=["block_elements"],
)
def test_not_finite_propagates_where_active_and_never_where_ignored(
    loss: Loss, block_elements: int, value: float
) -> None:
    features, labels, _, anchors = draw((2, 4, 3))
    labels[0, 0, 0], labels[1, 2, 1] = 255, 1
    ignored = features.clone()
    ignored[0, :, 0, 0] = value
    ignored.requires_grad_()
    features.requires_grad_()
    clean, held = loss(features, labels, anchors), loss(ignored, labels, anchors)
    assert torch.equal(clean, held)
    clean_grad, held_grad = gradient(clean, features), gradient(held, ignored)
    assert torch.equal(clean_grad, held_grad)

    diverged = features.detach().clone()
    diverged[1, 1, 2, 1] = value
    diverged.requires_grad_()
    seen = loss(diverged, labels, anchors)
    assert not seen.isfinite()
    grad = gradient(seen, diverged)
    # The slope of the Huber function at infinity is 1, and that of a softmax at −∞ is 0.
    saturated = (getattr(loss, "distance", None) == "smooth_l1" and math.isinf(value)) or (
        loss in LOGIT_LOSSES and value == -INF
    )
    assert bool(grad[1, :, 2, 1].isfinite().all()) == saturated
    grad[1, :, 2, 1] = clean_grad[1, :, 2, 1]
    torch.testing.assert_close(grad, clean_grad)


@pytest.mark.parametrize(
    ("loss", "layout", "dtype"), oracles.pairwise(LOSSES, LAYOUTS, [torch.bfloat16, torch.float16])
)
def test_half_precision_gives_the_answer_of_the_same_rounded_float32(
    loss: Loss, layout: str, dtype: torch.dtype
) -> None:
    features, labels, _, anchors = draw((2, 5, 3), dtype=dtype)
    half = lay_out(features, layout).detach().requires_grad_()
    single = half.detach().float().requires_grad_()
    of_half, of_single = loss(half, labels, anchors), loss(single, labels, anchors)
    assert of_half.dtype == torch.float32
    assert torch.equal(of_half, of_single)
    grad = gradient(of_half, half)
    assert grad.dtype == dtype
    assert torch.equal(grad, gradient(of_single, single).to(dtype))


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_accumulates_in_float32(loss: Loss) -> None:
    features, labels, _, anchors = draw((2, 50, 60))
    features.requires_grad_()
    expected = loss(features, labels, anchors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(features, labels, anchors)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert torch.equal(gradient(actual, features), gradient(expected, features))


@pytest.mark.parametrize("loss", FEATURE_LOSSES)
def test_anchors_receive_no_gradient(loss: Loss) -> None:
    features, labels, _, anchors = draw((2, 3))
    features.requires_grad_()
    anchors.requires_grad_()
    loss(features, labels, anchors).backward()
    assert features.grad is not None
    assert anchors.grad is None


@pytest.mark.parametrize("options", DISTANCE_OPTIONS)
def test_distance_module_is_its_function(options: dict[str, Any]) -> None:
    features, labels, _, anchors = draw((2, 5, 3))
    module = anchorda.AnchorDistanceLoss(**options)
    expected = anchorda.anchor_distance_loss(features, labels, anchors, **options)
    assert torch.equal(module(features, labels, anchors), expected)
    shown = f"AnchorDistanceLoss({options['distance']!r}, average={options['average']!r})"
    assert repr(module) == shown


def test_other_modules_are_their_functions() -> None:
    features, labels, logits, anchors = draw((2, 5, 3))
    contrastive = anchorda.AnchorContrastiveLoss(temperature=0.4, similarity="dot")
    expected = anchorda.anchor_contrastive_loss(
        features, labels, anchors, similarity="dot", temperature=0.4
    )
    assert torch.equal(contrastive(features, labels, anchors), expected)
    assert repr(contrastive) == "AnchorContrastiveLoss(temperature=0.4, similarity='dot')"
    weight = torch.tensor([1.0, 0.0, 2.0, 3.0])
    discriminative = anchorda.DiscriminativeLoss(weight=weight, label_smoothing=0.1)
    expected = anchorda.discriminative_loss(logits, labels, weight=weight, label_smoothing=0.1)
    assert torch.equal(discriminative(logits, labels), expected)
    assert torch.equal(discriminative.state_dict()["weight"], weight)
    assert not anchorda.DiscriminativeLoss().state_dict()
    assert repr(discriminative) == "DiscriminativeLoss(label_smoothing=0.1)"
    shown = "AnchorConsistencyLoss(temperature=2.0, similarity='dot')"
    assert repr(anchorda.AnchorConsistencyLoss(2, similarity="dot")) == shown
    assert repr(anchorda.AnchorDistributionLoss(2)) == "AnchorDistributionLoss(temperature=2.0)"
    symmetric = anchorda.SymmetricCrossEntropyLoss(alpha=1)
    assert repr(symmetric) == "SymmetricCrossEntropyLoss(alpha=1.0, beta=1.0)"
    assert repr(anchorda.FeatureDistanceLoss(classes=[3])) == "FeatureDistanceLoss(classes=[3])"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_elements", [7], indirect=True)
def test_losses_of_other_papers(shape: Sequence[int], block_elements: int) -> None:
    features, labels, logits, anchors = draw(shape)
    anchors[1] = NAN
    variances = torch.rand(4, 3)
    variances[3, 0] = NAN
    teacher = logits.softmax(dim=1)
    if features.numel() > 9:
        teacher[0], teacher[-1, 0] = NAN, 0.0
    reference = features.flip(0)
    x, y, a, z = rows(features), flat(labels), anchors.double().numpy(), rows(logits)
    pairs = [
        (
            anchorda.anchor_consistency_loss(
                features, teacher, anchors, similarity=kind, temperature=1.5
            ),
            oracles.consistency_loss(x, rows(teacher), a, kind, 1.5),
        )
        for kind in get_args(Similarity)
    ]
    pairs += [
        (
            anchorda.anchor_distribution_loss(features, labels, anchors, variances, temperature=t),
            oracles.distribution_loss(x, y, a, variances.double().numpy(), t),
        )
        for t in (0.7, 100.0)
    ]
    pairs += [
        (
            anchorda.symmetric_cross_entropy(5 * logits, labels, alpha=0.2, beta=0.7),
            oracles.symmetric_cross_entropy(5 * z, y, 0.2, 0.7),
        ),
        (anchorda.information_maximization_loss(logits), oracles.information_maximization(z)),
        (
            anchorda.feature_distance_loss(features, reference, labels, classes=[0, 3]),
            oracles.feature_distance(x, rows(reference), y, [0, 3]),
        ),
        (
            anchorda.feature_distance_loss(features, reference),
            oracles.feature_distance(x, rows(reference), 0 * y, [0]),
        ),
    ]
    for loss, expected in pairs:
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        # Measured: 1e-6 relative of the squared similarities.
        np.testing.assert_allclose(loss.item(), expected, rtol=5e-6, atol=5e-7)


def test_consistency_with_sure_teachers_is_the_contrastive_loss() -> None:
    features, labels, _, anchors = draw((2, 4, 3))
    anchors[2] = NAN
    contrastive = anchorda.AnchorContrastiveLoss(0.7)(features, labels, anchors)
    torch.testing.assert_close(consistency_loss(features, labels, anchors), contrastive)


@pytest.mark.parametrize("shape", [(4,), (0,), (2, 0, 3)])
def test_information_maximization_has_a_gradient_and_is_connected(shape: Sequence[int]) -> None:
    logits = draw(shape, dtype=torch.float64).logits.requires_grad_()
    loss: Loss = anchorda.InformationMaximizationLoss()
    assert torch.autograd.gradcheck(loss, logits) or logits.numel() == 0
    value = loss(logits)
    value.backward()
    assert logits.grad is not None
    assert logits.numel() > 0 or value.item() == 0
    half = logits.detach().half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(half), loss(half.float()))


def test_distance_to_another_map_at_zero_has_no_gradient() -> None:
    features = torch.randn(2, 3, 4, requires_grad=True)
    reference = features.detach().clone()
    reference[0, :, 0] += 1
    loss = anchorda.feature_distance_loss(features, reference)
    grad = gradient(loss, features)
    assert grad[0, :, 0].all()
    assert not grad[1].any()
    with pytest.raises(ValueError, match="Expected `labels` with `classes`, but got None"):
        anchorda.feature_distance_loss(features, reference, classes=[0])
    with pytest.raises(ValueError, match="Expected `reference` of shape"):
        anchorda.feature_distance_loss(features, reference[:1])


@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_weights(shape: Sequence[int]) -> None:
    features, labels, logits, anchors = draw(shape)
    anchors[1] = NAN
    assert_losses(features, labels, anchors, logits, torch.rand(*shape))


@pytest.mark.parametrize("loss", LOSSES)
def test_pixel_weights_are_constants_and_do_not_reach_ignored_pixels(loss: Loss) -> None:
    features, labels, _, anchors = draw((2, 5, 3))
    features.requires_grad_()
    ones = torch.ones(2, 5, 3)
    plain, weighted = (
        loss(features, labels, anchors),
        loss(features, labels, anchors, pixel_weights=ones),
    )
    assert torch.equal(plain, weighted)
    assert torch.equal(gradient(plain, features), gradient(weighted, features))
    ignored = (labels < 0) | (labels >= 4)
    poisoned = torch.where(ignored, NAN, 2.0).half().requires_grad_()
    doubled = loss(features, labels, anchors, pixel_weights=poisoned)
    torch.testing.assert_close(doubled, 2 * plain)
    doubled.backward()
    assert poisoned.grad is None
    with pytest.raises(ValueError, match="Expected `pixel_weights` of shape"):
        loss(features, labels, anchors, pixel_weights=ones[:1])
    with pytest.raises(TypeError, match="Expected `pixel_weights` of a floating-point dtype"):
        loss(features, labels, anchors, pixel_weights=ones.bool())


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, NAN])
def test_contrastive_loss_rejects_a_temperature_that_is_none(temperature: float) -> None:
    with pytest.raises(ValueError, match="Expected `temperature`"):
        anchorda.AnchorContrastiveLoss(temperature)
