"""A stage, top to bottom: anchors, margins, labels, mixed images, losses.

A stage starts from the network of the phase before. `begin_stage` copies it, averages the source's
features to one anchor for each class, and chooses the minimum margins. In each training step,
`label_target` labels the target's pixels by the copy, `mix` pastes source pixels into the target's
images, and the trained network minimizes `stage_losses` or `released_losses`. The copy follows the
trained network (`--teacher`).

By default this is CAG-UDA (arXiv 1910.13049): labels by anchors and by probability above minimums,
from a copy that is frozen, the distance loss, and no mixing. `--preset self-training` has all
labels of the classifier, from a copy that moves, and mixing, without anchors.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import parallel
import torch
import torch.nn.functional as F
from classes import IGNORE
from data import Data
from engine.loop import Batch, Term
from limits import Count, Fraction, Positive, Weight
from networks.segmenter import Segmenter, enlarge, segment
from streams import each_once
from torch import Tensor, nn
from torch.utils.data import Subset

import anchorda

SURE = 0.968  # probability of a sure label (arXiv 2007.08702)


@dataclass(frozen=True)
class StageSettings:
    """The stages: each labels the target anew and trains on both domains."""

    stages: Count = 3
    """Number of stages."""
    stage_iterations: Positive = 280
    """Iterations of each stage."""
    stage_batch: Positive = 2
    """Images of each domain in a step of a stage."""
    stage_learning_rate: Weight = 0.001
    """Learning rate at the start of each stage."""
    objective: Literal["paper", "released"] = "paper"
    """Form of the losses: the paper's, or as the released code has them (anchorda.released)."""
    labels: Literal["probability", "anchor", "agree", "rectify", "both"] = "both"
    """Labels of target pixels: by the classifier's probability; by the nearest anchor; where both
    agree, or by the probability times the soft assignment to the anchors, with the anchors in the
    metric of the features' covariance; or both label maps with a loss for each, the paper's."""
    mix: bool = False
    """Paste the pixels of half of the classes of a source image, with their labels, into each
    target image (class mixing, arXiv 2007.08702)."""
    margin: str = "coverage:0.2,precision:0.5"
    """Minimum margin of anchor labels: a number for all classes,
    coverage:Q to label that part of each class's pixels on the target,
    precision:P to have that part of each class's labels right on the held-out source,
    or several of these, separated by commas, of which the highest counts."""
    probability: Fraction = 0.95
    """Minimum probability of the classifier's labels."""
    distance_weight: Weight = 0.02
    """Weight of the distance loss; 0 leaves it out."""

    def weighs_labels(self) -> bool:
        """Return whether labels weigh by the share of sure pixels: those without a minimum do."""
        return self.labels in ("probability", "agree", "rectify") and self.probability == 0

    def check(self) -> None:
        """Raise a ValueError that names the flags which do not fit together."""
        margin_rules(self.margin)
        if self.objective == "released" and (self.labels != "both" or self.mix):
            raise ValueError("--objective released always has --labels both and --no-mix")


@dataclass(frozen=True)
class Stage:
    """The labels of a stage."""

    labeler: anchorda.StageLabeler
    """The copy of the network, the anchors, and the labelers."""
    counts: Tensor
    """(C,): number of source pixels that each anchor averages."""

    def plain(self) -> dict[str, object]:
        """Return the stage as a checkpoint holds it."""
        rule = self.labeler.rule
        return {"labeler": self.labeler.state_dict(), "rule": rule, "counts": self.counts}


def restore_stage(network: Segmenter, parts: Mapping[str, Any]) -> Stage:
    """Return the stage of a checkpoint; `network` has its architecture, with any weights."""
    device = next(network.parameters()).device
    anchors = torch.zeros(len(parts["counts"]), network.feature_dim, device=device)
    labeler = anchorda.StageLabeler(network, anchors, rule=parts["rule"], extract=segment)
    labeler.load_state_dict(parts["labeler"])
    if network.compiled:
        labeler.network.compile()
    return Stage(labeler, parts["counts"].to(device))


# ----------------------------------------------------------------------------------------- anchors


def begin_stage(network: Segmenter, data: Data, settings: StageSettings) -> Stage:
    """Copy the network, compute the anchors on the source, and choose the minimum margins."""
    shape, device = (len(data.classes), network.feature_dim), data.loading.device
    anchors, covariance = anchorda.CategoryAnchors(*shape).to(device), None
    if settings.labels in ("agree", "rectify"):
        covariance = anchorda.WithinClassCovariance(*shape).to(device)
    source = each_once(data.source_whole, "anchors", data.loading)
    labeler = anchorda.StageLabeler.from_source(
        network, source, anchors, covariance=covariance, extract=segment
    )
    labeler.by_anchor = anchorda.AnchorPseudoLabeler(min_margins(labeler, data, settings.margin))
    labeler.by_probability = anchorda.ProbabilityPseudoLabeler(settings.probability)
    if settings.labels != "both":
        labeler.rule = settings.labels
    if network.compiled:
        labeler.network.compile()
    return Stage(labeler, anchors.counts)


