"""Measure `examples/frozen_features.py` on three pairs of domains.

    python benchmarks/one_pass.py --output runs/one-pass --camvid DIR --carla DIR

Day to dusk, with DIR as in `own_images.py`; CARLA to Cityscapes, the folder of that name which
`street_pairs.py` writes; and the synthetic pair of own images, drawn anew for each seed. Anchors
and discriminants have no seed; on the pairs of photographs the linear probes have three. Results:
OUTPUT/frozen_features.csv, and the tables in Markdown.
"""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "synthetic"))

import frozen_features
import torch
import tyro
from folders import write_folders
from own_images import lay_out
from seeds import markdown

Scores = dict[str, list[float]]  # of each classifier, on held-out source and on the target
Values = dict[str, list[list[float]]]  # those of all seeds, a list for each domain


def measure(root: Path, size: tuple[int, int], seeds: tuple[int, ...], encoder: str) -> Values:
    """Return the scores of the classifiers, those of the probes as one classifier's."""
    files = root / "source", root / "target", root / "classes.txt"
    scores: Scores = frozen_features.main(
        *files, encoder=encoder, size=size, probes=seeds, device="cpu"
    )
    values: Values = defaultdict(lambda: [[], []])
    for name, of_domains in scores.items():
        for domain, value in zip(values[name.rstrip(" 0123456789")], of_domains, strict=True):
            domain.append(value)
    return values


def table(pair: str, values: Values) -> str:
    """Return the mean ± standard deviation of each classifier on both domains."""
    rows = []
    for name, domains in values.items():
        spreads = [f" ± {statistics.stdev(x):.1f}" if len(x) > 1 else "" for x in domains]
        means = (statistics.mean(x) for x in domains)
        rows.append([name, *(f"{m:.1f}{s}" for m, s in zip(means, spreads, strict=True))])
    return markdown([f"{pair}, mIoU (%)", "held-out source", "target"], rows)


def write(path: Path, pairs: dict[str, Values]) -> None:
    """Write a line for each score, and print the tables."""
    lines = [["pair", "classifier", "domain", "number", "miou"]]
    for pair, of_pair in pairs.items():
        for name, domains in of_pair.items():
            for domain, values in zip(("held-out source", "target"), domains, strict=True):
                of_one = [pair, name, domain]
                lines += [[*of_one, str(i), f"{v:.4f}"] for i, v in enumerate(values)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    print("\n\n".join(table(pair, values) for pair, values in pairs.items()), flush=True)


def main(
    output: Path,  # Folder for data and results.
    camvid: Path,  # Folder of day to dusk.
    carla: Path,  # Folder of CARLA to Cityscapes.
    encoder: str = "",  # Encoder, as of `frozen_features.py`.
    seeds: tuple[int, ...] = (0, 1, 2),  # Seeds of probes, and of the synthetic pair.
    threads: int = 1,  # CPU threads.
) -> None:
    """Measure and write the results after each pair."""
    torch.set_num_threads(threads)
    lay_out(camvid, day := output / "data" / "day to dusk")
    pairs = {"day to dusk": measure(day, (180, 240), seeds, encoder)}
    write(output / "frozen_features.csv", pairs)
    synthetic = pairs["synthetic"] = defaultdict(lambda: [[], []])
    for seed in seeds:
        write_folders(root := output / "data" / f"synthetic-{seed}", seed=seed)
        for name, domains in measure(root, (180, 240), (seed,), encoder).items():
            for values, more in zip(synthetic[name], domains, strict=True):
                values.extend(more)
    write(output / "frozen_features.csv", pairs)
    pairs["CARLA to Cityscapes"] = measure(carla, (120, 240), seeds, encoder)
    write(output / "frozen_features.csv", pairs)


if __name__ == "__main__":
    tyro.cli(main)
