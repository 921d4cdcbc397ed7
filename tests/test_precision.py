"""Margins near the anchors, at the scale of the released ones: norms 6.8 to 12.4, D = 256."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import anchorda
from anchorda._ops import cpu, reference
from tests import oracles
from tests.oracles import rows

# Measured: 5e-7 for distances and margins exactly at an anchor, where the error is the root of a
# float64 rounding of ‖x‖² ≈ 100; elsewhere 2.4e-7 and 5e-7, one and two roundings to float32.
TOLERANCE = 2e-6
PROMISE = 1e-4  # of margins; what float32 arithmetic throughout misses near an anchor

NEARNESS = [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0]


def released_scale_anchors() -> Tensor:
    """Return non-negative anchors around a common direction, as those after a ReLU are."""
    common = torch.randn(256, dtype=torch.float64).abs()
    own = torch.randn(19, 256, dtype=torch.float64).abs()
    anchors = normalize(0.2 * common + 0.8 * own, dim=1)
    return (anchors * torch.linspace(6.8, 12.4, 19, dtype=torch.float64)[:, None]).float()


def near(anchors: Tensor, nearness: float) -> Tensor:
    """Return five float32 features at that distance from each anchor, in random directions."""
    directions = normalize(torch.randn(5, *anchors.shape), dim=-1)
    return (anchors + nearness * directions).reshape(-1, anchors.shape[1])


@pytest.mark.parametrize("nearness", NEARNESS)
def test_margins_in_float32_agree_with_float64(nearness: float) -> None:
    anchors = released_scale_anchors()
    features = near(anchors, nearness)
    expected = oracles.anchor_distances(rows(features), anchors.double().numpy())
    distances = anchorda.anchor_distances(features, anchors)
    error = np.abs(distances.numpy() - expected).max()
    assert error < TOLERANCE

    margins = anchorda.AnchorPseudoLabeler()(features, anchors).scores
    ascending = np.sort(expected, axis=1)
    error = np.abs(margins.numpy() - (ascending[:, 1] - ascending[:, 0])).max()
    assert error < TOLERANCE < PROMISE


@pytest.mark.parametrize("nearness", [4.0, 5.0, 6.0, 8.0, 12.0])
def test_margins_of_what_a_cpu_computes_in_float32(nearness: float) -> None:
    # Measured: 2.8e-6 at 5, where that begins, and 2e-6 farther away.
    anchors = released_scale_anchors()
    features = torch.cat([near(anchors, nearness) for _ in range(25)])
    expected = np.sort(oracles.anchor_distances(rows(features), anchors.double().numpy()), axis=1)
    margins = anchorda.AnchorPseudoLabeler()(features, anchors).scores
    error = np.abs(margins.numpy() - (expected[:, 1] - expected[:, 0])).max()
    assert error < 4e-6 < PROMISE


@pytest.mark.parametrize("nearness", [4.0, 8.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_contrastive_losses_are_as_precise_as_float32_distances(
    temperature: float, nearness: float
) -> None:
    anchors = released_scale_anchors()
    features = torch.cat([near(anchors, nearness) for _ in range(25)])
    own = torch.randint(19, (len(features),))
    losses, _ = cpu.contrastive_losses(features, own, anchors, temperature)
    distances = oracles.anchor_distances(rows(features), anchors.double().numpy())
    logits = torch.from_numpy(-distances / temperature)
    exact = cross_entropy(logits, own, reduction="none")
    # Measured: 2.5e-6 of a distance, and 4e-7, the rounding of the loss itself, at temperature 10.
    assert (losses - exact).abs().max() < 4e-6 / temperature + 4e-7


def test_the_promise_is_beyond_float32_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = released_scale_anchors()
    features = near(anchors, 1e-3)
    monkeypatch.setattr(reference, "wide_dtype", lambda features: torch.float32)
    coarse = reference.anchor_distances(features, anchors)
    expected = oracles.anchor_distances(rows(features), anchors.double().numpy())
    assert np.abs(coarse.numpy() - expected).max() > PROMISE


@pytest.mark.parametrize("nearness", NEARNESS)
def test_float64_features_keep_the_precision_of_their_square(nearness: float) -> None:
    # The float64 rounding of ‖x‖² ≈ 100 divided by the distance. Measured: 5e-7 at an anchor,
    # then 9e-14 / distance.
    anchors = released_scale_anchors().double()
    features = near(anchors, nearness)
    expected = oracles.anchor_distances(rows(features), anchors.numpy())
    actual = anchorda.anchor_distances(features, anchors).numpy()
    assert np.abs(actual - expected).max() < min(2e-6, 5e-13 / max(nearness, 1e-9))


@pytest.mark.parametrize("nearness", [1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_directions_near_an_anchor(nearness: float) -> None:
    anchors = released_scale_anchors()
    features = near(anchors, nearness).requires_grad_()
    own = torch.arange(19).repeat(5)
    distances = anchorda.anchor_distances(features, anchors)[torch.arange(95), own]
    (gradient,) = torch.autograd.grad(distances.sum(), features)
    exact = normalize(features.detach().double() - anchors.double()[own], dim=1)
    # Unit vectors. Measured: 9e-7 at 1e-4, falling with the square of the distance to 2e-8.
    assert (gradient - exact).abs().max() < 1e-7 + 4e-14 / nearness**2


def test_large_offset_of_all_features() -> None:
    # Distances of about 1.4 at norms of 1600. Measured: 6e-8, one rounding to float32.
    anchors = 100 + torch.randn(19, 256) / 16
    features = 100 + torch.randn(50, 256) / 16
    expected = oracles.anchor_distances(rows(features), anchors.double().numpy())
    distances = anchorda.anchor_distances(features, anchors)
    assert np.abs(distances.numpy() - expected).max() < TOLERANCE


def test_drawn_anchors_are_of_the_released_scale() -> None:
    anchors = released_scale_anchors().double().numpy()
    distances = oracles.anchor_distances(anchors, anchors) + np.diag([np.inf] * 19)
    norms, nearest = np.linalg.norm(anchors, axis=1), distances.min(axis=1)
    np.testing.assert_allclose([norms.min(), norms.max()], [6.8, 12.4], rtol=1e-6)
    np.testing.assert_allclose([nearest.min(), nearest.max()], [4.8, 7.9], atol=0.5)
