"""The released objective against golden numbers and a loop; anchor files, hostile ones too."""

import copyreg
import functools
import io
import itertools
import math
import os
import pickle
import re
import runpy
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import anchorda
from anchorda.released import CagUdaLoss, cag_uda_loss, load_category_anchors
from tests import oracles
from tests.oracles import Array, Labels, flat, rows

# Measured: 2e-7 relative, a few roundings to float32.
RELATIVE_TOLERANCE = 2e-6
IGNORED = [250, 255, -1]


class Step(NamedTuple):
    """The tensors that `cag_uda_loss` takes, in its order."""

    source_features: Tensor
    source_logits: Tensor
    source_labels: Tensor
    target_features: Tensor
    target_logits: Tensor
    anchor_labels: Tensor
    probability_labels: Tensor
    anchors: Tensor

    def to(self, dtype: torch.dtype) -> "Step":
        """Return the step in another floating-point dtype; labels keep theirs."""
        return Step(*(t.to(dtype) if t.is_floating_point() else t for t in self))

    def with_labels(self, change: Callable[[Tensor], Tensor]) -> "Step":
        """Return the step with its three label maps changed."""
        maps = {name: map_ for name, map_ in self._asdict().items() if name.endswith("labels")}
        return self._replace(**{name: change(labels) for name, labels in maps.items()})

    def leaves(self) -> list[Tensor]:
        """Return the four tensors that receive a gradient, and require it."""
        inputs = [self.source_features, self.target_features]
        inputs += [self.source_logits, self.target_logits]
        return [t.requires_grad_() for t in inputs]


