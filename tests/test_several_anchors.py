"""Anchors (C, M, D): of several anchors of a class the nearest counts, in every operator."""

import math
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import anchorda
from anchorda._ops import cpu, reference
from anchorda.losses import Distance
from tests import oracles
from tests.oracles import FLOATS, LAYOUTS, Array, draw, flat, lay_out, pairwise, rows

NAN, INF = math.nan, math.inf
# As in the tests of one anchor a class: one rounding to float32 of distances, two in a margin.
TOLERANCE = 2e-6
CLASSES, PER_CLASS, DIM = 4, 3, 5


def draw_several(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return features, labels and anchors: of class 0 one is absent, of 1 two, of 3 all."""
    features, labels, _, _ = draw(shape, DIM, CLASSES, dtype)
    anchors = 2 * torch.randn(CLASSES, PER_CLASS, DIM)
    anchors[0, 1, 2] = anchors[1, :2] = NAN
    anchors[3, :, 4] = INF
    return features, labels, anchors


def nearest_of_class(x: Array, anchors: Tensor) -> Array:
    """Return (P, C): the smallest of M separate calls, infinite where all are."""
    calls = [oracles.anchor_distances(x, anchors[:, m].double().numpy()) for m in range(PER_CLASS)]
    absent = ~anchors.isfinite().all(dim=2).numpy()
    least = np.full(calls[0].shape, INF)
    for pixel, c in np.ndindex(least.shape):
        present = [calls[m][pixel, c] for m in range(PER_CLASS) if not absent[c, m]]
        least[pixel, c] = np.min(present, initial=INF)
    return least


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("shape", [(5,), (0,), (2, 0), (2, 5, 3), (3, 2, 1, 5)])
def test_distances_and_labels(shape: Sequence[int]) -> None:
    features, _, anchors = draw_several(shape)
    features[:1, :1] = NAN
    expected = nearest_of_class(rows(features), anchors)
    distances = anchorda.anchor_distances(features, anchors)
    np.testing.assert_allclose(rows(distances), expected, rtol=0, atol=TOLERANCE)
    for relative in (False, True):
        labeler = anchorda.AnchorPseudoLabeler(0.3, relative=relative)
        labels, scores = labeler(features, anchors)
        wanted, margins = oracles.nearest_labels(expected, [0.3] * CLASSES, relative, 255)
        np.testing.assert_allclose(scores.flatten(), margins, rtol=0, atol=TOLERANCE)
        unsure = np.abs(margins - 0.3) < TOLERANCE
        np.testing.assert_array_equal(np.where(unsure, wanted, flat(labels)), wanted)


@pytest.mark.parametrize(
    ("dtype", "layout", "distance", "block_elements"),
    pairwise(FLOATS, LAYOUTS, get_args(Distance), [7, 2**19]),
    indirect=["block_elements"],
)
def test_distance_loss(
    dtype: torch.dtype, layout: str, distance: Distance, block_elements: int
) -> None:
    features, labels, anchors = draw_several((2, 4, 3), dtype)
    features = lay_out(features, layout)
    total, count = 0.0, 0
    for x, y in zip(rows(features), flat(labels), strict=True):
        if y in (0, 1, 2):
            of_class = anchors[int(y)].double()
            own = of_class[of_class.isfinite().all(dim=1)].numpy()
            total += min(oracles.pixel_distance(x, a, distance) for a in own)
            count += 1
    loss = anchorda.anchor_distance_loss(features, labels, anchors, distance=distance)
    np.testing.assert_allclose(loss.item(), total / count, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_contrastive_loss(layout: str, dtype: torch.dtype) -> None:
    features, labels, anchors = draw_several((2, 4, 3), dtype)
    features = lay_out(features, layout)
    losses = []
    for of_classes, y in zip(nearest_of_class(rows(features), anchors), flat(labels), strict=True):
        if y in (0, 1, 2):
            losses.append(-math.log(oracles.softmax(-of_classes[:3] / 0.7)[y]))
    loss = anchorda.anchor_contrastive_loss(features, labels, anchors, temperature=0.7)
    np.testing.assert_allclose(loss.item(), np.mean(losses), rtol=TOLERANCE)


LOSSES: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    *(anchorda.AnchorDistanceLoss(distance) for distance in get_args(Distance)),
    anchorda.AnchorContrastiveLoss(0.7),
    lambda features, labels, anchors: anchorda.anchor_distances(features, anchors)[:, :3],
]


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_in_float64(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], layout: str
) -> None:
    features, labels, anchors = draw_several((2, 3, 2), torch.float64)
    features = lay_out(features, layout).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, anchors), features)


@pytest.mark.parametrize("loss", LOSSES[:4])
def test_what_is_not_finite_shows_where_it_is_active_and_nowhere_else(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    features, labels, anchors = draw_several((2, 4, 3))
    labels[0, 0, 0], labels[1, 2, 1] = 3, 0  # of an unseen class, and of one with a row absent
    features[0, :, 0, 0] = NAN
    features.requires_grad_()
    value = loss(features, labels, anchors)
    (grad,) = torch.autograd.grad(value, features)
    assert value.isfinite()
    assert grad.isfinite().all()
    with torch.no_grad():
        features[1, 0, 2, 1] = NAN
    value = loss(features, labels, anchors)
    (grad,) = torch.autograd.grad(value, features)
    assert value.isnan()
    assert grad[1, 0, 2, 1].isnan()
    assert not grad[0, :, 0, 0].any()


def test_one_anchor_of_each_class_is_the_same_as_none_besides() -> None:
    features, labels, _, anchors = draw((2, 4, 3))
    for call in (anchorda.anchor_distances, anchorda.AnchorPseudoLabeler(0.1)):
        for one, several in zip(
            call(features, anchors), call(features, anchors[:, None]), strict=True
        ):
            assert torch.equal(one, several)
    for loss in LOSSES[:4]:
        results = []
        for of in (anchors, anchors[:, None], anchors[:, None].repeat(1, 2, 1)):
            x = features.clone().requires_grad_()
            value = loss(x, labels, of)
            results.append((value, *torch.autograd.grad(value, x)))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("few", [0.0, 1.0])
def test_faster_way_of_a_cpu(few: float, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_FEW", few)
    anchors = 3 * normalize(torch.randn(7, 3, 40), dim=2)
    anchors[2, 1], anchors[4], anchors[5, 0] = NAN, NAN, anchors[6, 2]
    features = (anchors[1, 0] + torch.randn(2, 9, 8, 40)).movedim(-1, 1)
    features[0, :, 0] = anchors[3, 1][:, None]  # at one
    features[1, :, 0] = anchors[3, :2].mean(dim=0)[:, None]  # between two of one class
    features = lay_out(features.contiguous(), layout)
    labels = torch.randint(-1, 4, (2, 9, 8))
    expected, found = (of.nearest_anchors(features, anchors) for of in (reference, cpu))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1:], expected[1:], rtol=TOLERANCE, atol=TOLERANCE)
    both = [of.contrastive_losses(features, labels, anchors, 0.5) for of in (reference, cpu)]
    torch.testing.assert_close(both[1][0], both[0][0], rtol=TOLERANCE, atol=TOLERANCE)
    grads = [
        of.contrastive_losses_backward(losses, distances, features, labels, anchors, 0.5)
        for of, (losses, distances) in zip((reference, cpu), both, strict=True)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_margin_limits() -> None:
    anchors = torch.randn(4, 3, 2)
    anchors[1, 0], anchors[2] = NAN, NAN
    limits = anchorda.margin_limits(anchors)
    for c, own in enumerate(anchors):
        others = [anchors[k] for k in (0, 1, 3) if k != c]
        of_anchors = [
            min(float((a - b).norm()) for b in torch.cat(others) if b.isfinite().all())
            for a in own
            if a.isfinite().all()
        ]
        assert (
            limits[c].item() == pytest.approx(max(of_anchors)) if of_anchors else limits[c].isnan()
        )
    # No margin is larger.
    features = 3 * torch.randn(2000, 2)
    labels, margins = anchorda.AnchorPseudoLabeler()(features, anchors)
    assert (margins <= limits[labels] + TOLERANCE).all()
