"""Compare the two warm-ups over several seeds, and the stages on top of each.

What follows ``--`` goes to every run of the example unchanged:

    python benchmarks/warm_ups.py --output runs/warm-ups --seeds 0 1 2 --jobs 2 -- \
        --source DIR --target DIR --threads 1

Finished runs are not repeated. The tables, in Markdown, go to OUTPUT/results.md and the
terminal.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seeds import markdown, read_scores, score_cells
from trainer_labels import by_class, mean, read_events, run

WARM_UPS = {"source": ["--baseline"], "adversarial": ["--warmup", "adversarial"]}


def score_table(output: Path, seeds: list[int]) -> str:
    """Return a table of the mIoU after every phase, by seed, and the differences."""
    rows = []
    scores = {
        kind: [read_scores(output / f"seed{seed}" / kind) for seed in seeds] for kind in WARM_UPS
    }
    for kind, runs in scores.items():
        for phase in runs[0]:
            name = phase if phase == "source only" else f"{kind}, {phase}"
            rows.append([name, *score_cells([run[phase] for run in runs])])
    for phase in scores["adversarial"][0]:
        pairs = zip(scores["adversarial"], scores["source"], strict=True)
        gains = [adversarial[phase] - source[phase] for adversarial, source in pairs]
        rows.append([f"adversarial − source, {phase}", *score_cells(gains, "+")])
    return markdown(["mIoU (%)", *(f"seed {seed}" for seed in seeds), "mean ± std"], rows)


def class_table(output: Path, seeds: list[int]) -> str:
    """Return the IoU of each class after warm-up and last stage, means over the seeds."""
    table = {}
    for kind in WARM_UPS:
        by_seed = read_events(output, seeds, kind, "evaluation")
        warm_up = next(i for i, event in enumerate(by_seed[0]) if event["phase"] == "warm-up")
        for place in (warm_up, -1):
            ious = [events[place]["iou"] for events in by_seed]
            title = f"{kind}, {by_seed[0][place]['phase']}"
            table[title] = {c: mean(iou[c] for iou in ious) for c in ious[0]}
    return by_class(table)


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description="Compare the two warm-ups.")
    parser.add_argument("--output", type=Path, required=True, help="folder for all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="for every run of train.py")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        begun = [
            pool.submit(
                run,
                options.output / f"seed{seed}" / kind,
                [*options.flags, "--seed", str(seed), *flags],
            )
            for kind, flags in WARM_UPS.items()
            for seed in options.seeds
        ]
        for finished in begun:
            finished.result()
    where = options.output, options.seeds
    text = f"{score_table(*where)}\n\n{class_table(*where)}\n"
    (options.output / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
