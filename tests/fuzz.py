"""Random calls of every public function and class, against the oracles.

    python -m tests.fuzz --calls 100000 --seed 0

A call has arguments that fit each other, in any form that a user may give them: dtypes, layouts,
ranks, NumPy numbers and arrays, tensors without dimensions; state moved, copied, pickled, cast or
reloaded on the way. In half of the calls one or two arguments are then replaced by something else.
Such a call either returns what the oracle says of its arguments, or raises ``ValueError`` or
``TypeError`` in the form "Expected …, but got …"; a call that was left alone returns. Anything else
is a fault and is printed with the seed that repeats it: ``--seed SEED --calls 1``.

The unit tests run a few hundred calls, and require that every public name has a target here.
"""

import argparse
import collections
import copy
import decimal
import fractions
import io
import math
import pickle
import random
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import LAYOUTS, Array, Labels, flat, lay_out, rows

Arguments = dict[str, Any]

INTEGERS = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHOICES = {
    "mode": ["nearest", "majority"],
    "rule": ["agree", "union"],
    "distance": ["euclidean", "squared", "smooth_l1"],
    "average": ["pixel", "class"],
    "similarity": ["euclidean", "squared", "cosine", "dot"],
    "of": ["output", "input"],
}
# The form of every error of the public boundary.
FORM = re.compile(r"Expected .+, but (got|it is|it holds|its|it names|some) .+", re.DOTALL)


class FaultError(AssertionError):
    """A result or an error that the documentation does not promise."""


@dataclass
class Draw:
    """Random values, from one seed."""

    seed: int
    rng: random.Random = field(init=False)
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        """Seed both generators."""
        self.rng = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.scale = self.rng.choice([1.0, 1.0, 1.0, 1e-3, 1e3])

    def one(self, *values: Any) -> Any:
        """Return one of the values."""
        return self.rng.choice(values)

    def often(self, share: float = 0.5) -> bool:
        """Return True in this share of the calls."""
        return self.rng.random() < share

    def shape(self) -> tuple[int, ...]:
        """Return a label map's shape of any rank, now and then without a pixel."""
        spatial = self.one((), (), (7,), (3, 4), (5, 2), (1, 1), (2, 3, 2), (0,), (4, 0))
        return (self.one(1, 1, 2, 3, 0), *spatial)

    def features(self, shape: Sequence[int], dim: int, *, scale: float | None = None) -> Tensor:
        """Return features (N, D, *) of any dtype and layout, some with a non-finite value."""
        n, *spatial = shape
        values = torch.randn(n, dim, *spatial) * (self.scale if scale is None else scale)
        if values.numel() and self.often(0.1):
            position = self.rng.randrange(values.numel())
            values.view(-1)[position] = self.one(math.nan, math.inf, -math.inf)
        values = lay_out(values.to(self.one(*FLOATS)), self.one(*LAYOUTS))
        return values.requires_grad_() if self.often(0.3) and values.is_leaf else values

    def probabilities(self, shape: Sequence[int], num_classes: int) -> Tensor:
        """Return probabilities (N, C, *) of any dtype and layout."""
        logits = self.features(shape, num_classes, scale=1.0).detach()
        return logits.nan_to_num(0.0, 0.0, 0.0).softmax(1)

    def labels(self, shape: Sequence[int], num_classes: int) -> Tensor:
        """Return labels (N, *) of any integer dtype and layout, some of them ignored."""
        dtype = self.one(*INTEGERS)
        labels = torch.randint(num_classes, tuple(shape))
        ignored = self.one(-1, 250, 255, num_classes, 2**40, 100)
        labels = torch.where(torch.rand(*shape) < 0.8, labels, ignored)
        limits = torch.iinfo(dtype)
        if not limits.min <= ignored <= limits.max:
            labels = torch.where(labels == ignored, 100, labels)
        labels = labels.to(dtype)
        layout = self.one(*LAYOUTS)
        # Not all copies know the widest unsigned dtypes.
        return labels if dtype in INTEGERS[5:] else lay_out(labels, layout)

    def anchors(self, num_classes: int, dim: int, *, several: bool = True) -> Tensor:
        """Return anchors (C, D) or (C, M, D), now and then with unseen classes."""
        shape = (num_classes, 2, dim) if several and self.often(0.2) else (num_classes, dim)
        anchors = 2 * self.scale * torch.randn(*shape)
        if self.often(0.3):
            anchors[self.rng.randrange(num_classes)] = self.one(math.nan, math.inf)
        return anchors.to(self.one(torch.float32, torch.float32, torch.float64))

    def integer(self, value: int) -> Any:
        """Return the same integer in any form."""
        forms: list[Callable[[int], Any]] = [int, int, np.int64, np.array, torch.tensor]
        if 0 <= value < 128:
            forms += [np.uint8, lambda v: torch.tensor(v, dtype=torch.uint16)]
        return self.one(*forms)(value)

    def number(self, value: float) -> Any:
        """Return the same number in any form; it is exact in half precision."""
        forms: list[Callable[[float], Any]] = [
            *(float, float, np.float32, np.float64, np.float16, np.array, torch.tensor),
            fractions.Fraction,
            lambda v: torch.tensor(v, dtype=torch.float16, requires_grad=True),
        ]
        if value == int(value):
            forms += [int, np.int32]
        return self.one(*forms)(value)

    def per_class(self, values: Tensor) -> Any:
        """Return the same values (C,) in any form."""
        array = values.numpy()
        forms: list[Callable[[], Any]] = [
            *(lambda: values, lambda: values.double(), lambda: array, lambda: array.astype(">f8")),
            *(lambda: list(map(float, array)), lambda: tuple(array), lambda: frozen(array)),
            *(lambda: np.concatenate([array, array])[::-1][-len(array) :][::-1].copy()[::1],),
        ]
        return self.one(*forms)()

    def choice(self, name: str) -> Any:
        """Return one of the choices of an argument, also as NumPy's string."""
        value = self.one(*CHOICES[name])
        return self.one(str, str, np.str_)(value)

    def moved(self, module: Any) -> Any:
        """Return the same state after something that users do to modules."""
        kind = self.one(*range(11))
        if kind == 0:
            return copy.deepcopy(module)
        if kind == 1:
            return pickle.loads(pickle.dumps(module))
        if kind == 2:
            buffer = io.BytesIO()
            torch.save(module.state_dict(), buffer)
            buffer.seek(0)
            other = copy.deepcopy(module)
            other.load_state_dict(torch.load(buffer, weights_only=True))
            return other
        operations: list[Callable[[nn.Module], object]] = [
            *(nn.Module.half, nn.Module.double, nn.Module.bfloat16, nn.Module.train),
            *(nn.Module.eval, nn.Module.share_memory),
            *(lambda m: m.to("cpu"), lambda m: m.requires_grad_(False)),
        ]
        if not any(buffer.is_meta for buffer in module.buffers()):
            operations[kind - 3](nn.ModuleList([module]))
        return module


def frozen(array: np.ndarray) -> np.ndarray:
    """Return a copy that may not be written to."""
    copied = array.copy()
    copied.flags.writeable = False
    return copied


# What a call is replaced with.


