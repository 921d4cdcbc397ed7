"""Compare kinds of pseudo-labels and margins over several seeds, with the example's command line.

For each seed: source only and warm-up once, then the stages from that warm-up for each of
`VARIANTS`. What follows ``--`` goes to every run unchanged:

    python benchmarks/trainer_labels.py --output runs/dusk --seeds 0 1 2 --jobs 2 -- \
        --source DIR --target DIR --threads 1

Finished runs are not repeated, so an interrupted comparison goes on where it was. The tables,
in Markdown, go to OUTPUT/results.md and the terminal.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from seeds import markdown, score_cells

TRAIN = Path(__file__).parents[1] / "examples" / "gta5_to_cityscapes" / "train.py"
LABELS = {
    "probability": ["--labels", "probability"],
    "anchor": ["--labels", "anchor"],
    "both": ["--labels", "both"],
    # What the terms contribute: no pull to the anchors; no target pixel labeled at all.
    "anchor, no pull": ["--labels", "anchor", "--distance-weight", "0"],
    "no target labels": ["--labels", "anchor", "--margin", "inf"],
}
# In place of the default: one margin for all classes, chosen by hand; and each of its rules alone.
MARGINS = {
    f"anchor, margin {margin}": ["--labels", "anchor", "--margin", margin]
    for margin in ("0.5", "1", "2", "4", "8", "coverage:0.2", "precision:0.9")
}
VARIANTS = LABELS | MARGINS

Event = dict[str, Any]


def run(folder: Path, flags: list[str]) -> None:
    """One run of the example, unless one of the same flags has already finished there."""
    finished = folder / "finished.txt"
    if finished.exists() and finished.read_text("utf-8") == " ".join(flags):
        return
    if finished.exists():
        raise SystemExit(f"{folder} holds a run of other flags: remove it or name another --output")
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    folder.mkdir(parents=True)
    command = [sys.executable, str(TRAIN), "--output", str(folder), *flags]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    finished.write_text(" ".join(flags), "utf-8")
    print(f"finished {folder}", flush=True)


def folder_of(name: str) -> str:
    """The folder of a variant."""
    return name.replace(", ", "-").replace(" ", "-").replace(":", "-")


def run_all(output: Path, seeds: list[int], jobs: int, flags: list[str]) -> None:
    """The warm-ups side by side, then the stages."""
    warm_ups, stages = [], []
    for seed in seeds:
        folder, seeded = output / f"seed{seed}", [*flags, "--seed", str(seed)]
        start = ["--baseline", "--stages", "0"]
        warm_ups.append(partial(run, folder / "warm-up", [*seeded, *start]))
        checkpoint = folder / "warm-up" / "checkpoints" / "warm-up.pt"
        for name, variant in VARIANTS.items():
            more = [*variant, "--warmup-checkpoint", str(checkpoint)]
            stages.append(partial(run, folder / folder_of(name), [*seeded, *more]))
    for step in (warm_ups, stages):
        with ThreadPoolExecutor(jobs) as pool:
            for finished in [pool.submit(one) for one in step]:
                finished.result()


def read_events(output: Path, seeds: list[int], name: str, kind: str) -> list[list[Event]]:
    """The events of one kind in a run's metrics, by seed."""
    events = []
    for seed in seeds:
        lines = (
            (output / f"seed{seed}" / folder_of(name) / "metrics.jsonl")
            .read_text("utf-8")
            .splitlines()
        )
        events.append([e for e in map(json.loads, lines) if e["kind"] == kind])
    return events


def score_table(output: Path, seeds: list[int], names: Iterable[str], *, last: bool = False) -> str:
    """The mIoU after every phase, or after the last alone: each seed, mean and deviation."""
    rows = []
    for name in names:
        by_seed = read_events(output, seeds, name, "evaluation")
        for place, event in enumerate(by_seed[0]):
            phase = event["phase"]
            if name != "warm-up" and phase == "warm-up":
                continue  # where these runs start: a row of its own
            if last and place < len(by_seed[0]) - 1:
                continue
            label = phase if name == "warm-up" else f"{name}, {phase}"
            rows.append([label, *score_cells([100 * events[place]["miou"] for events in by_seed])])
    return markdown(["mIoU (%)", *(f"seed {seed}" for seed in seeds), "mean ± std"], rows)


def class_table(output: Path, seeds: list[int]) -> str:
    """The IoU of each class at the start and after the last stage, means over the seeds."""
    columns = {"source only": ("warm-up", 0), "warm-up": ("warm-up", 1)}
    columns |= {name: (name, -1) for name in LABELS}
    table = {}
    for title, (name, place) in columns.items():
        last = [events[place]["iou"] for events in read_events(output, seeds, name, "evaluation")]
        table[title] = {c: mean(iou[c] for iou in last) for c in last[0]}
    return by_class(table)


def label_table(output: Path, seeds: list[int], kind: str) -> str:
    """Coverage and precision of one kind of labels, by class and stage, means over the seeds."""
    by_seed = read_events(output, seeds, kind, "pseudo-labels")
    table = {}
    for number, event in enumerate(by_seed[0]):
        for what in ("coverage", "precision"):
            values = [events[number][what] for events in by_seed]
            table[f"{event['phase']} {what}"] = {c: mean(v[c] for v in values) for c in values[0]}
    return by_class(table)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is defined."""
    defined = [value for value in values if value is not None]
    return statistics.mean(defined) if defined else None


def by_class(table: dict[str, dict[str, float | None]]) -> str:
    """A row for every class that has a value anywhere."""
    show: Callable[[float | None], str] = lambda v: "–" if v is None else f"{100 * v:.1f}"  # noqa: E731
    classes = [
        c for c in next(iter(table.values())) if any(t[c] is not None for t in table.values())
    ]
    return markdown(
        ["class", *table], [[c, *(show(t[c]) for t in table.values())] for c in classes]
    )


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description="Compare the kinds of pseudo-labels.")
    parser.add_argument("--output", type=Path, required=True, help="folder for all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="for every run of train.py")
    options = parser.parse_args()
    run_all(options.output, options.seeds, options.jobs, options.flags)
    if not read_events(options.output, options.seeds[:1], "anchor", "pseudo-labels")[0]:
        parser.error("the tables need the labels of the target's training images, gtFine/train")
    where = options.output, options.seeds
    parts = [score_table(*where, ("warm-up", *LABELS)), class_table(*where)]
    margins = ("anchor", *MARGINS, "no target labels")
    parts += ["margins:", score_table(*where, margins, last=True)]
    for kind in ("probability", "anchor"):
        parts += [f"{kind} labels:", label_table(*where, kind)]
    text = "\n\n".join(parts) + "\n"
    (options.output / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
