"""The Triton kernels, by Triton's interpreter on the CPU, or on a GPU where there is one."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import anchorda
from anchorda._ops import choice, reference
from tests import oracles
from tests.oracles import flat, lay_out, pairwise, rows

triton = pytest.importorskip("triton", "3.3", reason="there is no Triton that the kernels run with")
from anchorda._ops import kernels  # noqa: E402

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = (
    # The interpreter computes with NumPy, which warns of infinities that are meant.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    if IS_INTERPRETED
    else pytest.mark.gpu
)
on_a_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="no GPU")
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Pixels and channels that no block divides; classes up to where blocks change their size.
SIZES = [
    *(((2, 5, 7), 3, 4), ((1, 129), 33, 19), ((70,), 1, 1), ((1, 2, 3), 257, 2)),
    *(((3, 3, 11), 70, 33), ((33,), 40, 150), ((40,), 16, 256), ((2, 1, 64), 64, 16)),
]
VIEWABLE = ["contiguous", "channels_last"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a device whose operators are the kernels."""
    if not IS_INTERPRETED:
        return "cuda"
    monkeypatch.setattr(choice, "_kernels", lambda device: kernels)
    # Kernels are chosen as for a GPU.
    monkeypatch.setattr(choice, "_is_cpu", lambda device: False)
    return "cpu"