def draw_step(
    source: Sequence[int] = (2, 7, 9),
    labels: Sequence[int] = (27, 20),
    target: Sequence[int] = (3, 6, 5),
    dim: int = 3,
    num_classes: int = 3,
    factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Return label maps with a tenth ignored, and logits that mostly agree with them."""

    def label_map(shape: Sequence[int]) -> Tensor:
        ignored = torch.tensor(IGNORED)[torch.randint(3, tuple(shape))]
        return torch.where(torch.rand(*shape) < 0.9, torch.randint(num_classes, shape), ignored)

    def features(shape: Sequence[int]) -> Tensor:
        n, *spatial = shape
        return factor * (torch.randn(n, dim, 1, 1) + torch.randn(n, dim, *spatial))

    def logits(labels: Tensor) -> Tensor:
        classes = labels.clamp(0, num_classes - 1)
        one_hot = torch.nn.functional.one_hot(classes, num_classes).movedim(-1, 1)
        return 4 * one_hot + torch.randn(one_hot.shape)

    source_labels = label_map((source[0], *labels))
    anchor_labels, probability_labels = label_map(target), label_map(target)
    step = Step(
        features(source),
        logits(anchorda.resize_labels(source_labels, source[1:])),
        source_labels,
        features(target),
        logits(anchor_labels),
        anchor_labels,
        probability_labels,
        torch.randn(num_classes, dim),
    )
    return step.to(dtype)


# The oracle.


def divided(term: float) -> float:
    while term > 5:
        term /= 10
    return term


def distance_oracle(features: Tensor, logits: Tensor, labels: Tensor, anchors: Tensor) -> Any:  # noqa: ANN401
    """Return the distance loss of one domain, its gradient (N, P, D), and how many terms it has."""
    a = anchors.double().numpy()
    terms, parts = [], []
    n, d, h, w = features.shape
    gradient = np.zeros((n, h * w, d))
    for i in range(n):
        x, z, y = rows(features[i : i + 1]), rows(logits[i : i + 1]), flat(labels[i])
        predictions = z.argmax(axis=1)
        for c in range(len(a)):
            members = [p for p in range(h * w) if y[p] == c == predictions[p]]
            if len(members) < 10 or not np.isfinite(a[c]).all():
                continue
            mean = sum(x[p] for p in members) / len(members)
            term = oracles.pixel_distance(mean, a[c], "smooth_l1")
            terms.append(divided(term))
            shrunk = 10.0 ** round(math.log10(divided(term) / term)) if term else 1.0
            of_mean = shrunk * np.clip(mean - a[c], -1, 1) / d
            parts.append((i, members, of_mean))
    for i, members, of_mean in parts:
        for p in members:
            area = len(members) / (h * w)
            gradient[i, p] = 10 / len(terms) * of_mean / len(members) * 2 * area
    loss = sum(terms) / len(terms) * 10 if terms else 0.0
    return loss, gradient, len(terms)


def bilinear(maps: Array, size: Sequence[int]) -> Array:
    """Resize (C, h, w) to (C, H, W) with aligned corners."""
    result = np.zeros((len(maps), *size))
    for row in range(size[0]):
        for column in range(size[1]):
            place = []
            for i, old, new in ((row, maps.shape[1], size[0]), (column, maps.shape[2], size[1])):
                position = i * (old - 1) / (new - 1) if new > 1 else 0.0
                low = min(int(position), max(old - 2, 0))
                place.append((low, min(low + 1, old - 1), position - low))
            (top, bottom, down), (left, right, across) = place
            upper = maps[:, top, left] * (1 - across) + maps[:, top, right] * across
            lower = maps[:, bottom, left] * (1 - across) + maps[:, bottom, right] * across
            result[:, row, column] = upper * (1 - down) + lower * down
    return result


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    return oracles.cross_entropy(rows(logits), flat(labels), [1.0] * logits.shape[1], 0.0)


def oracle(step: Step, weight: float = 0.7) -> Any:  # noqa: ANN401
    """Return (total, source, pseudo, distance) and the gradients (N, D, h, w) of both features."""
    size = step.source_labels.shape[1:]
    upsampled = np.stack([bilinear(z, size) for z in step.source_logits.detach().double().numpy()])
    source = cross_entropy(torch.from_numpy(upsampled), step.source_labels)
    pseudo = cross_entropy(step.target_logits, step.anchor_labels) / 2
    pseudo += cross_entropy(step.target_logits, step.probability_labels) / 2
    spatial = step.source_features.shape[2:]
    resized: list[Labels] = [
        oracles.resize_nearest(labels.numpy(), spatial) for labels in step.source_labels
    ]
    of_source = distance_oracle(
        step.source_features, step.source_logits, torch.tensor(np.stack(resized)), step.anchors
    )
    of_target = distance_oracle(
        step.target_features, step.target_logits, step.anchor_labels, step.anchors
    )
    distance = weight * (of_source[0] + of_target[0])
    gradients = [
        weight * gradient.transpose(0, 2, 1).reshape(features.shape)
        for (_, gradient, _), features in (
            (of_source, step.source_features),
            (of_target, step.target_features),
        )
    ]
    return (source + pseudo + distance, source, pseudo, distance), gradients


def assert_agrees(
    step: Step, tolerance: float = RELATIVE_TOLERANCE, weight: float = 0.7
) -> CagUdaLoss:
    expected, gradients = oracle(step, weight)
    leaves = step.leaves()[:2]
    loss = cag_uda_loss(*step, distance_weight=weight)
    np.testing.assert_allclose([part.item() for part in loss], expected, rtol=tolerance, atol=1e-7)
    for actual, wanted in zip(torch.autograd.grad(loss.total, leaves), gradients, strict=True):
        scale = float(np.abs(wanted).max(initial=1e-30))
        np.testing.assert_allclose(
            actual.double().numpy() / scale, wanted / scale, rtol=0, atol=tolerance
        )
    return loss


# The golden numbers.


def golden_step(golden: Path, seed: int, factor: float) -> Step:
    make_inputs = runpy.run_path(str(golden / "inputs.py"))["make_inputs"]
    anchors, *source = make_inputs(seed, 2, 32, 24, 40)
    _, *target = make_inputs(seed + 1, 2, 32, 24, 40, anchors=anchors)
    source_features, source_logits, _, labels = map(torch.from_numpy, source)
    target_features, target_logits, _, _ = map(torch.from_numpy, target)
    anchors = torch.from_numpy(anchors)
    of_anchors = anchorda.AnchorPseudoLabeler(0.8, ignore_index=250)(
        target_features * 0.97, anchors
    )
    return Step(
        source_features * factor,
        source_logits,
        labels.repeat_interleave(4, 1).repeat_interleave(4, 2),
        target_features * factor,
        target_logits,
        of_anchors.labels,
        anchorda.ProbabilityPseudoLabeler(0.95, ignore_index=250)(target_logits).labels,
        anchors,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "seed", "factor"), [("step_a", 11, 1.0), ("step_b", 21, 25.0)])
def test_golden_step(golden: Path, name: str, seed: int, factor: float, dtype: torch.dtype) -> None:
    with np.load(golden / "golden.npz") as file:
        numbers = dict(file)
    step = golden_step(golden, seed, factor).to(dtype)
    leaves = step.leaves()
    loss = cag_uda_loss(*step)
    parts = [loss.total.item(), loss.distance.item(), loss.pseudo.item()]
    # Measured, relative: losses 1.6e-7, norms 1.3e-7, samples 1.4e-6 of the largest; float64 is no
    # nearer.
    np.testing.assert_allclose(parts, numbers[f"{name}_loss"], rtol=1e-6)
    gradients = torch.autograd.grad(loss.total, leaves)
    kinds = ["features_source", "features_target", "logits_source", "logits_target"]
    for kind, gradient in zip(kinds, gradients, strict=True):
        key = f"{name}_grad_{kind}"
        np.testing.assert_allclose(
            gradient.double().norm().item(), numbers[f"{key}_norm"], rtol=1e-6
        )
        sample = numbers[f"{key}_sample"]
        np.testing.assert_allclose(
            gradient.flatten()[::997], sample, rtol=0, atol=3e-6 * np.abs(sample).max()
        )


# Shapes and values.


@pytest.mark.parametrize(
    ("source", "labels", "target"),
    [
        ((2, 7, 9), (27, 20), (3, 6, 5)),
        ((1, 5, 11), (5, 11), (1, 1, 30)),
        ((3, 8, 4), (3, 5), (1, 9, 9)),
        ((1, 1, 1), (1, 1), (2, 1, 1)),
        ((1, 6, 6), (1, 13), (0, 4, 4)),
    ],
)
@pytest.mark.parametrize(("dim", "num_classes"), [(3, 3), (1, 2), (6, 4)])
def test_any_shape(
    source: Sequence[int], labels: Sequence[int], target: Sequence[int], dim: int, num_classes: int
) -> None:
    step = draw_step(source, labels, target, dim, num_classes)
    before = [tensor.clone() for tensor in step]
    assert_agrees(step)
    for tensor, copy in zip(step, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("factor", [0.1, 10.0, 100.0, 1e4, 1e7])
def test_terms_above_five(factor: float) -> None:
    loss = assert_agrees(draw_step(factor=factor))
    assert loss.distance.item() < 0.7 * 2 * 10 * 5


def test_float64() -> None:
    step = draw_step(factor=40.0, dtype=torch.float64)
    loss = assert_agrees(step, tolerance=1e-12)
    assert {part.dtype for part in loss} == {torch.float64}


@pytest.mark.parametrize("weight", [0.0, 0.7, 3])
def test_distance_weight(weight: float) -> None:
    assert_agrees(draw_step(), weight=weight)


def constant_step(pixels: int, value: float) -> Step:
    """Return a step with that many pixels of class 0 in a 4×5 source image, all of one value."""
    labels = torch.full((1, 20), 255)
    labels[0, :pixels] = 0
    labels = labels.reshape(1, 4, 5)
    ignored, logits = torch.full((1, 4, 5), 255), torch.zeros(1, 2, 4, 5)
    features = torch.full((1, 1, 4, 5), value)
    return Step(features, logits, labels, features, logits, ignored, ignored, torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("term", "left"),
    [(0.5, 0.5), (5, 5), (5.25, 0.525), (50, 5), (50.5, 0.505), (500, 5), (501, 0.501), (3e8, 3.0)],
)
def test_a_term_is_divided_while_it_exceeds_five(term: float, left: float) -> None:
    step = constant_step(20, term + 0.5)
    features = step.source_features.requires_grad_()
    loss = cag_uda_loss(*step, distance_weight=1).distance
    assert loss.item() == pytest.approx(10 * left, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 10 * left / term * 2 / 20))


@pytest.mark.parametrize(("pixels", "counts"), [(9, False), (10, True)])
def test_a_class_needs_ten_pixels(pixels: int, counts: bool) -> None:
    loss = cag_uda_loss(*constant_step(pixels, 1.5), distance_weight=1)
    assert loss.distance.item() == (10 if counts else 0)


def test_a_wrong_prediction_is_not_averaged() -> None:
    step = constant_step(20, 1.5)
    # A second class, predicted at the first 11 of 20 pixels, leaves 9 of the first.
    second = torch.zeros(1, 20)
    second[0, :11] = 1
    logits = torch.stack([torch.full((1, 20), 0.5), second], dim=1).reshape(1, 2, 4, 5)
    labels = torch.zeros(1, 4, 5, dtype=torch.int64)
    anchors = torch.zeros(2, 1)
    ignored = step.anchor_labels
    features = step.source_features
    loss = cag_uda_loss(features, logits, labels, features, logits, ignored, ignored, anchors)
    assert loss.distance.item() == 0
    loss = cag_uda_loss(features, logits, labels, features, -logits, labels, ignored, anchors)
    assert loss.distance.item() == pytest.approx(0.7 * 10)


@pytest.mark.parametrize("factor", [1.0, 50.0])
def test_gradient_is_that_of_the_loss_times_twice_the_area(factor: float) -> None:
    step = draw_step(factor=factor, dtype=torch.float64)
    (features, *_) = step.leaves()
    (gradient,) = torch.autograd.grad(cag_uda_loss(*step).distance, features)
    labels = anchorda.resize_labels(step.source_labels, features.shape[2:])
    correct = anchorda.keep_correct(labels, step.source_logits)
    compared = 0
    for n in range(features.shape[0]):
        for c in range(3):
            pixels = (correct[n] == c).nonzero().tolist()
            if len(pixels) < 10:
                continue
            row, column = pixels[0]
            losses = []
            for offset in (-1e-5, 1e-5):
                moved = features.detach().clone()
                moved[n, 1, row, column] += offset
                losses.append(cag_uda_loss(moved, *step[1:]).distance.item())
            slope = (losses[1] - losses[0]) / 2e-5
            area = len(pixels) / (features.shape[2] * features.shape[3])
            expected = pytest.approx(2 * area * slope, rel=1e-5)
            assert gradient[n, 1, row, column].item() == expected
            compared += 1
    assert compared >= 2


def test_gradient_of_the_logits() -> None:
    step = draw_step((1, 3, 4), (5, 7), (1, 4, 3), dim=2, dtype=torch.float64)

    def of_logits(source_logits: Tensor, target_logits: Tensor) -> Tensor:
        step_ = step._replace(source_logits=source_logits, target_logits=target_logits)
        return cag_uda_loss(*step_).total

    logits = (step.source_logits.requires_grad_(), step.target_logits.requires_grad_())
    assert torch.autograd.gradcheck(of_logits, logits)


@pytest.mark.parametrize("marker", [math.nan, math.inf])
@pytest.mark.parametrize("unseen", [[1], [0, 2]])
def test_unseen_class_contributes_nothing(unseen: list[int], marker: float) -> None:
    step = draw_step()
    step.anchors[unseen, 1] = marker
    loss = assert_agrees(step)
    assert loss.distance.item() > 0


@pytest.mark.parametrize("nothing", ["labels", "anchors", "predictions"])
def test_nothing_to_average_is_a_zero_that_is_connected(nothing: str) -> None:
    step = draw_step(num_classes=4)
    if nothing == "labels":
        step = step.with_labels(lambda labels: torch.full_like(labels, 250))
    elif nothing == "anchors":
        step = step._replace(anchors=torch.full_like(step.anchors, math.nan))
    else:
        step = step._replace(source_logits=-step.source_logits, target_logits=-step.target_logits)
        step.source_logits[:, 0] -= 100
        step.target_logits[:, 0] -= 100
        step.source_labels[step.source_labels > 0] = 0
        step.anchor_labels[step.anchor_labels > 0] = 0
    leaves = step.leaves()
    loss = cag_uda_loss(*step)
    assert loss.distance.item() == 0
    loss.total.backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == 4
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not any(gradient.any() for gradient in gradients[:2])
    if nothing == "labels":
        assert [part.item() for part in loss] == [0, 0, 0, 0]
        assert not any(gradient.any() for gradient in gradients[2:])


def test_ignored_pixels_have_no_influence() -> None:
    step = draw_step(labels=(7, 9))
    for marker in IGNORED:
        marked = step.with_labels(lambda y: torch.where((y < 0) | (y > 2), marker, y))  # noqa: B023
        assert cag_uda_loss(*marked) == cag_uda_loss(*step)
    changed = step.target_features.clone()
    ignored = (step.anchor_labels < 0) | (step.anchor_labels > 2)
    changed.movedim(1, -1)[ignored] = math.nan
    assert cag_uda_loss(*step._replace(target_features=changed)) == cag_uda_loss(*step)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    step = draw_step()
    of_dtype = step.with_labels(lambda y: torch.where(y < 0, 255, y).to(dtype))
    assert cag_uda_loss(*of_dtype) == cag_uda_loss(*step)


def test_divergence_is_seen() -> None:
    step = draw_step()
    step.source_features[0, 0, 2, 2] = math.nan
    step.source_logits[0, :, 2, 2] = math.nan
    loss = cag_uda_loss(*step)
    assert loss.total.isnan()
    assert loss.distance.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_answer_of_the_same_rounded_float32(dtype: torch.dtype) -> None:
    half = draw_step().to(dtype)
    single = half.to(torch.float32)
    leaves, of_single = half.leaves(), single.leaves()
    loss, expected = cag_uda_loss(*half), cag_uda_loss(*single)
    assert {part.dtype for part in loss} == {torch.float32}
    assert loss == expected
    gradients = torch.autograd.grad(loss.total, leaves)
    wanted = torch.autograd.grad(expected.total, of_single)
    for actual, other in zip(gradients, wanted, strict=True):
        assert torch.equal(actual, other.to(dtype))


def test_autocast_computes_in_float32() -> None:
    step = draw_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cag_uda_loss(*step)
    assert loss == cag_uda_loss(*step)


def test_anchors_receive_no_gradient() -> None:
    step = draw_step()
    step.anchors.requires_grad_()
    assert not cag_uda_loss(*step).total.requires_grad
    step.leaves()
    cag_uda_loss(*step).total.backward()
    assert step.anchors.grad is None


@pytest.fixture
def _forget_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget_compiled")
def test_traces_whole_for_all_sizes() -> None:
    compiled = torch.compile(cag_uda_loss, fullgraph=True, backend="aot_eager")
    # The second height makes heights a variable.
    for height, recompiles in ((7, True), (8, True), (11, False)):
        step = draw_step((2, height, 9), (3 * height, 20), (2, height, 5), factor=30.0)
        leaves = step.leaves()
        with torch._dynamo.config.patch(error_on_recompile=not recompiles):
            actual = compiled(*step)
        expected = cag_uda_loss(*step)
        torch.testing.assert_close(tuple(actual), tuple(expected))
        torch.testing.assert_close(
            torch.autograd.grad(actual.total, leaves), torch.autograd.grad(expected.total, leaves)
        )


def test_on_the_meta_device() -> None:
    loss = cag_uda_loss(*(tensor.to("meta") for tensor in draw_step()))
    assert all(part.is_meta and part.shape == () for part in loss)


# Rejections.


LONG = torch.int64
DIM = "of shape (N, D, h, w) with D = 3 to match `anchors`, but got"
LOGITS = "Pass the logits of the classifier before they are interpolated."


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("source_features", torch.zeros(2, 3, 7), f"{DIM} (2, 3, 7)."),
        ("target_features", torch.zeros(3, 4, 6, 5), f"{DIM} (3, 4, 6, 5)."),
        (
            *("source_logits", torch.zeros(2, 3, 27, 20)),
            "of shape (N, C, h, w) = (2, 3, 7, 9) to match `source_features` and `anchors`, but "
            f"got (2, 3, 27, 20). {LOGITS}",
        ),
        (
            *("target_logits", torch.zeros(3, 4, 6, 5)),
            "of shape (N, C, h, w) = (3, 3, 6, 5) to match `target_features` and `anchors`, but "
            f"got (3, 4, 6, 5). {LOGITS}",
        ),
        (
            *("source_labels", torch.zeros(2, 1, 27, 20, dtype=LONG)),
            "of shape (N, H, W) with N = 2 to match `source_features`, but got (2, 1, 27, 20). "
            "Drop the channel dimension with source_labels.squeeze(1).",
        ),
        (
            *("source_labels", torch.zeros(3, 27, 20, dtype=LONG)),
            "of shape (N, H, W) with N = 2 to match `source_features`, but got (3, 27, 20).",
        ),
        (
            *("anchor_labels", torch.zeros(3, 24, 20, dtype=LONG)),
            "of shape (N, H, W) = (3, 6, 5) to match `target_features`, but got (3, 24, 20). Resize"
            " them with anchorda.resize_labels(anchor_labels, target_features.shape[2:]).",
        ),
        (
            *("probability_labels", torch.zeros(2, 6, 5, dtype=LONG)),
            "of shape (N, H, W) = (3, 6, 5) to match `target_features`, but got (2, 6, 5).",
        ),
        (
            *("anchors", torch.zeros(3, 5)),
            "of shape (C, D) or (C, M, D) with D = 3 to match `features`, but got (3, 5). Compute "
            "them from features of the same layer, or transpose them with anchors.T.",
        ),
        (
            *("anchor_labels", torch.zeros(3, 6, 5, dtype=LONG, device="meta")),
            "on cpu like `target_features`, but got meta. Move them with "
            ".to(target_features.device).",
        ),
        ("distance_weight", -1.0, "in [0.0, inf], but got -1.0."),
    ],
)
def test_wrong_values(name: str, value: object, message: str) -> None:
    assert_rejected(name, value, ValueError, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            *("source_features", torch.zeros(2, 3, 7, 9, dtype=LONG)),
            "of a floating-point dtype, but got torch.int64. Convert them with "
            "source_features.float().",
        ),
        (
            *("source_labels", torch.zeros(2, 27, 20)),
            "of an integer dtype, but got torch.float32. Convert them with source_labels.long().",
        ),
        (
            *("probability_labels", [0]),
            "to be a torch.Tensor, but got list. Convert it with "
            "torch.as_tensor(probability_labels).",
        ),
    ],
)
def test_wrong_types(name: str, value: object, message: str) -> None:
    assert_rejected(name, value, TypeError, message)


def assert_rejected(name: str, value: object, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = draw_step()._asdict()
    with pytest.raises(error) as raised:
        cag_uda_loss(**arguments | {name: value})
    assert str(raised.value) == f"Expected `{name}` {message}"


# Anchor files.

Save = Callable[[Any, Path], None]


save_legacy: Save = functools.partial(torch.save, _use_new_zipfile_serialization=False)


def pickled(protocol: int) -> Save:
    def save(value: object, path: Path) -> None:
        path.write_bytes(pickle.dumps(value, protocol=protocol))

    return save


SAVES_OF_TENSORS: dict[str, Save] = {"torch": torch.save, "torch before 1.6": save_legacy}
SAVES = SAVES_OF_TENSORS | {f"pickle {protocol}": pickled(protocol) for protocol in range(2, 6)}


# The files of ProDA and SePiCo hold tensors.


def proda(values: Tensor) -> object:
    return values


def sepico(values: Tensor) -> object:
    counts = torch.tensor([1234.0, 0.0, 7.0])
    return {"CoVariance": torch.rand(values.shape), "Ave": values, "Amount": counts}


ARRAYS = {"objective_vectors": np.ones((3, 4)), "objective_num": np.ones(3)}
TENSORS = sepico(torch.ones(3, 2))
CONTENTS: list[tuple[Save, object]] = [
    *itertools.product(SAVES.values(), [ARRAYS]),
    *itertools.product(SAVES_OF_TENSORS.values(), [TENSORS, proda(torch.ones(3, 40))]),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "category_anchors"


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_both_layouts(path: Path, save: Save, dtype: str, order: Any) -> None:  # noqa: ANN401
    vectors = np.arange(1.0, 13.0).reshape(4, 3).astype(dtype, order=order)
    expected = torch.arange(1.0, 13.0).reshape(4, 3)
    save(vectors, path)
    anchors = load_category_anchors(path)
    assert anchors.dtype == torch.float32
    assert torch.equal(anchors, expected)
    counts: Any
    for counts in (np.array([3, 1, 3000, 2]), np.array([3.0, 1.0, 3000.0, 2.0])):
        save({"objective_vectors": vectors, "objective_num": counts}, path)
        assert torch.equal(load_category_anchors(str(path)), expected)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_unseen_classes(path: Path, save: Save) -> None:
    vectors = np.array([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0], [np.nan, np.nan]])
    expected = torch.tensor([[1.0, 2.0], [math.nan, math.nan], [3.0, 0.0], [math.nan, math.nan]])
    save(vectors, path)
    torch.testing.assert_close(load_category_anchors(path), expected, equal_nan=True)
    save({"objective_vectors": vectors, "objective_num": np.array([0, 5, 1, 0])}, path)
    expected = torch.tensor([[math.nan, math.nan], [0.0, 0.0], [3.0, 0.0], [math.nan, math.nan]])
    torch.testing.assert_close(load_category_anchors(path), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_reads_tensors(path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(24, dtype=dtype).reshape(4, 6)
    for tensor in (whole + 1, whole[1:3, 2:], (whole + 1).T, torch.nn.Parameter(whole + 1)):
        torch.save(tensor, path)
        assert torch.equal(load_category_anchors(path), tensor.float())
        counts = torch.arange(len(tensor))
        torch.save({"objective_vectors": tensor, "objective_num": counts}, path)
        anchors = load_category_anchors(path)
        assert anchors[0].isnan().all()
        assert torch.equal(anchors[1:], tensor[1:].float())


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_reads_arrays_of_numpy_1_and_2(path: Path, module: bytes) -> None:
    data = pickle.dumps(np.ones((2, 3)), protocol=2)
    assert b"multiarray" in data
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        data = data.replace(name, module)
    path.write_bytes(data)
    assert torch.equal(load_category_anchors(path), torch.ones(2, 3))


def test_round_trip_with_the_accumulator(path: Path) -> None:
    accumulator = anchorda.CategoryAnchors(3, 2)
    accumulator.update(torch.randn(5, 2), torch.tensor([0, 0, 2, 2, 2]))
    torch.save(accumulator.compute(), path)
    torch.testing.assert_close(
        load_category_anchors(path), accumulator.compute(), rtol=0, atol=0, equal_nan=True
    )


def test_the_released_file() -> None:
    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "released_category_anchors"
    if not path.is_file():
        pytest.skip("the released anchor file is not beside this repository")
    anchors = load_category_anchors(path)
    assert anchors.shape == (19, 256)
    norms = anchors.norm(dim=1)
    nearest = (torch.cdist(anchors, anchors) + 100 * torch.eye(19)).amin(dim=1)
    extremes = [norms.min(), norms.max(), nearest.min(), nearest.max()]
    np.testing.assert_allclose(extremes, [6.8, 12.4, 4.8, 7.9], atol=0.05)


class Payload:
    """Unpickled, it calls the function: in a plain pickle load, it would run."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the call that a pickle makes."""
        return self.call


def payloads(marker: str) -> dict[str, tuple[object, str]]:
    """Return objects that write the file when unpickled, and the global to be named."""
    system = Payload(os.system, f"touch {marker}"), f"{os.system.__module__}.system"
    return {
        "os.system": system,
        "exec": (Payload(exec, f"open({marker!r}, 'w').close()"), ".exec"),
        "getattr": (Payload(getattr(Path(marker), "touch")), "getattr"),  # noqa: B009
        "in a dict": (
            {"objective_vectors": np.ones((2, 3)), "objective_num": system[0]},
            system[1],
        ),
        "as a key": ({"objective_vectors": 0, (1, system[0]): 0}, system[1]),
        "in an array": (np.array([[system[0]]], dtype=object), system[1]),
        "NumPy's own": (Payload(np.memmap, marker, "f8", "w+", 0, (2, 3)), "memmap"),
        "torch's own": (Payload(torch.save, torch.ones(1), marker), "torch.serialization.save"),
    }


def load_anything(path: Path, save: Save) -> None:
    if save in (torch.save, save_legacy):
        torch.load(path, weights_only=False)
    else:
        with path.open("rb") as file:
            pickle.load(file)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("name", payloads(""))
def test_runs_nothing(path: Path, tmp_path: Path, save: Save, name: str) -> None:
    marker = tmp_path / "marker"
    value, named = payloads(str(marker))[name]
    save(value, path)
    marker.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="nothing of it was run") as raised:
        load_category_anchors(path)
    assert not marker.exists()
    assert str(path) in str(raised.value)
    assert named in str(raised.value)
    load_anything(path, save)
    assert marker.exists(), "a payload that does nothing proves nothing"


