"""Category anchor-guided domain adaptation (arXiv 1910.13049), GTA5 to Cityscapes, top to bottom.

    python examples/gta5_to_cityscapes/train.py --source GTA5 --target CITYSCAPES --output runs/one

Settings, data, the objective, warm-up, stages, evaluation, report. Without data sets it first
writes a small synthetic pair. The labels of the target's training images are never trained on:
where they exist they tell, after the fact, how good the pseudo-labels were.
"""

import argparse
import copy
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, get_args

import torch
import torch.nn.functional as F
from augment import photometric
from classes import CLASS_NAMES, IGNORE, NUM_CLASSES, SYNTHIA_13, SYNTHIA_16
from deeplab import DeepLab, load_backbone
from network import Segmenter, SmallSegmenter
from readers import (
    DatasetError,
    LabeledImages,
    ResizeAndCrop,
    UnlabeledImages,
    cityscapes_images,
    cityscapes_pairs,
    gta5_pairs,
    synthia_pairs,
)
from records import Records, load_checkpoint, save_checkpoint, write_atomically
from report import (
    Panel,
    iou_table,
    save_anchor_distances,
    save_curves,
    save_label_quality,
    save_margin_curves,
    save_panels,
)
from synthetic import SourceFormat, write_synthetic_pair
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset
from tqdm import tqdm

import anchorda

Item = TypeVar("Item")

# ---------------------------------------------------------------------------------------- settings


class Settings(argparse.Namespace):
    """All that a run depends on; saved beside its results."""

    source: Path | None
    target: Path | None
    output: Path
    source_format: SourceFormat
    network: str
    backbone: Path | None
    labels: str
    margin: str
    probability: float
    distance_weight: float
    height: int
    crop: tuple[int, int]
    batch: int
    learning_rate: float
    stage_learning_rate: float
    warmup_iterations: int
    stages: int
    stage_iterations: int
    baseline: bool
    warmup_checkpoint: Path | None
    seed: int
    workers: int
    threads: int
    bf16: bool
    device: str


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(
        description="Category anchor-guided domain adaptation, GTA5 to Cityscapes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--source", type=Path, help="GTA5 or SYNTHIA folder; none: a synthetic pair")
    add("--target", type=Path, help="Cityscapes folder (leftImg8bit, gtFine)")
    add("--output", type=Path, required=True, help="folder for metrics, checkpoints and report")
    add(
        "--source-format",
        choices=get_args(SourceFormat),
        default="gta5",
        help="gta5: images, labels; synthia: RGB, GT/LABELS, and its 16 classes in evaluation",
    )
    add(
        "--network",
        choices=("small", "deeplab18", "deeplab50", "deeplab101"),
        default="small",
        help="small is for a CPU; deeplab101 is the paper's",
    )
    add("--backbone", type=Path, help="ImageNet weights of DeepLab's ResNet, as torchvision's")
    add(
        "--labels",
        choices=("anchor", "probability", "both"),
        default="both",
        help="what labels target pixels; both is the paper's",
    )
    add(
        "--margin",
        type=_margin,
        default="coverage:0.2,precision:0.5",
        help="minimum margin of anchor labels: a number; coverage:Q, by class, on the target; "
        "precision:P, by class, on the held-out source; or several of these, the highest counts",
    )
    add("--probability", type=_fraction, default=0.95, help="minimum of probability labels")
    add("--distance-weight", type=float, default=0.02, help="weight of the distance loss")
    add("--height", type=_count, default=144, help="images are scaled to this height")
    add("--crop", type=_count, nargs=2, default=(128, 192), help="height and width of crops")
    add("--batch", type=_count, default=4, help="images a step; in stages half of each domain")
    add("--learning-rate", type=float, default=0.003, help="at the start of the warm-up")
    add("--stage-learning-rate", type=float, default=0.001, help="at the start of each stage")
    add("--warmup-iterations", type=_count, default=900, help="of the warm-up, and the baseline")
    add("--stages", type=int, default=3, help="how often the target is labeled anew")
    add("--stage-iterations", type=_count, default=280, help="of each stage")
    add("--baseline", action="store_true", help="train without augmentation too, to compare")
    add("--warmup-checkpoint", type=Path, help="start from this warm-up instead of training one")
    add("--seed", type=int, default=0, help="of all randomness")
    add("--workers", type=int, default=2, help="processes that read images")
    add("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves it to torch")
    add("--bf16", action="store_true", help="run the network in bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    settings = parser.parse_args(arguments, namespace=Settings())
    settings.crop = (settings.crop[0], settings.crop[1])
    if settings.crop[0] > settings.height:
        parser.error(f"--crop {settings.crop[0]} is higher than --height {settings.height}")
    if settings.batch % 2:
        parser.error(f"--batch {settings.batch} cannot be halved between the domains")
    if (settings.source is None) != (settings.target is None):
        parser.error("--source and --target belong together: give both, or neither")
    if settings.backbone is not None and settings.network == "small":
        parser.error("--backbone holds weights of a ResNet: choose a --network that has one")
    if settings.backbone is not None and not settings.backbone.is_file():
        parser.error(f"there is no file of weights {settings.backbone}")
    if settings.warmup_checkpoint is not None and not settings.warmup_checkpoint.is_file():
        parser.error(f"there is no warm-up checkpoint {settings.warmup_checkpoint}")
    if (settings.output / "metrics.jsonl").exists():
        parser.error(f"{settings.output} already holds a run: remove it, or name another --output")
    return settings


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text!r}")
    return value