@pytest.fixture(autouse=True)
def _reference_is_not_called(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test that asks for `device` fail if the reference is called."""
    if "device" not in request.fixturenames or "fall" in request.node.name:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        if "several" not in request.node.name:
            for name in ("class_sums", "nearest_anchors", "pixel_losses", "pixel_losses_backward"):
                patch.setattr(reference, name, None)
        yield


def draw(
    shape: tuple[int, ...], dim: int, classes: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, labels and anchors; of many classes one is unseen."""
    features, labels, _, anchors = oracles.draw(shape, dim, classes, dtype)
    if classes > 3:
        anchors[1] = NAN
        anchors[3] = anchors[2]
    return features.to(device), labels.to(device), anchors.to(device)


def plain_margins(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return nearest distances and margins in plain torch, in the features' precision."""
    x = features.movedim(1, -1).reshape(-1, features.shape[1])
    a = anchors.to(x.dtype)
    squares = x.square().sum(1, keepdim=True) - 2 * x @ a.T + a.square().sum(1)
    distances = squares.clamp(min=0).sqrt().nan_to_num(INF).double()
    distances = torch.cat([distances, torch.full_like(distances[:, :1], INF)], dim=1)
    two = distances.topk(2, largest=False).values
    return two[:, 0], two[:, 1] - two[:, 0]


@pytest.mark.parametrize("layout", VIEWABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "classes"), SIZES)
def test_labels_and_scores(
    shape: tuple[int, ...], dim: int, classes: int, dtype: torch.dtype, layout: str, device: str
) -> None:
    features, _, anchors = draw(shape, dim, classes, dtype, device)
    labeler = anchorda.AnchorPseudoLabeler(-INF, ignore_index=-1)
    labels, scores = labeler(lay_out(features, layout), anchors)
    distances = oracles.anchor_distances(rows(features.cpu()), anchors.cpu().double().numpy())
    ascending = np.sort(np.column_stack([distances, np.full(len(distances), INF)]), axis=1)
    with np.errstate(invalid="ignore"):
        expected = ascending[:, 1] - ascending[:, 0]
    got = scores.flatten().cpu().double().numpy()
    _, plain = plain_margins(features.cpu(), anchors.cpu())
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    # No worse than twice what plain arithmetic in the precision of the features comes to.
    own = np.abs(plain.numpy() - expected)[finite].max(initial=0)
    assert np.abs(got - expected)[finite].max(initial=0) <= 2 * own + 2e-6
    first = np.array([np.flatnonzero(row <= row.min() + 1e-6)[0] for row in distances])
    unsure = expected < 1e-5
    np.testing.assert_array_equal(np.where(unsure, first, flat(labels.cpu())), first)


def test_of_equally_near_anchors_the_first_wins(device: str) -> None:
    anchors = torch.tensor([[9.0, 0.0], [1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]], device=device)
    features = torch.tensor([[0.9, 1.1], [0.0, 1.0], [-0.9, 1.1]], device=device)
    labels, scores = anchorda.AnchorPseudoLabeler(-INF)(features, anchors)
    assert labels.tolist() == [1, 1, 3]
    assert scores[:2].tolist() == [0, 0]


@pytest.mark.parametrize("nearness", [0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.65, 0.8, 1.0, 3.0])
def test_precision_near_an_anchor(nearness: float, device: str) -> None:
    # Norms up to 12 at 256 channels, as those of the released anchors.
    anchors = normalize(torch.randn(19, 256).abs(), dim=1) * torch.linspace(6.8, 12.4, 19)[:, None]
    own = torch.arange(19).repeat(4)
    features = anchors[own] + nearness * normalize(torch.randn(76, 256), dim=1)
    got = anchorda.AnchorPseudoLabeler()(features.to(device), anchors.to(device))
    ascending = np.sort(oracles.anchor_distances(rows(features), anchors.double().numpy()), axis=1)
    error = np.abs(got.scores.cpu().double().numpy() - (ascending[:, 1] - ascending[:, 0])).max()
    # What the library promises. Measured with the interpreter: 2e-5, at 1.0. Tensor cores truncate
    # where it rounds.
    assert error < 1e-4
    assert torch.equal(got.labels.cpu(), own)


def test_large_offset_of_all_features(device: str) -> None:
    # Distances of about 1.4 at norms of 1600, where products of float32 know nothing.
    anchors = 100 + torch.randn(19, 256) / 16
    features = 100 + torch.randn(50, 256) / 16
    got = anchorda.AnchorPseudoLabeler(-INF)(features.to(device), anchors.to(device))
    distances = oracles.anchor_distances(rows(features), anchors.double().numpy())
    ascending = np.sort(distances, axis=1)
    np.testing.assert_array_equal(got.labels.cpu().numpy(), distances.argmin(axis=1))
    error = np.abs(got.scores.cpu().double().numpy() - (ascending[:, 1] - ascending[:, 0])).max()
    assert error < 2e-6  # Measured: 5e-7, roundings of the distances.


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_features(bad: float, dtype: torch.dtype, device: str) -> None:
    features, labels, anchors = draw((2, 9, 15), 37, 5, dtype, device)
    features[0, 36, 4, 4] = features[1, 0, 0, 0] = bad
    labels[0, 4, 4], labels[1, 0, 0] = 0, 255
    clean = features.nan_to_num(0.5, 0.5, 0.5)
    labeler = anchorda.AnchorPseudoLabeler(-INF)
    got, expected = labeler(features, anchors), labeler(clean, anchors)
    hit = (features * 0).sum(dim=1) != 0
    assert hit.sum() == 2
    assert (got.labels[hit] == 255).all()
    assert (got.scores[hit] == 0).all()
    assert torch.equal(got.labels[~hit], expected.labels[~hit])
    assert torch.equal(got.scores[~hit], expected.scores[~hit])

    sums = anchorda.class_sums(features, labels, 5)
    of_clean = anchorda.class_sums(clean, torch.where(hit, -1, labels), 5)
    assert torch.equal(sums.counts, of_clean.counts)
    assert torch.equal(sums.sums, of_clean.sums)


@pytest.mark.parametrize("layout", VIEWABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "classes"), SIZES)
def test_class_sums(
    shape: tuple[int, ...], dim: int, classes: int, dtype: torch.dtype, layout: str, device: str
) -> None:
    features, labels, _ = draw(shape, dim, classes, dtype, device)
    sums, counts = anchorda.class_sums(lay_out(features, layout), labels, classes)
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int64)
    expected, number = oracles.class_sums(rows(features.cpu()), flat(labels.cpu()), classes)
    np.testing.assert_array_equal(counts.cpu().numpy(), number)
    # Sums of up to 64 in float32. Measured: 2e-6.
    np.testing.assert_allclose(sums.cpu().numpy(), expected, rtol=0, atol=1e-5)
    again = anchorda.class_sums(lay_out(features, layout), labels, classes)
    assert torch.equal(again.sums, sums)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_dtype_and_stride(dtype: torch.dtype, device: str) -> None:
    features, _, anchors = draw((3, 4, 6), 5, 4, torch.float32, device)
    labels = torch.tensor([0, 2, 3, 9, 2, 0], device=device).to(dtype).expand(3, 4, 6)
    expected, number = oracles.class_sums(rows(features.cpu()), flat(labels.cpu()), 4)
    sums, counts = anchorda.class_sums(features, labels, 4)
    np.testing.assert_array_equal(counts.cpu().numpy(), number)
    np.testing.assert_allclose(sums.cpu().numpy(), expected, rtol=0, atol=1e-5)
    loss = anchorda.anchor_distance_loss(features, labels, anchors)
    dense = anchorda.anchor_distance_loss(features, labels.contiguous(), anchors)
    assert torch.equal(loss, dense)