def wrong_tensors(draw: Draw, value: Tensor) -> list[Callable[[], Any]]:
    """Return a tensor other than the right one; some of them fit as well."""
    plain = value.detach()
    wide = plain.long() if not plain.is_floating_point() else plain
    dtype = draw.one(*INTEGERS, *FLOATS, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return [
        *(lambda: None, lambda: wide.tolist(), lambda: wide.float().numpy(), lambda: "text"),
        *(lambda: wide.to("meta"), lambda: wide.to(dtype), lambda: wide[None]),
        *(lambda: wide[..., None], lambda: wide.unsqueeze(min(1, wide.ndim)), lambda: wide[:0]),
        *(lambda: wide[0], lambda: wide[:1], lambda: wide[..., :1], lambda: wide[:, :0]),
        *(lambda: wide.flatten(), lambda: torch.cat([wide, wide])),
        *(lambda: torch.cat([wide, wide], dim=-1), lambda: wide.movedim(-1, 0)),
        *(lambda: wide.movedim(min(1, wide.ndim - 1), -1), lambda: wide.float().to_sparse()),
        *(lambda: torch.nested.nested_tensor([wide.float()], layout=torch.jagged),),
        *(lambda: torch.quantize_per_tensor(wide.float(), 0.1, 3, torch.quint8),),
        *(lambda: wide.new_zeros(()), lambda: 3, lambda: [wide]),
        *(lambda: nn.Parameter(wide.float()), lambda: wide.float() * math.nan, lambda: -wide),
        *(lambda: wide * 0,),
    ]


WRONG_NUMBERS: list[Any] = [
    *(None, "1", b"1", [1], (1, 2), {}, True, False, np.True_, 1j, math.nan, math.inf, -math.inf),
    *(-1, 0, 1, 2, 0.5, -0.5, 1.5, 10**400, -(10**400), 2**63, 2**64, -(2**63), 255, 256, 7, 1e-40),
    *(np.float64("nan"), np.float16(2), np.int8(-3), np.array([1]), np.array([[0.5]])),
    *(
        np.array("1"),
        torch.tensor([1]),
        torch.tensor([0.5, 1.0]),
        torch.tensor(True),
        torch.tensor(2j),
    ),
    *(torch.tensor(1.0, device="meta"), decimal.Decimal("0.5"), fractions.Fraction(1, 3), object()),
    *(np.datetime64("2026-11-27"), range(3), torch.float32, slice(None)),
]
WRONG_STRINGS: list[Any] = [
    *(None, "", "Agree", "euclidean ", b"agree", 1, ["agree"], ("nearest",), np.array(["a", "b"])),
    *(torch.zeros(2), math.nan, {"a": 1}, "class", "mean", "\0", "squared", "input"),
]
WRONG_SIZES: list[Any] = [
    *(None, (), (2,), (2, 2), (2, 2, 2), (0, 2), (-1, 2), (2.0, 2.0), ("2", "2"), "22", 2, [3, 1]),
    *(np.array([2, 3]), torch.tensor([1, 2]), torch.Size([3, 2]), (np.int32(2), 2), (True, 2)),
    *(np.array([[2, 2]]), {2: 2}, (None, 2), (2**63, 1), range(1, 3), (math.nan, 1)),
]


def other(draw: Draw, name: str, value: Any) -> Any:
    """Return something else in place of an argument."""
    if isinstance(value, Tensor) and value.ndim > 0:
        if draw.often(0.15):
            return draw.one(*WRONG_NUMBERS)
        try:
            return draw.one(*wrong_tensors(draw, value))()
        except Exception:  # torch does not make it
            return None
    if name in CHOICES:
        return draw.one(*WRONG_STRINGS)
    if name == "size":
        return draw.one(*WRONG_SIZES)
    if isinstance(value, np.ndarray) and value.ndim > 0:
        dtype = draw.one(bool, "U4", object, complex, np.longdouble, np.int64)
        if value.dtype.kind in "UO":
            dtype = object
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = [value.astype(dtype), value[:-1], value[None], None, value[::-1]]
        return draw.one(*changed)
    return draw.one(*WRONG_NUMBERS)


# Values as the oracles take them. What cannot be converted should not have been accepted.


def scalar(value: Any, types: tuple[type, ...], dtypes: Sequence[torch.dtype]) -> Any:
    """Return a Python number, also from an array or a tensor without dimensions."""
    kinds = "iuf" if torch.float32 in dtypes else "iu"
    if isinstance(value, types) and not isinstance(value, (bool, np.bool_)):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in kinds:
        return value.item()
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype in dtypes:
        return value.item()
    raise FaultError(f"accepted {value!r} as a number")


def integer(value: Any) -> int:
    """Return an integer that may be given as one."""
    return int(scalar(value, (int, np.integer), INTEGERS))


def number(value: Any) -> float:
    """Return a number that may be given as one."""
    types = int, float, np.integer, np.floating, fractions.Fraction
    try:
        return float(scalar(value, types, FLOATS + INTEGERS))
    except OverflowError:
        return math.copysign(math.inf, value)


def temperature_of(arguments: Arguments) -> float:
    """Return the temperature, which float32 must be able to divide by."""
    temperature = number(arguments["temperature"])
    if temperature < 1e-30:
        raise OverflowError("beyond float32")
    return temperature


def per_class(value: Any, num_classes: int) -> list[float]:
    """Return one number for each class, from one for all or one for each."""
    if isinstance(value, (list, tuple)):
        values = [number(v) for v in value]
    elif isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1:
        if isinstance(value, Tensor) and value.dtype not in FLOATS + INTEGERS:
            raise FaultError(f"accepted {value.dtype} for each class")
        values = [number(v) for v in value]
    else:
        values = [number(value)] * num_classes
    if len(values) != num_classes:
        raise FaultError(f"accepted {len(values)} values for {num_classes} classes")
    return [float(np.float32(v)) for v in values]


def tensor(value: Any, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Return a dense tensor of one of these dtypes."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes or value.layout != torch.strided:
        raise FaultError(f"accepted {type(value).__name__} {getattr(value, 'dtype', '')}")
    return value.detach()


def x_of(value: Any) -> Array:
    """Return rows of features or logits."""
    values = tensor(value, FLOATS)
    if values.shape[1] == 0:
        return np.zeros((values.shape[0] * math.prod(values.shape[2:]), 0))
    return rows(values)


def y_of(value: Any, features: Any) -> Labels:
    """Return labels in the order of the rows, of the shape of the features."""
    labels = tensor(value, INTEGERS)
    if tuple(labels.shape) != (features.shape[0], *features.shape[2:]):
        raise FaultError(f"accepted labels {tuple(labels.shape)} for {tuple(features.shape)}")
    return flat(labels)


def a_of(value: Any) -> Array:
    """Return anchors (C, D) or (C, M, D) as float64."""
    if isinstance(value, np.ndarray):
        return np.asarray(value, np.float64)
    return np.asarray(tensor(value, FLOATS).double().numpy())


def distances_of(x: Array, a: Array) -> Array:
    """Return distances to the nearest of each class's anchors."""
    if a.ndim == 2:
        return oracles.anchor_distances(x, a)
    if a.shape[1] == 0:
        raise FaultError(f"accepted anchors {a.shape}")
    of_each = oracles.anchor_distances(x, a.reshape(-1, a.shape[2])).reshape(len(x), *a.shape[:2])
    return np.asarray(np.where(np.isnan(of_each), np.inf, of_each).min(axis=2))


# What is compared.


def close(actual: Any, expected: Any, scale: float = 1.0, tolerance: float = 2e-5) -> None:
    """Reject a result that differs; what is not finite only has to be so in both."""
    got = (
        actual.detach().double().numpy()
        if isinstance(actual, Tensor)
        else np.asarray(actual, float)
    )
    want = np.asarray(expected, np.float64)
    if got.shape != want.shape:
        raise FaultError(f"shape {got.shape} instead of {want.shape}")
    finite = np.isfinite(want)
    if (np.abs(want[finite]) > 1e37).any():
        raise OverflowError("beyond float32")
    both = finite & np.isfinite(got)
    if not np.array_equal(finite, np.isfinite(got)):
        raise FaultError(f"{got[~both].flat[0]} instead of {want[~both].flat[0]}")
    if not np.allclose(got[both], want[both], rtol=tolerance, atol=tolerance * scale):
        worst = np.abs(got[both] - want[both]).argmax()
        raise FaultError(f"{got[both][worst]!r} instead of {want[both][worst]!r}")


def same(actual: Any, expected: Any) -> None:
    """Reject integers that are not equal."""
    got = actual.detach().long().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    if not np.array_equal(got, np.asarray(expected)):
        raise FaultError(f"{got.tolist()} instead of {np.asarray(expected).tolist()}")


# Targets, each in three steps: arguments that fit each other, of which some come back as something
# else; the call; the check of its result.

Steps = Generator[Any, Any, None]
Target = Callable[[Draw], Steps]
TARGETS: dict[str, Target] = {}
# The public names that a target is about.
NAMES: dict[str, tuple[str, ...]] = {}
# What is not replaced: what the check knows of a file, and what a stage's network is called with.
ALONE = {
    "released.load_category_anchors": ("damage", "anchors"),
    "StageLabeler": ("images", "feature_dim", "num_classes"),
}
RESULTS = "AnchorHealth ClassMoments ClassSums PrecisionCoverage PseudoLabels StageLabels"
PLOTS = "class_colors plot_anchor_distances plot_coverage_and_precision plot_features plot_labels"
NOT_CALLED = {
    **dict.fromkeys([*RESULTS.split(), "released.CagUdaLoss"], "what the functions return"),
    **dict.fromkeys(
        [f"plots.{name}" for name in (*PLOTS.split(), "plot_scores")],
        "draws on an Axes; tests/test_plots.py",
    ),
}


def target(*names: str) -> Callable[[Target], Target]:
    """Register a function as the target of public names."""

    def register(steps: Target) -> Target:
        TARGETS[names[0]], NAMES[names[0]] = steps, names
        return steps

    return register


def classes_and_dim(draw: Draw, least: int = 1) -> tuple[int, int]:
    """Return the numbers of classes and of features, as text."""
    return draw.rng.randint(least, 5), draw.rng.randint(1, 5)


def sums_arguments(d: Draw) -> Arguments:
    """Return features, labels, and the number of classes."""
    (c, dim), shape = classes_and_dim(d), d.shape()
    return {
        "features": d.features(shape, dim),
        "labels": d.labels(shape, c),
        "num_classes": d.integer(c),
    }


@target("class_sums")
def _(d: Draw) -> Steps:
    a = yield sums_arguments(d)
    result = anchorda.class_sums(**a)
    yield
    x, y = x_of(a["features"]), y_of(a["labels"], a["features"])
    sums, counts = oracles.class_sums(x, y, integer(a["num_classes"]))
    close(result.sums, sums, d.scale, 1e-10)
    same(result.counts, counts)


@target("image_centroids")
def _(d: Draw) -> Steps:
    a = yield {
        **sums_arguments(d),
        "min_pixels": d.integer(d.one(1, 2, 3)),
        "ignore_index": d.integer(d.one(255, -1, 100)),
    }
    result = anchorda.image_centroids(**a)
    yield
    features, labels = tensor(a["features"], FLOATS), tensor(a["labels"], INTEGERS)
    y_of(labels, features)
    c, least, ignored = (integer(a[k]) for k in ("num_classes", "min_pixels", "ignore_index"))
    for n in range(len(features)):
        x, y = x_of(features[n : n + 1]), flat(labels.long()[n : n + 1])
        means, classes = oracles.image_centroids(x, y, c, least, ignored)
        close(result[0][n].T, means, d.scale)
        same(result[1][n], classes)


@target("keep_correct")
def _(d: Draw) -> Steps:
    (c, _), shape = classes_and_dim(d, 2), d.shape()
    a = yield {
        "labels": d.labels(shape, c),
        "logits": d.features(shape, c),
        "ignore_index": d.integer(d.one(127, 100, 99)),
    }
    result = anchorda.keep_correct(**a)
    yield
    y, z = y_of(a["labels"], a["logits"]), x_of(a["logits"])
    if result.dtype != a["labels"].dtype:
        raise FaultError(f"{result.dtype} instead of {a['labels'].dtype}")
    same(flat(result), oracles.keep_correct(y, z, integer(a["ignore_index"])))


@target("resize_labels")
def _(d: Draw) -> Steps:
    shape = tuple(max(1, s) for s in d.shape())
    size = tuple(d.rng.randint(1, 9) for _ in shape[1:])
    a = yield {
        "labels": d.labels(shape, 4),
        "size": d.one(tuple, list, torch.Size, np.array if size else tuple)(size),
        "mode": d.choice("mode"),
        "min_ratio": d.number(d.one(0.75, 0.5, 0.0, 1.0)),
        "ignore_index": d.integer(d.one(127, 100, 0)),
    }
    result = anchorda.resize_labels(**a)
    yield
    labels, size = tensor(a["labels"], INTEGERS), tuple(integer(s) for s in a["size"])
    if tuple(result.shape) != (len(labels), *size) or result.dtype != labels.dtype:
        raise FaultError(f"{result.dtype} {tuple(result.shape)}")
    ratio, ignored = number(a["min_ratio"]), integer(a["ignore_index"])
    for image, resized in zip(labels.long().numpy(), result.long().numpy(), strict=True):
        if a["mode"] == "nearest":
            same(resized, oracles.resize_nearest(image, size))
        else:
            same(resized, oracles.resize_majority(image, size, ratio, ignored))


@target("CategoryAnchors", "all_reduce")
def _(d: Draw) -> Steps:
    (c, dim), first, second = classes_and_dim(d), d.shape(), d.shape()
    options: Arguments = d.one(
        {},
        {"max_count": d.integer(d.one(1, 5, 100))},
        {"momentum": d.number(d.one(0.25, 1.0, 0.0))},
    )
    a = yield {
        "num_classes": d.integer(c),
        "feature_dim": d.integer(dim),
        **options,
        "features": d.features(first, dim),
        "labels": d.labels(first, c),
        "more_features": d.features(second, dim),
        "more_labels": d.labels(second, c),
    }
    settings = {k: v for k, v in a.items() if "features" not in k and "labels" not in k}
    anchors = anchorda.CategoryAnchors(**settings)
    anchors.update(a["features"], a["labels"])
    anchors = d.moved(anchors)
    if d.often(0.3):
        anchorda.all_reduce(anchors)  # in a single process
    if d.often() or not isinstance(a["num_classes"], int):
        anchors.update(a["more_features"], a["more_labels"])
    else:
        sums, counts = anchorda.class_sums(a["more_features"], a["more_labels"], a["num_classes"])
        if d.often():
            anchors.update_sums(sums.numpy(), counts.numpy())
        else:
            anchors.update_sums(sums, counts)
    empty = anchorda.CategoryAnchors(**settings)
    empty.merge(anchors)
    if not torch.equal(empty.counts, anchors.counts):
        raise FaultError("merging into an empty one changes the counts")
    result = anchors.compute(), anchors.counts
    yield
    batches = [
        (x_of(a[f"{more}features"]), y_of(a[f"{more}labels"], a[f"{more}features"]))
        for more in ("", "more_")
    ]
    max_count, momentum = a.get("max_count"), a.get("momentum")
    means, expected = oracles.stream_anchors(
        batches,
        integer(a["num_classes"]),
        integer(a["feature_dim"]),
        None if max_count is None else integer(max_count),
        None if momentum is None else number(momentum),
    )
    close(result[0], means, d.scale)
    same(result[1], expected)


@target("AnchorClusters")
def _(d: Draw) -> Steps:
    a = yield {
        **sums_arguments(d),
        "feature_dim": d.integer(2),
        "anchors_per_class": d.integer(d.one(1, 2)),
        "seed": d.integer(d.one(0, 7)),
    }
    dim = a["feature_dim"]
    if _is_plain(a["features"]) and a["features"].ndim > 1:
        dim = a["features"].shape[1]
    options = {k: a[k] for k in ("num_classes", "anchors_per_class", "seed")}
    clusters = anchorda.AnchorClusters(feature_dim=dim, **options)
    for _ in range(3):
        clusters.update(a["features"], a["labels"])
        clusters = d.moved(clusters)
        anchorda.all_reduce(clusters)
        clusters.step()
    result = clusters.compute()
    yield
    x, y = x_of(a["features"]), y_of(a["labels"], a["features"])
    sums, counts = oracles.class_sums(x, y, integer(a["num_classes"]))
    for c, anchors in enumerate(result.double().numpy()):
        of_class = x[(y == c) & np.isfinite(x).all(axis=1)]
        found = anchors[np.isfinite(anchors).all(axis=1)]
        if (len(found) > 0) != (len(of_class) > 0) or len(found) > integer(a["anchors_per_class"]):
            raise FaultError(f"{len(found)} anchors of {len(of_class)} features")
        if len(found) == 1 and len(np.unique(of_class, axis=0)) == 1:
            close(found[0], of_class[0], d.scale)
        if integer(a["anchors_per_class"]) == 1 and counts[c] > 0:
            close(found[0], sums[c] / counts[c], d.scale)


@target("CategoryAnchors.from_centroids")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d)
    centroids = d.anchors(c, dim, several=False)
    counts: Any = torch.randint(9, (c,)).to(d.one(*INTEGERS))
    if d.often():
        counts = counts.numpy()
    a = yield {
        "centroids": d.one(centroids, centroids.numpy(), frozen(centroids.numpy())),
        "counts": d.one(counts, None),
    }
    anchors = d.moved(anchorda.CategoryAnchors.from_centroids(**a))
    result = anchors.compute(), anchors.counts
    yield
    means = a_of(a["centroids"])
    finite = np.isfinite(means).all(axis=1)
    counts = finite.astype(int)
    if a["counts"] is not None:
        given = a["counts"] if isinstance(a["counts"], np.ndarray) else a["counts"].long().numpy()
        counts = np.where(finite, given.astype(np.int64), 0)
    same(result[1], counts)
    close(result[0], np.where(counts[:, None] > 0, means, np.nan), d.scale)


@target("all_reduce_class_sums")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d)
    a = yield {
        "sums": d.features((c,), dim),
        "counts": torch.randint(9, (c,)).to(d.one(*INTEGERS)),
    }
    result = anchorda.all_reduce_class_sums(anchorda.ClassSums(a["sums"], a["counts"]))
    yield
    close(result.sums, tensor(a["sums"], FLOATS).double().numpy())
    close(result.counts, tensor(a["counts"], INTEGERS + FLOATS).double().numpy())


