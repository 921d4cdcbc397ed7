"""Category anchor-guided domain adaptation (arXiv 1910.13049), top to bottom.

    python examples/gta5_to_cityscapes/train.py --source GTA5 --target CITYSCAPES --output runs/one

Data, network, objectives, warm-up, stages, evaluation, report. Without data sets it first writes a
small synthetic pair. `--preset gta5` and `--preset synthia` are the paper's settings, and `torchrun
--nproc-per-node=4 train.py …` trains on as many GPUs. The labels of the target's training images
are never trained on: where they exist they tell, after the fact, how good the pseudo-labels were.
"""

import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import parallel
import torch
import torch.nn.functional as F
from adversarial import Discriminator, fooling_loss, telling_loss
from augment import photometric
from build import build_network, load_weights
from classes import CLASS_NAMES, IGNORE, NUM_CLASSES, SYNTHIA_16
from deeplab import freeze_batch_norm
from loop import Batch, Losses, Phase, Term, load_unfinished, loading_of, train
from network import Segmenter
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
from records import Records, load_checkpoint, load_finished, save_checkpoint, write_text
from report import (
    Panel,
    iou_table,
    save_anchor_distances,
    save_curves,
    save_label_quality,
    save_margin_curves,
    save_panels,
)
from settings import Settings, parse_settings, split_margin
from streams import RandomStream, each_once
from synthetic import write_synthetic_pair
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Subset

import anchorda

# -------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Data:
    """The two domains, listed and checked."""

    source: LabeledImages
    """Crops to train on."""
    source_whole: LabeledImages
    """The same images uncropped, to take anchors from."""
    held_out: LabeledImages
    """The last tenth of the source, 500 images at most, never trained on: what a margin's precision
    is measured on, and the best network of a phase."""
    target: UnlabeledImages
    target_whole: UnlabeledImages
    evaluation: LabeledImages
    """The target's validation split."""
    analysis: LabeledImages | None
    """The target's training split with its labels, if there are any: never trained on."""
    evaluated: tuple[int, ...]
    """The classes that the source knows: the truth of others is ignored in evaluation."""
    class_weight: Tensor | None
    """(C,): of the source's classes in its cross-entropy."""


