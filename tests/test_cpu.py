"""The faster ways of a CPU: the reference's answers, which float32 alone would miss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from anchorda import _ops
from anchorda._ops import blocks, choice, cpu, reference
from tests import oracles
from tests.oracles import BLOCKS, LAYOUTS, draw, flat, lay_out, pairwise, rows

NAN, INF = float("nan"), float("inf")
SIZES = [
    *(((2, 5, 7), 3, 4), ((70,), 130, 19), ((3, 1, 129), 6, 2), ((2, 3, 4, 5), 1, 1)),
    *(((1, 40, 9), 65, 7), ((9,), 1, 3), ((0, 3), 3, 4)),
]
# Measured: 1.5e-6 of 1 and the value, in gradients.
TOLERANCE = 2e-6


@pytest.fixture(params=["whole", "few"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute all pixels again in case of doubt, or those alone."""
    monkeypatch.setattr(cpu, "_FEW", 0.0 if request.param == "whole" else 1.0)
    param: str = request.param
    return param


@contextmanager
def calls_of(name: str) -> Iterator[list[tuple[int, ...]]]:
    """Yield the shapes of the features that an operator of the reference is given."""
    shapes: list[tuple[int, ...]] = []
    original: Callable[..., object] = getattr(reference, name)
    features_at = 2 if name.endswith("backward") else 0

    def recorded(*arguments: Tensor) -> object:
        shapes.append(tuple(arguments[features_at].shape))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, name, recorded)
        yield shapes