@pytest.mark.parametrize("save", SAVES_OF_TENSORS.values(), ids=SAVES_OF_TENSORS)
@pytest.mark.parametrize("keys", [("objective_vectors", "objective_num"), ("Ave", "Amount")])
def test_runs_nothing_beside_a_tensor(path: Path, save: Save, keys: tuple[str, str]) -> None:
    save({keys[0]: torch.ones(2, 3), keys[1]: Payload(exec, "1 / 0")}, path)
    with pytest.raises(ValueError, match=r"it names \w+\.exec, which no array needs"):
        load_category_anchors(path)
    with pytest.raises(ZeroDivisionError):
        torch.load(path, weights_only=False)


def by_hand(command: bytes) -> dict[str, bytes]:
    """Return pickles that no pickler writes, of os.system(command)."""
    module = os.system.__module__.encode()
    text = b"X" + len(command).to_bytes(4, "little") + command
    name = b"\x8c" + bytes([len(module)]) + module + b"\x8c\x06system\x93"
    return {
        "REDUCE": b"c" + module + b"\nsystem\n(" + text + b"tR.",
        "INST": b"(" + text + b"i" + module + b"\nsystem\n.",
        "OBJ": b"(c" + module + b"\nsystem\n" + text + b"o.",
        "STACK_GLOBAL": b"\x80\x04" + name + text + b"\x85R.",
        "after the numbers": b"\x80\x02"
        + pickle.dumps(np.ones((2, 3)), 2)[2:-1]
        + b"0c"
        + module
        # The array is dropped, the call is made, and its result is what is left.
        + b"\nsystem\n"
        + text
        + b"\x85R.",
    }


