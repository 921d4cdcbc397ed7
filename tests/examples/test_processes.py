"""Two gloo processes do what one does: anchors, margins, evaluation, gradients, and a whole run.

Importing torch costs each process seconds, so both ranks do everything once and save a report, and
the tests read those.
"""

import copy
import functools
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
import torch.distributed as dist
import train
from classes import NUM_CLASSES
from data import Data, open_data
from engine import loop
from engine.files import load_checkpoint
from method import Stage, StageSettings, begin_stage, stage_losses
from networks.build import new_network
from networks.segmenter import Segmenter
from scores import evaluate, label_quality
from settings import parse_settings
from streams import Loading, RandomStream
from synthetic import write_synthetic_pair
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from warm_up import Discriminator, adversarial_losses, source_losses

from tests.ranks import SECONDS, run_ranks

TRAIN = Path(train.__file__)
KINDS = ("source", "adversarial", "paper", "paper in parts")

Report = dict[str, Any]


def arguments_of(folder: Path) -> list[str]:
    """Return arguments without randomness in a step and without batch statistics."""
    return [
        *("--source", str(folder / "pair" / "source"), "--output", str(folder / "none")),
        *("--target", str(folder / "pair" / "target"), "--resize", "height:48"),
        *("--crop", "32", "48", "--workers", "0", "--device", "cpu", "--threads", "1"),
        *("--no-photometric", "--batch-norm", "freeze"),
        *("--adversarial-weight", "0.5", "--probability", "0.3", "--distance-weight", "0.5"),
    ]


def without_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0


def report_of(folder: Path) -> Report:
    """Return all values on which processes have to agree, as computed by this one."""
    settings = parse_settings(arguments_of(folder))
    data = open_data(settings.data, Loading(0))
    network = new_network(settings.network, settings.run.seed, torch.device("cpu"))
    network.load_state_dict(torch.load(folder / "network.pt"))
    without_dropout(network)
    stage = begin_stage(network, data, settings.stages)
    return {
        "class weight": data.class_weight,
        "anchors": stage.labeler.centroids,
        "counts": stage.counts,
        "margins": stage.labeler.by_anchor.min_margin,
        "quality": {k: q.counts for k, q in label_quality(stage, data, "both").items()},
        "confusion": evaluate(network, data.evaluation, data).counts,
        **{kind: gradients(kind, network, stage, data, settings.stages) for kind in KINDS},
        "teacher": followed(stage, network),
    }


def followed(stage: Stage, network: Segmenter) -> dict[str, torch.Tensor]:
    """Return the weights of the teacher, where each process has other statistics of batches."""
    for buffer in network.buffers():
        buffer.add_(parallel.rank())
    train.follow(stage, network, decay=0.5)
    return stage.labeler.network.state_dict()