@target("anchor_distances")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d)
    a = yield {"features": d.features(d.shape(), dim), "anchors": d.anchors(c, dim)}
    result = anchorda.anchor_distances(**a)
    yield
    close(rows(result), distances_of(x_of(a["features"]), a_of(a["anchors"])), d.scale)


@target("AnchorPseudoLabeler")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d)
    relative = d.often()
    scale = 1.0 if relative else d.scale
    minimum = d.one(
        d.number(d.one(0.0, 0.25, 0.5)),
        d.per_class(torch.rand(c).half().float() * scale),
        math.inf,
        -math.inf,
    )
    a = yield {
        "features": d.features(d.shape(), dim),
        "anchors": d.anchors(c, dim),
        "min_margin": minimum,
        "relative": d.one(bool, np.bool_)(relative),
        "ignore_index": d.integer(d.one(255, -1, 250)),
    }
    options = {k: v for k, v in a.items() if k not in ("features", "anchors")}
    labeler = d.moved(anchorda.AnchorPseudoLabeler(**options))
    result = labeler(a["features"], a["anchors"])
    yield
    if not isinstance(a["relative"], (bool, np.bool_)):
        raise FaultError(f"accepted relative={a['relative']!r}")
    anchors, x = a_of(a["anchors"]), x_of(a["features"])
    minimum, ignored = per_class(a["min_margin"], len(anchors)), integer(a["ignore_index"])
    relative = bool(a["relative"])
    tolerance = 2e-5 * (1.0 if relative else d.scale)
    distances = distances_of(x, anchors)
    oracle = oracles.nearest_labels(distances, minimum, relative, ignored)
    several = np.isfinite(distances).sum(axis=1) > 1
    given = zip(flat(result.labels), result.scores.flatten(), *oracle, several, strict=True)
    for label, score, expected, wanted, unsure in given:
        # Which is nearer, or whether the minimum is exceeded, may be a matter of rounding.
        if unsure and any(abs(wanted - limit) <= 10 * tolerance for limit in [0.0, *minimum]):
            expected = label
        close(score, wanted, scale=max(10 * tolerance / 2e-5, 1e-6), tolerance=2e-4)
        same(label, expected)


