"""Sums, anchors and evaluation over spawned gloo ranks, against one process that sees it all.

Importing torch costs each process seconds, so there is one spawn per number of ranks: every rank
runs `rank_main`, which does everything below once and saves a report, and the tests read those.
"""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import anchorda
from anchorda import (
    AnchorClusters,
    CategoryAnchors,
    ClassSums,
    ClassVariances,
    ConfusionMatrix,
    InformationMaximization,
    LabelAgreement,
    NuclearNorm,
    PseudoLabelQuality,
    SoftNeighborhoodDensity,
    StageLabeler,
    WithinClassCovariance,
)
from anchorda.calibration import ScoreCalibrator
from anchorda.distributed import _meeting_place, all_reduce, all_reduce_class_sums
from tests.oracles import draw, lay_out
from tests.ranks import SECONDS, run_ranks

Batch = tuple[Tensor, Tensor]
Report = dict[str, Any]

TOLERANCE = 1e-12
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "capped": {"max_count": 10},
    "moving": {"momentum": 0.25},
}
# Batches of ranks 0 to 2, never as many on each; the second time some rank has seen nothing.
SHARES = {"uneven": [2, 1, 3], "one empty": [0, 2, 1]}
COUNTING: list[Any] = [ConfusionMatrix, PseudoLabelQuality, ScoreCalibrator, LabelAgreement]
OF_LOGITS: list[Any] = [SoftNeighborhoodDensity, InformationMaximization, NuclearNorm]
SCATTERS: list[Any] = [ClassVariances, WithinClassCovariance]


def batch_of(rank: int, world: int, number: int, images: int = 2) -> Batch:
    """Drawn the same in any process. Class 3 is on the last rank only, class 4 on none."""
    torch.manual_seed(100 * rank + number)
    drawn = draw((images, 4, 5 + rank), num_classes=5)
    absent = (drawn.labels == 4) | ((drawn.labels == 3) & (rank != world - 1))
    return drawn.features, drawn.labels.masked_fill(absent, 255)


def stream_of(rank: int, world: int, share: str) -> list[Batch]:
    return [batch_of(rank, world, number) for number in range(SHARES[share][rank])]


def step_of(rank: int, world: int, number: int) -> Batch:
    """Return one rank's part of a global batch; rank 1 has no image in the second."""
    return batch_of(rank, world, 10 + number, images=0 if (rank, number) == (1, 1) else rank + 1)


def update(state: Any, batches: list[Batch]) -> None:  # noqa: ANN401
    """Add batches to a state of any kind; scores of logits are of the features."""
    for features, labels in batches:
        if type(state) in OF_LOGITS:
            state.update(features)
        elif type(state) is ScoreCalibrator:
            state.update(labels, features[:, 0].abs(), truth=labels.roll(1))
        elif type(state) in COUNTING:
            state.update(labels.roll(1), labels)
        else:
            state.update(features, labels)


def filled(kind: Any, batches: list[Batch], **options: Any) -> Any:  # noqa: ANN401
    """Return a state of that kind after these batches."""
    sizes = () if kind in OF_LOGITS else (5,) if kind in COUNTING else (5, 3)
    state = kind(*sizes, **options)
    update(state, batches)
    return state


def record(report: Report, name: str, state: nn.Module) -> None:
    report |= {f"{name} {key}": value.clone() for key, value in state.state_dict().items()}