def easy(classes: int = 19, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Return features (2, D, 8, 16), each clearly nearest to one anchor."""
    anchors = 3 * normalize(torch.randn(classes, dim), dim=1)
    labels = torch.randint(classes, (2, 8, 16))
    offsets = 3 * normalize(torch.randn(2, 8, 16, dim), dim=-1)
    return (anchors[labels] + offsets).movedim(-1, 1).contiguous(), labels, anchors


def hard(anchors: Tensor) -> Tensor:
    """Return features (P, D) that float32 can neither measure nor tell apart."""
    first, second = anchors[:-1], anchors[1:]
    middle = (first + second) / 2
    steps = torch.logspace(-9, -2, 15)[:, None, None]
    between = (middle + steps * (second - first)).flatten(0, 1)
    near = (first + steps * torch.randn_like(first)).flatten(0, 1)
    odd = first[:1].repeat(6, 1)
    odd[0, 0], odd[1, -1], odd[2], odd[3], odd[4], odd[5] = NAN, INF, -INF, 0, 1e25, -1e38
    return torch.cat([anchors, middle, between, near, odd])


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize(
    ("size", "layout", "block_elements", "few"),
    pairwise(SIZES, LAYOUTS, BLOCKS, ["whole", "few", "few"]),
    indirect=["block_elements", "few"],
)
def test_any_shape_and_layout(
    size: tuple[tuple[int, ...], int, int], layout: str, block_elements: int, few: str
) -> None:
    shape, dim, classes = size
    features, labels, _, anchors = draw(shape, dim, classes)
    features = lay_out(features, layout)
    if classes > 2:
        anchors[1], anchors[2] = NAN, anchors[0]
    assert_same(
        cpu.nearest_anchors(features, anchors), reference.nearest_anchors(features, anchors)
    )
    assert_same(
        cpu.class_sums(features, labels, classes)[::-1],
        reference.class_sums(features, labels, classes)[::-1],
    )
    targets = torch.where((labels >= 0) & (labels < classes) & (labels != 1), labels, -1)
    losses, distances = cpu.contrastive_losses(features, targets, anchors, 0.5)
    expected, exact = reference.contrastive_losses(features, targets, anchors, 0.5)
    assert_same((targets, losses), (targets, expected))
    weights = torch.rand_like(losses)
    others = features, targets, anchors, 0.5
    grad = cpu.contrastive_losses_backward(weights, distances, *others)
    assert_same(
        (targets, grad), (targets, reference.contrastive_losses_backward(weights, exact, *others))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize("scale", [1e-25, 1e-4, 1, 1e4, 1e18])
def test_hard_pixels_are_the_reference_s(
    scale: float, offset: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_FEW", 1.0)
    anchors = scale * (offset + torch.randn(7, 40))
    features = hard(anchors).to(dtype)
    actual = cpu.nearest_anchors(features, anchors)
    expected = reference.nearest_anchors(features, anchors)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)  # measured: 4e-7


def test_no_choice_is_left_to_rounding() -> None:
    # Differences of the squared distances from far below what float32 resolves to well above it.
    anchors = 5 + torch.randn(2, 256, dtype=torch.float64)
    along = normalize(anchors[1] - anchors[0], dim=0)
    steps = torch.logspace(-9, -2, 20001, dtype=torch.float64)[:, None]
    sides = 2 * torch.randint(2, steps.shape) - 1
    across = torch.randn(len(steps), 256, dtype=torch.float64)
    across -= (across @ along)[:, None] * along
    features = (anchors.mean(dim=0) + across + sides * steps * along).float()
    labels, _, _ = cpu.nearest_anchors(features, anchors.float())
    expected, _, _ = reference.nearest_anchors(features, anchors.float())
    assert (labels != expected).sum() == 0
    squared = (features[:, None] - anchors.float()).square().sum(dim=2)  # what float32 chooses
    assert (squared.argmin(dim=1) != expected).sum() > 100


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_reference_computes_what_is_in_doubt_and_no_more(layout: str) -> None:
    features, labels, anchors = easy()
    features = lay_out(features, layout)
    whole, two = (2, 64, 128), (2, 64)

    def called() -> list[list[tuple[int, ...]]]:
        with (
            calls_of("nearest_anchors") as nearest,
            calls_of("contrastive_losses") as losses,
            calls_of("contrastive_losses_backward") as grads,
        ):
            found = cpu.nearest_anchors(features, anchors)
            of_pixels, distances = cpu.contrastive_losses(features, labels, anchors, 1.0)
            cpu.contrastive_losses_backward(
                torch.ones_like(of_pixels), distances, features, labels, anchors, 1.0
            )
        assert_same(found, reference.nearest_anchors(features, anchors))
        return [nearest, losses, grads]

    assert called() == [[], [], []]
    # Two at their anchors.
    features[1, :, 2, 3] = anchors[labels[1, 2, 3]]
    features[0, :, 7, 15] = anchors[labels[0, 7, 15]] + 1e-3
    assert called() == [[two], [two], [two]]
    # Many: all of their block, and of two blocks if each image is one.
    features[0, :, :4] = anchors[labels[0, :4]].movedim(-1, 0)
    assert called() == [[whole], [whole], [whole]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK_PIXELS_CPU", 128)
        patch.setattr(blocks, "_PART_BYTES_CPU", 128 * 4 * 65)
        assert called() == [[(1, 64, 128), (1, 64)]] * 3


def test_the_second_distance_is_measured_as_well_as_the_first() -> None:
    features, _, anchors = easy()
    anchors[1] = anchors[0] + 0.1 * normalize(torch.randn(64), dim=0)
    features[0, :, :4] = anchors[0][:, None, None] + 0.01 * normalize(torch.randn(64, 4, 16), dim=0)
    found, expected = (of.nearest_anchors(features, anchors) for of in (cpu, reference))
    assert_same(found, expected)
    assert (expected[2][0, :4] < 0.12).all()


def test_pixels_without_a_label_are_in_no_doubt_for_the_loss() -> None:
    features, labels, anchors = easy()
    features[0, :, :4] = anchors[labels[0, :4]].movedim(-1, 0)
    features[1, 0, 0, 0] = NAN
    labels[0, :4] = labels[1, 0, 0] = -1
    with calls_of("contrastive_losses") as losses, calls_of("contrastive_losses_backward") as grads:
        found, distances = cpu.contrastive_losses(features, labels, anchors, 1.0)
        grad = cpu.contrastive_losses_backward(
            torch.ones_like(found), distances, features, labels, anchors, 1.0
        )
    assert losses == grads == []
    assert (found[labels < 0] == 0).all()
    assert (grad.movedim(1, -1)[labels < 0] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_class_sums_of_long_runs_and_of_features_that_are_not_finite(layout: str) -> None:
    features = lay_out(torch.randn(2, 5, 40, 33), layout)
    labels = torch.arange(40)[:, None].div(9, rounding_mode="floor").expand(2, 40, 33) - 1
    for value in (0.0, NAN, INF):
        features[0, 2, 30, 7] = value
        sums, counts = cpu.class_sums(features, labels, 3)
        expected = reference.class_sums(features, labels, 3)
        assert_same((counts, sums), expected[::-1])
        assert counts.sum() == 2 * 27 * 33 - (value != 0)


def test_results_do_not_depend_on_the_default_dtype() -> None:
    features, labels, anchors = easy()

    def results() -> list[Tensor]:
        losses, distances = cpu.contrastive_losses(features, labels, anchors, 1.0)
        grad = cpu.contrastive_losses_backward(losses, distances, features, labels, anchors, 1.0)
        return [
            *(losses, distances, grad, *cpu.nearest_anchors(features, anchors)),
            *cpu.class_sums(features, labels, 19),
        ]

    expected = results()
    try:
        torch.set_default_dtype(torch.float64)
        torch.testing.assert_close(results(), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def chosen(name: str, features: Tensor) -> str:
    """Return the module that computes an operator, by its name."""
    return choice.module_for(name, features).__name__.rpartition(".")[2]


PRODUCTS = "nearest_anchors", "contrastive_losses", "contrastive_losses_backward"


@pytest.mark.parametrize("name", PRODUCTS)
def test_only_where_it_is_faster_and_as_precise(name: str) -> None:
    features = torch.randn(2**17, 4)
    assert chosen(name, features) == chosen(name, features.half()) == "cpu"
    for other in (features[1:], features.double(), features.to("meta")):
        assert chosen(name, other) == "reference"
    try:
        torch.set_float32_matmul_precision("medium")
        assert chosen(name, features) == "reference"
        assert chosen("class_sums", features) == "cpu"
        with calls_of("nearest_anchors") as calls:
            _ops.nearest_anchors(features, torch.randn(2, 4))
        assert len(calls) == 1
    finally:
        torch.set_float32_matmul_precision("highest")


def test_class_sums_of_any_number_of_features() -> None:
    features = torch.randn(2, 4)
    assert chosen("class_sums", features) == chosen("class_sums", features.half()) == "cpu"
    for other in (features.double(), features.to("meta")):
        assert chosen("class_sums", other) == "reference"


def test_a_precision_that_is_set_by_the_newer_interface() -> None:
    features, backend = torch.randn(2**17, 4), torch.backends.mkldnn
    if not hasattr(backend, "matmul"):
        pytest.skip("this torch has the older interface alone")
    before = backend.matmul.fp32_precision
    try:
        backend.matmul.fp32_precision = "bf16"
        assert chosen("nearest_anchors", features) == "reference"
    finally:
        backend.matmul.fp32_precision = before
    assert chosen("nearest_anchors", features) == "cpu"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_sums_of_more_classes_than_a_product_is_good_for(
    dtype: torch.dtype, layout: str
) -> None:
    features, labels, _, _ = draw((3, 20, 11), 5, 300, dtype)
    features[1, 2, 3, 4] = NAN
    features = lay_out(features, layout)
    expected = oracles.class_sums(rows(features), flat(labels), 300)
    for sums, counts in (
        _ops.class_sums(features, labels, 300),
        reference.class_sums(features, labels, 300),
    ):
        np.testing.assert_array_equal(counts.numpy(), expected[1])
        np.testing.assert_allclose(sums.numpy(), expected[0], rtol=0, atol=1e-12)