@pytest.mark.parametrize("name", by_hand(b""))
def test_runs_nothing_that_is_pickled_by_hand(path: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    path.write_bytes(by_hand(f"touch {marker}".encode())[name])
    with pytest.raises(ValueError, match=r"it names \w+\.system, which no array needs"):
        load_category_anchors(path)
    assert not marker.exists()
    with path.open("rb") as file:
        pickle.load(file)
    assert marker.exists(), "a payload that does nothing proves nothing"


# The names that arrays need, used for something else: none of these calls is made.
MISUSED = {
    "an array over foreign memory": b"cnumpy\nndarray\n(K\x02K\x03\x86X\x02\x00\x00\x00f8tR.",
    "a codec": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zliptR.",
    "a dtype of objects": pickle.dumps(np.array([[1.5]]), protocol=2).replace(b"f8", b"O8"),
    "a subarray dtype": pickle.dumps(np.ones((1, 1)), protocol=2).replace(b"f8", b"V8"),
    "a shape beyond the data": pickle.dumps(np.ones((2, 3)), protocol=2).replace(
        b"K\x02K\x03\x86", b"K\x02K\x7f\x86"
    ),
    "a global for an array": b"cnumpy\nndarray\n.",
    "an attribute of a global": b"cnumpy\ndtype\n}X\x04\x00\x00\x00nameK\x01sb.",
    "a storage without an archive": b"\x80\x02X\x07\x00\x00\x00storage\x85Q.",
}


@pytest.mark.parametrize("name", MISUSED)
def test_misused_names_of_arrays(path: Path, name: str) -> None:
    path.write_bytes(MISUSED[name])
    with pytest.raises(ValueError, match="to hold category anchors"):
        load_category_anchors(path)


def test_registered_extensions_are_refused(path: Path, tmp_path: Path) -> None:
    """An earlier unpickling may have left what an extension code stands for in a cache."""
    witness = tmp_path / "witness"
    payload = b"\x80\x02\x82\x05X" + len(str(witness)).to_bytes(4, "little")
    payload += str(witness).encode() + b"\x85R."
    copyreg._extension_cache[5] = os.mkdir  # type: ignore[attr-defined]
    try:
        path.write_bytes(payload)
        with pytest.raises(ValueError, match="it names the pickle extension 5; nothing of it was"):
            load_category_anchors(path)
        assert not witness.exists()
        pickle.loads(payload)  # the payload does bite
        assert witness.exists()
    finally:
        del copyreg._extension_cache[5]  # type: ignore[attr-defined]


def test_a_tensor_larger_than_its_data_is_refused(path: Path) -> None:
    torch.save(torch.zeros(1, 1).expand(1000, 1000), path)
    with pytest.raises(ValueError, match="it holds a tensor that is larger than its data"):
        load_category_anchors(path)


def test_keys_are_named_in_few_words(path: Path) -> None:
    path.write_bytes(pickle.dumps({"k" * 10**6: 1, (1, 2): 2}, protocol=2))
    with pytest.raises(ValueError, match=r"it is a dict of other keys: 'k{40}'") as raised:
        load_category_anchors(path)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("stride", "offset", "key"),
    [
        (b"M\xff\xff", b"K\x00", b"0"),
        (b"K\x03", b"K\x01", b"0"),
        (b"K\x03", b"K\x00", b"1"),
        (b"J\xff\xff\xff\xff", b"K\x00", b"0"),
        (b"\x8a\x08" + 7 * b"\xff" + b"\x3f", b"K\x00", b"0"),
    ],
)
def test_a_tensor_reaches_no_further_than_its_data(
    path: Path, stride: bytes, offset: bytes, key: bytes
) -> None:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key
    storage += b"X\x03\x00\x00\x00cpuK\x06tQ"
    rest = b"\x89ccollections\nOrderedDict\n)RtR."

    def write(offset: bytes, stride: bytes) -> None:
        size = b"(K\x02K\x03t(" + stride + b"K\x01t"
        data = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + rest
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/data/0", np.arange(6, dtype="<f4").tobytes())

    write(offset, stride)
    with pytest.raises(ValueError, match="it is damaged"):
        load_category_anchors(path)
    if key == b"0":
        write(b"K\x00", b"K\x03")
        assert torch.equal(load_category_anchors(path), torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(("save", "content"), CONTENTS)
def test_truncated(path: Path, save: Save, content: object) -> None:
    save(content, path)
    data = path.read_bytes()
    for length in [0, 1, 2, 3, 10, 15, *range(37, len(data) - 60, 37), len(data) - 60]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="to hold category anchors") as raised:
            load_category_anchors(path)
        assert str(path) in str(raised.value)
        if content is ARRAYS:
            assert ("it is damaged" if length else "it is empty") in str(raised.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2], "it holds list in place of an array of numbers"),
        (None, "it holds NoneType in place of an array of numbers"),
        ({"vectors": 1}, "it is a dict of other keys: 'vectors'"),
        (
            {"objective_vectors": np.ones((2, 3))},
            "it is a dict of other keys: 'objective_vectors'",
        ),
        (np.ones(3), "its anchors are torch.float64 of shape (3,)"),
        (np.ones((1, 2, 3)), "its anchors are torch.float64 of shape (1, 2, 3)"),
        (np.array(1.0), "its anchors are torch.float64 of shape ()"),
        (np.ones((2, 3), np.int32), "its anchors are torch.int64 of shape (2, 3)"),
        (np.array([["a"]]), "it holds an array of another kind in place of an array of numbers"),
        (
            np.ones((2, 3), np.complex128),
            "it holds an array of another kind in place of an array of numbers",
        ),
        (
            {"objective_vectors": np.ones((2, 3)), "objective_num": np.ones(3)},
            "its counts are of shape (3,) for 2 anchors",
        ),
        (
            {"objective_vectors": np.ones((2, 3)), "objective_num": [1, 2]},
            "it holds list in place of an array of numbers",
        ),
        (np.array([[1.0, np.nan]]), "some of its anchors are not finite"),
        (np.array([[1.0, np.inf]]), "some of its anchors are not finite"),
        (np.array([[1e300, 1.0]]), "some of its anchors are not finite"),
    ],
)
@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_wrong_content(path: Path, save: Save, value: object, reason: str) -> None:
    save(value, path)
    with pytest.raises(ValueError, match="Expected") as raised:
        load_category_anchors(path)
    assert str(raised.value) == (
        f"Expected {str(path)!r} to hold category anchors, an array (C, D) or a dict with "
        "`objective_vectors` (C, D) and `objective_num` (C,), or with `Ave` (C, D) and `Amount` "
        f"(C,), but {reason}."
    )


