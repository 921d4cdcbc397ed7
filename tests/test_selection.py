"""Scores without target labels: plain loops, the authors' numbers, and what a sample loses."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorda import InformationMaximization, LabelAgreement, NuclearNorm, SoftNeighborhoodDensity
from tests.oracles import LAYOUTS, SHAPES, draw, lay_out

OF_LOGITS = [SoftNeighborhoodDensity, InformationMaximization, NuclearNorm]
Array = NDArray[np.float64]


def softmax(logits: Tensor) -> Array:
    """Return probabilities (P, C) of the pixels whose logits are finite."""
    z = logits.double().movedim(1, -1).flatten(0, -2).numpy()
    z = z[np.isfinite(z).all(axis=1)]
    e = np.exp(z - z.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def density(p: Array, temperature: float, copies: Sequence[int] | None = None) -> float:
    """Return the entropy of each pixel's neighborhood, over pixels that occur some times each."""
    times = [1] * len(p) if copies is None else copies
    x = [row / math.sqrt(sum(v * v for v in row)) for row in p]
    total = 0.0
    for i in range(len(x)):
        scores = [math.exp(float(x[i] @ x[j]) / temperature) for j in range(len(x))]
        own = math.exp(-1 / temperature)
        z = sum(n * s for n, s in zip(times, scores, strict=True)) - scores[i] + own
        entropy = -own / z * math.log(own / z + 1e-5)
        for j, (n, s) in enumerate(zip(times, scores, strict=True)):
            entropy -= (n - (i == j)) * s / z * math.log(s / z + 1e-5)
        total += times[i] * entropy
    return total / sum(times)


def information(p: Array) -> float:
    mean = p.mean(axis=0)
    certain = -(p * np.log(p + 1e-5)).sum(axis=1).mean()
    return float(-(mean * np.log(mean + 1e-5)).sum() - certain)


def nuclear_norm(p: Array) -> float:
    values = np.linalg.svd(p, compute_uv=False)
    return float(values.sum() / math.sqrt(len(p) * min(p.shape)))


ORACLES: dict[Any, Any] = {
    SoftNeighborhoodDensity: lambda p: density(p, 0.05),
    InformationMaximization: information,
    NuclearNorm: nuclear_norm,
}


def score_of(kind: type[Any], *batches: Tensor) -> float:
    state = kind()
    for logits in batches:
        state.update(logits)
    value: Tensor = state.compute()
    assert value.shape == ()
    assert value.dtype == torch.float64
    return value.item()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) > 0])
@pytest.mark.parametrize("kind", OF_LOGITS)
def test_equals_the_oracle_in_any_division_and_layout(
    kind: type[Any], shape: Sequence[int]
) -> None:
    logits = 3 * draw(shape, num_classes=4).logits
    before = logits.clone()
    oracle = ORACLES[kind]
    expected = oracle(softmax(logits))
    rows = logits.movedim(1, -1).flatten(0, -2)
    parts = rows.split([len(rows) // 3, len(rows) - len(rows) // 3])
    nothing = logits[:0]
    divided = [
        score_of(kind, nothing, logits),
        score_of(kind, *parts),
        score_of(kind, rows.flip(0)),
    ]
    np.testing.assert_allclose(divided, expected, rtol=2e-6, atol=1e-7)
    for layout in LAYOUTS:
        laid_out = lay_out(logits, layout)
        got = score_of(kind, laid_out)
        np.testing.assert_allclose(got, oracle(softmax(laid_out)), rtol=2e-6, atol=1e-7)
    assert torch.equal(logits, before)


def scalar(numbers: Mapping[str, Any], name: str) -> float:
    """Return one of the numbers that the file stores together."""
    return float(dict(zip(numbers["scalar_names"], numbers["scalars"], strict=True))[name])


@pytest.mark.parametrize("kind", [SoftNeighborhoodDensity, InformationMaximization])
def test_authors_numbers(kind: type[Any], golden: Path) -> None:
    if kind is SoftNeighborhoodDensity:
        numbers = np.load(golden / "peers" / "snd.npz")
        got = score_of(kind, torch.tensor(numbers["probabilities"]).log())
        np.testing.assert_allclose(got, scalar(numbers, "density"), rtol=2e-6)
    else:
        numbers = np.load(golden / "peers" / "shot.npz")
        got = score_of(kind, torch.tensor(numbers["information.logits"]))
        np.testing.assert_allclose(got, -scalar(numbers, "information.loss"), rtol=2e-6)


@pytest.mark.parametrize("kind", OF_LOGITS)
def test_pixel_that_is_not_finite_is_left_out(kind: type[Any]) -> None:
    logits = torch.randn(5, 3, 2)
    broken = logits.clone()
    broken[1, 0, 1], broken[3, 2, 0], broken[4, 1, 1] = math.nan, math.inf, -math.inf
    np.testing.assert_allclose(score_of(kind, broken), ORACLES[kind](softmax(broken)), rtol=2e-6)


@pytest.mark.parametrize("kind", OF_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind: type[Any], dtype: torch.dtype) -> None:
    logits = torch.randn(200, 3).to(dtype)
    assert score_of(kind, logits) == score_of(kind, logits.float())


@pytest.mark.parametrize("kind", OF_LOGITS)
def test_nothing_added(kind: type[Any]) -> None:
    if kind is SoftNeighborhoodDensity:
        with pytest.raises(ValueError, match="at least one pixel with finite logits, but got none"):
            score_of(kind, torch.full((2, 3), math.nan))
    else:
        assert math.isnan(score_of(kind))
        assert math.isnan(score_of(kind, torch.full((2, 3), math.nan)))


@pytest.mark.parametrize("kind", OF_LOGITS)
def test_merge_reset_and_state(kind: type[Any]) -> None:
    batches = [torch.randn(7, 4), torch.randn(2, 4, 3)]
    whole, first, second = kind(), kind(), kind()
    for batch, state in zip(batches, (first, second), strict=True):
        whole.update(batch)
        state.update(batch)
    first.merge(kind())
    first.half().merge(second)
    torch.testing.assert_close(first.compute(), whole.compute(), rtol=1e-9, atol=0)
    restored = kind()
    restored.load_state_dict(whole.state_dict())
    assert torch.equal(restored.compute(), whole.compute())
    restored.update(batches[0])
    whole.reset()
    whole.update(batches[0])
    alone = kind()
    alone.update(batches[0])
    assert torch.equal(whole.compute(), alone.compute())
    with pytest.raises(ValueError, match="Expected 4 classes as before, but got 3"):
        whole.update(torch.randn(2, 3))


def crowded(pixels: int) -> Tensor:
    """Return logits (P, 5) of classes from frequent to rare, some pixels certain, some not."""
    classes = torch.multinomial(torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01]), pixels, True)
    certain = 8 * torch.rand(pixels, 1)
    return torch.randn(pixels, 5) + certain * torch.nn.functional.one_hot(classes, 5)