def _margin(text: str) -> str:
    try:
        for part in text.split(","):
            rule, colon, number = part.partition(":")
            if colon and rule in ("coverage", "precision"):
                _fraction(number)
            elif math.isnan(float(part)):
                raise ValueError
    except (ValueError, argparse.ArgumentTypeError):
        message = f"expected a number, coverage:Q or precision:P with Q, P in [0, 1], got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return text


# -------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Data:
    """The two domains, listed and checked."""

    source: LabeledImages
    """Crops to train on."""
    source_whole: LabeledImages
    """The same images uncropped, to take anchors from."""
    held_out: LabeledImages
    """The last tenth of the source, never trained on: what a margin's precision is measured on."""
    target: UnlabeledImages
    target_whole: UnlabeledImages
    evaluation: LabeledImages
    """The target's validation split."""
    analysis: LabeledImages | None
    """The target's training split with its labels, if there are any: never trained on."""
    evaluated: tuple[int, ...]
    """The classes that the source knows: the truth of others is ignored in evaluation."""
    class_weight: Tensor
    """(C,): of the source's classes in its cross-entropy."""


def open_data(settings: Settings) -> Data:
    """List and check both data sets, writing the synthetic ones first if none are given."""
    source, target = settings.source, settings.target
    if source is None or target is None:
        source, target = write_synthetic_pair(
            settings.output / "synthetic",
            seed=settings.seed,
            source_format=settings.source_format,
        )
    whole = ResizeAndCrop(settings.height)
    crops = ResizeAndCrop(settings.height, settings.crop, flip=True)
    is_synthia = settings.source_format == "synthia"
    source_pairs = synthia_pairs(source) if is_synthia else gta5_pairs(source)
    target_images = cityscapes_images(target, "train")
    has_truth = (target / "gtFine" / "train").is_dir()
    some = max(1, len(source_pairs) // 10)
    source_pairs, held_out = source_pairs[:-some] or source_pairs, source_pairs[-some:]
    source_whole = LabeledImages(source_pairs, whole)
    return Data(
        source=LabeledImages(source_pairs, crops),
        source_whole=source_whole,
        held_out=LabeledImages(held_out, whole),
        target=UnlabeledImages(target_images, crops),
        target_whole=UnlabeledImages(target_images, whole),
        evaluation=LabeledImages(cityscapes_pairs(target, "val"), whole),
        analysis=LabeledImages(cityscapes_pairs(target, "train"), whole) if has_truth else None,
        evaluated=SYNTHIA_16 if is_synthia else tuple(range(NUM_CLASSES)),
        class_weight=class_weight(source_whole, settings).to(settings.device),
    )


def batches(dataset: Dataset[Item], count: int, size: int, settings: Settings) -> DataLoader[Item]:
    """`count` batches of `size` samples, drawn in a new random order each time round."""
    sampler = RandomSampler(dataset, num_samples=count * size)  # type: ignore[arg-type]
    return DataLoader(dataset, size, sampler=sampler, num_workers=settings.workers)


def one_by_one(dataset: Dataset[Item], settings: Settings, title: str) -> "tqdm[Item]":
    """Every sample once and in order, as a batch of one (whole images differ in size)."""
    loader = DataLoader(dataset, batch_size=1, num_workers=settings.workers)
    return tqdm(loader, desc=title, leave=False)


def class_weight(source: LabeledImages, settings: Settings) -> Tensor:
    """One over the root of each class's frequency in the source, 1 in the mean over its pixels.

    Without it, small and rare classes are not learned in as few iterations as the defaults are.
    """
    some = Subset(source, range(0, len(source), math.ceil(len(source) / 240)))
    counts = torch.zeros(NUM_CLASSES)
    for _, labels in one_by_one(some, settings, "class frequencies"):
        counts += torch.bincount(labels[labels < NUM_CLASSES], minlength=NUM_CLASSES)
    frequency = counts / counts.sum()
    weight = frequency.clamp(min=1e-4).rsqrt()
    return weight / (weight @ frequency)


# --------------------------------------------------------------------------------------- objective


def segment(network: nn.Module, images: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Features and logits of images, in bfloat16 if asked for."""
    with torch.autocast(torch.device(settings.device).type, torch.bfloat16, settings.bf16):
        features, logits = network(images)
    return features, logits


def source_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Class-weighted cross-entropy of the source at the resolution of its labels."""
    logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
    return anchorda.discriminative_loss(logits, labels, weight=weight)


def optimize(terms: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One step down the sum of the terms."""
    optimizer.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    optimizer.step()


def show(
    terms: dict[str, Tensor], iteration: int, phase: str, records: Records, progress: "tqdm[Item]"
) -> None:
    """Record the terms every ten iterations: reading them makes the host wait for the GPU."""
    if iteration % 10 != 1:
        return
    values = {name: term.item() for name, term in terms.items()}
    if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(f"{phase}, iteration {iteration}: not finite any more: {values}")
    progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
    records.losses(phase, iteration, values)


def make_optimizer(
    network: Segmenter, learning_rate: float, iterations: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW; the learning rate rises for 5 % of the iterations, then falls as (1 − t/T)^0.9."""
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)

    def factor(iteration: int) -> float:
        rise = min(1.0, (iteration + 1) / max(1.0, 0.05 * iterations))
        return rise * math.pow(1 - iteration / iterations, 0.9)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ----------------------------------------------------------------------------------------- warm-up


def warm_up(
    network: Segmenter, data: Data, settings: Settings, records: Records, *, augment: bool
) -> None:
    """Train on the source alone."""
    phase = "warm-up" if augment else "source only"
    count = settings.warmup_iterations
    optimizer, schedule = make_optimizer(network, settings.learning_rate, count)
    network.train()
    progress = tqdm(batches(data.source, count, settings.batch, settings), desc=phase)
    for iteration, (images, labels) in enumerate(progress, start=1):
        images, labels = images.to(settings.device), labels.to(settings.device)
        _, logits = segment(network, photometric(images) if augment else images, settings)
        terms = {"source": source_loss(logits, labels, data.class_weight)}
        optimize(terms, optimizer)
        schedule.step()
        show(terms, iteration, phase, records, progress)


# ------------------------------------------------------------------------------------------ stages


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage holds fixed, and what it rests on."""

    labeler: anchorda.StageLabeler
    """The network it starts from, the anchors, and the labelers."""
    counts: Tensor
    """(C,): how many source pixels each anchor averages."""


def begin_stage(network: Segmenter, data: Data, settings: Settings) -> Stage:
    """Freeze the network, compute the anchors on the source, and choose the minimum margin."""
    anchors = anchorda.CategoryAnchors(NUM_CLASSES, network.feature_dim).to(settings.device)
    labeler = anchorda.StageLabeler.from_source(
        network,
        one_by_one(data.source_whole, settings, "anchors"),
        anchors,
        extract=functools.partial(segment, settings=settings),
    )
    minimum = torch.full((NUM_CLASSES,), -math.inf, device=settings.device)
    for part in settings.margin.split(","):
        minimum = torch.maximum(minimum, choose_margin(part, labeler, data, settings))
    anchorda.warn_unreachable_margins(minimum, labeler.centroids, class_names=CLASS_NAMES)
    labeler.by_anchor = anchorda.AnchorPseudoLabeler(minimum)
    labeler.by_probability = anchorda.ProbabilityPseudoLabeler(settings.probability)
    return Stage(labeler, anchors.counts)


def choose_margin(
    part: str, labeler: anchorda.StageLabeler, data: Data, settings: Settings
) -> Tensor:
    """The minimum margins by one rule, () or (C,); see --margin."""
    rule, _, number = part.rpartition(":")
    if rule == "precision":
        labeled = one_by_one(data.held_out, settings, "margins")
        return count_margins(labeler, labeled, settings).min_score_for_precision(float(number))
    if rule == "coverage":
        target = ((images, None) for images in one_by_one(data.target_whole, settings, "margins"))
        return count_margins(labeler, target, settings).min_score_for_coverage(float(number))
    return torch.tensor(float(number), device=settings.device)


def count_margins(
    labeler: anchorda.StageLabeler,
    samples: Iterable[tuple[Tensor, Tensor | None]],
    settings: Settings,
) -> anchorda.ScoreCalibrator:
    """The margin of every pixel, and whether its nearest anchor is right where that is known."""
    calibrator = anchorda.ScoreCalibrator(NUM_CLASSES).to(settings.device)
    for images, truth in samples:
        labels, margins = labeler(images.to(settings.device)).by_anchor
        if truth is not None:
            truth = anchorda.resize_labels(truth.to(settings.device), labels.shape[1:])
        calibrator.update(labels, margins, truth)
    return calibrator


def label_target(stage: Stage, images: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Pseudo-label maps of target images, by labeler: the paper's "both" are two maps."""
    _, by_anchor, by_probability = stage.labeler(images)
    maps = {"anchor": by_anchor.labels, "probability": by_probability.labels}
    return maps if settings.labels == "both" else {settings.labels: maps[settings.labels]}


def train_stage(
    network: Segmenter, stage: Stage, data: Data, settings: Settings, records: Records, phase: str
) -> None:
    """Train on the source and on the pseudo-labeled target, pulling both to the anchors."""
    count, half = settings.stage_iterations, settings.batch // 2
    optimizer, schedule = make_optimizer(network, settings.stage_learning_rate, count)
    distance = anchorda.AnchorDistanceLoss()
    # Without class weights: they would multiply the mistakes in rare classes, which are many.
    discriminate = anchorda.DiscriminativeLoss()
    centroids = stage.labeler.centroids
    network.train()
    both_domains = zip(
        batches(data.source, count, half, settings),
        batches(data.target, count, half, settings),
        strict=True,
    )
    progress = tqdm(both_domains, desc=phase, total=count)
    for iteration, ((source, labels), target) in enumerate(progress, start=1):
        source, labels = source.to(settings.device), labels.to(settings.device)
        target = target.to(settings.device)
        pseudo = label_target(stage, target, settings).values()
        features, logits = segment(network, photometric(torch.cat([source, target])), settings)
        source_features, target_features = features.split(half)
        source_logits, target_logits = logits.split(half)
        small_labels = anchorda.resize_labels(labels, features.shape[2:])
        correct = anchorda.keep_correct(small_labels, source_logits)
        pull = distance(source_features, correct, centroids)
        for pseudo_labels in pseudo:
            pull = pull + distance(target_features, pseudo_labels, centroids) / len(pseudo)
        terms = {
            "source": source_loss(source_logits, labels, data.class_weight),
            "pseudo": sum(discriminate(target_logits, p) for p in pseudo) / len(pseudo),
            "distance": settings.distance_weight * pull,
        }
        optimize(terms, optimizer)
        schedule.step()
        show(terms, iteration, phase, records, progress)


# -------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(network: Segmenter, images: Tensor, size: torch.Size, settings: Settings) -> Tensor:
    """Predicted classes (N, H, W) at the size of the labels."""
    _, logits = segment(network, images.to(settings.device), settings)
    logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)


def evaluate(network: Segmenter, data: Data, settings: Settings) -> anchorda.ConfusionMatrix:
    """Score a network on the target's validation split."""
    network.eval()
    confusion = anchorda.ConfusionMatrix(NUM_CLASSES).to(settings.device)
    evaluated = torch.tensor(data.evaluated, device=settings.device)
    for images, labels in one_by_one(data.evaluation, settings, "evaluation"):
        labels = labels.to(settings.device)
        labels = labels.where(torch.isin(labels, evaluated), IGNORE)
        confusion.update(predict(network, images, labels.shape[1:], settings), labels)
    return confusion


def analyze_labels(
    stage: Stage, data: Data, settings: Settings
) -> dict[str, anchorda.PseudoLabelQuality]:
    """Compare a stage's pseudo-labels with the target's training labels, if there are any."""
    quality: dict[str, anchorda.PseudoLabelQuality] = {}
    if data.analysis is None:
        return quality
    for images, labels in one_by_one(data.analysis, settings, "label quality"):
        maps = label_target(stage, images.to(settings.device), settings)
        for labeler, pseudo in maps.items():
            if labeler not in quality:
                quality[labeler] = anchorda.PseudoLabelQuality(NUM_CLASSES).to(settings.device)
            truth = anchorda.resize_labels(labels.to(settings.device), pseudo.shape[1:])
            quality[labeler].update(pseudo, truth)
    return quality


# -------------------------------------------------------------------------------------- everything


def adapt(settings: Settings) -> Path:
    """Baseline, warm-up, stages; returns the folder of the report."""
    data = open_data(settings)
    records = Records(settings.output)
    scores: dict[str, anchorda.ConfusionMatrix] = {}

    def finish(phase: str, network: Segmenter, stage: Stage | None = None) -> None:
        """Score, print and save what a phase has come to."""
        scores[phase] = evaluate(network, data, settings)
        records.evaluation(phase, scores[phase])
        parts: dict[str, object] = {"phase": phase, "network": network.state_dict()}
        if stage is not None:
            parts |= {"stage": stage.labeler.state_dict(), "counts": stage.counts}
        name = phase.replace(" ", "-") + ".pt"
        save_checkpoint(settings.output / "checkpoints" / name, parts)
        print(f"\n{score_table(scores)}\n", flush=True)
        if settings.source_format == "synthia":
            mean = scores[phase].iou()[list(SYNTHIA_13)].nanmean().item()
            print(f"mIoU without wall, fence and pole: {100 * mean:.1f}\n", flush=True)

    if settings.baseline:
        baseline = new_network(settings)
        warm_up(baseline, data, settings, records, augment=False)
        finish("source only", baseline)

    network = new_network(settings)
    if settings.warmup_checkpoint is None:
        warm_up(network, data, settings, records, augment=True)
    else:
        network.load_state_dict(load_checkpoint(settings.warmup_checkpoint)["network"])
    finish("warm-up", network)
    warm = copy.deepcopy(network).eval()

    health = []
    stage: Stage | None = None
    for number in range(1, settings.stages + 1):
        phase, previous = f"stage {number}", stage
        # The same draws however the warm-up came, and whether or not there was truth to look at.
        torch.manual_seed(1000 * settings.seed + number)
        stage = begin_stage(network, data, settings)
        health.append(f"{phase}\n{anchor_table(stage, previous)}\n")
        for labeler, quality in analyze_labels(stage, data, settings).items():
            records.pseudo_labels(phase, labeler, quality)
        torch.manual_seed(1000 * settings.seed + number)
        train_stage(network, stage, data, settings, records, phase)
        finish(phase, network, stage)

    records.close()
    folder = settings.output / "report"
    folder.mkdir(exist_ok=True)
    write_text(folder / "iou.txt", score_table(scores) + "\n")
    write_text(folder / "anchors.txt", "\n".join(health))
    stage = stage or begin_stage(network, data, settings)
    draw_report(folder, warm, network.eval(), stage, data, settings)
    return folder


def new_network(settings: Settings) -> Segmenter:
    """The network to begin with, the same for the same seed."""
    torch.manual_seed(settings.seed)
    if settings.network == "small":
        return SmallSegmenter(NUM_CLASSES).to(settings.device)
    network = DeepLab(NUM_CLASSES, depth=int(settings.network.removeprefix("deeplab")))
    if settings.backbone is not None:
        load_backbone(network, settings.backbone)
    return network.to(settings.device)


def score_table(scores: dict[str, anchorda.ConfusionMatrix]) -> str:
    """Per-class IoU of all phases so far."""
    return iou_table(
        {phase: confusion.iou() for phase, confusion in scores.items()},
        {phase: confusion.mean_iou().item() for phase, confusion in scores.items()},
    )


def anchor_table(stage: Stage, previous: Stage | None) -> str:
    """Counts, nearest neighbors and drift of a stage's anchors."""
    before = None if previous is None else previous.labeler.centroids
    health = anchorda.anchor_health(stage.labeler.centroids, stage.counts, previous=before)
    return health.table(CLASS_NAMES)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def draw_report(
    folder: Path, warm: Segmenter, adapted: Segmenter, stage: Stage, data: Data, settings: Settings
) -> None:
    """The pictures by which a person judges a run."""
    panels = []
    for index in range(0, len(data.evaluation), max(1, len(data.evaluation) // 4))[:4]:
        image, truth = data.evaluation[index]
        images, size = image[None], truth.shape
        maps = list(label_target(stage, images.to(settings.device), settings).values())
        panels.append(
            Panel(
                image,
                truth,
                predict(warm, images, size, settings)[0].cpu(),
                predict(adapted, images, size, settings)[0].cpu(),
                anchorda.combine_pseudo_labels(maps[0], maps[-1], "union")[0].cpu(),
            )
        )
    save_panels(folder / "panels.png", panels)
    metrics = settings.output / "metrics.jsonl"
    save_curves(folder / "curves.png", metrics)
    save_label_quality(folder / "label_quality.png", metrics)
    save_anchor_distances(folder / "anchor_distances.png", stage.labeler.centroids.cpu())
    # A stage without minimums, to see what other minimums would have done.
    of_all = anchorda.StageLabeler(
        stage.labeler.network, stage.labeler.centroids, extract=stage.labeler.extract
    )
    margins = {
        domain: count_margins(of_all, one_by_one(dataset, settings, "margins"), settings)
        for domain, dataset in (("held-out source", data.held_out), ("target", data.analysis))
        if dataset is not None
    }
    save_margin_curves(folder / "margins.png", margins, stage.labeler.by_anchor.min_margin)


def main() -> None:
    """Run from the command line."""
    settings = parse_settings()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings.output.mkdir(parents=True, exist_ok=True)
    resolved = json.dumps(vars(settings), default=str, indent=2)
    (settings.output / "settings.json").write_text(resolved + "\n", encoding="utf-8")
    try:
        folder = adapt(settings)
    except (DatasetError, FloatingPointError) as error:
        # From a worker process the message comes behind a traceback.
        sys.exit("error: " + str(error).rpartition("DatasetError: ")[2])
    print(f"Report: {folder}")


if __name__ == "__main__":
    main()