def gradients(
    kind: str, network: nn.Module, stage: Stage, data: Data, settings: StageSettings
) -> dict[str, torch.Tensor]:
    """Return gradients of the first step, on the same images for any number of processes."""
    torch.manual_seed(0)
    networks = nn.ModuleDict({"network": copy.deepcopy(network)})
    losses: dict[str, loop.Losses] = {
        "source": functools.partial(source_losses, data=data),
        "adversarial": functools.partial(adversarial_losses, data=data, weight=0.5),
    }
    losses["paper"] = losses["paper in parts"] = functools.partial(
        stage_losses, stage=stage, data=data, settings=settings
    )
    streams: list[RandomStream[Any]] = [RandomStream(data.source, (0, 0))]
    if kind == "adversarial":
        networks["discriminator"] = Discriminator(NUM_CLASSES)
    if kind != "source":
        streams.append(RandomStream(data.target, (0, 1)))
    objective = loop.Objective(networks, losses[kind]).train()
    whole = DistributedDataParallel(objective) if dist.is_initialized() else objective
    loaders = [stream.batches(0, 1, 4, Loading(0)) for stream in streams]
    (samples,) = zip(*loaders, strict=True)
    batch = list(loop.flat(samples))
    parts = 2 if kind == "paper in parts" else 1
    values = loop.back_propagate(whole, batch, parts, torch.amp.GradScaler("cpu", enabled=False))
    gradient = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return gradient | {f"value of {name}": value for name, value in values.items()}


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    torch.save(report_of(folder), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pair of data sets and a network that has learned a little of them."""
    root = tmp_path_factory.mktemp("processes")
    write_synthetic_pair(
        root / "pair", seed=0, source_images=11, target_images=5, val_images=3, height=48
    )
    flags = ["--output", str(root / "begun"), "--batch-norm", "train", "--max-iterations", "30"]
    train.adapt([*arguments_of(root), *flags, "--stages", "0"])
    parts = load_checkpoint(root / "begun" / "checkpoints" / "warm-up.pt")
    torch.save(parts["network"], root / "network.pt")
    return root


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[Report]:
    """Return the reports of one process, then of each of two."""
    torch.save(report_of(folder), folder / "one.pt")
    run_ranks(2, rank_main, folder)
    return [torch.load(folder / f"{name}.pt") for name in ("one", "rank0", "rank1")]


def test_anchors_and_margins_are_those_of_one_process(reports: list[Report]) -> None:
    one, *ranks = reports
    assert one["anchors"].isfinite().any()
    for report in ranks:
        torch.testing.assert_close(
            report["anchors"], one["anchors"], rtol=1e-6, atol=1e-7, equal_nan=True
        )
        for name in ("counts", "margins"):
            assert torch.equal(report[name], one[name]), name
        torch.testing.assert_close(report["class weight"], one["class weight"])
    assert torch.equal(ranks[0]["anchors"].nan_to_num(), ranks[1]["anchors"].nan_to_num())


def test_evaluation_is_that_of_one_process(reports: list[Report]) -> None:
    one, *ranks = reports
    assert one["confusion"].sum() > 0
    for report in ranks:
        assert torch.equal(report["confusion"], one["confusion"])
        assert report["quality"].keys() == {"anchor", "probability"}
        for kind, counts in one["quality"].items():
            assert torch.equal(report["quality"][kind], counts)


def test_the_teacher_is_the_same_on_all_processes(reports: list[Report]) -> None:
    one, *ranks = (report["teacher"] for report in reports)
    for name, value in one.items():
        assert all(torch.equal(rank[name], value) for rank in ranks), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_gradients_are_those_of_one_process(kind: str, reports: list[Report]) -> None:
    one, *ranks = (report[kind] for report in reports)
    gradients = [name for name in one if not name.startswith("value")]
    assert len(gradients) > 10
    largest = {name: one[name].abs().max() for name in gradients}
    assert min(largest.values()) > 0
    for name in gradients:
        # Where the sum over patches nearly cancels, its rounding is that of what is added up.
        allowed = 1e-5 * max(largest[name], 1e-2 * max(largest.values()))
        for report in ranks:
            assert (report[name] - one[name]).abs().max() <= allowed, name
    # A term's mean over all is the mean of what the ranks report, each counted by its amount.
    for name in one.keys() - set(gradients):
        mean = (ranks[0][name] + ranks[1][name]) / 2
        torch.testing.assert_close(mean, one[name], rtol=1e-5, atol=1e-7)
        assert name == "value of adversarial" or not torch.equal(ranks[0][name], ranks[1][name])


def test_torchrun_leaves_one_log_and_one_set_of_checkpoints(folder: Path) -> None:
    output = folder / "torchrun"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(TRAIN), "--source", str(folder / "pair" / "source")),
        *("--target", str(folder / "pair" / "target"), "--output", str(output)),
        *("--resize", "height:48", "--crop", "32", "48", "--workers", "0", "--device", "cpu"),
        *("--max-iterations", "3", "--stages", "1", "--threads", "1", "--accumulate", "2"),
        *("--warmup", "adversarial", "--warmup-batch", "4", "--stage-batch", "4"),
        *("--evaluate-every", "2", "--checkpoint-every", "1"),
    ]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=2 * SECONDS,
        # Without progress bars, so that a failure's output is short; with the stack of a crash.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Report: ") == 1
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["phase"]) for e in events] == [
        *(("losses", "warm-up"), ("selection", "warm-up"), ("selection", "warm-up")),
        *(("evaluation", "warm-up"), ("pseudo-labels", "stage 1"), ("pseudo-labels", "stage 1")),
        *(("losses", "stage 1"), ("selection", "stage 1"), ("selection", "stage 1")),
        ("evaluation", "stage 1"),
    ]
    names = {path.name for path in (output / "checkpoints").iterdir()}
    assert names == {"warm-up.pt", "stage-1.pt", "unfinished.pt"}