@pytest.mark.parametrize(
    ("size", "distance", "layout", "dtype"),
    pairwise(SIZES, get_args(anchorda.losses.Distance), VIEWABLE, DTYPES),
)
def test_distance_loss_and_gradient(
    size: tuple[tuple[int, ...], int, int],
    distance: anchorda.losses.Distance,
    layout: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    shape, dim, classes = size
    features, labels, anchors = draw(shape, dim, classes, dtype, device)
    features = lay_out(features, layout).detach().requires_grad_()
    loss = anchorda.anchor_distance_loss(features, labels, anchors, distance=distance)
    (gradient,) = torch.autograd.grad(loss, features)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)

    exact = features.detach().cpu().double().requires_grad_()
    truth = plain_distance_loss(exact, labels.cpu(), anchors.cpu().double(), distance)
    (slope,) = torch.autograd.grad(truth, exact)
    assert abs(loss.item() - truth.item()) <= 1e-6 * abs(truth.item())
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    # An element of half precision may be so small that it has no more digits.
    bound = rounding * slope.abs().max() + 6e-8
    assert (gradient.cpu().double() - slope).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "of_class"), [(5, 3), (40, 4)])
def test_several_anchors_of_each_class(
    classes: int, of_class: int, dtype: torch.dtype, device: str
) -> None:
    features, labels, _ = draw((2, 5, 7), 33, classes, dtype, device)
    anchors = torch.randn(classes, of_class, 33)
    anchors[1], anchors[2, 0], anchors[0, 1:] = NAN, NAN, NAN
    expected, nearest, second = reference.nearest_anchors(features.cpu().double(), anchors.double())
    labeler = anchorda.AnchorPseudoLabeler(-INF, ignore_index=-1)
    got, margins = labeler(features, anchors.to(device))
    sure = second - nearest > 1e-4
    assert torch.equal(got.cpu()[sure], expected.long()[sure])
    torch.testing.assert_close(margins.cpu().double(), second - nearest, rtol=0, atol=1e-4)
    for distance in ("euclidean", "squared", "smooth_l1"):
        results = []
        for x, a in ((features, anchors.to(device)), (features.double(), anchors.double())):
            leaf = x.detach().requires_grad_()
            loss = anchorda.anchor_distance_loss(leaf, labels, a.to(device), distance=distance)
            results.append((loss.double(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*(r[0] for r in results), rtol=1e-6, atol=0)
        bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        error = (results[0][1].double() - results[1][1]).abs().max()
        assert error <= bound * results[1][1].abs().max() + 6e-8


def plain_distance_loss(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """Return the mean over the pixels with the label of a seen class, one after the other."""
    total, count = features.sum() * 0, 0
    x = features.movedim(1, -1).reshape(-1, features.shape[1])
    for feature, label in zip(x, labels.flatten().tolist(), strict=True):
        if not 0 <= label < len(anchors) or anchors[label].isnan().any():
            continue
        offset = feature - anchors[label]
        if distance == "smooth_l1":
            size = offset.abs()
            total = total + torch.where(size < 1, size**2 / 2, size - 0.5).mean()
        else:
            square = offset.square().sum()
            total = total + (square if distance == "squared" else square.sqrt())
        count += 1
    return total / max(count, 1)


@pytest.mark.parametrize("distance", ["euclidean", "squared", "smooth_l1"])
def test_what_is_ignored_does_not_reach_the_gradient(
    distance: anchorda.losses.Distance, device: str
) -> None:
    features, labels, anchors = draw((2, 5, 7), 33, 4, torch.float32, device)
    labels[0, 0, 0], labels[1, 2, 3] = 255, 0
    features[0, :, 0, 0] = NAN
    features.requires_grad_()
    loss = anchorda.anchor_distance_loss(features, labels, anchors, distance=distance)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite()
    ignored = (labels < 0) | (labels >= 4) | (labels == 1)
    assert (gradient.movedim(1, -1)[ignored] == 0).all()

    with torch.no_grad():
        features[1, 7, 2, 3] = NAN  # now where the label is active
    loss = anchorda.anchor_distance_loss(features, labels, anchors, distance=distance)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isnan()
    assert gradient[1, 7, 2, 3].isnan()
    assert (gradient.movedim(1, -1)[ignored] == 0).all()


def test_gradient_at_an_anchor_is_zero(device: str) -> None:
    anchors = torch.randn(2, 40, device=device)
    features = anchors.clone().requires_grad_()
    loss = anchorda.anchor_distance_loss(features, torch.tensor([0, 1], device=device), anchors)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_offsets_beyond_32_bits(device: str) -> None:
    """Two channels more than 2³¹ elements apart: few of the pages in between are ever touched."""
    far = 2**31 + 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        memory = torch.empty(far + 3, dtype=torch.bfloat16, device=device)
    features = memory.as_strided((1, 2, 3), (3, far, 1))
    features[0] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    anchors = torch.tensor([[1.0, 4.0], [2.5, 6.0]], device=device)
    labels, scores = anchorda.AnchorPseudoLabeler(-INF)(features, anchors)
    assert labels.tolist() == [[0, 1, 1]]
    assert scores[0, 0].item() == pytest.approx(2.5)
    sums, _ = anchorda.class_sums(features, torch.tensor([[0, 0, 0]], device=device), 1)
    assert sums.tolist() == [[6.0, 15.0]]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: lay_out(x, "strided"),
        lambda x: lay_out(x, "transposed"),
        lambda x: x[:0],
        lambda x: x[:, :, :0],
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
    ],
    ids=["float64", "strided", "transposed", "no image", "no pixel", "expanded"],
)
def test_what_they_do_not_take_falls_back(change: Callable[[Tensor], Tensor], device: str) -> None:
    features, _, anchors = draw((2, 6, 7), 5, 4, torch.float32, device)
    features = change(features)
    got = anchorda.AnchorPseudoLabeler(0.1)(features, anchors)
    classes, nearest, second = reference.nearest_anchors(features, anchors)
    assert choice.module_for("nearest_anchors", features, anchors) is reference
    active = (second - nearest > 0.1) & (classes >= 0)
    assert torch.equal(got.labels, torch.where(active, classes, 255))


def test_anchors_in_float64_fall_back(device: str) -> None:
    features, anchors = torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)
    for name in ("nearest_anchors", "pixel_losses"):
        assert choice.module_for(name, features, anchors.double()) is reference
        assert choice.module_for(name, features, anchors.bfloat16()) is kernels