def written(save: Callable[..., object], *values: object, **named: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *values, **named)
    return buffer.getvalue()


STATE = anchorda.CategoryAnchors(2, 3).state_dict()
NPY = written(np.save, np.ones((2, 3)))
NPZ = written(np.savez, centers=np.ones((2, 3)), counts=np.ones(2))
OTHER_FILES: list[tuple[bytes, str]] = [
    (b"", "it is empty."),
    (b"PK\x03\x04" + bytes(100), "it is damaged: "),
    (b"." + bytes(100), "it is damaged: "),
    (b"\x8e" + b"\xff" * 8, "it is damaged: "),  # a string of 2⁶⁴ − 1 bytes
    (b"\x96" + b"\xff" * 7 + b"\x0f", "it is damaged: "),  # a bytearray of 2⁶⁰ bytes
    (NPY, "it is a NumPy .npy file. Pass numpy.load(path) to CategoryAnchors.from_centroids."),
    (NPZ, "it is a NumPy .npz file of 'centers', 'counts'. Pass one of its arrays to "),
    (
        written(lambda buffer: torch.save(STATE, buffer)),
        "it is the state_dict of a module, which its load_state_dict takes",
    ),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
    (b"\n<!DOCTYPE html><html></html>", "it is a page of HTML or XML"),
    (b'{"anchors": [[1.0, 2.0]]}', "it is text, such as JSON."),
    (b"\xef\xbb\xbf[[1.0, 2.0]]", "it is text, such as JSON."),
    (b'\x40\x00\x00\x00\x00\x00\x00\x00{"anchors": {}}', "it is a safetensors file."),
    (b"\x89PNG\r\n", "it is a PNG image."),
    (b"\x1f\x8b\x08" + bytes(20), "it is compressed by gzip. Unpack it first."),
]