def test_sample_of_a_million_pixels_is_within_a_percent() -> None:
    """The exact score of 10⁶ pixels is known where they are copies of a few hundred."""
    few, copies = crowded(400), 2500
    expected = density(softmax(few), 0.05, [copies] * len(few))
    for seed in range(3):
        state = SoftNeighborhoodDensity(seed=seed)
        for _ in range(10):
            state.update(few.repeat(copies // 10, 1)[torch.randperm(len(few) * copies // 10)])
        assert state.counts.sum() == 10**6
        assert state.rows.numel() == 5 * 256 * 5  # however long the stream
        assert state.compute().item() == pytest.approx(expected, rel=0.01)


def test_sample_does_not_depend_on_batches_and_covers_rare_classes() -> None:
    logits = crowded(5000)
    whole, parts = (SoftNeighborhoodDensity(pixels_per_class=16) for _ in range(2))
    whole.update(logits)
    for part in logits.split(77):
        parts.update(part)
    assert torch.equal(whole.rows, parts.rows)
    found = whole.rows.argmax(dim=2)
    assert torch.equal(found, torch.arange(5)[:, None].expand(5, 16))
    other = SoftNeighborhoodDensity(pixels_per_class=16, seed=1)
    other.update(logits)
    assert not torch.equal(other.rows, whole.rows)


def test_every_pixel_of_a_class_is_sampled_equally_often() -> None:
    hits = torch.zeros(40)
    logits = torch.stack([torch.linspace(1, 3, 40), torch.zeros(40)], dim=1)
    rows = torch.nn.functional.normalize(logits.softmax(dim=1), dim=1)[:, 1]
    for seed in range(500):
        state = SoftNeighborhoodDensity(pixels_per_class=10, seed=seed)
        state.update(logits)
        hits[torch.cdist(state.rows[0, :, 1:], rows[:, None]).argmin(dim=1)] += 1
    # 500 draws of a quarter: 125 expected, and a standard deviation of 9.7.
    assert hits.sum() == 5000
    assert (hits - 125).abs().max() < 4 * 9.7


def test_agreement_is_the_mean_iou_over_classes_of_either() -> None:
    first = torch.tensor([[0, 0, 0, 1, 1, 255, 2, 9]])
    second = torch.tensor([[0, 0, 1, 1, 0, 0, 255, 9]])
    agreement = LabelAgreement(4)
    agreement.update(first, second)
    # Class 0: 2 of 4 pixels; class 1: 1 of 3; classes 2 and 3: of no pixel that both label.
    assert agreement.compute().item() == pytest.approx((2 / 4 + 1 / 3) / 2)
    other = LabelAgreement(4)
    other.update(second, first)
    assert other.compute() == agreement.compute()
    other.merge(agreement)
    assert other.counts.sum() == 2 * agreement.counts.sum()
    other.reset()
    assert other.compute().isnan()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftNeighborhoodDensity(0.0), "Expected `temperature` above 0 and finite"),
        (lambda: SoftNeighborhoodDensity(pixels_per_class=1), "of at least 2, but got 1"),
        (lambda: NuclearNorm().update(torch.zeros(3)), r"of shape \(N, D, \*\)"),
        (
            lambda: SoftNeighborhoodDensity().merge(SoftNeighborhoodDensity(0.1)),
            "Expected `other` with temperature=0.05.*, but got temperature=0.1",
        ),
    ],
)
def test_rejections(make: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        make()