@target("ProbabilityPseudoLabeler")
def _(d: Draw) -> Steps:
    c, _ = classes_and_dim(d, 2)
    minimum = d.one(d.number(0.5), d.number(0.75), d.per_class(torch.rand(c).half().float()))
    a = yield {
        "logits": d.features(d.shape(), c, scale=3.0),
        "min_probability": minimum,
        "ignore_index": d.integer(d.one(255, -1, 250)),
    }
    options = {k: v for k, v in a.items() if k != "logits"}
    result = d.moved(anchorda.ProbabilityPseudoLabeler(**options))(a["logits"])
    yield
    z = x_of(a["logits"])
    minimum = per_class(a["min_probability"], z.shape[1])
    ignored = integer(a["ignore_index"])
    labels, scores = oracles.probability_labels(z, minimum, ignored)
    close(result.scores.flatten(), scores)
    for got, want, score, logits in zip(flat(result.labels), labels, scores, z, strict=True):
        top = sorted(logits)[-2:]
        unsure = any(abs(score - m) < 1e-5 for m in minimum) or top[1] - top[0] < 1e-5
        if got != want and not unsure:
            raise FaultError(f"label {got} instead of {want}")


@target("combine_pseudo_labels")
def _(d: Draw) -> Steps:
    shape = d.shape()
    a = yield {
        "first": d.labels(shape, 3),
        "second": d.labels(shape, 3),
        "rule": d.choice("rule"),
        "ignore_index": d.integer(d.one(255, -1, 250, 100)),
    }
    result = anchorda.combine_pseudo_labels(**a)
    yield
    first, second = (tensor(a[k], INTEGERS) for k in ("first", "second"))
    if first.shape != second.shape:
        raise FaultError("accepted two shapes")
    ignored = integer(a["ignore_index"])
    expected = []
    for one, two in zip(flat(first), flat(second), strict=True):
        one, two = (ignored if v < 0 else v for v in (one, two))
        combined = one if one == two else ignored
        if a["rule"] == "union" and ignored in (one, two):
            combined = two if one == ignored else one
        expected.append(combined)
    same(flat(result), expected)


def weights_of(value: Any, features: Tensor) -> Array | None:
    """Return weights of the pixels in the order of the rows."""
    if value is None:
        return None
    weights = tensor(value, FLOATS)
    if tuple(weights.shape) != (features.shape[0], *features.shape[2:]):
        raise FaultError(f"accepted weights {tuple(weights.shape)}")
    return np.asarray(weights.double().flatten().numpy())


def loss_arguments(d: Draw) -> Arguments:
    """Return features, labels, anchors, and now and then weights."""
    (c, dim), shape = classes_and_dim(d), d.shape()
    weights = d.one(None, None, torch.rand(shape), torch.rand(shape).double())
    return {
        "features": d.features(shape, dim),
        "labels": d.labels(shape, c),
        "anchors": d.anchors(c, dim),
        "pixel_weights": weights,
    }


def either(d: Draw, function: Any, module: Any, a: Arguments, settings: Sequence[str]) -> Any:
    """Call the function, or the module that is made with the settings."""
    if d.often():
        return function(**a)
    inputs = {name: value for name, value in a.items() if name not in settings}
    return d.moved(module(**{name: a[name] for name in settings}))(**inputs)


@target("anchor_distance_loss", "AnchorDistanceLoss")
def _(d: Draw) -> Steps:
    a = yield {
        **loss_arguments(d),
        "distance": d.choice("distance"),
        "average": d.choice("average"),
    }
    both = anchorda.anchor_distance_loss, anchorda.AnchorDistanceLoss
    result = either(d, *both, a, ["distance", "average"])
    yield
    x, y, anchors = x_of(a["features"]), y_of(a["labels"], a["features"]), a_of(a["anchors"])
    weights = weights_of(a["pixel_weights"], a["features"])
    if anchors.ndim == 3:
        groups = _per_row_loss(x, y, anchors, a["distance"], a["average"], weights)
        close(result, groups, d.scale * d.scale)
        return
    expected = oracles.distance_loss(x, y, anchors, a["distance"], a["average"], weights)
    close(result, expected, d.scale * d.scale)


