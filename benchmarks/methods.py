"""Compare the methods of `examples/methods` on the synthetic pair of own images, by seed.

    python benchmarks/methods.py --output runs/methods

All methods of a seed start from the same warm-up and take the same number of steps as the control,
which sees the source alone. T3A takes none. The labels of the target are for the scores, and chose
nothing. Finished phases are reused. Results: OUTPUT/results.csv and OUTPUT/results.md.
"""

import argparse
import csv
import dataclasses
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "methods"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "synthetic"))

import torch
from folders import write_folders
from seeds import markdown, score_cells
from t3a import AdjustedClassifier
from torch import nn

from image_folders import Data, open_data, save
from light_network import build_network
from segmentation import (
    BeginStage,
    Options,
    evaluate,
    run_phase,
    self_training,
    source_alone,
)

STAGED = ("cag_uda", "proda", "cpsl", "sepico", "diga", "shot")
CONTROL = "control"


def adapted(name: str, warm: nn.Module, data: Data, options: Options) -> nn.Module:
    """Return the network of a method after all of its stages."""
    if name == "t3a":
        return AdjustedClassifier(warm)
    begins: dict[str, BeginStage] = {CONTROL: source_alone, "self-training": self_training}
    if name in STAGED:
        begins[name] = importlib.import_module(name).begin_stage
    network = warm
    for number in range(1, options.stages + 1):
        network = run_phase(name, number, network, begins[name], data, options)
    return network


def run_seed(seed: int, names: list[str], options: Options) -> dict[str, dict[str, float]]:
    """Return the IoU of the classes on the target by each method, all from one warm-up."""
    folder = options.output / f"data-{seed}"
    write_folders(folder, seed=seed)
    data = open_data(folder / "source", folder / "target", folder / "classes.txt", options.size)
    options = dataclasses.replace(options, output=options.output / f"seed{seed}", seed=seed)
    torch.manual_seed(seed)
    start = build_network("", len(data.classes), options.device)
    warm = run_phase("source only", 0, start, source_alone, data, options)
    scores = {"source only": evaluate(warm, data.evaluation, data, options)}
    for name in names:
        path = options.output / f"{name}.json"
        if not path.exists():
            network = adapted(name, warm, data, options)
            score = evaluate(network, data.evaluation, data, options)
            text = json.dumps(score)
            save(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        scores[name] = json.loads(path.read_text("utf-8"))
        print(f"seed {seed}, {name}: mIoU {scores[name]['mean']:.1%}", flush=True)
    return scores


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description="Compare the methods of examples/methods.")
    parser.add_argument("--output", type=Path, required=True, help="folder for all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warmup-iterations", type=int, default=400)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--stage-iterations", type=int, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), help="of all images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = Options(
        output=given.output,
        warmup_iterations=given.warmup_iterations,
        stages=given.stages,
        stage_iterations=given.stage_iterations,
        size=tuple(given.size),
        resume=True,
    )
    names = [CONTROL, "self-training", *STAGED, "t3a"]
    runs = [run_seed(seed, names, options) for seed in given.seeds]
    means = {name: [100 * scores[name]["mean"] for scores in runs] for name in runs[0]}
    rows = []
    for name, values in means.items():
        gains = [a - b for a, b in zip(values, means[CONTROL], strict=True)]
        rows.append([name, *score_cells(values), score_cells(gains, "+")[-1]])
    head = ["mIoU (%)", *(f"seed {s}" for s in given.seeds), "mean ± std", "− control"]
    table = markdown(head, rows)
    save(given.output / "results.md", lambda file: file.write_text(table + "\n", encoding="utf-8"))
    with (given.output / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "method", "class", "iou"])
        for seed, scores in zip(given.seeds, runs, strict=True):
            for name, classes in scores.items():
                writer.writerows([seed, name, c, f"{iou:.6f}"] for c, iou in classes.items())
    print(table)


if __name__ == "__main__":
    main()