def staged(batches: list[Batch]) -> StageLabeler:
    """Return a stage whose network passes the images on as features."""
    torch.manual_seed(0)
    classifier = nn.Conv2d(3, 5, 1)

    def extract(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, network(images)

    covariance = WithinClassCovariance(5, 3)
    return StageLabeler.from_source(
        classifier, batches, CategoryAnchors(5, 3), covariance=covariance, extract=extract
    )


def sums_of(batches: list[Batch], *, soft: bool = False) -> ClassSums:
    """Return the class sums of these batches, or those of the softmax of their features."""
    classes, dtype = (3, torch.float64) if soft else (5, torch.int64)
    total = ClassSums(torch.zeros(classes, 3).double(), torch.zeros(classes, dtype=dtype))
    for features, labels in batches:
        hard = anchorda.class_sums(features, labels, 5)
        part = anchorda.soft_class_sums(features, features.softmax(dim=1)) if soft else hard
        total = ClassSums(total.sums + part.sums, total.counts + part.counts)
    return total


def disagreeing(odd: bool) -> dict[str, Callable[[], None]]:
    """Return calls in which one rank differs from the others."""
    states: dict[str, Any] = {
        "classes": CategoryAnchors(4 if odd else 5, 3),
        "dim": CategoryAnchors(5, 2 if odd else 3),
        "max_count": CategoryAnchors(5, 3, max_count=7 if odd else 8),
        "momentum": CategoryAnchors(5, 3, momentum=0.1 if odd else None),
        "kind": PseudoLabelQuality(5) if odd else ConfusionMatrix(5),
        "evaluated classes": ConfusionMatrix(4 if odd else 5),
        "anchors and evaluation": CategoryAnchors(5, 3) if odd else ScoreCalibrator(5),
    }
    sums, counts = torch.zeros(5, 4 if odd else 3), torch.zeros(5, dtype=torch.int64)
    half = torch.zeros(5, 3, dtype=torch.float16 if odd else torch.float64)
    calls: dict[str, Callable[[], None]] = {
        name: lambda state=state: all_reduce(state)  # type: ignore[misc]
        for name, state in states.items()
    }
    calls["shape of sums"] = lambda: _discard(all_reduce_class_sums(ClassSums(sums, counts)))
    calls["dtype of sums"] = lambda: _discard(all_reduce_class_sums(ClassSums(half, counts)))
    return calls


def _discard(_: ClassSums) -> None: ...


def message_of(call: Callable[[], None]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def passed_states() -> dict[str, list[Any]]:
    """Return one state of each kind, empty and filled, as arguments of a process."""
    batches, kinds = [batch_of(0, 2, 90)], [CategoryAnchors, *COUNTING]
    return {
        "empty": [filled(kind, []) for kind in kinds],
        "filled": [filled(kind, batches) for kind in kinds],
    }


def _report_passed(report: Report, rank: int, world: int, passed: dict[str, list[Any]]) -> None:
    for state, filled in zip(passed["empty"], passed["filled"], strict=True):
        name = type(state).__name__
        assert not any(buffer.is_shared() for buffer in (*state.buffers(), *filled.buffers()))
        update(state, [batch_of(rank, world, 91)])
        all_reduce(state)
        report[f"passed {name}"] = state.counts.clone()
        report[f"passed filled {name}"] = filled.counts.clone()
        report[f"refused {name}"] = message_of(lambda filled=filled: all_reduce(filled))  # type: ignore[misc]
        filled.reset()
        all_reduce(filled)
        assert not filled.counts.any()


def rank_main(rank: int, world: int, folder: Path, passed: dict[str, list[Any]]) -> None:
    """Everything that needs a group, on one rank."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    report: Report = {}
    for share in SHARES:
        _report_share(report, rank, world, share)
    _report_steps(report, rank, world)
    for name, call in disagreeing(odd=rank == 1).items():
        report[f"disagreeing {name}"] = message_of(call)
    report["wrong kind"] = message_of(lambda: all_reduce(nn.Linear(1, 1)))  # type: ignore[arg-type]
    _report_passed(report, rank, world, passed)
    _report_subgroup(report, rank, world)
    if world == 2:
        _report_parallel(report, rank)
    torch.save(report, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _report_share(report: Report, rank: int, world: int, share: str) -> None:
    stream = stream_of(rank, world, share)
    sums = sums_of(stream)
    if rank == 1:  # in another memory layout than the other ranks
        sums = ClassSums(lay_out(sums.sums, "transposed"), sums.counts)
    before = sums.sums.clone(), sums.counts.clone()
    report[f"{share} sums"], report[f"{share} counts"] = all_reduce_class_sums(sums)
    assert torch.equal(sums.sums, before[0])
    assert torch.equal(sums.counts, before[1])
    half = all_reduce_class_sums(ClassSums(sums.sums.half(), sums.counts.to(torch.uint8)))
    report[f"{share} half sums"] = half.sums
    report[f"{share} half counts"] = half.counts
    for name, options in OPTIONS.items():
        anchors = filled(CategoryAnchors, stream, **options)
        record(report, f"local {share} {name}", anchors)
        all_reduce(anchors)
        record(report, f"{share} {name}", anchors)
        anchors.update(*batch_of(0, world, 50))
        record(report, f"{share} {name} after", anchors)
    for kind in (*COUNTING, *SCATTERS, *OF_LOGITS):
        state = filled(kind, stream)
        all_reduce(state)
        if kind in OF_LOGITS:
            report[f"{share} {kind.__name__}"] = state.compute()[None]
        else:
            record(report, f"{share} {kind.__name__}", state)
    clusters = AnchorClusters(5, 3, 2)
    for number in range(2):
        for features, labels in stream:
            clusters.update(features, labels)
        all_reduce(clusters)
        report[f"{share} clusters counts {number}"] = clusters.counts.clone()
        clusters.step()
    report[f"{share} clusters"] = clusters.compute().nan_to_num(-99.0)
    soft = sums_of(stream, soft=True)
    report[f"{share} soft sums"], report[f"{share} soft counts"] = all_reduce_class_sums(soft)
    report[f"{share} stage"] = staged(stream).centroids


def _report_steps(report: Report, rank: int, world: int) -> None:
    for name, options in OPTIONS.items():
        anchors = CategoryAnchors(5, 3, **options)
        for number in range(3):
            sums = anchorda.class_sums(*step_of(rank, world, number), 5)
            anchors.update_sums(*all_reduce_class_sums(sums))
        record(report, f"steps {name}", anchors)


def _report_subgroup(report: Report, rank: int, world: int) -> None:
    """All ranks but the first."""
    group = dist.new_group(list(range(1, world)))
    anchors = filled(CategoryAnchors, [batch_of(rank, world, 0)])
    untouched = copy.deepcopy(anchors)
    report["subgroup"] = message_of(lambda: all_reduce(anchors, group=group))
    if rank == 0:
        assert torch.equal(anchors.means, untouched.means)
        assert torch.equal(anchors.counts, untouched.counts)
        sums = ClassSums(anchors.means, anchors.counts)
        report["subgroup sums"] = message_of(
            lambda: _discard(all_reduce_class_sums(sums, group=group))
        )
    else:
        record(report, "subgroup", anchors)
        odd = ConfusionMatrix(4 if rank == 1 else 5)
        report["subgroup disagreeing"] = message_of(lambda: all_reduce(odd, group=group))


class Network(nn.Module):
    """A layer and, as buffers, the anchors of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.anchors = CategoryAnchors(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return features, without an update."""
        features: Tensor = self.layer(x)
        return features


def _report_parallel(report: Report, rank: int) -> None:
    """Three training steps of four pixels of class 0 on rank 0, of class 1 on rank 1."""
    arguments = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in arguments
    off = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    settings: dict[str, tuple[bool, dict[str, Any]]] = {
        "inside": (True, {}),
        "outside": (False, {}),
        "not broadcast": (True, off),
    }
    for name, (inside, options) in settings.items():
        network = Network()
        parallel = DistributedDataParallel(network, **options)
        anchors = network.anchors if inside else CategoryAnchors(2, 3)
        for _ in range(3):
            features = parallel(torch.randn(4, 3))
            anchors.update(features, torch.full((4,), rank))
            features.sum().backward()
        all_reduce(anchors)
        report[f"parallel {name}"] = anchors.counts


@pytest.fixture(scope="module", params=[2, 3])
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Report]:
    """Return the report of each rank."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    run_ranks(world, rank_main, world, folder, passed_states())
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def assert_same(report: Report, name: str, expected: CategoryAnchors) -> None:
    assert torch.equal(report[f"{name} counts"], expected.counts)
    torch.testing.assert_close(report[f"{name} means"], expected.means, rtol=TOLERANCE, atol=0)


def whole(world: int, share: str) -> list[Batch]:
    return [batch for rank in range(world) for batch in stream_of(rank, world, share)]


def test_every_rank_has_the_same_bits(reports: list[Report]) -> None:
    shared = [
        name
        for name, value in reports[0].items()
        if isinstance(value, Tensor) and not name.startswith(("local", "subgroup"))
    ]
    assert len(shared) > 30
    for name in shared:
        for other in reports[1:]:
            assert other[name].dtype == reports[0][name].dtype
            bits = (report[name].contiguous().view(torch.uint8) for report in (reports[0], other))
            assert torch.equal(*bits), name


def test_what_a_process_is_started_with_is_its_own(reports: list[Report]) -> None:
    world = len(reports)
    for state in passed_states()["filled"]:
        name = type(state).__name__
        expected = filled(type(state), [batch_of(rank, world, 91) for rank in range(world)])
        for report in reports:
            assert torch.equal(report[f"passed {name}"], expected.counts)
            assert torch.equal(report[f"passed filled {name}"], state.counts)
            assert "passed to the process with counts in it" in report[f"refused {name}"]


def test_accumulators_share_no_memory() -> None:
    for state in passed_states()["filled"]:
        state.share_memory()
        queue = pickle.loads(bytes(ForkingPickler.dumps(state)))
        whole_file = pickle.loads(pickle.dumps(state))
        for copied in (state, queue, whole_file, copy.deepcopy(state)):
            assert not any(buffer.is_shared() for buffer in copied.buffers()) or copied is state
            assert torch.equal(copied.counts, state.counts)
            assert not copied.passed_with_counts
        queue.counts.zero_()
        assert state.counts.any()


@pytest.mark.parametrize("share", SHARES)
def test_sums_are_those_of_one_process(reports: list[Report], share: str) -> None:
    expected = sums_of(whole(len(reports), share))
    assert reports[0][f"{share} sums"].dtype == torch.float64
    assert torch.equal(reports[0][f"{share} counts"], expected.counts)
    torch.testing.assert_close(reports[0][f"{share} sums"], expected.sums, rtol=TOLERANCE, atol=0)
    half = [sums_of(stream_of(r, len(reports), share)).sums.half() for r in range(len(reports))]
    exact = torch.stack(half).double().sum(dim=0)
    assert torch.equal(reports[0][f"{share} half sums"], exact.half())
    assert torch.equal(reports[0][f"{share} half counts"], expected.counts)


@pytest.mark.parametrize("share", SHARES)
def test_anchors_are_those_of_one_process(reports: list[Report], share: str) -> None:
    world = len(reports)
    expected = filled(CategoryAnchors, whole(world, share))
    assert expected.seen.tolist() == [True, True, True, True, False]
    assert_same(reports[0], f"{share} exact", expected)
    # What one rank alone has seen keeps its bits.
    alone = reports[-1][f"local {share} exact means"][3]
    assert torch.equal(reports[0][f"{share} exact means"][3], alone)
    expected.update(*batch_of(0, world, 50))
    assert_same(reports[0], f"{share} exact after", expected)


@pytest.mark.parametrize("share", SHARES)
def test_a_stage_has_the_anchors_of_the_whole_source(reports: list[Report], share: str) -> None:
    expected = staged(whole(len(reports), share)).centroids
    assert expected.isfinite().all(dim=1).sum() >= 2
    for report in reports:
        torch.testing.assert_close(report[f"{share} stage"], expected, equal_nan=True)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["capped", "moving"])
def test_forgetful_anchors_are_weighed_by_their_counts(
    reports: list[Report], share: str, name: str
) -> None:
    local = [
        (report[f"local {share} {name} means"], report[f"local {share} {name} counts"])
        for report in reports
    ]
    expected = CategoryAnchors(5, 3, **OPTIONS[name])
    for c in range(5):
        total = sum(int(counts[c]) for _, counts in local)
        if total:
            blend = sum(counts[c].double() * means[c] for means, counts in local) / total
            expected.means[c] = torch.as_tensor(blend)
            expected.counts[c] = min(total, OPTIONS[name].get("max_count", total))
    if name == "capped" and share == "uneven":
        assert any(sum(int(counts[c]) for _, counts in local) > 10 for c in range(5))
    assert_same(reports[0], f"{share} {name}", expected)
    expected.update(*batch_of(0, len(reports), 50))
    assert_same(reports[0], f"{share} {name} after", expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_sums_of_every_batch_give_what_the_global_batch_gives(
    reports: list[Report], name: str
) -> None:
    world, expected = len(reports), CategoryAnchors(5, 3, **OPTIONS[name])
    for number in range(3):
        parts = [step_of(rank, world, number) for rank in range(world)]
        features = torch.cat([x.movedim(1, -1).reshape(-1, 3) for x, _ in parts])
        expected.update(features, torch.cat([y.flatten() for _, y in parts]))
    assert_same(reports[0], f"steps {name}", expected)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", [*COUNTING, *SCATTERS])
def test_states_are_those_of_one_process(reports: list[Report], share: str, kind: Any) -> None:  # noqa: ANN401
    expected = filled(kind, whole(len(reports), share))
    assert expected.counts.any()
    for name, value in expected.state_dict().items():
        actual = reports[0][f"{share} {kind.__name__} {name}"]
        torch.testing.assert_close(actual, value, rtol=TOLERANCE, atol=1e-13)


@pytest.mark.parametrize("share", SHARES)
def test_clusters_and_soft_sums_are_those_of_one_process(reports: list[Report], share: str) -> None:
    stream = whole(len(reports), share)
    counts = sums_of(stream).counts
    for number in range(2):
        assert torch.equal(reports[0][f"{share} clusters counts {number}"].sum(dim=1), counts)
    found = reports[0][f"{share} clusters"]
    assert ((found != -99).all(dim=2).any(dim=1) == (counts > 0)).all()
    for name, expected in zip(("sums", "counts"), sums_of(stream, soft=True), strict=True):
        actual = reports[0][f"{share} soft {name}"]
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=1e-13)


ANCHORS = "CategoryAnchors(num_classes={}, feature_dim={}, max_count={}, momentum={})"
SUMS = (
    "ClassSums(sums=Tensor of torch.{2} and shape ({0}, {1}), "
    "counts=Tensor of torch.int64 and shape (5,))"
)


@pytest.mark.parametrize(
    ("what", "most", "odd"),
    [
        ("classes", ANCHORS.format(5, 3, None, None), ANCHORS.format(4, 3, None, None)),
        ("dim", ANCHORS.format(5, 3, None, None), ANCHORS.format(5, 2, None, None)),
        ("max_count", ANCHORS.format(5, 3, 8, None), ANCHORS.format(5, 3, 7, None)),
        ("momentum", ANCHORS.format(5, 3, None, None), ANCHORS.format(5, 3, None, 0.1)),
        ("kind", "ConfusionMatrix(num_classes=5)", "PseudoLabelQuality(num_classes=5)"),
        (
            "evaluated classes",
            "ConfusionMatrix(num_classes=5)",
            "ConfusionMatrix(num_classes=4)",
        ),
        (
            "anchors and evaluation",
            "ScoreCalibrator(num_classes=5)",
            ANCHORS.format(5, 3, None, None),
        ),
        ("shape of sums", SUMS.format(5, 3, "float32"), SUMS.format(5, 4, "float32")),
        ("dtype of sums", SUMS.format(5, 3, "float64"), SUMS.format(5, 3, "float16")),
    ],
)
def test_every_rank_hears_of_a_disagreement(
    reports: list[Report], what: str, most: str, odd: str
) -> None:
    where = {2: "rank 0", 3: "ranks 0, 2"}[len(reports)]
    message = (
        f"ValueError: Expected the same state on every rank, but got {most} on {where} and "
        f"{odd} on rank 1. Create it with the same settings in every process."
    )
    assert [report[f"disagreeing {what}"] for report in reports] == [message] * len(reports)


def test_a_group_is_its_processes_only(reports: list[Report]) -> None:
    world = len(reports)
    expected = filled(CategoryAnchors, [batch_of(rank, world, 0) for rank in range(1, world)])
    message = "ValueError: Expected a process that is in `group`, but got rank 0, which is not."
    assert reports[0]["subgroup"].startswith(message)
    assert reports[0]["subgroup sums"].startswith(message)
    for report in reports[1:]:
        assert report["subgroup"] == "no error"
        assert_same(report, "subgroup", expected)
        assert torch.equal(report["subgroup means"], reports[1]["subgroup means"])
        got = report["subgroup disagreeing"]
        assert got == "no error" if world == 2 else "num_classes=4) on rank 1 and" in got


@pytest.mark.parametrize("reports", [2], indirect=True)
def test_parallel_training_loses_anchors_inside_of_the_wrapped_module(
    reports: list[Report],
) -> None:
    # Rank 0 has its three batches, rank 1 the first two of rank 0 and its own last.
    assert reports[0]["parallel inside"].tolist() == [12 + 8, 4]
    for report in reports:
        assert report["parallel outside"].tolist() == [12, 12]
        assert report["parallel not broadcast"].tolist() == [12, 12]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", OF_LOGITS)
def test_scores_of_logits_are_those_of_one_process(
    reports: list[Report],
    share: str,
    kind: Any,  # noqa: ANN401
) -> None:
    expected = filled(kind, whole(len(reports), share)).compute()[None]
    actual = reports[0][f"{share} {kind.__name__}"]  # of all ranks, by their bits
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=0)


KINDS = ", ".join(
    kind.__name__
    for kind in (CategoryAnchors, AnchorClusters, *SCATTERS[::-1], *COUNTING, *OF_LOGITS)
)


def test_wrong_kinds_are_rejected(reports: list[Report]) -> None:
    for report in reports:
        message = f"TypeError: Expected `state` to be one of {KINDS}, but got Linear."
        assert report["wrong kind"] == message


def test_a_single_process_needs_no_group() -> None:
    stream = stream_of(0, 2, "uneven")
    given = sums_of(stream)
    sums, counts = all_reduce_class_sums(given)
    assert torch.equal(sums, given.sums)
    assert torch.equal(counts, given.counts)
    sums.zero_()
    counts.zero_()
    assert given.sums.any()
    assert given.counts.any()
    states = [filled(CategoryAnchors, stream, **options) for options in OPTIONS.values()]
    for state in (*states, *(filled(kind, stream) for kind in (*COUNTING, *SCATTERS, *OF_LOGITS))):
        before = copy.deepcopy(state.state_dict())
        all_reduce(state)
        torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(TypeError, match=f"Expected `state` to be one of {KINDS}, but got Tensor"):
        all_reduce(torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected `class_sums` to be ClassSums, but got tuple"):
        all_reduce_class_sums((sums, counts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backends", "cuda", "local", "expected"),
    [
        ("cpu:gloo,cuda:gloo", True, "cuda:1", "cpu"),
        ("cpu:gloo,cuda:gloo", False, "cpu", "cpu"),
        ("cuda:nccl", True, "cuda:1", "cuda:1"),
        ("cuda:nccl", True, "cpu", "cuda"),
        ("cpu:gloo,cuda:nccl", True, "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", True, "cpu", "cuda"),
        ("cpu:gloo,cuda:nccl", False, "cpu", "cpu"),
        ("cpu:mpi,cuda:mpi", True, "cuda:1", "cuda:1"),
    ],
)
def test_where_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, backends: str, cuda: bool, local: str, expected: str
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert _meeting_place(torch.device(local), None) == torch.device(expected)