def _per_row_loss(
    x: Array, y: Labels, a: Array, kind: str, average: str, weights: Array | None
) -> float:
    """Return the distance loss to the nearest of several anchors by the averaged distance."""
    of_class: dict[int, list[float]] = {}
    for i, label in enumerate(y):
        if 0 <= label < len(a) and np.isfinite(a[label]).all(axis=1).any():
            own = a[label][np.isfinite(a[label]).all(axis=1)]
            loss = float(np.min([oracles.pixel_distance(x[i], anchor, kind) for anchor in own]))
            of_class.setdefault(int(label), []).append(
                loss * (1 if weights is None else weights[i])
            )
    groups = list(of_class.values())
    if average == "pixel":
        groups = [[loss] for group in groups for loss in group]
    return sum(sum(group) / len(group) for group in groups) / max(1, len(groups))


@target("anchor_contrastive_loss", "AnchorContrastiveLoss")
def _(d: Draw) -> Steps:
    a = yield {
        **loss_arguments(d),
        "temperature": d.number(d.one(1.0, 0.5, 4.0) * max(1.0, d.scale)),
        "similarity": d.choice("similarity"),
    }
    both = anchorda.anchor_contrastive_loss, anchorda.AnchorContrastiveLoss
    result = either(d, *both, a, ["temperature", "similarity"])
    yield
    x, y, anchors = x_of(a["features"]), y_of(a["labels"], a["features"]), a_of(a["anchors"])
    weights = weights_of(a["pixel_weights"], a["features"])
    temperature = temperature_of(a)
    probabilities = assignments(x, anchors, a["similarity"], temperature)
    losses = []
    for i, label in enumerate(y):
        if 0 <= label < len(anchors) and np.isfinite(anchors[label]).all(-1).any():
            losses.append(
                -math.log(probabilities[i, label]) * (1 if weights is None else weights[i])
            )
    close(result, sum(losses) / max(1, len(losses)), max(1.0, d.scale), 2e-4)


@target("anchor_consistency_loss", "AnchorConsistencyLoss")
def _(d: Draw) -> Steps:
    (c, dim), shape = classes_and_dim(d, 2), d.shape()
    a = yield {
        "features": d.features(shape, dim, scale=1.0),
        "teacher_probabilities": d.probabilities(shape, c),
        "anchors": d.anchors(c, dim, several=False) / d.scale,
        "similarity": d.choice("similarity"),
        "temperature": d.number(d.one(1.0, 4.0)),
    }
    both = anchorda.anchor_consistency_loss, anchorda.AnchorConsistencyLoss
    result = either(d, *both, a, ["temperature", "similarity"])
    yield
    x, t, anchors = x_of(a["features"]), x_of(a["teacher_probabilities"]), a_of(a["anchors"])
    if not np.isfinite(x).all() or (t < 0).any() or anchors.ndim == 3:
        return
    temperature = temperature_of(a)
    expected = oracles.consistency_loss(x, t, anchors, str(a["similarity"]), temperature)
    half = t.size and a["teacher_probabilities"].dtype in (torch.float16, torch.bfloat16)
    close(result, expected, 1.0, 1e-2 if half else 2e-4)


@target("anchor_distribution_loss", "AnchorDistributionLoss")
def _(d: Draw) -> Steps:
    (c, dim), shape = classes_and_dim(d), d.shape()
    a = yield {
        "features": d.features(shape, dim, scale=1.0),
        "labels": d.labels(shape, c),
        "means": d.anchors(c, dim, several=False) / d.scale,
        "variances": torch.rand(c, dim),
        "temperature": d.number(d.one(1.0, 4.0)),
    }
    both = anchorda.anchor_distribution_loss, anchorda.AnchorDistributionLoss
    result = either(d, *both, a, ["temperature"])
    yield
    x, y = x_of(a["features"]), y_of(a["labels"], a["features"])
    means, variances = a_of(a["means"]), a_of(a["variances"])
    if np.isfinite(x).all() and not (variances < 0).any():
        expected = oracles.distribution_loss(x, y, means, variances, temperature_of(a))
        close(result, expected, 1.0, 2e-4)


@target("symmetric_cross_entropy", "SymmetricCrossEntropyLoss")
def _(d: Draw) -> Steps:
    (c, _), shape = classes_and_dim(d, 2), d.shape()
    a = yield {
        "logits": d.features(shape, c, scale=3.0),
        "labels": d.labels(shape, c),
        "alpha": d.number(d.one(0.0, 0.5, 2.0)),
        "beta": d.number(d.one(0.0, 0.5, 2.0)),
    }
    both = anchorda.symmetric_cross_entropy, anchorda.SymmetricCrossEntropyLoss
    result = either(d, *both, a, ["alpha", "beta"])
    yield
    z, y = x_of(a["logits"]), y_of(a["labels"], a["logits"])
    if np.isfinite(z).all():
        weights = number(a["alpha"]), number(a["beta"])
        close(result, oracles.symmetric_cross_entropy(z, y, *weights), 1.0, 2e-4)


@target("information_maximization_loss", "InformationMaximizationLoss")
def _(d: Draw) -> Steps:
    c, _ = classes_and_dim(d, 2)
    a = yield {"logits": d.features(d.shape(), c, scale=3.0)}
    both = anchorda.information_maximization_loss, anchorda.InformationMaximizationLoss
    result = either(d, *both, a, [])
    yield
    z = x_of(a["logits"])
    if np.isfinite(z).all():
        close(result, oracles.information_maximization(z), 1.0, 2e-4)


@target("feature_distance_loss", "FeatureDistanceLoss")
def _(d: Draw) -> Steps:
    (c, dim), shape = classes_and_dim(d), d.shape()
    a = yield {
        "features": d.features(shape, dim),
        "reference": d.features(shape, dim).detach(),
        "labels": d.labels(shape, c),
        "classes": d.one(None, [0], (1, 2), np.array([0, 2]), torch.tensor([1])),
    }
    both = anchorda.feature_distance_loss, anchorda.FeatureDistanceLoss
    result = either(d, *both, a, ["classes"])
    yield
    x, reference = x_of(a["features"]), x_of(a["reference"])
    if a["classes"] is None:
        classes, y = [0], np.zeros(len(x), np.int64)
    else:
        classes, y = [integer(k) for k in a["classes"]], y_of(a["labels"], a["features"])
    close(result, oracles.feature_distance(x, reference, y, classes), d.scale)


def assignments(x: Array, a: Array, kind: str, temperature: float) -> Array:
    """Return the softmax of similarities over seen classes, the largest of each class's anchors."""
    groups = a[:, None] if a.ndim == 2 else a
    values = np.full((len(x), len(groups)), -math.inf)
    for i, c in np.ndindex(values.shape):
        of_class = [
            oracles.similarity_of(x[i], anchor, kind)
            for anchor in groups[c]
            if np.isfinite(anchor).all()
        ]
        if of_class:
            values[i, c] = max(of_class) if not any(map(math.isnan, of_class)) else math.nan
    result = np.zeros_like(values)
    for i, row in enumerate(values / temperature):
        seen = [k for k in range(len(groups)) if row[k] != -math.inf]
        if seen:
            result[i, seen] = oracles.softmax(row[seen])
    return result


@target("anchor_probabilities")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d)
    a = yield {
        "features": d.features(d.shape(), dim),
        "anchors": d.anchors(c, dim),
        "similarity": d.choice("similarity"),
        "temperature": d.number(d.one(1.0, 0.5, 4.0)),
    }
    result = anchorda.anchor_probabilities(**a)
    yield
    x, anchors = x_of(a["features"]), a_of(a["anchors"])
    if not np.isfinite(x).all():
        return
    temperature = temperature_of(a)
    # A rounded similarity of size s moves a probability by up to s · 1e-6 / temperature.
    size = max(1.0, d.scale * d.scale) * 40 / temperature
    close(rows(result), assignments(x, anchors, a["similarity"], temperature), size, 2e-5)


