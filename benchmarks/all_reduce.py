"""Measure what `anchorda.distributed.all_reduce` costs with gloo ranks on this machine.

    python benchmarks/all_reduce.py --ranks 2 4

Beside each state stands a bare ``dist.all_reduce`` of as many bytes of float64, measured in turns
with it. A repetition takes as long as its slowest rank. The table, in Markdown, goes to the
terminal: medians in milliseconds, with the tenth and the ninetieth percentile in brackets.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from anchorda import CategoryAnchors, ConfusionMatrix
from anchorda.calibration import ScoreCalibrator
from anchorda.distributed import State, all_reduce

STATES: dict[str, Callable[[], State]] = {
    "CategoryAnchors(19, 256)": lambda: CategoryAnchors(19, 256),
    "CategoryAnchors(19, 2048)": lambda: CategoryAnchors(19, 2048),
    "CategoryAnchors(256, 2048)": lambda: CategoryAnchors(256, 2048),
    "ConfusionMatrix(19)": lambda: ConfusionMatrix(19),
    "ScoreCalibrator(19)": lambda: ScoreCalibrator(19),
}


def bytes_of(state: State) -> int:
    """Return the bytes that have to be added up."""
    return sum(value.nbytes for value in state.state_dict().values())


def filled(create: Callable[[], State]) -> State:
    """Return a state in which every class is seen."""
    state = create()
    state.counts.random_(1, 1000)
    if isinstance(state, CategoryAnchors):
        state.means.normal_()
    return state


def seconds_of(collective: Callable[[], object]) -> float:
    """Return the duration on this rank, after all ranks have arrived."""
    dist.barrier()
    start = time.perf_counter()
    collective()
    return time.perf_counter() - start


def measure(rank: int, ranks: int, repetitions: int, folder: Path) -> None:
    """Save the seconds (states, 2, repetitions) of one rank: ours, then the bare collective."""
    torch.set_num_threads(1)
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    seconds = torch.zeros(len(STATES), 2, repetitions)
    for row, create in enumerate(STATES.values()):
        state = filled(create)
        bare = torch.zeros(bytes_of(state) // 8, dtype=torch.float64)
        for repetition in range(-2, repetitions):  # two to warm up
            # Of a copy: reducing one state again and again would let its counts overflow.
            times = (
                seconds_of(partial(all_reduce, copy.deepcopy(state))),
                seconds_of(partial(dist.all_reduce, bare)),
            )
            if repetition >= 0:
                seconds[row, :, repetition] = torch.tensor(times)
    torch.save(seconds, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def shown(seconds: list[float]) -> str:
    """Return the median and spread in milliseconds."""
    tenths = statistics.quantiles(seconds, n=10)
    low, middle, high = (1e3 * s for s in (tenths[0], statistics.median(seconds), tenths[-1]))
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    """Measure with each number of ranks, then print the table."""
    parser = argparse.ArgumentParser(description="Measure all_reduce with gloo on this machine.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repetitions", type=int, default=50)
    options = parser.parse_args()
    print("| state | bytes | ranks | all_reduce, ms | bare, ms |\n| :-- | --: | --: | --: | --: |")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spawn(measure, (ranks, options.repetitions, folder), ranks)
            of_ranks = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
        slowest = torch.stack(of_ranks).amax(dim=0).tolist()
        for (state, create), (ours, bare) in zip(STATES.items(), slowest, strict=True):
            size = f"{bytes_of(create()):,}"
            print(f"| `{state}` | {size} | {ranks} | {shown(ours)} | {shown(bare)} |")


if __name__ == "__main__":
    main()