@pytest.mark.parametrize(("content", "reason"), OTHER_FILES)
def test_a_file_of_another_format_is_named(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"(C,), but {reason}")):
        load_category_anchors(path)


@pytest.mark.parametrize("path", [None, 0, b"anchors", ["anchors"]])
def test_what_is_no_path(path: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"Expected `path` to be a str or os\.PathLike, but got"):
        load_category_anchors(path)
    with pytest.raises(ValueError, match="Expected `path` without null characters"):
        load_category_anchors("a\0b")


def from_gpu(path: Path) -> None:
    """Rewrite a file as torch writes it where its tensors are on a GPU: the location differs."""
    old, new = (b"X" + bytes([len(name), 0, 0, 0]) + name for name in (b"cpu", b"cuda:0"))
    if not zipfile.is_zipfile(path):
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled_name,) = [name for name in members if name.endswith("data.pkl")]
    assert old in members[pickled_name]
    members[pickled_name] = members[pickled_name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("save", SAVES_OF_TENSORS.values(), ids=SAVES_OF_TENSORS)
@pytest.mark.parametrize("layout", [proda, sepico])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_reads_proda_and_sepico(
    path: Path, save: Save, layout: Callable[[Tensor], object], device: str
) -> None:
    values = torch.randn(3, 5)
    values[1] = 0
    save(layout(values), path)
    if device != "cpu":
        from_gpu(path)
        if not torch.cuda.is_available():  # torch takes the file for one from a GPU
            with pytest.raises((RuntimeError, pickle.UnpicklingError), match="on a CUDA device"):
                torch.load(path, weights_only=True)
    anchors = load_category_anchors(path)
    assert (anchors.dtype, anchors.device.type) == (torch.float32, "cpu")
    assert torch.equal(anchors[[0, 2]], values[[0, 2]])
    assert anchors[1].isnan().all()


@pytest.mark.parametrize("save", SAVES_OF_TENSORS.values(), ids=SAVES_OF_TENSORS)
def test_tensors_that_share_their_storage(path: Path, save: Save) -> None:
    whole = torch.arange(1.0, 13.0).reshape(4, 3)
    save({"objective_vectors": whole[1:], "objective_num": whole[:3, 0]}, path)
    assert torch.equal(load_category_anchors(path), whole[1:])


def test_a_size_in_an_old_file_decides_nothing(path: Path) -> None:
    """A storage that says it is as large as memory is read no further than the file goes."""
    save_legacy(torch.ones(2, 3), path)
    data = path.read_bytes()
    size, numbers = data[:-24][-8:], data[-24:]
    assert size == (6).to_bytes(8, "little")
    for claimed in (0, 7, 2**40, 2**62, 2**64 - 1):
        path.write_bytes(data[:-32] + claimed.to_bytes(8, "little") + numbers)
        with pytest.raises(ValueError, match="it ends within its numbers"):
            load_category_anchors(path)


def test_a_compressed_archive_is_refused(path: Path) -> None:
    torch.save(torch.ones(2, 3), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="it is compressed, which torch never does"):
        load_category_anchors(path)


def test_a_checkpoint_of_a_network_is_refused(path: Path) -> None:
    network = torch.nn.Linear(2, 3)
    state = {"model_state": network.state_dict(), "objective_vectors": torch.ones(3, 2)}
    torch.save({"Deeplab": state, "iter": 7}, path)
    with pytest.raises(ValueError, match="it is a dict of other keys: 'Deeplab', 'iter'"):
        load_category_anchors(path)


def test_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_category_anchors(path)


@pytest.mark.parametrize(
    ("save", "content"), [(pickled(2), ARRAYS), (torch.save, TENSORS), (save_legacy, TENSORS)]
)
def test_any_byte_changed_is_an_anchor_or_a_value_error(
    path: Path, save: Save, content: object
) -> None:
    save(content, path)
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        changed = bytearray(data)
        changed[generator.integers(len(data))] = generator.integers(256)
        path.write_bytes(changed)
        try:
            outcomes.add(load_category_anchors(path).ndim)
        except ValueError as error:
            outcomes.add(str(error).startswith(f"Expected {str(path)!r} to hold"))
    assert outcomes == {2, True}
