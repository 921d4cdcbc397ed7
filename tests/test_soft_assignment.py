"""Soft assignment of features to anchors, rectified probabilities, and Sinkhorn assignments."""

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch

import anchorda
from anchorda._similarity import Similarity
from tests import oracles
from tests.oracles import FLOATS, LAYOUTS, SHAPES, draw, lay_out, pairwise, rows

# Measured: 6e-7 of a probability; 2e-6 of one that float32 distances of up to 8 are squared for.
TOLERANCE = 5e-6
NAN = math.nan
KINDS = get_args(Similarity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(kind: Similarity, shape: Sequence[int]) -> None:
    features, _, _, anchors = draw(shape)
    anchors[1, 0] = NAN
    if features.numel() > 6:
        features[0] = 0
        features[-1, 2, ...] = math.inf
    probabilities = anchorda.anchor_probabilities(
        features, anchors, similarity=kind, temperature=0.7
    )
    assert probabilities.dtype == torch.float32
    expected = oracles.anchor_probabilities(rows(features), anchors.double().numpy(), kind, 0.7)
    np.testing.assert_allclose(rows(probabilities), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("dtype", "layout", "kind"), pairwise(FLOATS, LAYOUTS, KINDS))
def test_any_layout_and_dtype(dtype: torch.dtype, layout: str, kind: Similarity) -> None:
    features, _, _, anchors = draw((3, 4, 5), dtype=dtype)
    features = lay_out(features, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = anchorda.anchor_probabilities(features, anchors, similarity=kind)
    wide = dtype == torch.float64
    assert probabilities.dtype == (torch.float64 if wide else torch.float32)
    expected = oracles.anchor_probabilities(rows(features), anchors.double().numpy(), kind, 1.0)
    tolerance = 1e-12 if wide else TOLERANCE
    np.testing.assert_allclose(rows(probabilities), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_probabilities(kind: Similarity) -> None:
    features, _, _, anchors = draw((2, 3, 2), dtype=torch.float64)
    anchors[2] = NAN
    features.requires_grad_()
    anchors.requires_grad_()

    def probabilities(x: torch.Tensor) -> torch.Tensor:
        return anchorda.anchor_probabilities(x, anchors, similarity=kind, temperature=2.0)

    assert torch.autograd.gradcheck(probabilities, features)
    probabilities(features).square().sum().backward()
    assert anchors.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_seen_class_every_probability_and_gradient_is_zero(kind: Similarity) -> None:
    features = torch.randn(2, 3, 4, requires_grad=True)
    anchors = torch.full((5, 3), NAN)
    probabilities = anchorda.anchor_probabilities(features, anchors, similarity=kind)
    assert not probabilities.any()
    probabilities.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()


def test_cosine_has_no_scale_and_of_a_zero_vector_it_is_zero() -> None:
    features, _, _, anchors = draw((2, 5))
    of = anchorda.anchor_probabilities
    scaled = of(2.0**30 * features, 2.0**-30 * anchors, similarity="cosine")
    assert torch.equal(scaled, of(features, anchors, similarity="cosine"))
    zero = torch.zeros(1, 3, requires_grad=True)
    even = of(zero, anchors, similarity="cosine")
    assert torch.equal(even, torch.full((1, 4), 0.25))
    even[0, 0].backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rectify(dtype: torch.dtype) -> None:
    logits = draw((2, 5, 3), dtype=dtype).logits
    probabilities, assignments = logits.softmax(dim=1), logits.flip(0).softmax(dim=1)
    assignments[:, 1] = 0
    assignments[0, :, 0, 0] = 0
    rectified = anchorda.rectify(probabilities, assignments.requires_grad_())
    assert rectified.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not rectified.requires_grad
    expected = oracles.rectify(rows(probabilities), rows(assignments))
    np.testing.assert_allclose(rows(rectified), expected, rtol=0, atol=TOLERANCE)
    # Labels by the logarithm: ignored where no class has both.
    labels, scores = anchorda.ProbabilityPseudoLabeler(0.0)(rectified.log())
    assert labels[0, 0, 0] == 255
    torch.testing.assert_close(scores, rectified.amax(dim=1).float(), rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"Expected `assignments` of shape \(2, 4, 5, 3\)"):
        anchorda.rectify(probabilities, assignments[:, :3])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, NAN])
def test_a_temperature_is_positive_and_finite(temperature: float) -> None:
    with pytest.raises(ValueError, match="Expected `temperature`"):
        anchorda.anchor_probabilities(torch.ones(1, 2), torch.ones(3, 2), temperature=temperature)
    with pytest.raises(ValueError, match="Expected `similarity` to be one of 'euclidean'"):
        anchorda.anchor_probabilities(torch.ones(1, 2), torch.ones(3, 2), similarity="l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(23, 5), (1, 1), (0, 3), (7, 2)])
@pytest.mark.parametrize("with_shares", [False, True])
def test_sinkhorn(dtype: torch.dtype, size: tuple[int, int], with_shares: bool) -> None:
    scores = torch.rand(size).to(dtype)
    shares = (torch.rand(size[1]) + 0.1).tolist() if with_shares else None
    q = anchorda.sinkhorn_assignments(scores, shares=shares, epsilon=0.1, iterations=4)
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = oracles.sinkhorn(scores.double().numpy(), shares or [1.0] * size[1], 0.1, 4)
    # Measured: 2e-6, of exponents up to 10 in float32.
    np.testing.assert_allclose(q, expected, rtol=0, atol=1e-5)


def test_sinkhorn_with_unseen_classes_and_bad_samples() -> None:
    scores = torch.rand(9, 4)
    clean = anchorda.sinkhorn_assignments(scores[:, :3], shares=np.array([1.0, 2.0, 3.0]))
    scores[:, 3] = -math.inf
    with_unseen = anchorda.sinkhorn_assignments(scores, shares=torch.tensor([1.0, 2.0, 3.0, 9.0]))
    torch.testing.assert_close(with_unseen[:, :3], clean)
    assert not with_unseen[:, 3].any()
    bad = torch.full((3, 4), NAN)
    bad[1:] = math.inf
    with_bad = anchorda.sinkhorn_assignments(torch.cat([bad, scores]), shares=[1, 2, 3, 9])
    assert with_bad[:3].isnan().all()
    torch.testing.assert_close(with_bad[3:], with_unseen)
    assert not anchorda.sinkhorn_assignments(torch.full((3, 2), -math.inf)).any()


def test_sinkhorn_does_not_overflow_and_reaches_the_shares() -> None:
    scores = 1e4 * torch.rand(200, 3)
    assert anchorda.sinkhorn_assignments(scores).isfinite().all()
    q = anchorda.sinkhorn_assignments(torch.rand(200, 3), shares=[0.5, 0.3, 0.2], iterations=200)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(200))
    torch.testing.assert_close(q.mean(dim=0), torch.tensor([0.5, 0.3, 0.2]), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"Expected `scores` of shape \(n, K\)"):
        anchorda.sinkhorn_assignments(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="Expected `shares`"):
        anchorda.sinkhorn_assignments(torch.ones(2, 3), shares=[1.0, 2.0])