@target("sinkhorn_assignments")
def _(d: Draw) -> Steps:
    c, _ = classes_and_dim(d, 2)
    a = yield {
        "scores": d.features((d.one(0, 1, 5, 9),), c, scale=1.0),
        "shares": d.one(None, d.per_class((torch.rand(c) + 0.25).half().float())),
        "epsilon": d.number(d.one(0.5, 1.0)),
        "iterations": d.integer(d.one(1, 3)),
    }
    result = anchorda.sinkhorn_assignments(**a)
    yield
    scores = x_of(a["scores"])
    if a["shares"] is not None:
        per_class(a["shares"], scores.shape[1])
    if result.shape != scores.shape or number(a["epsilon"]) <= 0 or integer(a["iterations"]) < 1:
        raise FaultError(f"assignments {tuple(result.shape)}")
    if a["shares"] is None and np.isfinite(scores).all() and scores.shape[1] > 0:
        close(result.sum(dim=1), np.ones(len(scores)), 1.0)


@target("rectify")
def _(d: Draw) -> Steps:
    (c, _), shape = classes_and_dim(d, 2), d.shape()
    a = yield {
        "probabilities": d.probabilities(shape, c),
        "assignments": d.probabilities(shape, c),
    }
    result = anchorda.rectify(**a)
    yield
    p, w = x_of(a["probabilities"]), x_of(a["assignments"])
    if (p < 0).any() or (w < 0).any() or not np.isfinite(p + w).all():
        return
    half = result.dtype in (torch.float16, torch.bfloat16)
    close(rows(result), oracles.rectify(p, w), 1.0, 1e-2 if half else 1e-5)


@target("soft_class_sums")
def _(d: Draw) -> Steps:
    (c, dim), shape = classes_and_dim(d, 2), d.shape()
    a = yield {
        "features": d.features(shape, dim),
        "probabilities": d.probabilities(shape, c),
    }
    result = anchorda.soft_class_sums(**a)
    yield
    x, p = x_of(a["features"]), x_of(a["probabilities"])
    if not np.isfinite(p).all() or (p < 0).any():
        return
    sums, counts = oracles.soft_class_sums(x, p)
    close(result.sums, sums, d.scale, 1e-6)
    close(result.counts, counts, 1.0, 1e-6)


@target("discriminative_loss", "DiscriminativeLoss")
def _(d: Draw) -> Steps:
    (c, _), shape = classes_and_dim(d, 2), d.shape()
    a = yield {
        "logits": d.features(shape, c, scale=3.0),
        "labels": d.labels(shape, c),
        "weight": d.one(None, d.per_class(torch.rand(c).half().float())),
        "label_smoothing": d.number(d.one(0.0, 0.25, 1.0)),
        "pixel_weights": d.one(None, torch.rand(shape)),
    }
    both = anchorda.discriminative_loss, anchorda.DiscriminativeLoss
    result = either(d, *both, a, ["weight", "label_smoothing"])
    yield
    z, y = x_of(a["logits"]), y_of(a["labels"], a["logits"])
    c = z.shape[1]
    weight = [1.0] * c if a["weight"] is None else per_class(a["weight"], c)
    weights = weights_of(a["pixel_weights"], a["logits"])
    active = [i for i, label in enumerate(y) if 0 <= label < c]
    if not np.isfinite(z[active]).all() or not np.isfinite(weight).all() or min(weight) < 0:
        return
    smoothing = number(a["label_smoothing"])
    close(
        result,
        oracles.cross_entropy(
            z[active], y[active], weight, smoothing, None if weights is None else weights[active]
        ),
        1.0,
    )


@target("ConfusionMatrix", "PseudoLabelQuality", "LabelAgreement")
def _(d: Draw) -> Steps:
    (c, _), shape = classes_and_dim(d), d.shape()
    a = yield {
        "num_classes": d.integer(c),
        "predictions": d.labels(shape, c),
        "labels": d.labels(shape, c),
    }
    kind = d.one(anchorda.ConfusionMatrix, anchorda.PseudoLabelQuality, anchorda.LabelAgreement)
    state = kind(a["num_classes"])
    state.update(a["predictions"], a["labels"])
    state = d.moved(state)
    state.merge(copy.deepcopy(state))
    if d.often(0.3):
        anchorda.all_reduce(state)
    for method in ("iou", "mean_iou", "accuracy", "coverage", "precision", "recall", "compute"):
        values = getattr(state, method)() if hasattr(state, method) else torch.zeros(1)
        if ((values < -1) | (values > 1)).any():
            raise FaultError(f"{method} is {values.tolist()}")
    result = kind, state.counts.clone()
    yield
    predictions, labels = tensor(a["predictions"], INTEGERS), tensor(a["labels"], INTEGERS)
    if predictions.shape != labels.shape:
        raise FaultError("accepted two shapes")
    c = integer(a["num_classes"])
    if result[0] is not anchorda.LabelAgreement:
        same(result[1], 2 * oracles.confusion(flat(predictions), flat(labels), c))


@target("ScoreCalibrator")
def _(d: Draw) -> Steps:
    (c, _), shape = classes_and_dim(d), d.shape()
    size = 10.0 ** d.rng.uniform(-5, 4)
    scores = size * d.one(torch.randn(shape), torch.rand(shape), -torch.rand(shape))
    a = yield {
        "num_classes": d.integer(c),
        "labels": d.labels(shape, c),
        "scores": scores.to(d.one(torch.float32, torch.float64)),
        "truth": d.one(None, d.labels(shape, c)),
        "coverage": d.number(d.one(0.0, 0.5, 0.75, 1.0)),
        "precision": d.number(d.one(0.0, 0.5, 1.0)),
        "min_count": d.integer(d.one(1, 3)),
    }
    state = anchorda.ScoreCalibrator(a["num_classes"])
    state.update(a["labels"], a["scores"], a["truth"])
    state = d.moved(state)
    by_precision = None
    judged = state.counts[:2].any()
    if a["truth"] is not None and judged:
        by_precision = state.min_score_for_precision(a["precision"], min_count=a["min_count"])
    result = (
        state.min_score_for_coverage(a["coverage"]),
        by_precision,
        state.counts.sum(dim=(0, 2)),
    )
    yield
    labels, scores = tensor(a["labels"], INTEGERS), tensor(a["scores"], FLOATS)
    if labels.shape != scores.shape:
        raise FaultError("accepted two shapes")
    y, s = flat(labels), scores.float().double().flatten().numpy()
    coverage = number(a["coverage"])
    for c in range(integer(a["num_classes"])):
        of_class = s[(y == c) & ~np.isnan(s)]
        same(result[2][c], len(of_class))
        minimum = float(result[0][c])
        if len(of_class) == 0 or coverage == 0:
            close(minimum, math.inf)
            continue
        enough = max(1, math.ceil(coverage * len(of_class) - 1e-9))
        if (of_class > minimum).sum() < enough and minimum > -math.inf:
            raise FaultError(f"a minimum of {minimum} labels too few")
        exact = sorted(of_class)[-enough]
        if 1e-6 < abs(exact) < 1e6 and not 0 <= exact - minimum <= 0.0111 * abs(exact):
            raise FaultError(f"a minimum of {minimum} for a quantile of {exact}")