# ----------------------------------------------------------------------------------------- margins


def min_margins(labeler: anchorda.StageLabeler, data: Data, rules: str) -> Tensor:
    """Return the minimum margin (C,) of each class: the highest of the rules of `--margin`."""
    minimum = torch.full((len(data.classes),), -math.inf, device=data.loading.device)
    for rule, number in margin_rules(rules):
        minimum = torch.maximum(minimum, min_margin(rule, number, labeler, data))
    if parallel.is_main():
        anchorda.warn_unreachable_margins(
            minimum, labeler.centroids, class_names=data.classes.names
        )
    return minimum


def min_margin(rule: str, number: float, labeler: anchorda.StageLabeler, data: Data) -> Tensor:
    """Return the minimum margins by one rule, () or (C,)."""
    if rule == "precision":
        labeled = each_once(data.held_out, "margins", data.loading)
        return count_margins(labeler, labeled).min_score_for_precision(number)
    if rule == "coverage":
        unlabeled = each_once(data.target_whole, "margins", data.loading)
        target = ((images, None) for images in unlabeled)
        return count_margins(labeler, target).min_score_for_coverage(number)
    return torch.tensor(number, device=data.loading.device)


def count_margins(
    labeler: anchorda.StageLabeler, samples: Iterable[tuple[Tensor, Tensor | None]]
) -> anchorda.ScoreCalibrator:
    """Count the margins of all pixels, with the truth where it is known."""
    calibrator = anchorda.ScoreCalibrator(len(labeler.centroids)).to(labeler.centroids.device)
    for images, truth in samples:
        labels, margins = labeler(images).by_anchor
        if truth is not None:
            truth = anchorda.resize_labels(truth, labels.shape[1:])
        calibrator.update(labels, margins, truth)
    anchorda.all_reduce(calibrator)
    return calibrator


def margin_rules(text: str) -> list[tuple[str, float]]:
    """Return the rules of `--margin`, each with its number; a fixed margin is the rule ""."""
    rules = []
    for part in text.split(","):
        rule, _, number = part.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        known = rule == part.partition(":")[0] and rule in ("coverage", "precision")
        if not (0 <= value <= 1 if known else part == number and not math.isnan(value)):
            raise ValueError(
                "--margin: expected a number, coverage:Q or precision:P with Q, P in [0, 1], "
                f"got {text!r}"
            )
        rules.append((rule, value))
    return rules


# ------------------------------------------------------------------------------------------ labels


class Labeled(NamedTuple):
    """Pseudo-labels of target images."""

    maps: dict[str, Tensor]
    """Label maps by labeler; the paper's are two."""
    sure: Tensor
    """(): the part of the pixels of whose class the network is sure."""


def label_target(stage: Stage, images: Tensor, kinds: str) -> Labeled:
    """Return the labels of target images (N, 3, H, W) by `--labels`, maps (N, h, w)."""
    labels, by_anchor, by_probability = stage.labeler(images)
    sure = (by_probability.scores > SURE).float().mean()
    if kinds == "both":
        maps = {"anchor": by_anchor.labels, "probability": by_probability.labels}
        return Labeled(maps, sure)
    return Labeled({kinds: labels}, sure)


def labeled_shares(stage: Stage, data: Data, kinds: str) -> dict[str, float]:
    """Return the share of target pixels with a label, by labeler, on 32 images or fewer."""
    target = data.target_whole
    some = Subset(target, range(0, len(target), math.ceil(len(target) / 32)))
    names = ("anchor", "probability") if kinds == "both" else (kinds,)
    counts = torch.zeros(len(names) + 1, device=data.loading.device)
    for images in each_once(some, "labeled pixels", data.loading):
        maps = label_target(stage, images, kinds).maps
        counts[0] += maps[names[0]].numel()
        for index, name in enumerate(names, start=1):
            counts[index] += maps[name].ne(IGNORE).sum()
    counts = parallel.total(counts.double())
    return dict(zip(names, (counts[1:] / counts[0]).tolist(), strict=True))


# ------------------------------------------------------------------------------------------ mixing


class Mixed(NamedTuple):
    """Target images with source pixels in them."""

    images: Tensor
    pseudo: dict[str, Tensor]
    """Label maps by labeler; those of the pasted pixels are the source's."""
    of_source: Tensor
    """(N, H, W): the weights of pasted pixels, by their class, and 0 elsewhere: on pseudo-labels,
    class weights would multiply the mistakes in rare classes, which are many."""


