"""Shared covariance, class variances, soft sums, and the linear discriminant."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

import anchorda
from anchorda import ClassVariances, WithinClassCovariance, linear_discriminant, whitening_matrix
from tests import oracles
from tests.oracles import FLOATS, LAYOUTS, SHAPES, draw, flat, lay_out, rows

Batch = tuple[Tensor, Tensor]
KINDS = [ClassVariances, WithinClassCovariance]
NAN = math.nan


def stream(dtype: torch.dtype = torch.float32, offset: float = 0.0) -> list[Batch]:
    """Return batches in which class 3 comes late and class 4 never; one feature is not finite."""
    batches = []
    for i in range(5):
        drawn = draw((2, 4, 3), num_classes=5, dtype=dtype)
        absent = (drawn.labels == 4) | ((drawn.labels == 3) & (i < 3))
        batches.append((drawn.features + offset, drawn.labels.masked_fill(absent, 255)))
    batches[1][0][0, 1, 0, 0] = math.inf
    batches[1][1][0, 0, 0] = 1
    return batches


def accumulated(kind: type[Any], batches: list[Batch]) -> Any:  # noqa: ANN401
    state = kind(5, 3)
    for features, labels in batches:
        state.update(features, labels)
    return state


def assert_moments(batches: list[Batch], tolerance: float) -> None:
    """Both states against the loop over everything at once."""
    x = np.concatenate([rows(features) for features, _ in batches])
    y = np.concatenate([flat(labels) for _, labels in batches])
    means, scatters, counts = oracles.within_class_scatter(x, y, 5)
    covariance = accumulated(WithinClassCovariance, batches)
    variances = accumulated(ClassVariances, batches)
    for state in (covariance, variances):
        np.testing.assert_array_equal(state.counts, counts)
        seen = counts > 0
        np.testing.assert_allclose(state.means[seen], means[seen], rtol=0, atol=tolerance)
    expected = scatters.sum(axis=0) / counts.sum()
    np.testing.assert_allclose(covariance.compute(), expected, rtol=0, atol=tolerance)
    assert covariance.compute().dtype == torch.float64
    moments = variances.compute()
    assert moments.means.dtype == moments.variances.dtype == torch.float32
    with np.errstate(invalid="ignore"):
        diagonal = scatters.diagonal(axis1=1, axis2=2) / counts[:, None]
    np.testing.assert_allclose(moments.variances, diagonal, rtol=2e-6, atol=0)
    np.testing.assert_allclose(moments.means, means, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_elements", [7], indirect=True)
def test_stream(dtype: torch.dtype, layout: str, block_elements: int) -> None:
    batches = [(lay_out(x, layout), lay_out(y, layout)) for x, y in stream(dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_moments(batches, 1e-13)


def test_large_offset_of_all_features_costs_no_digits() -> None:
    # Σ x² − n·m² would be off by 1e-16 · 1e10.
    assert_moments(stream(torch.float64, 1e5), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_one_stream_in_any_order_and_split(kind: type[Any]) -> None:
    batches = stream()
    whole = accumulated(kind, batches)
    images = [(x[i : i + 1], y[i : i + 1]) for x, y in batches[::-1] for i in range(2)]
    merged = accumulated(kind, batches[:3])
    merged.merge(accumulated(kind, batches[3:]))
    empty = kind(5, 3)
    empty.merge(merged)
    empty.merge(kind(5, 3))
    for other in (accumulated(kind, images), merged, empty):
        assert torch.equal(other.counts, whole.counts)
        for name in ("means", "scatter"):
            actual, expected = getattr(other, name), getattr(whole, name)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="Merge equal settings only"):
        whole.merge(kind(4, 3))
    with pytest.raises(TypeError, match=f"Expected `other` to be {kind.__name__}"):
        whole.merge(anchorda.CategoryAnchors(5, 3))
    whole.reset()
    assert not any(buffer.any() for buffer in whole.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_casts_and_copies(kind: type[Any]) -> None:
    state = accumulated(kind, stream())
    before = {name: buffer.clone() for name, buffer in state.state_dict().items()}
    assert set(before) == {"means", "counts", "scatter"}
    nn.ModuleList([state]).half()
    restored = kind(5, 3)
    restored.load_state_dict(state.state_dict())
    for other in (state, restored, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert repr(other) == f"{kind.__name__}(num_classes=5, feature_dim=3)"
        for name, buffer in other.state_dict().items():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
    with pytest.raises(ValueError, match=r"with D = 3, but got .* Set feature_dim=2\."):
        state.update(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))


def test_nothing_seen_is_nan() -> None:
    assert WithinClassCovariance(2, 3).compute().isnan().all()
    assert all(values.isnan().all() for values in ClassVariances(2, 3).compute())


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_class_sums(shape: Sequence[int]) -> None:
    features, _, logits, _ = draw(shape)
    probabilities = logits.softmax(dim=1)
    if features.numel() > 12:
        features[0, 1], probabilities[-1, 2] = math.inf, NAN
    sums, counts = anchorda.soft_class_sums(features, probabilities)
    assert sums.dtype == counts.dtype == torch.float64
    expected = oracles.soft_class_sums(rows(features), rows(probabilities))
    np.testing.assert_allclose(sums, expected[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(counts, expected[1], rtol=0, atol=1e-13)
    one_hot = torch.nn.functional.one_hot(logits.argmax(dim=1), 4).movedim(-1, 1)
    hard = anchorda.class_sums(features, logits.argmax(dim=1), 4)
    soft = anchorda.soft_class_sums(features, one_hot.half())
    torch.testing.assert_close(soft.sums, hard.sums, rtol=0, atol=1e-13)
    assert torch.equal(soft.counts.long(), hard.counts)
    assert anchorda.all_reduce_class_sums(soft).counts.dtype == torch.float64


def moments(num_classes: int = 4, dim: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features that are far from round, labels, class means and their shared covariance."""
    mixing = torch.randn(dim, dim, dtype=torch.float64)
    labels = torch.randint(num_classes, (400,))
    centers = torch.randn(num_classes, dim, dtype=torch.float64)
    features = centers[labels] + torch.randn(400, dim, dtype=torch.float64) @ mixing
    anchors, covariance = anchorda.CategoryAnchors(4, dim), WithinClassCovariance(4, dim)
    anchors.update(features, labels)
    covariance.update(features, labels)
    return features, labels, anchors.means, covariance.compute()


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_discriminant_is_that_of_scikit_learn_and_the_nearest_by_mahalanobis(
    shrinkage: float,
) -> None:
    features, labels, means, covariance = moments()
    discriminant = linear_discriminant(means, covariance, shrinkage=shrinkage)
    logits = discriminant.logits(features)
    assert logits.dtype == torch.float64
    if shrinkage == 0:
        reference = LinearDiscriminantAnalysis(solver="lsqr")
        reference.fit(features.numpy(), labels.numpy())
        expected = reference.decision_function(features.numpy())
        # Weights of up to 4 times features of up to 10, rounded to float32. Measured: 1e-6.
        np.testing.assert_allclose(logits, expected - np.log(reference.priors_), rtol=0, atol=1e-5)
        counts = labels.bincount()
        with_priors = linear_discriminant(means, covariance, priors=counts, shrinkage=0.0)
        np.testing.assert_allclose(with_priors.logits(features), expected, rtol=0, atol=1e-5)
    variance = covariance.trace() / 6
    metric = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * variance * torch.eye(6))
    offsets = features[:, None] - means
    distances = (offsets @ metric * offsets).sum(dim=2)
    probabilities = (-distances / 2).softmax(dim=1)
    torch.testing.assert_close(logits.softmax(dim=1), probabilities, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_maps(shape: Sequence[int], dtype: torch.dtype) -> None:
    features, _, _, anchors = draw(shape, dtype=dtype)
    anchors[1] = NAN
    discriminant = linear_discriminant(anchors, torch.diag(torch.tensor([1.0, 2.0, 4.0])))
    features.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminant.logits(features)
    assert logits.dtype == torch.float32
    expected = rows(features) @ discriminant.weight.double().numpy().T
    expected += discriminant.bias.double().numpy()
    np.testing.assert_allclose(rows(logits), expected, rtol=1e-5, atol=1e-5)
    assert (logits[:, 1] == -math.inf).all()
    logits[:, [0, 2, 3]].sum().backward()
    assert features.grad is not None
    # The class without an anchor is never labeled.
    assert not (anchorda.ProbabilityPseudoLabeler(0.0)(logits).labels == 1).any()


def test_several_anchors_of_a_class() -> None:
    features, _, _, covariance = moments()
    anchors = torch.randn(4, 3, 6)
    anchors[1, 2], anchors[3] = NAN, NAN
    discriminant = linear_discriminant(anchors, covariance)
    assert (discriminant.weight.shape, discriminant.bias.shape) == ((4, 3, 6), (4, 3))
    single = linear_discriminant(anchors.flatten(0, 1), covariance)
    expected = single.logits(features).view(-1, 4, 3).amax(dim=2)
    assert torch.equal(discriminant.logits(features), expected)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_nearest_whitened_anchors_are_the_discriminants_classes(shrinkage: float) -> None:
    features, _, means, covariance = moments()
    whitening = whitening_matrix(covariance, shrinkage=shrinkage)
    assert torch.equal(whitening, whitening.T)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / 6 * torch.eye(6)
    product = whitening.double() @ shrunk @ whitening.double()
    # float32 entries times a covariance of condition 100. Measured: 2e-6.
    torch.testing.assert_close(product, torch.eye(6, dtype=torch.float64), rtol=0, atol=2e-5)
    nearest = anchorda.AnchorPseudoLabeler()(
        features.float() @ whitening, means.float() @ whitening
    ).labels
    logits = linear_discriminant(means, covariance, shrinkage=shrinkage).logits(features)
    assert torch.equal(nearest, logits.argmax(dim=1))


def test_whitening_of_a_singular_covariance() -> None:
    covariance = torch.diag(torch.tensor([4.0, 0.0]))
    assert torch.equal(
        whitening_matrix(covariance, shrinkage=0), torch.diag(torch.tensor([0.5, 0]))
    )
    assert whitening_matrix(covariance).isfinite().all()
    assert torch.equal(whitening_matrix(torch.zeros(2, 2)), torch.eye(2) * 10)
    assert whitening_matrix(torch.full((2, 2), NAN)).isnan().all()


def test_priors_of_several_anchors_and_of_a_class_that_never_occurs() -> None:
    features, _, _, covariance = moments()
    anchors = torch.randn(4, 3, 6)
    plain = linear_discriminant(anchors, covariance).logits(features)
    priors = torch.tensor([1.0, 0.0, 2.0, 5.0])
    logits = linear_discriminant(anchors, covariance, priors=priors).logits(features)
    torch.testing.assert_close(logits, plain + (priors / 8).log(), rtol=0, atol=1e-5)
    assert (logits[:, 1] == -math.inf).all()


def test_features_without_variance_have_the_euclidean_metric() -> None:
    anchors = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    discriminant = linear_discriminant(anchors, torch.zeros(2, 2), shrinkage=1.0)
    torch.testing.assert_close(discriminant.weight, anchors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: linear_discriminant(torch.ones(2, 3), torch.eye(2)),
            r"of shape \(D, D\) = \(3, 3",
        ),
        (lambda: linear_discriminant(torch.ones(3), torch.eye(3)), "Expected `anchors` of shape"),
        (
            lambda: whitening_matrix(torch.ones(2, 3)),
            r"Expected `covariance` of shape \(D, D\), but",
        ),
        (
            lambda: linear_discriminant(torch.ones(2, 3), torch.eye(3), priors=torch.ones(3)),
            r"Expected `priors` of shape \(C,\) = \(2,\) to match `anchors`, but got \(3,\)",
        ),
        (
            lambda: linear_discriminant(torch.ones(2, 3), torch.eye(3), shrinkage=2.0),
            "Expected `shrinkage` in",
        ),
        (
            lambda: linear_discriminant(torch.ones(2, 3), torch.eye(3)).logits(torch.ones(1, 2)),
            "Expected `features` of shape .* with D = 3, but got",
        ),
    ],
)
def test_rejections(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