@target("margin_limits", "warn_unreachable_margins", "anchor_health")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d)
    drawn = d.anchors(c, dim, several=False)
    counts: Any = torch.randint(20, (c,)).to(d.one(*INTEGERS))
    a = yield {
        "anchors": d.one(drawn, drawn.numpy()),
        "counts": d.one(counts, counts.numpy()),
        "previous": d.one(None, d.anchors(c, dim, several=False).to(drawn.dtype)),
        "min_count": d.integer(d.one(1, 10)),
        "min_margin": d.one(d.number(0.5), d.per_class(torch.rand(c).half().float())),
        "class_names": d.one(
            None, [f"class {k}" for k in range(c)], np.array([f"c{k}" for k in range(c)])
        ),
    }
    health = anchorda.anchor_health(
        a["anchors"], a["counts"], previous=a["previous"], min_count=a["min_count"]
    )
    if len(health.table(a["class_names"]).splitlines()) != len(health.counts) + 1:
        raise FaultError(f"a table of {health}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anchorda.warn_unreachable_margins(
            a["min_margin"], a["anchors"], class_names=a["class_names"]
        )
    result = health, anchorda.margin_limits(a["anchors"]), bool(caught)
    yield
    health, limits, warned = result
    anchors = a_of(a["anchors"])
    distances = oracles.anchor_distances(anchors, anchors)
    np.fill_diagonal(distances, math.inf)
    seen = np.isfinite(anchors).all(axis=1)
    expected = np.where(seen, distances.min(axis=1), math.nan)
    close(limits, expected, d.scale)
    close(health.limits, expected, d.scale)
    same(health.unseen, ~seen)
    counts = np.asarray(a["counts"].long() if isinstance(a["counts"], Tensor) else a["counts"])
    same(health.too_few, seen & (counts.astype(np.int64) < integer(a["min_count"])))
    minimum = np.array(per_class(a["min_margin"], len(anchors)))
    unsure = np.abs(minimum - expected) < 1e-5 * max(1.0, d.scale)
    unreachable = np.isfinite(minimum) & (minimum >= expected)
    if not unsure.any() and warned != unreachable.any():
        raise FaultError(f"warned: {warned}, unreachable: {unreachable}")


class Splitting(nn.Module):
    """A network that returns its input as features, and logits of one convolution."""

    def __init__(self, dim: int, num_classes: int) -> None:
        """Make the classifier."""
        super().__init__()
        self.classifier = nn.Conv1d(dim, num_classes, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        features = self.dropout(images)
        return features, self.classifier(features)


@target("StageLabeler", "average_views")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d, 2)
    images = torch.randn(2, dim, 5)
    a = yield {
        "network": Splitting(dim, c),
        "images": images,
        "feature_dim": dim,
        "labels": d.labels((2, d.one(5, 7)), c),
        "num_classes": c,
        "rule": d.one("anchor", "probability", "agree", "union", "rectify"),
        "min_margin": d.one(0.0, d.per_class(torch.rand(c).half().float())),
        "batch": d.one("pair", "pair", "list", "dict", "triple", "nothing"),
        "extract": d.one("both", "views", "logits", "dict", "exchanged"),
    }
    images, labels = a["images"], a["labels"]
    outputs: dict[str, Callable[[nn.Module, Tensor], Any]] = {
        "both": lambda network, x: network(x),
        "views": anchorda.average_views(),
        "logits": lambda network, x: network(x)[1],
        "dict": lambda network, x: dict(zip("ab", network(x), strict=True)),
        "exchanged": lambda network, x: network(x)[::-1],
    }
    batch: Any = {
        "pair": (images, labels),
        "list": [images, labels],
        "triple": (images, labels, 0),
        "dict": {"x": images, "y": labels},
        "nothing": None,
    }
    batch = batch[a["batch"]] if isinstance(a["batch"], str) and a["batch"] in batch else a["batch"]
    anchors = anchorda.CategoryAnchors(a["num_classes"], a["feature_dim"])
    extract: Any = a["extract"]
    extract = outputs.get(extract, extract) if isinstance(extract, str) else extract
    stage = anchorda.StageLabeler.from_source(
        a["network"], [] if batch is None else [batch], anchors, extract=extract
    )
    stage.rule = a["rule"]
    stage.by_anchor = anchorda.AnchorPseudoLabeler(a["min_margin"])
    stage = d.one(stage, copy.deepcopy(stage))
    parent = nn.ModuleList([stage])
    for thaw in (
        parent.train,
        lambda: parent.requires_grad_(True),
        lambda: [m.train() for m in parent.modules()],
    ):
        if d.often(0.3):
            thaw()
    result = stage(images)
    yield
    fits = a["extract"] in ("both", "views") or (
        a["extract"] == "exchanged" and a["num_classes"] == a["feature_dim"]
    )
    if a["batch"] not in ("pair", "list") or not fits:
        raise FaultError(f"accepted {a['batch']} and {a['extract']}")
    network = copy.deepcopy(a["network"]).eval()
    with torch.no_grad():
        features, logits = extract(network, a["images"])
        if a["rule"] == "rectify":
            logits = stage.probabilities(a["images"]).log()
    close(result.by_probability.scores, logits.softmax(1).amax(1).numpy())
    if result.labels.shape != (features.shape[0], *features.shape[2:]):
        raise FaultError(f"labels {tuple(result.labels.shape)}")


@target("FeatureTap")
def _(d: Draw) -> Steps:
    a = yield {"module": nn.Identity(), "of": d.choice("of"), "features": d.features(d.shape(), 3)}
    with anchorda.FeatureTap(a["module"], of=a["of"]) as tap:
        nn.Sequential(a["module"])(a["features"])
    result = tap.features
    yield
    if result is not a["features"]:
        raise FaultError("other features")


@target("released.cag_uda_loss")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d, 2)
    source, target_ = (d.one(1, 2), d.one(1, 5), 4), (d.one(1, 2), 3, d.one(1, 4))
    a = yield {
        "source_features": d.features(source, dim),
        "source_logits": d.features(source, c, scale=3),
        "source_labels": d.labels((source[0], 7, d.one(1, 6)), c),
        "target_features": d.features(target_, dim),
        "target_logits": d.features(target_, c, scale=3),
        "anchor_labels": d.labels(target_, c),
        "probability_labels": d.labels(target_, c),
        "anchors": d.anchors(c, dim, several=False),
        "distance_weight": d.number(d.one(0.0, 0.5, 1.0)),
    }
    result = anchorda.released.cag_uda_loss(**a)
    yield
    z = x_of(a["target_logits"])
    if not np.isfinite(z).all():
        return
    parts = [
        oracles.cross_entropy(z, y_of(a[k], a["target_logits"]), [1.0] * z.shape[1], 0.0)
        for k in ("anchor_labels", "probability_labels")
    ]
    close(result.pseudo, sum(parts) / 2, 1.0)
    parts = [float(part.detach()) for part in result[1:]]
    close(result.total, sum(parts) if np.isfinite(parts).all() else math.nan, max(1.0, d.scale))


@target("released.load_category_anchors")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d)
    anchors = torch.randn(c, dim)
    counts = torch.randint(1, 9, (c,))
    content: Any = d.one(
        anchors.numpy(),
        {"objective_vectors": anchors.numpy(), "objective_num": counts.numpy()},
        {"Ave": anchors, "Amount": counts, "CoVariance": anchors},
        anchors,
    )
    buffer = io.BytesIO()
    if d.often() or not isinstance(content, np.ndarray):
        torch.save(content, buffer, _use_new_zipfile_serialization=d.often())
    else:
        pickle.dump(content, buffer, protocol=d.one(2, 3, 4, 5))
    data = bytearray(buffer.getvalue())
    damage = d.one("none", "byte", "cut", "tail", "other")
    if damage == "byte":
        data[d.rng.randrange(len(data))] = d.rng.randrange(256)
    elif damage == "cut":
        del data[d.rng.randrange(len(data)) :]
    elif damage == "tail":
        data += b"\0" * 9
    elif damage == "other":
        start = d.one(
            b"", b"PK", b"\x93NUMPY", b"{", b"<html>", b"\x80\x05", b"\x8e", b"\x96", b"c"
        )
        data = bytearray(start + d.rng.randbytes(30))
    a = yield {"path": data, "anchors": anchors, "damage": damage}
    with tempfile.TemporaryDirectory() as folder:
        path: Any = Path(folder) / "anchors"
        if a["path"] is data:
            path.write_bytes(data)
        else:
            path = a["path"]
        try:
            result = anchorda.released.load_category_anchors(
                d.one(str, Path)(path) if isinstance(path, Path) else path
            )
        except OSError:
            return  # no file of this name
    yield
    if a["damage"] == "none":
        close(result, a["anchors"].numpy())
    elif result.ndim != 2 or result.dtype != torch.float32:
        raise FaultError(f"{result.dtype} {tuple(result.shape)}")