def open_data(settings: Settings) -> Data:
    """List and check both data sets, writing the synthetic ones first if none are given."""
    source, target = settings.source, settings.target
    if source is None or target is None:
        folder = settings.output / "synthetic"
        source, target = folder / "source", folder / "target"
        if parallel.is_main():
            write_synthetic_pair(folder, seed=settings.seed, source_format=settings.source_format)
        parallel.wait()
    whole = ResizeAndCrop(settings.resize)
    crops = ResizeAndCrop(settings.resize, settings.crop, flip=True)
    is_synthia = settings.source_format == "synthia"
    source_pairs = synthia_pairs(source) if is_synthia else gta5_pairs(source)
    target_images = cityscapes_images(target, "train")
    has_truth = (target / "gtFine" / "train").is_dir()
    some = min(500, max(1, len(source_pairs) // 10))
    source_pairs, held_out = source_pairs[:-some] or source_pairs, source_pairs[-some:]
    source_whole = LabeledImages(source_pairs, whole)
    weight = weigh_classes(source_whole, settings) if settings.class_weights else None
    return Data(
        source=LabeledImages(source_pairs, crops),
        source_whole=source_whole,
        held_out=LabeledImages(held_out, whole),
        target=UnlabeledImages(target_images, crops),
        target_whole=UnlabeledImages(target_images, whole),
        evaluation=LabeledImages(cityscapes_pairs(target, "val"), whole),
        analysis=LabeledImages(cityscapes_pairs(target, "train"), whole) if has_truth else None,
        evaluated=SYNTHIA_16 if is_synthia else tuple(range(NUM_CLASSES)),
        class_weight=weight,
    )


def weigh_classes(source: LabeledImages, settings: Settings) -> Tensor:
    """One over the root of each class's frequency in the source, 1 in the mean over its pixels.

    Without it, small and rare classes are not learned in as few iterations as the defaults are.
    """
    some = Subset(source, range(0, len(source), math.ceil(len(source) / 240)))
    counts = torch.zeros(NUM_CLASSES)
    for _, labels in each_once(some, "class frequencies", loading_of(settings)):
        counts += torch.bincount(labels[labels < NUM_CLASSES], minlength=NUM_CLASSES)
    counts = parallel.total(counts.double())
    frequency = counts / counts.sum()
    weight = frequency.clamp(min=1e-4).rsqrt()
    return (weight / (weight @ frequency)).float().to(settings.device)


# ----------------------------------------------------------------------------------------- network


def new_network(settings: Settings) -> Segmenter:
    """The network to begin with, the same for the same seed."""
    torch.manual_seed(settings.seed)
    network = build_network(settings.network)
    load_weights(network, whole=settings.weights, backbone=settings.backbone)
    if settings.batch_norm == "freeze":
        freeze_batch_norm(network)
    elif settings.batch_norm == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    # Channels last is the layout in which CPUs and tensor cores convolve fastest.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to(settings.device)
    if settings.compile:
        network.compile()
    return network


def augment(images: Tensor, settings: Settings) -> Tensor:
    """The images as the network that is trained sees them; the frozen one sees them as they are."""
    return photometric(images) if settings.photometric else images


def autocast(settings: Settings) -> torch.autocast:
    """The precision that networks run at."""
    dtype = torch.float16 if settings.precision == "float16" else torch.bfloat16
    kind = torch.device(settings.device).type
    return torch.autocast(kind, dtype, enabled=settings.precision != "float32")


def segment(network: nn.Module, images: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Features and logits of images, at the precision asked for."""
    with autocast(settings):
        features, logits = network(images.contiguous(memory_format=torch.channels_last))
    return features, logits


def enlarge(network: nn.Module, logits: Tensor, size: torch.Size) -> Tensor:
    """Logits (N, C, *size), in float32, as they lie over the images."""
    aligned = bool(network.align_corners)
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=aligned)


def make_optimizer(
    network: nn.Module, learning_rate: float, iterations: int, settings: Settings
) -> tuple[Optimizer, LRScheduler]:
    """The optimizer; the learning rate rises for a part of the time, then falls: (1 − t/T)^0.9."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer: Optimizer
    if isinstance(network, Discriminator):
        optimizer = torch.optim.Adam(parameters, learning_rate, betas=(0.9, 0.99))
    elif settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, learning_rate, 0.9, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=settings.weight_decay)

    def factor(iteration: int) -> float:
        rise = min(1.0, (iteration + 1) / max(1.0, settings.rise * iterations))
        return rise * math.pow(1 - iteration / max(1, iterations), 0.9)

    return optimizer, LambdaLR(optimizer, factor)


# ----------------------------------------------------------------------------------------- warm-up


def source_term(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Term:
    """Cross-entropy of the source at the resolution of its labels."""
    loss = anchorda.discriminative_loss(logits, labels, weight=weight)
    return Term(loss, amount(labels, logits.new_ones(NUM_CLASSES) if weight is None else weight))


def amount(labels: Tensor, weight: Tensor) -> Tensor:
    """The weights (C,) of labels 0 to 255, added up over all pixels."""
    return F.pad(weight, (0, 256 - len(weight)))[labels].sum()


def source_losses(
    networks: nn.ModuleDict, batch: Batch, *, class_weight: Tensor | None, settings: Settings
) -> dict[str, Term]:
    """The source alone."""
    images, labels = batch
    network = networks["network"]
    _, logits = segment(network, augment(images, settings), settings)
    logits = enlarge(network, logits, labels.shape[1:])
    return {"source": source_term(logits, labels, class_weight)}


def adversarial_losses(
    networks: nn.ModuleDict, batch: Batch, *, class_weight: Tensor | None, settings: Settings
) -> dict[str, Term]:
    """The source, and target predictions that are to look like the source's (AdaptSegNet)."""
    source, labels, target = batch
    network, discriminator = networks["network"], networks["discriminator"]
    _, logits = segment(network, augment(torch.cat([source, target]), settings), settings)
    source_logits, target_logits = enlarge(network, logits, labels.shape[1:]).split(len(source))
    with autocast(settings):
        fooling = fooling_loss(discriminator, target_logits)
        telling = telling_loss(discriminator, source_logits, target_logits)
    images = logits.new_tensor(len(target), dtype=torch.float32)
    return {
        "source": source_term(source_logits, labels, class_weight),
        "adversarial": Term(settings.adversarial_weight * fooling, images),
        "discriminator": Term(telling, images),
    }


def warm_up(
    name: str, network: Segmenter, data: Data, settings: Settings, records: Records
) -> None:
    """Train on the source and, if asked for, align the target's predictions with it."""
    count = settings.iterations(settings.warmup_iterations)
    networks = nn.ModuleDict({"network": network})
    optimizers = [make_optimizer(network, settings.warmup_learning_rate, count, settings)]
    losses: Losses = functools.partial(
        source_losses, class_weight=data.class_weight, settings=settings
    )
    streams: list[RandomStream[Any]] = [RandomStream(data.source, (settings.seed, 0, 0))]
    if settings.warmup == "adversarial":
        discriminator = Discriminator(NUM_CLASSES).to(settings.device)
        networks["discriminator"] = discriminator
        rate = settings.discriminator_learning_rate
        optimizers.append(make_optimizer(discriminator, rate, count, settings))
        losses = functools.partial(
            adversarial_losses, class_weight=data.class_weight, settings=settings
        )
        streams.append(RandomStream(data.target, (settings.seed, 0, 1)))
    phase = Phase(
        name=name,
        number=0,
        iterations=count,
        batch=settings.warmup_batch,
        networks=networks,
        losses=losses,
        optimizers=optimizers,
        streams=streams,
        score=functools.partial(select, data=data, settings=settings),
    )
    train(phase, settings, records, load_unfinished(phase.name, settings))


# ------------------------------------------------------------------------------------------ stages


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage holds fixed, and what it rests on."""

    labeler: anchorda.StageLabeler
    """The network it starts from, the anchors, and the labelers."""
    counts: Tensor
    """(C,): how many source pixels each anchor averages."""

    def plain(self) -> dict[str, object]:
        """What a checkpoint holds of it."""
        return {"labeler": self.labeler.state_dict(), "counts": self.counts}


def restore_stage(network: Segmenter, parts: Mapping[str, Any], settings: Settings) -> Stage:
    """The stage that a checkpoint holds; `network` has its architecture, with any weights."""
    anchors = torch.zeros(NUM_CLASSES, network.feature_dim, device=settings.device)
    extract = functools.partial(segment, settings=settings)
    labeler = anchorda.StageLabeler(network, anchors, extract=extract)
    labeler.load_state_dict(parts["labeler"])
    if settings.compile:
        labeler.network.compile()
    return Stage(labeler, parts["counts"].to(settings.device))


def begin_stage(network: Segmenter, data: Data, settings: Settings) -> Stage:
    """Freeze the network, compute the anchors on the source, and choose the minimum margin."""
    anchors = anchorda.CategoryAnchors(NUM_CLASSES, network.feature_dim).to(settings.device)
    labeler = anchorda.StageLabeler.from_source(
        network,
        each_once(data.source_whole, "anchors", loading_of(settings)),
        anchors,
        extract=functools.partial(segment, settings=settings),
    )
    minimum = torch.full((NUM_CLASSES,), -math.inf, device=settings.device)
    for rule, number in split_margin(settings.margin):
        minimum = torch.maximum(minimum, choose_margin(rule, number, labeler, data, settings))
    if parallel.is_main():
        anchorda.warn_unreachable_margins(minimum, labeler.centroids, class_names=CLASS_NAMES)
    labeler.by_anchor = anchorda.AnchorPseudoLabeler(minimum)
    labeler.by_probability = anchorda.ProbabilityPseudoLabeler(settings.probability)
    if settings.compile:
        labeler.network.compile()  # a copy is not compiled, whatever its original was
    return Stage(labeler, anchors.counts)


def choose_margin(
    rule: str, number: float, labeler: anchorda.StageLabeler, data: Data, settings: Settings
) -> Tensor:
    """The minimum margins by one rule, () or (C,); see --margin."""
    if rule == "precision":
        labeled = each_once(data.held_out, "margins", loading_of(settings))
        return count_margins(labeler, labeled, settings).min_score_for_precision(number)
    if rule == "coverage":
        unlabeled = each_once(data.target_whole, "margins", loading_of(settings))
        target = ((images, None) for images in unlabeled)
        return count_margins(labeler, target, settings).min_score_for_coverage(number)
    return torch.tensor(number, device=settings.device)


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
    anchorda.all_reduce(calibrator)
    return calibrator


def label_target(stage: Stage, images: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Pseudo-label maps of target images, by labeler: the paper's "both" are two maps."""
    _, by_anchor, by_probability = stage.labeler(images)
    maps = {"anchor": by_anchor.labels, "probability": by_probability.labels}
    return maps if settings.labels == "both" else {settings.labels: maps[settings.labels]}


def paper_losses(
    networks: nn.ModuleDict,
    batch: Batch,
    *,
    stage: Stage,
    class_weight: Tensor | None,
    settings: Settings,
) -> dict[str, Term]:
    """Both domains classified, and both pulled to the anchors of their (pseudo-)labels."""
    source, labels, target = batch
    pseudo = label_target(stage, target, settings)
    network, centroids = networks["network"], stage.labeler.centroids
    features, logits = segment(network, augment(torch.cat([source, target]), settings), settings)
    source_features, target_features = features.split(len(source))
    source_logits, target_logits = logits.split(len(source))
    whole_logits = enlarge(network, source_logits, labels.shape[1:])
    terms = {"source": source_term(whole_logits, labels, class_weight)}

    seen = centroids.isfinite().all(dim=1).float()
    resized = anchorda.resize_labels(labels, features.shape[2:])
    correct = anchorda.keep_correct(resized, source_logits)
    pull = settings.distance_weight * anchorda.anchor_distance_loss(
        source_features, correct, centroids
    )
    terms["source distance"] = Term(pull, amount(correct, seen))
    for kind, guess in pseudo.items():
        # Without class weights: they would multiply the mistakes in rare classes, which are many.
        loss = anchorda.discriminative_loss(target_logits, guess) / len(pseudo)
        terms[f"{kind} labels"] = Term(loss, amount(guess, torch.ones_like(seen)))
        pull = anchorda.anchor_distance_loss(target_features, guess, centroids) / len(pseudo)
        terms[f"{kind} distance"] = Term(settings.distance_weight * pull, amount(guess, seen))
    return terms


def released_losses(
    networks: nn.ModuleDict, batch: Batch, *, stage: Stage, settings: Settings
) -> dict[str, Term]:
    """The same as the released code computes it, each process for itself."""
    source, labels, target = batch
    _, by_anchor, by_probability = stage.labeler(target)
    images = augment(torch.cat([source, target]), settings)
    features, logits = segment(networks["network"], images, settings)
    source_features, target_features = features.split(len(source))
    source_logits, target_logits = logits.split(len(source))
    loss = anchorda.released.cag_uda_loss(
        source_features, source_logits, labels,
        target_features, target_logits, by_anchor.labels, by_probability.labels,
        stage.labeler.centroids, distance_weight=settings.distance_weight,
    )  # fmt: skip
    one = logits.new_ones(())
    parts = {"source": loss.source, "pseudo": loss.pseudo, "distance": loss.distance}
    return {name: Term(part, one) for name, part in parts.items()}


def train_stage(
    network: Segmenter,
    stage: Stage,
    data: Data,
    settings: Settings,
    records: Records,
    number: int,
    held: Mapping[str, object],
) -> None:
    """Train on the source and on the pseudo-labeled target."""
    count = settings.iterations(settings.stage_iterations)
    losses: Losses = functools.partial(
        paper_losses, stage=stage, class_weight=data.class_weight, settings=settings
    )
    if settings.objective == "released":
        losses = functools.partial(released_losses, stage=stage, settings=settings)
    phase = Phase(
        name=f"stage {number}",
        number=number,
        iterations=count,
        batch=settings.stage_batch,
        networks=nn.ModuleDict({"network": network}),
        losses=losses,
        optimizers=[make_optimizer(network, settings.stage_learning_rate, count, settings)],
        streams=[
            RandomStream(data.source, (settings.seed, number, 0)),
            RandomStream(data.target, (settings.seed, number, 1)),
        ],
        score=functools.partial(select, data=data, settings=settings),
        held=held,
    )
    train(phase, settings, records, load_unfinished(phase.name, settings))


# -------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(network: Segmenter, images: Tensor, size: torch.Size, settings: Settings) -> Tensor:
    """Predicted classes (N, H, W) at the size of the labels."""
    _, logits = segment(network, images.to(settings.device), settings)
    return enlarge(network, logits, size).argmax(dim=1)


def evaluate(
    network: Segmenter, images: LabeledImages, data: Data, settings: Settings
) -> anchorda.ConfusionMatrix:
    """Score a network on labeled images."""
    network.eval()
    confusion = anchorda.ConfusionMatrix(NUM_CLASSES).to(settings.device)
    evaluated = torch.tensor(data.evaluated, device=settings.device)
    for image, labels in each_once(images, "evaluation", loading_of(settings)):
        labels = labels.to(settings.device)
        labels = labels.where(torch.isin(labels, evaluated), IGNORE)
        confusion.update(predict(network, image, labels.shape[1:], settings), labels)
    anchorda.all_reduce(confusion)
    return confusion


def select(network: Segmenter, *, data: Data, settings: Settings) -> dict[str, float]:
    """What the best network may be chosen by; see --best-by."""
    domains = {"source": data.held_out, "target": data.evaluation}
    return {
        domain: evaluate(network, images, data, settings).mean_iou().item()
        for domain, images in domains.items()
    }


def analyze_labels(
    stage: Stage, data: Data, settings: Settings
) -> dict[str, anchorda.PseudoLabelQuality]:
    """Compare a stage's pseudo-labels with the target's training labels, if there are any."""
    if data.analysis is None:
        return {}
    kinds = ("anchor", "probability") if settings.labels == "both" else (settings.labels,)
    quality = {k: anchorda.PseudoLabelQuality(NUM_CLASSES).to(settings.device) for k in kinds}
    for images, labels in each_once(data.analysis, "label quality", loading_of(settings)):
        for kind, guess in label_target(stage, images.to(settings.device), settings).items():
            truth = anchorda.resize_labels(labels.to(settings.device), guess.shape[1:])
            quality[kind].update(guess, truth)
    for of_kind in quality.values():
        anchorda.all_reduce(of_kind)
    return quality


# -------------------------------------------------------------------------------------- everything


class Run:
    """What there is of a run. A phase is done when its checkpoint is there, whole."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.output / "checkpoints"
        self.records = Records(settings.output if parallel.is_main() else None)
        self.scores: dict[str, anchorda.ConfusionMatrix] = {}
        there = self.folder.glob("*.pt") if settings.resume else ()
        # What was recorded after the latest checkpoint will be recorded again.
        self.records.rewind(max((load_checkpoint(p)["metrics_size"] for p in there), default=0))

    def path(self, phase: str) -> Path:
        """The checkpoint of a finished phase."""
        return self.folder / f"{phase.replace(' ', '-')}.pt"

    def load(self, phase: str, network: Segmenter) -> bool:
        """Whether a phase has been finished; then the network is what it ended with."""
        if not (self.settings.resume and self.path(phase).is_file()):
            return False
        parts = load_checkpoint(self.path(phase))
        network.load_state_dict(parts["network"])
        self.scores[phase] = anchorda.ConfusionMatrix(NUM_CLASSES)
        self.scores[phase].counts.copy_(parts["confusion"])
        return True

    def held(self, phase: str) -> dict[str, Any] | None:
        """What a phase holds fixed, if it was begun."""
        if self.settings.resume and self.path(phase).is_file():
            parts: dict[str, Any] | None = load_checkpoint(self.path(phase))
        else:
            parts = load_unfinished(phase, self.settings)
        return None if parts is None else parts["held"]

    def finish(
        self, phase: str, network: Segmenter, data: Data, held: Mapping[str, object] | None = None
    ) -> None:
        """Score what a phase has come to, and save it."""
        scores = evaluate(network, data.evaluation, data, self.settings).cpu()
        self.scores[phase] = scores
        self.records.evaluation(phase, scores)
        if not parallel.is_main():
            return
        parts = {
            "settings": self.settings.plain(),
            "phase": phase,
            "network": network.state_dict(),
            "held": dict(held or {}),
            "confusion": scores.counts,
            "metrics_size": self.records.size(),
        }
        save_checkpoint(self.path(phase), parts)
        print(f"\n{iou_table(self.scores, data.evaluated)}\n", flush=True)


def adapt(settings: Settings) -> Path:
    """Baseline, warm-up, stages; returns the folder of the report."""
    data = open_data(settings)
    run = Run(settings)

    if settings.baseline:
        baseline = new_network(settings)
        if not run.load("source only", baseline):
            plain = dataclasses.replace(settings, warmup="source", photometric=False)
            warm_up("source only", baseline, data, plain, run.records)
            run.finish("source only", baseline, data)

    network = new_network(settings)
    if not run.load("warm-up", network):
        if settings.warmup_checkpoint is None:
            warm_up("warm-up", network, data, settings, run.records)
        else:
            network.load_state_dict(load_finished(settings.warmup_checkpoint)["network"])
        run.finish("warm-up", network, data)
    warm = copy.deepcopy(network).eval()

    stage: Stage | None = None
    health = []
    for number in range(1, settings.stages + 1):
        name, previous = f"stage {number}", stage
        held = run.held(name)
        if held is None:
            stage = begin_stage(network, data, settings)
            held = {"stage": stage.plain(), "health": anchor_table(stage, previous)}
            for kind, quality in analyze_labels(stage, data, settings).items():
                run.records.pseudo_labels(name, kind, quality)
        else:
            stage = restore_stage(network, held["stage"], settings)
        health.append(f"{name}\n{held['health']}\n")
        if not run.load(name, network):
            train_stage(network, stage, data, settings, run.records, number, held)
            run.finish(name, network, data, held)

    run.records.close()
    stage = stage or begin_stage(network, data, settings)
    folder = settings.output / "report"
    margins = {
        domain: all_margins(stage, images, settings)
        for domain, images in (("held-out source", data.held_out), ("target", data.analysis))
        if images is not None
    }
    if parallel.is_main():
        folder.mkdir(exist_ok=True)
        write_text(folder / "iou.txt", iou_table(run.scores, data.evaluated) + "\n")
        write_text(folder / "anchors.txt", "\n".join(health))
        save_margin_curves(folder / "margins.png", margins, stage.labeler.by_anchor.min_margin)
        draw_report(folder, warm, network.eval(), stage, data, settings)
    return folder


def anchor_table(stage: Stage, previous: Stage | None) -> str:
    """Counts, nearest neighbors and drift of a stage's anchors."""
    before = None if previous is None else previous.labeler.centroids
    health = anchorda.anchor_health(stage.labeler.centroids, stage.counts, previous=before)
    return health.table(CLASS_NAMES)


def all_margins(
    stage: Stage, images: LabeledImages, settings: Settings
) -> anchorda.ScoreCalibrator:
    """What other minimums would have given, on labeled images."""
    of_all = anchorda.StageLabeler(
        stage.labeler.network, stage.labeler.centroids, extract=stage.labeler.extract
    )
    return count_margins(of_all, each_once(images, "margins", loading_of(settings)), settings)


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


def main() -> None:
    """Run from the command line."""
    settings = parse_settings()
    device = parallel.start(settings.device)
    settings = dataclasses.replace(settings, device=str(device))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if parallel.is_main():
        settings.output.mkdir(parents=True, exist_ok=True)
        settings.save(settings.output / "settings.toml")
    try:
        folder = adapt(settings)
    except (DatasetError, FloatingPointError) as error:
        # From a worker process the message comes behind a traceback.
        sys.exit("error: " + str(error).rpartition("DatasetError: ")[2])
    if parallel.is_main():
        print(f"Report: {folder}")
    parallel.stop()


if __name__ == "__main__":
    main()
