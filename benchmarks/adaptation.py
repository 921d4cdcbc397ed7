"""Compare labels, anchors, mixing, teachers, views and weights in adaptation to four tasks.

    python benchmarks/adaptation.py --output runs/adaptation --camvid DIR --streets DIR

Tasks: the synthetic pair of own images, drawn anew for each seed; day to dusk, with DIR as in
`own_images.py`; CARLA to Cityscapes, with DIR as `street_pairs.py` lays the pairs out; and the
digits of `examples/digits.py`, features (N, D).

The protocol:

- `examples/segmentation.py`, its network with ImageNet weights, four images of each domain in a
  step. A warm-up of 400 steps on the source, once for each task and seed; then, from it, each row
  takes two stages of 60 steps. The control takes the same steps on the source alone.
- The default is `self_training` as `segmentation.py` has it. Each other row changes one thing.
- The network of a row is its moving average after the last step. Beside it: the one of the two
  stages that is best on held-out source, and, by target labels, the best of the two.
- Three seeds. Labels of the targets of the tasks are for the scores, and chose nothing.

Mixing and the weight of a label were chosen on two other pairs, whose target, CamVid by day, is the
target of no task: Cityscapes to CamVid and CARLA to CamVid, three seeds, the same steps:

    python benchmarks/adaptation.py --output runs/choice --streets DIR \
        --tasks "Cityscapes to CamVid" "CARLA to CamVid" \
        --rows control default "no mixing" "no weights" "sure share"

The first protocol had a warm-up of 160 steps, which was not over. In the second, labels weighed as
much as part of them was sure, as in DACS and DAFormer; its results are at commit 853af63.

Finished rows are reused; `--tasks` and `--rows` run a part, `--from-nothing` (with an output of its
own) without ImageNet weights. Results: OUTPUT/results.csv, results.md
and results.png. About three hours on one core of a recent CPU.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "methods"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "synthetic"))

import cag_uda
import digits
import frozen_features
import torch
import torch.nn.functional as F
import tyro
from folders import write_folders
from matplotlib.figure import Figure
from own_images import lay_out
from seeds import markdown, score_cells
from torch import Tensor, nn

import anchorda
from image_folders import Batch, Data, open_data, save
from light_network import build_network
from segmentation import (
    DECAY,
    BeginLabels,
    BeginStage,
    Label,
    Objective,
    Options,
    at_full_size,
    crop,
    evaluate,
    freeze,
    label_all,
    run_phase,
    self_training,
    source_alone,
)

SIZES = {"synthetic": (96, 128), "day to dusk": (96, 128), "CARLA to Cityscapes": (96, 192)}
TASKS = (*SIZES, "digits")
SIZES |= {"Cityscapes to CamVid": (96, 192), "CARLA to CamVid": (96, 192)}  # to choose by
SURE = 0.968  # probability of a sure label (arXiv 2007.08702)
ANCHORS_OF = 160  # source images of the frozen encoder's anchors and of the clusters
Score = dict[str, float]  # mean IoU on the target, and on held-out source
Scores = dict[str, list[Score]]  # of each row, after each stage


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare rows of settings on four tasks, over several seeds."""

    output: Path  # Folder for all runs.
    camvid: Path | None = None  # Folder of day to dusk.
    streets: Path | None = None  # Folder of CARLA to Cityscapes and the two pairs to choose by.
    encoder: str = ""  # Frozen encoder of the row of that name, as of `frozen_features.py`.
    tasks: tuple[str, ...] = TASKS  # Tasks to run.
    rows: tuple[str, ...] = ()  # Rows to run, the control among them; all if empty.
    from_nothing: bool = False  # Draw the weights of the network at random.
    stages: int = 2  # Stages of 60 steps.
    seeds: tuple[int, ...] = (0, 1, 2)  # Seeds to run.
    threads: int = 1  # CPU threads.


# ------------------------------------------------------------------------------------------- rows


def followed(stage: anchorda.StageLabeler) -> Label:
    """Return the labels of a stage that follows the trained network, weighed as in the default."""

    def label(network: nn.Module, target: Tensor) -> Batch:
        stage.follow(network, DECAY)
        labels, _, (_, scores) = stage(target)
        return labels, scores

    return label


def weighed(
    weigh: Callable[[Tensor], Tensor], network: nn.Module, data: Data, options: Options
) -> Label:
    """Label as in the default, with weights that are another function of the probabilities."""
    label_default = label_all(network, data, options)

    def label(network: nn.Module, target: Tensor) -> Batch:
        labels, probabilities = label_default(network, target)
        return labels, weigh(probabilities)

    return label