def mix(
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    pseudo: Mapping[str, Tensor],
    class_weight: Tensor | None,
    num_classes: int,
) -> Mixed:
    """Paste half of the classes of each source image into a target image of the same size."""
    pasted = half_of_classes(labels, num_classes)
    images = torch.where(pasted[:, None], source, target)
    size = next(iter(pseudo.values())).shape[1:]
    small, pasted = (anchorda.resize_labels(x, size) for x in (labels, pasted.long()))
    maps = {kind: torch.where(pasted == 1, small, guess) for kind, guess in pseudo.items()}
    of_class = source.new_ones(num_classes) if class_weight is None else class_weight
    of_source = F.pad(of_class, (0, 256 - num_classes))[small]
    return Mixed(images, maps, torch.where(pasted == 1, of_source, 0.0))


def half_of_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Return a mask (N, H, W) of half of the classes in each label map, drawn at random."""
    index = labels.clamp(max=num_classes).flatten(1)
    absent = torch.ones(len(labels), num_classes + 1, device=labels.device).scatter(1, index, 0.0)
    absent = absent[:, :-1]  # without the ignored pixels
    place = (torch.rand_like(absent) + absent).argsort(dim=1).argsort(dim=1)
    chosen = 2 * place < num_classes - absent.sum(dim=1, keepdim=True)
    return F.pad(chosen, (0, 1)).gather(1, index).view_as(labels)


# ------------------------------------------------------------------------------------------ losses


def stage_losses(
    networks: nn.ModuleDict, batch: Batch, *, stage: Stage, data: Data, settings: StageSettings
) -> dict[str, Term]:
    """Classify both domains, and pull them to the anchors of their (pseudo-)labels if asked to."""
    source, labels, target = batch
    pseudo, sure = label_target(stage, target, settings.labels)
    weight = sure if settings.weighs_labels() else torch.ones_like(sure)
    weights = weight.expand(next(iter(pseudo.values())).shape)
    if settings.mix:
        target, pseudo, of_source = mix(
            source, labels, target, pseudo, data.class_weight, len(data.classes)
        )
        weights = torch.where(of_source > 0, of_source, weights)
    network, centroids, pull = (
        networks["network"],
        stage.labeler.centroids,
        settings.distance_weight,
    )
    features, logits = segment(network, data.augment(torch.cat([source, target])))
    source_features, target_features = features.split(len(source))
    source_logits, target_logits = logits.split(len(source))
    whole_logits = enlarge(network, source_logits, labels.shape[1:])
    terms = {"source": source_term(whole_logits, labels, data.class_weight)}
    if pull:
        resized = anchorda.resize_labels(labels, features.shape[2:])
        correct = anchorda.keep_correct(resized, source_logits)
        terms["source distance"] = distance_term(source_features, correct, centroids, pull)
    for kind, guess in pseudo.items():
        part = 1 / len(pseudo)
        loss = anchorda.discriminative_loss(target_logits, guess, pixel_weights=weights)
        terms[f"{kind} labels"] = Term(part * loss, amount(guess, torch.ones_like(centroids[:, 0])))
        if pull:
            distance = distance_term(target_features, guess, centroids, part * pull)
            terms[f"{kind} distance"] = distance
    return terms


def distance_term(features: Tensor, labels: Tensor, centroids: Tensor, weight: float) -> Term:
    """Return the weighted distance of features to the anchors of their labels."""
    seen = centroids.isfinite().all(dim=1).float()
    loss = anchorda.anchor_distance_loss(features, labels, centroids)
    return Term(weight * loss, amount(labels, seen))


def source_term(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Term:
    """Return the cross-entropy of the source at the resolution of its labels."""
    loss = anchorda.discriminative_loss(logits, labels, weight=weight)
    return Term(
        loss, amount(labels, logits.new_ones(logits.shape[1]) if weight is None else weight)
    )


def amount(labels: Tensor, weight: Tensor) -> Tensor:
    """Return the weights (C,) of labels 0 to 255, added up over all pixels."""
    return F.pad(weight, (0, 256 - len(weight)))[labels].sum()


def released_losses(
    networks: nn.ModuleDict, batch: Batch, *, stage: Stage, data: Data, settings: StageSettings
) -> dict[str, Term]:
    """Return the objective as the released code computes it, in each process by itself."""
    source, labels, target = batch
    _, by_anchor, by_probability = stage.labeler(target)
    images = data.augment(torch.cat([source, target]))
    features, logits = segment(networks["network"], images)
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
