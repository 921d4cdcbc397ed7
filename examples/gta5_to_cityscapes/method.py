"""A stage of CAG-UDA (arXiv 1910.13049), top to bottom: anchors, margins, labels, losses.

A stage starts from the network of the phase before. `begin_stage` freezes a copy of it, averages
the source's features to one anchor for each class, and chooses the minimum margins. In each
training step, `label_target` labels the target's pixels by the frozen network, and the trained
network minimizes `paper_losses` or `released_losses`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    """Losses: the paper's, or as the released code computes them (anchorda.released)."""
    labels: Literal["anchor", "probability", "both"] = "both"
    """Labels of target pixels: by the nearest anchor, by the classifier's probability, or by both.
    The paper's is both, with a loss for each."""
    margin: str = "coverage:0.2,precision:0.5"
    """Minimum margin of anchor labels: a number for all classes,
    coverage:Q to label that part of each class's pixels on the target,
    precision:P to have that part of each class's labels right on the held-out source,
    or several of these, separated by commas, of which the highest counts."""
    probability: Fraction = 0.95
    """Minimum probability of the classifier's labels."""
    distance_weight: Weight = 0.02
    """Weight of the distance loss."""

    def check(self) -> None:
        """Raise a ValueError that names the flags which do not fit together."""
        margin_rules(self.margin)
        if self.objective == "released" and self.labels != "both":
            raise ValueError("--objective released always has --labels both")


@dataclass(frozen=True)
class Stage:
    """All that a stage holds fixed."""

    labeler: anchorda.StageLabeler
    """The frozen network, the anchors, and the labelers."""
    counts: Tensor
    """(C,): number of source pixels that each anchor averages."""

    def plain(self) -> dict[str, object]:
        """Return the stage as a checkpoint holds it."""
        return {"labeler": self.labeler.state_dict(), "counts": self.counts}


def restore_stage(network: Segmenter, parts: Mapping[str, Any]) -> Stage:
    """Return the stage of a checkpoint; `network` has its architecture, with any weights."""
    device = next(network.parameters()).device
    anchors = torch.zeros(len(parts["counts"]), network.feature_dim, device=device)
    labeler = anchorda.StageLabeler(network, anchors, extract=segment)
    labeler.load_state_dict(parts["labeler"])
    if network.compiled:
        labeler.network.compile()
    return Stage(labeler, parts["counts"].to(device))


# ----------------------------------------------------------------------------------------- anchors


def begin_stage(network: Segmenter, data: Data, settings: StageSettings) -> Stage:
    """Freeze the network, compute the anchors on the source, and choose the minimum margins."""
    anchors = anchorda.CategoryAnchors(len(data.classes), network.feature_dim).to(
        data.loading.device
    )
    source = each_once(data.source_whole, "anchors", data.loading)
    labeler = anchorda.StageLabeler.from_source(network, source, anchors, extract=segment)
    labeler.by_anchor = anchorda.AnchorPseudoLabeler(min_margins(labeler, data, settings.margin))
    labeler.by_probability = anchorda.ProbabilityPseudoLabeler(settings.probability)
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


def label_target(stage: Stage, images: Tensor, kinds: str) -> dict[str, Tensor]:
    """Return pseudo-label maps of target images by labeler; the paper's `kinds` is "both"."""
    _, by_anchor, by_probability = stage.labeler(images)
    maps = {"anchor": by_anchor.labels, "probability": by_probability.labels}
    return maps if kinds == "both" else {kinds: maps[kinds]}


def labeled_shares(stage: Stage, data: Data, kinds: str) -> dict[str, float]:
    """Return the share of target pixels with a label, by labeler, on 32 images or fewer."""
    target = data.target_whole
    some = Subset(target, range(0, len(target), math.ceil(len(target) / 32)))
    names = ("anchor", "probability") if kinds == "both" else (kinds,)
    counts = torch.zeros(len(names) + 1, device=data.loading.device)
    for images in each_once(some, "labeled pixels", data.loading):
        maps = label_target(stage, images, kinds)
        counts[0] += maps[names[0]].numel()
        for index, name in enumerate(names, start=1):
            counts[index] += maps[name].ne(IGNORE).sum()
    counts = parallel.total(counts.double())
    return dict(zip(names, (counts[1:] / counts[0]).tolist(), strict=True))


# ------------------------------------------------------------------------------------------ losses


def paper_losses(
    networks: nn.ModuleDict, batch: Batch, *, stage: Stage, data: Data, settings: StageSettings
) -> dict[str, Term]:
    """Classify both domains, and pull them to the anchors of their (pseudo-)labels."""
    source, labels, target = batch
    pseudo = label_target(stage, target, settings.labels)
    network, centroids = networks["network"], stage.labeler.centroids
    features, logits = segment(network, data.augment(torch.cat([source, target])))
    source_features, target_features = features.split(len(source))
    source_logits, target_logits = logits.split(len(source))
    whole_logits = enlarge(network, source_logits, labels.shape[1:])
    terms = {"source": source_term(whole_logits, labels, data.class_weight)}

    seen = centroids.isfinite().all(dim=1).float()
    resized = anchorda.resize_labels(labels, features.shape[2:])
    correct = anchorda.keep_correct(resized, source_logits)
    pull = settings.distance_weight * anchorda.anchor_distance_loss(
        source_features, correct, centroids
    )
    terms["source distance"] = Term(pull, amount(correct, seen))
    for kind, guess in pseudo.items():
        # No class weights: they would multiply the mistakes in rare classes, which are many.
        loss = anchorda.discriminative_loss(target_logits, guess) / len(pseudo)
        terms[f"{kind} labels"] = Term(loss, amount(guess, torch.ones_like(seen)))
        pull = anchorda.anchor_distance_loss(target_features, guess, centroids) / len(pseudo)
        terms[f"{kind} distance"] = Term(settings.distance_weight * pull, amount(guess, seen))
    return terms


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
