"""A run that is killed at any moment goes on, and ends with the same bits as one that is not."""

import contextlib
import json
import math
import random
import shutil
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import train
from engine.files import load_checkpoint

from tests.ranks import forkserver

KILLS = 16
FLAGS = [
    *("--preset", "self-training"),  # has the most to remember: a teacher, and what is pasted
    *("--resize", "height:32", "--crop", "32", "48", "--workers", "0", "--device", "cpu"),
    *("--warmup-iterations", "12", "--stages", "2", "--stage-iterations", "12", "--baseline"),
    *("--warmup", "adversarial", "--teacher", "0.8", "--precision", "bfloat16"),
    *("--checkpoint-every", "3", "--evaluate-every", "4", "--threads", "1"),
]


def main(arguments: list[str], log: Path) -> None:
    """The command line in a process that has imported torch already: starting is quick."""
    with log.open("a") as file:
        sys.stdout = sys.stderr = file
        sys.argv = ["train.py", *arguments]
        train.main()


def start(pair: tuple[Path, Path], output: Path, *flags: str) -> ForkServerProcess:
    source, target = pair
    arguments = ["--source", str(source), "--target", str(target), "--output", str(output)]
    log = output.with_suffix(".log")
    process = forkserver().Process(target=main, args=([*arguments, *FLAGS, *flags], log))
    process.start()
    return process


def written(output: Path) -> set[tuple[str, int, int]]:
    """Return the files of a run, when they were written last, and their sizes."""
    states = set()
    for path in (output / "metrics.jsonl", *output.glob("checkpoints/*")):
        with contextlib.suppress(FileNotFoundError):  # a temporary file that has been renamed
            state = path.stat()
            states.add((path.name, state.st_mtime_ns, state.st_size))
    return states


def watch(process: ForkServerProcess, output: Path, writes: float) -> int:
    """Count how often a run writes, until it is done or has written that often."""
    count, before = 0, written(output)
    while process.exitcode is None and count < writes:
        time.sleep(0.002)
        now = written(output)
        count += now != before
        before = now
    return count


def result_of(output: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the metrics, and every tensor of every phase's checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for path in (output / "checkpoints").glob("*.pt"):
        if path.name != "unfinished.pt":
            parts = load_checkpoint(path)
            flat = parts["network"] | {"confusion": parts["confusion"]}
            flat |= parts["stored"].get("stage", {}).get("labeler", {})
            tensors |= {f"{path.name}: {name}": value for name, value in flat.items()}
    return (output / "metrics.jsonl").read_text(), tensors


@pytest.fixture(scope="module")
def whole(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Return a run without interruption, and how often it writes."""
    output = tmp_path_factory.mktemp("whole") / "run"
    process = start(pair, output)
    writes = watch(process, output, math.inf)
    assert process.exitcode == 0, output.with_suffix(".log").read_text()
    return output, writes


def test_killed_at_random_moments_it_ends_the_same(
    pair: tuple[Path, Path], whole: tuple[Path, int], tmp_path: Path
) -> None:
    uninterrupted, writes = whole
    metrics, tensors = result_of(uninterrupted)
    draw = random.Random(0)
    kills = runs = 0
    places = set()
    while kills < KILLS:
        output = tmp_path / f"run{runs}"
        runs += 1
        while True:
            process = start(pair, output, "--resume")
            if kills < KILLS:
                # Counted in what it writes: by a clock a busy machine would never be killed late.
                watch(process, output, draw.randrange(writes // 4))
                process.join(draw.uniform(0.0, 0.1))
            else:
                process.join()
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            for path in output.glob("checkpoints/*.pt"):
                parts = load_checkpoint(path)  # whole, or an exception
                places.add((parts["phase"], parts.get("iteration")))
        assert process.exitcode == 0, output.with_suffix(".log").read_text()
        again, tensors_again = result_of(output)
        assert again == metrics
        assert tensors_again.keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(tensors_again[name].nan_to_num(), value.nan_to_num()), name
        assert not list(output.rglob("*.tmp"))
    # It was killed in every phase, and at more than one place of each.
    assert {phase for phase, _ in places} == {"source only", "warm-up", "stage 1", "stage 2"}
    assert len(places) > 8


def test_a_finished_run_that_goes_on_changes_nothing(
    pair: tuple[Path, Path], whole: tuple[Path, int], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    process = start(pair, output, "--resume")
    process.join()
    assert process.exitcode == 0
    assert result_of(output)[0] == result_of(whole[0])[0]


def test_what_was_recorded_after_the_checkpoint_is_recorded_again(
    pair: tuple[Path, Path], whole: tuple[Path, int], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    metrics = result_of(output)[0]
    for name in ("stage-2.pt", "stage-1.pt"):
        (output / "checkpoints" / name).unlink()
    (output / "checkpoints" / "unfinished.pt").unlink()
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "losses", "phase": "sta')  # a line that was cut
    process = start(pair, output, "--resume")
    process.join()
    assert process.exitcode == 0
    assert result_of(output)[0] == metrics
    assert all(map(json.loads, metrics.splitlines()))