@target("WithinClassCovariance", "ClassVariances")
def _(d: Draw) -> Steps:
    (c, dim), shape = classes_and_dim(d), d.shape()
    a = yield {
        "num_classes": d.integer(c),
        "feature_dim": d.integer(dim),
        "features": d.features(shape, dim),
        "labels": d.labels(shape, c),
    }
    kind = d.one(anchorda.WithinClassCovariance, anchorda.ClassVariances)
    state = kind(a["num_classes"], a["feature_dim"])
    state.update(a["features"], a["labels"])
    state = d.moved(state)
    state.merge(kind(a["num_classes"], a["feature_dim"]))
    anchorda.all_reduce(state)
    result = state.compute(), state.means, state.counts
    yield
    x, y = x_of(a["features"]), y_of(a["labels"], a["features"])
    if x.shape[1] != integer(a["feature_dim"]):
        raise FaultError("accepted another dimension")
    sums, counts = oracles.class_sums(x, y, integer(a["num_classes"]))
    same(result[2], counts)
    close(result[1], sums / np.maximum(counts, 1)[:, None], d.scale, 1e-9)


@target("linear_discriminant", "LinearDiscriminant", "whitening_matrix")
def _(d: Draw) -> Steps:
    c, dim = classes_and_dim(d, 2)
    half = torch.randn(dim, dim, dtype=torch.float64)
    a = yield {
        "anchors": d.anchors(c, dim),
        "covariance": half @ half.T + torch.eye(dim),
        "shrinkage": d.number(d.one(0.5, 1.0, 0.25)),
        "features": d.features(d.shape(), dim),
    }
    discriminant = anchorda.linear_discriminant(
        a["anchors"], a["covariance"], shrinkage=a["shrinkage"]
    )
    result = discriminant.logits(a["features"])
    whitening = anchorda.whitening_matrix(a["covariance"], shrinkage=a["shrinkage"])
    yield
    if not torch.equal(whitening.isfinite(), torch.ones_like(whitening, dtype=torch.bool)):
        raise FaultError("a whitening matrix that is not finite")
    features = tensor(a["features"], FLOATS)
    expected = (features.shape[0], len(a["anchors"]), *features.shape[2:])
    if tuple(result.shape) != expected:
        raise FaultError(f"logits {tuple(result.shape)} instead of {expected}")
    if not 0 <= number(a["shrinkage"]) <= 1:
        raise FaultError(f"accepted a shrinkage of {a['shrinkage']}")


@target("InformationMaximization", "NuclearNorm", "SoftNeighborhoodDensity")
def _(d: Draw) -> Steps:
    c, _ = classes_and_dim(d, 2)
    a = yield {
        "logits": d.features(d.shape(), c, scale=3.0),
        "temperature": d.number(d.one(0.5, 1.0)),
        "pixels_per_class": d.integer(4),
        "seed": d.integer(3),
    }
    kind = d.one(anchorda.InformationMaximization, anchorda.NuclearNorm, None)
    if kind is None:
        state: Any = anchorda.SoftNeighborhoodDensity(
            a["temperature"], pixels_per_class=a["pixels_per_class"], seed=a["seed"]
        )
    else:
        state = kind()
    state.update(a["logits"])
    before = state.compute()
    state = d.moved(state)
    anchorda.all_reduce(state)
    if not torch.allclose(state.compute(), before, equal_nan=True):
        raise FaultError(f"{state.compute()} after a move instead of {before}")
    result = before
    yield
    x_of(a["logits"])
    if result.shape != ():
        raise FaultError(f"shape {tuple(result.shape)}")


@dataclass
class Outcome:
    """A call: what became of it, and why that is a fault if it is."""

    name: str
    kind: str
    message: str = ""


def run(seed: int, names: Sequence[str]) -> Outcome:
    """Make one call, from its number alone."""
    draw = Draw(seed)
    name = names[seed % len(names)]
    steps = TARGETS[name](draw)
    arguments: Arguments = next(steps)
    changed = []
    for _ in range(draw.one(0, 0, 0, 1, 1, 2)):
        argument = draw.one(*arguments)
        if argument not in ALONE.get(name, ()):
            arguments[argument] = other(draw, argument, arguments[argument])
            changed.append(argument)
    before = {key: value.clone() for key, value in arguments.items() if _is_plain(value)}

    def fault(what: object) -> Outcome:
        return Outcome(name, "fault", f"{what} {_shown(arguments, changed)}")

    try:
        steps.send(arguments)
    except StopIteration:
        return Outcome(name, "raised OSError")
    except FaultError as error:
        return fault(error)
    except (ValueError, TypeError) as error:
        if not FORM.match(str(error)):
            return fault(_raised(error))
        if not changed and not _may_be_rejected(name, arguments):
            return fault(f"refused what fits: {error}")
        return Outcome(name, f"raised {type(error).__name__}")
    except Exception as error:
        return fault(_raised(error))
    if any(isinstance(value, Tensor) and value.is_meta for value in arguments.values()):
        return Outcome(name, "returned on the meta device")
    for key, value in before.items():
        torch.testing.assert_close(arguments[key], value, rtol=0, atol=0, equal_nan=True)
    try:
        with np.errstate(all="ignore"):
            next(steps, None)
    except (OverflowError, ValueError) as error:
        if isinstance(error, OverflowError) or "math domain" in str(error):  # the logarithm of 0
            return Outcome(name, "returned, beyond the oracle")
        return fault(_raised(error))
    except Exception as error:
        return fault(error if isinstance(error, FaultError) else _raised(error))
    return Outcome(name, "returned what the oracle says")


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Return True for a tensor that torch compares."""
    return (
        isinstance(value, Tensor)
        and value.dtype in FLOATS + INTEGERS[:5]
        and (value.layout == torch.strided and not value.is_meta)
    )


def _raised(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {str(error)[:300]} at {Path(where.filename).name}:{where.lineno}"
    )


def _may_be_rejected(name: str, arguments: Arguments) -> bool:
    """Return True where arguments were drawn wrong on purpose, or have nothing to compute from."""
    if name in ("StageLabeler", "InformationMaximization"):
        return True  # there may be no pixel to compute from
    return name == "released.load_category_anchors" and arguments["damage"] != "none"


def _shown(arguments: Arguments, changed: list[str]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0:
            return f"{type(value).__name__}{tuple(value.shape)} {value.dtype}"
        return repr(value)[:80]

    shown = ", ".join(f"{k}={text(v)}" for k, v in arguments.items())
    return f"[changed: {', '.join(changed) or 'nothing'}; {shown}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calls, print the counts and every fault, and return 1 if there was one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first call; it is its number too"
    )
    parser.add_argument("--only", nargs="*", help="targets, by the first of their names")
    parser.add_argument("--faults", type=int, default=20, help="stop after that many")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message in ("The PyTorch API of nested tensors", "torch.quantize_per_tensor"):
        warnings.filterwarnings("ignore", message=message)
    names = options.only or list(TARGETS)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    faults = 0
    for seed in range(options.seed, options.seed + options.calls):
        outcome = run(seed, names)
        counts[outcome.name, outcome.kind] += 1
        if outcome.kind == "fault":
            faults += 1
            print(f"seed {seed}: {outcome.name}: {outcome.message}", flush=True)
            if faults >= options.faults:
                break
    kinds = sorted({kind for _, kind in counts})
    for kind in kinds:
        print(f"{sum(n for (_, k), n in counts.items() if k == kind):8}  {kind}")
    print(f"{sum(counts.values()):8}  calls of {len(names)} targets, from seed {options.seed}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