def test_more_classes_than_fit_fall_back(device: str) -> None:
    features = torch.ones(2, 3, device=device)
    anchors = torch.arange(257.0, device=device)[:, None].expand(257, 3)
    assert choice.module_for("class_sums", features, num_classes=256) is kernels
    assert choice.module_for("class_sums", features, num_classes=257) is reference
    assert choice.module_for("nearest_anchors", features, anchors[:256]) is kernels
    for too_many in (anchors, anchors[:156].reshape(52, 3, 3).repeat(2, 1, 1)):
        assert choice.module_for("nearest_anchors", features, too_many) is reference
    labels = anchorda.AnchorPseudoLabeler(ignore_index=-1)(features, anchors)
    assert labels.labels.tolist() == [1, 1]


@pytest.mark.parametrize("count", [2, 3])
def test_images_that_lie_apart_in_memory(count: int, device: str) -> None:
    features, labels, anchors = draw((2 * count, 3, 7), 33, 4, torch.float32, device)
    for layout in VIEWABLE:
        apart = lay_out(features, layout)[::2].detach().requires_grad_()
        dense = apart.detach().contiguous().requires_grad_()
        for got, expected in zip(
            anchorda.AnchorPseudoLabeler(0.1)(apart, anchors),
            anchorda.AnchorPseudoLabeler(0.1)(dense, anchors),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
        gradients = [
            torch.autograd.grad(anchorda.anchor_distance_loss(x, labels[::2], anchors), x)[0]
            for x in (apart, dense)
        ]
        torch.testing.assert_close(*gradients)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a GPU as the dispatch sees it; what it says can be changed."""
    seen = SimpleNamespace(capability=(9, 0), driver=SimpleNamespace(get_current_device=int))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=seen.driver))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: seen.capability)
    choice._kernels.cache_clear()
    return seen


def test_dispatch(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = choice._kernels.__wrapped__
    cuda = torch.device("cuda", 0)
    assert choose(cuda) is kernels
    assert choose(torch.device("cpu")) is None
    assert choose(torch.device("mps")) is None
    gpu.capability = (7, 5)
    assert choose(cuda) is None
    gpu.capability = (8, 0)
    assert choose(cuda) is kernels
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert choose(cuda) is None
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1")
    assert choose(cuda) is kernels

    def without_compiler() -> int:
        raise RuntimeError("Failed to find C compiler.")

    gpu.driver.get_current_device = without_compiler
    assert choose(cuda) is None
    gpu.driver.get_current_device = int
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's GPUs are called cuda, too
    assert choose(cuda) is None


def test_without_triton(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choice._kernels.__wrapped__(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_a_gpu(capability: int) -> None:
    """To machine code, which needs no GPU; the interpreter takes what the compiler does not."""
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(program), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    shared = [int(line.split()[1]) for line in ran.stdout.splitlines()]
    assert len(shared) == 38
    assert max(shared) <= 101_376  # of one block on the smallest of these GPUs


@on_a_gpu
def test_operators_keep_the_rules_on_a_gpu() -> None:
    features, labels, anchors = draw((2, 5, 7), 33, 4, torch.float32, "cuda")
    anchors = anchors.nan_to_num(1.0)
    targets = torch.where((labels >= 0) & (labels < 4), labels, -1)
    operators = torch.ops.anchorda
    torch.library.opcheck(operators.class_sums.default, (features, labels, 4))
    torch.library.opcheck(operators.nearest_anchors.default, (features, anchors))
    of = (features.requires_grad_(), targets, anchors, "euclidean")
    torch.library.opcheck(operators.pixel_losses.default, of)


@on_a_gpu
def test_a_graph_replays_them() -> None:
    features, labels, anchors = draw((2, 5, 7), 33, 4, torch.float32, "cuda")
    labeler = anchorda.AnchorPseudoLabeler(0.1).cuda()

    def step() -> tuple[Tensor, ...]:
        return (*labeler(features, anchors), *anchorda.class_sums(features, labels, 4))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    features.copy_(torch.randn_like(features))
    graph.replay()
    for got, expected in zip(held, step(), strict=True):
        assert torch.equal(got, expected)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_under_autocast(dtype: torch.dtype) -> None:
    _, labels, anchors = draw((2, 5, 7), 33, 4, torch.float32, "cuda")
    layer = torch.nn.Conv2d(3, 33, 1).cuda()
    images = torch.randn(2, 3, 5, 7, device="cuda")

    def step() -> Tensor:
        with torch.autocast("cuda", dtype):
            return anchorda.anchor_distance_loss(layer(images), labels, anchors)

    compiled = torch.compile(step, fullgraph=True)()
    torch.testing.assert_close(compiled, step(), rtol=1e-2, atol=1e-2)
    compiled.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
