"""Measure `examples/segmentation.py`: source only, control and adapted, over several seeds.

    python benchmarks/own_images.py --output runs/own-images --pairs synthetic
    python benchmarks/own_images.py --output runs/own-images --pairs day-to-dusk --camvid DIR

The synthetic pair is drawn anew for each seed. DIR holds ``source`` in GTA5's layout and ``target``
in that of Cityscapes; the network adapts to its ``train`` split, without labels, and is scored on
``val``. What follows ``--`` goes to every run. Finished runs are reused and interrupted ones go on
after their last phase. Results: OUTPUT/results.csv and the tables of OUTPUT/results.md.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "synthetic"))

from folders import write_folders
from seeds import markdown, score_cells

EXAMPLES = Path(__file__).parents[1] / "examples"
STREET_CLASSES = """\
road: 7
sidewalk: 8
building: 11
fence: 13
pole: 17
sign: 20
vegetation: 21
sky: 23
pedestrian: 24
bicyclist: 25
car: 26
"""
Scores = dict[str, dict[str, float]]  # of each network, the IoU of each class and the mean


def lay_out(camvid: Path, root: Path) -> None:
    """Link the images and labels of day to dusk into the folder layout."""
    source = [
        (kind, path)
        for kind in ("images", "labels")
        for path in (camvid / "source" / kind).iterdir()
    ]
    links = {root / "source" / kind / path.name: path for kind, path in source}
    for kind, split, folder, ending in (
        ("images", "train", "leftImg8bit", "_leftImg8bit"),
        ("images", "val", "leftImg8bit", "_leftImg8bit"),
        ("labels", "val", "gtFine", "_gtFine_labelIds"),
    ):
        for path in (camvid / "target" / folder / split).rglob("*.png"):
            links[root / "target" / kind / f"{split}_{path.stem.removesuffix(ending)}.png"] = path
    for link, path in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())
    (root / "classes.txt").write_text(STREET_CLASSES, encoding="utf-8")


def run(data: Path, output: Path, flags: list[str]) -> Scores:
    """Return the scores of a run, which is run, or goes on, unless it has finished."""
    scores = output / "scores.json"
    if not scores.exists():
        command = [sys.executable, str(EXAMPLES / "segmentation.py"), "--output", str(output)]
        command += ["--source", str(data / "source"), "--target", str(data / "target")]
        command += ["--classes", str(data / "classes.txt"), "--control", "--resume", *flags]
        output.mkdir(parents=True, exist_ok=True)
        with (output / "log.txt").open("a", encoding="utf-8") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        print(f"finished {output}", flush=True)
    found: Scores = json.loads(scores.read_text("utf-8"))
    return found


def tables(pair: str, runs: list[Scores], seeds: list[int]) -> str:
    """Return the mean IoU by seed, what adapting adds, and the IoU of each class, in percent."""
    means = {name: [100 * scores[name]["mean"] for scores in runs] for name in runs[0]}
    rows = [[name, *score_cells(values)] for name, values in means.items()]
    for other in ("control", "source only"):
        gains = [a - b for a, b in zip(means["adapted"], means[other], strict=True)]
        rows.append([f"adapted − {other}", *score_cells(gains, "+")])
    head = [f"{pair}, mIoU (%)", *(f"seed {seed}" for seed in seeds), "mean ± std"]
    by_class = []
    for name in runs[0]["adapted"]:
        values = [statistics.mean(100 * scores[row][name] for scores in runs) for row in runs[0]]
        by_class.append([name, *(f"{value:.1f}".replace("nan", "–") for value in values)])
    return "\n\n".join([markdown(head, rows), markdown(["mean IoU (%)", *runs[0]], by_class)])


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description="Measure examples/segmentation.py.")
    parser.add_argument("--output", type=Path, required=True, help="folder for all runs")
    parser.add_argument("--pairs", nargs="+", choices=["synthetic", "day-to-dusk"], required=True)
    parser.add_argument("--camvid", type=Path, help="folder of day to dusk")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="for every run")
    options = parser.parse_args()
    if "day-to-dusk" in options.pairs and options.camvid is None:
        parser.error("--pairs day-to-dusk needs --camvid DIR")
    texts, lines = [], [["pair", "seed", "network", "class", "iou"]]
    for pair in options.pairs:
        runs = []
        for seed in options.seeds:
            data = options.output / "data" / (f"{pair}-{seed}" if pair == "synthetic" else pair)
            if pair == "synthetic":
                write_folders(data, seed=seed)
            else:
                lay_out(options.camvid, data)
            output = options.output / pair / f"seed{seed}"
            runs.append(run(data, output, [*options.flags, "--seed", str(seed)]))
        texts.append(tables(pair, runs, options.seeds))
        for seed, scores in zip(options.seeds, runs, strict=True):
            for name, classes in scores.items():
                for c, iou in classes.items():
                    lines.append([pair, str(seed), name, c, f"{iou:.6f}"])
    (options.output / "results.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    with (options.output / "results.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