def share_of_sure(probabilities: Tensor) -> Tensor:
    """Return the share of sure pixels, the weight of DACS and DAFormer."""
    return (probabilities > SURE).float().mean().expand(probabilities.shape)


def above_threshold(network: nn.Module, data: Data, options: Options) -> Label:
    """Label the pixels whose largest probability exceeds 0.95."""
    stage = freeze(network, data, options)
    stage.by_probability = anchorda.ProbabilityPseudoLabeler(0.95)
    return followed(stage)


def of_views(network: nn.Module, data: Data, options: Options) -> Label:
    """Label by the average over two scales, each as it is and flipped."""
    stage = freeze(network, data, options)
    stage.extract = anchorda.average_views(at_full_size, scales=(1.0, 1.25))
    return followed(stage)


def of_clusters(network: nn.Module, data: Data, options: Options) -> Label:
    """Label where the classifier agrees with the nearest of four whitened anchors of each class."""
    stage = freeze(network, data, dataclasses.replace(options, labels="agree"))
    num_classes, dim = stage.centroids.shape
    clusters = anchorda.AnchorClusters(num_classes, dim, anchors_per_class=4)
    for _ in range(4):
        batches = data.source.batches(options.batch, options.device)
        for images, labels in islice(batches, ANCHORS_OF // options.batch):
            with torch.no_grad():
                features, _ = stage.network(images)
            clusters.update(features, anchorda.resize_labels(labels, features.shape[2:]))
        clusters.step()
    stage.centroids = clusters.compute()
    return followed(stage)


def by_frozen_encoder(network: nn.Module, data: Data, options: Options, encoder: str = "") -> Label:
    """Label by the teacher's probabilities times those of a frozen encoder's discriminant."""
    stage = freeze(network, data, options)
    encode = frozen_features.build_encoder(encoder, options.device)
    with torch.no_grad():
        dim = encode(data.source.batch(torch.arange(1), options.device)[0]).shape[1]
        anchors = anchorda.CategoryAnchors(len(data.classes), dim)
        covariance = anchorda.WithinClassCovariance(len(data.classes), dim)
        batches = data.source.batches(options.batch, options.device)
        for images, labels in islice(batches, ANCHORS_OF // options.batch):
            features = encode(images)
            labels = anchorda.resize_labels(labels, features.shape[2:], mode="majority")
            anchors.update(features, labels)
            covariance.update(features, labels)
    discriminant = anchorda.linear_discriminant(anchors.compute(), covariance.compute())

    @torch.no_grad()
    def label(network: nn.Module, target: Tensor) -> Batch:
        stage.follow(network, DECAY)
        logits = discriminant.logits(encode(target)) / 3  # its softmax is overconfident
        logits = F.interpolate(logits, target.shape[2:], mode="bilinear")
        probabilities = stage.probabilities(target)
        labels = anchorda.rectify(probabilities, logits.softmax(dim=1)).argmax(dim=1)
        return labels, probabilities.amax(dim=1)

    return label


def source_as_it_is(network: nn.Module, data: Data, options: Options) -> Objective:
    """Begin a warm-up without a change of color, light or sharpness."""
    weights = data.class_weights().to(options.device)

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        images, labels = crop(*source)
        _, logits = at_full_size(network, images)
        return anchorda.discriminative_loss(logits, labels, weight=weights)

    return objective


def begin_row(name: str, options: Options, encoder: str) -> tuple[BeginStage, Options]:
    """Return how a row begins a stage, and its options."""
    begins: Mapping[str, BeginStage] = {"control": source_alone, "the paper": cag_uda.begin_stage}
    labels: Mapping[str, BeginLabels] = {
        "threshold": above_threshold,
        "views": of_views,
        "no weights": partial(weighed, torch.ones_like),
        "sure share": partial(weighed, share_of_sure),
        "clusters": of_clusters,
        "frozen encoder": partial(by_frozen_encoder, encoder=encoder),
    }
    changes: Mapping[str, dict[str, object]] = {
        "no mixing": {"mix": False},
        "fixed teacher": {"teacher": "stage"},
        "agreement": {"labels": "agree"},
        "rectified": {"labels": "rectify"},
    }
    begin = begins.get(name, self_training)
    if name in labels:
        begin = partial(self_training, begin_labels=labels[name])
    return begin, dataclasses.replace(options, **changes.get(name, {}))  # type: ignore[arg-type]


ROWS = {
    "control": "control: source alone, the same steps",
    "default": "**default**: all labels of a moving average, by probability; class mixing",
    "the paper": "the paper: anchor and probability labels, distance loss",
    "threshold": "default, but only labels above 0.95",
    "no weights": "default, labels of equal weight",
    "sure share": "default, labels weighed by the share above 0.968",
    "no mixing": "default without mixing",
    "fixed teacher": "default, labels of a fixed copy",
    "views": "default, labels averaged over four views",
    "agreement": "default where whitened anchors agree",
    "rectified": "default rectified by whitened anchors",
    "clusters": "default where four whitened anchors a class agree",
    "frozen encoder": "default rectified by anchors of a frozen encoder",
}
STARTS = {"source only": "source only", "augmented": "+ augmentation: the warm-up"}
OF_DIGITS = {
    "control": "control",
    "default": "self_training",
    "the paper": "cag_uda",
    "agreement": "agree",
    "rectified": "rectify",
}


# ------------------------------------------------------------------------------------------- runs


def open_task(task: str, seed: int, settings: Settings) -> Data:
    """Lay out and read the images of a task."""
    root = settings.output / "data" / (f"synthetic-{seed}" if task == "synthetic" else task)
    if task == "synthetic":
        write_folders(root, seed=seed)
    elif task == "day to dusk" and settings.camvid is not None:
        lay_out(settings.camvid, root)
    elif task != "day to dusk" and settings.streets is not None:
        root = settings.streets / task.lower().replace(" ", "-")
    else:
        sys.exit(f"Expected the folder of {task}: --camvid or --streets.")
    return open_data(root / "source", root / "target", root / "classes.txt", SIZES[task])


def score(network: nn.Module, data: Data, options: Options) -> Score:
    """Return the mean IoU on the target and on held-out source."""
    domains = {"target": data.evaluation, "held-out source": data.held_out}
    return {name: evaluate(network, x, data, options)["mean"] for name, x in domains.items()}


def adapt(name: str, warm: nn.Module, data: Data, options: Options, encoder: str) -> list[Score]:
    """Return the scores of a row after each stage."""
    begin, options = begin_row(name, options, encoder)
    network, scores = warm, list[Score]()
    for number in range(1, options.stages + 1):
        network = run_phase(name, number, network, begin, data, options)
        scores.append(score(network, data, options))
    return scores


def build_start(num_classes: int, options: Options, *, from_nothing: bool) -> nn.Module:
    """Return the network that the warm-up starts from."""
    network = build_network("", num_classes, options.device)
    if from_nothing:
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()
    return network


def run_maps(task: str, seed: int, settings: Settings) -> Scores:
    """Return the scores of the rows on a task of maps."""
    output = settings.output / task / f"seed{seed}"
    rows = settings.rows or (*STARTS, *ROWS)
    paths = {name: output / f"{name}.json" for name in rows}
    if not all(path.exists() for path in paths.values()):
        data = open_task(task, seed, settings)
        options = Options(
            output=output, size=SIZES[task], warmup_iterations=400, stage_iterations=60,
            stages=settings.stages, seed=seed, threads=settings.threads, device="cpu", resume=True,
        )  # fmt: skip
        torch.manual_seed(seed)
        start = build_start(len(data.classes), options, from_nothing=settings.from_nothing)
        warm = run_phase("augmented", 0, start, source_alone, data, options)
        for name, path in paths.items():
            if path.exists():
                continue
            if name in STARTS:
                begin = source_alone if name == "augmented" else source_as_it_is
                network = run_phase(name, 0, start, begin, data, options)
                scores = [score(network, data, options)]
            else:
                scores = adapt(name, warm, data, options, settings.encoder)
            text = json.dumps(scores)
            save(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))  # type: ignore[misc]
            print(f"{task}, seed {seed}, {name}: {100 * scores[-1]['target']:.1f}", flush=True)
    return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()}


def run_digits(settings: Settings) -> list[Scores]:
    """Return the accuracies of the rows on digits by seed, after the last stage."""
    path = settings.output / "digits" / f"{max(settings.seeds) + 1} seeds.json"
    if not path.exists():
        arguments = ["--method", *OF_DIGITS.values(), "--seeds", str(max(settings.seeds) + 1)]
        found = digits.main(arguments)
        save(path, lambda file: file.write_text(json.dumps(found), encoding="utf-8"))
    found = json.loads(path.read_text("utf-8"))
    rows = {"source only": "source only", **OF_DIGITS}
    return [
        {name: [{"target": found[row][seed]}] for name, row in rows.items()}
        for seed in settings.seeds
    ]


# ---------------------------------------------------------------------------------------- results


CHOICES: Mapping[str, Callable[[list[Score]], Score]] = {
    "last": lambda scores: scores[-1],
    "best on held-out source": lambda scores: max(
        scores, key=lambda score: score.get("held-out source", 0.0)
    ),
    "best on target": lambda scores: max(scores, key=lambda score: score["target"]),
}


def table(results: dict[str, list[Scores]], choice: str, *, gains: bool = False) -> str:
    """Return mean ± deviation of each row on each task, or what it gains over the control."""
    lines = []
    for name, text in {**STARTS, **ROWS}.items():
        cells, over_tasks = [], list[float]()
        for runs in results.values():
            if not all(name in scores for scores in runs):
                cells.append("–")
                continue
            values = [100 * CHOICES[choice](scores[name])["target"] for scores in runs]
            if gains:
                control = [100 * CHOICES[choice](scores["control"])["target"] for scores in runs]
                values = [a - b for a, b in zip(values, control, strict=True)]
                over_tasks.append(sum(values) / len(values))
            cells.append(score_cells(values, "+" if gains else "")[-1])
        if set(cells) == {"–"}:
            continue
        mean = f"{sum(over_tasks) / len(over_tasks):+.1f}" if over_tasks else "–"
        lines.append([text, *cells, *([mean] if gains else [])])
    what = f"{choice}, − control" if gains else f"{choice}, mIoU or accuracy (%)"
    return markdown([what, *results, *(["mean of tasks"] if gains else [])], lines)


def draw(results: dict[str, list[Scores]]) -> Figure:
    """Draw what each row gains over the control: a dot for each seed, a line for the mean."""
    found = {name for runs in results.values() for scores in runs for name in scores}
    names = [name for name in ROWS if name in found - {"control"}]
    figure = Figure((7.0, 3.6), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (task, runs) in zip(axes, results.items(), strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, name in enumerate(reversed(names)):
            if all(name in scores for scores in runs):
                values = [
                    100 * (scores[name][-1]["target"] - scores["control"][-1]["target"])
                    for scores in runs
                ]
                color = "#d55e00" if name == "default" else "#0072b2"
                axis.plot(values, [place] * len(values), "o", color=color, markersize=3, alpha=0.6)
                mean = sum(values) / len(values)
                axis.plot([mean, mean], [place - 0.3, place + 0.3], color=color, linewidth=2)
        axis.set_title(task, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    figure.supxlabel("points above the control, after the last stage", fontsize=8)
    return figure


def write_csv(path: Path, results: dict[str, list[Scores]], seeds: tuple[int, ...]) -> None:
    """Write every score."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "seed", "row", "stage", "domain", "score"])
        for task, runs in results.items():
            for seed, scores in zip(seeds, runs, strict=True):
                for name, stages in scores.items():
                    for number, found in enumerate(stages, 1):
                        for domain, value in found.items():
                            writer.writerow([task, seed, name, number, domain, f"{value:.6f}"])


def check_names(flag: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Exit if a name is not known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"Expected {flag} of {', '.join(known)}, but got {', '.join(unknown)}.")


def main() -> None:
    """Run what is missing, then write the tables and the chart."""
    settings = tyro.cli(Settings)
    check_names("--tasks", settings.tasks, (*SIZES, "digits"))
    check_names("--rows", settings.rows, (*STARTS, *ROWS))
    if settings.rows and "control" not in settings.rows:
        sys.exit("Expected --rows with control, which the others are compared with.")
    torch.set_num_threads(settings.threads)
    results: dict[str, list[Scores]] = {task: [] for task in settings.tasks}
    if "digits" in results:
        results["digits"] = run_digits(settings)
    for seed in settings.seeds:
        for task in [task for task in SIZES if task in results]:
            results[task].append(run_maps(task, seed, settings))
    texts = [table(results, "last"), table(results, "last", gains=True)]
    texts += [table(results, choice) for choice in list(CHOICES)[1:]]
    text = "\n\n".join(texts) + "\n"
    save(settings.output / "results.md", lambda file: file.write_text(text, encoding="utf-8"))
    save(settings.output / "results.csv", lambda f: write_csv(f, results, settings.seeds))
    save(settings.output / "results.png", partial(draw(results).savefig, dpi=200))
    print(text)


if __name__ == "__main__":
    main()
