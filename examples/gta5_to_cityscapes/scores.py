"""Scores of networks, and of pseudo-labels where the truth is known; nothing here is trained on."""

import math
from typing import TypeVar

import torch
from classes import IGNORE
from data import Data
from method import Stage, count_margins, label_target
from networks.segmenter import Segmenter, enlarge, segment
from readers import LabeledImages
from streams import each_once
from torch import Tensor
from torch.utils.data import Dataset, Subset

import anchorda

Sample = TypeVar("Sample")


@torch.no_grad()
def predict(network: Segmenter, images: Tensor, size: torch.Size) -> Tensor:
    """Return predicted classes (N, H, W) at the size of the labels."""
    _, logits = segment(network, images)
    return enlarge(network, logits, size).argmax(dim=1)


def evaluate(network: Segmenter, images: LabeledImages, data: Data) -> anchorda.ConfusionMatrix:
    """Return the confusion of a network on labeled images."""
    network.eval()
    device = data.loading.device
    confusion = anchorda.ConfusionMatrix(len(data.classes)).to(device)
    evaluated = torch.tensor(data.evaluated, device=device)
    for image, labels in each_once(images, "evaluation", data.loading):
        labels = labels.where(torch.isin(labels, evaluated), IGNORE)
        confusion.update(predict(network, image, labels.shape[1:]), labels)
    anchorda.all_reduce(confusion)
    return confusion


def select(network: Segmenter, *, data: Data) -> dict[str, float]:
    """Return the scores that --best-by chooses from."""
    domains = {"source": data.held_out, "target": data.evaluation}
    mean_iou = {
        domain: evaluate(network, images, data).mean_iou().item()
        for domain, images in domains.items()
    }
    return mean_iou | scores_without_labels(network, data)


@torch.no_grad()
def scores_without_labels(network: Segmenter, data: Data) -> dict[str, float]:
    """Return the scores of `anchorda.selection` on the target's training images, or some of them.

    The anchors that the classifier is compared with are those of as many images of the source.
    """
    network.eval()
    device, num_classes = data.loading.device, len(data.classes)
    anchors = anchorda.CategoryAnchors(num_classes, network.feature_dim).to(device)
    for images, labels in each_once(_some(data.source_whole), "anchors", data.loading):
        features, logits = segment(network, images)
        labels = anchorda.resize_labels(labels, features.shape[2:])
        anchors.update(features, anchorda.keep_correct(labels, logits))
    anchorda.all_reduce(anchors)
    centroids, nearest = anchors.compute(), anchorda.AnchorPseudoLabeler()
    agreement, flipped = (anchorda.LabelAgreement(num_classes).to(device) for _ in range(2))
    density = anchorda.SoftNeighborhoodDensity().to(device)
    information = anchorda.InformationMaximization().to(device)
    norm = anchorda.NuclearNorm().to(device)
    for images in each_once(_some(data.target_whole), "selection", data.loading):
        features, logits = segment(network, images)
        labels = logits.argmax(dim=1)
        _, mirrored = segment(network, images.flip(3))
        agreement.update(labels, nearest(features, centroids).labels)
        flipped.update(labels, mirrored.flip(3).argmax(dim=1))
        density.update(logits)
        information.update(logits)
        norm.update(logits)
    for score in (agreement, flipped, density, information, norm):
        anchorda.all_reduce(score)
    return {
        "agreement": agreement.compute().item(),
        "flipped": flipped.compute().item(),
        "density": density.compute().item() if bool(density.counts.any()) else math.nan,
        "information": information.compute().item(),
        "norm": norm.compute().item(),
    }


def _some(images: Dataset[Sample]) -> Subset[Sample]:
    """Return at most 64 images, evenly taken."""
    count: int = len(images)  # type: ignore[arg-type]
    return Subset(images, range(0, count, math.ceil(count / 64)))


def label_quality(stage: Stage, data: Data, kinds: str) -> dict[str, anchorda.PseudoLabelQuality]:
    """Return a stage's pseudo-label quality by labeler, if the target has training labels."""
    if data.analysis is None:
        return {}
    names = ("anchor", "probability") if kinds == "both" else (kinds,)
    device = data.loading.device
    quality = {name: anchorda.PseudoLabelQuality(len(data.classes)).to(device) for name in names}
    for images, labels in each_once(data.analysis, "label quality", data.loading):
        for kind, guess in label_target(stage, images, kinds).maps.items():
            truth = anchorda.resize_labels(labels, guess.shape[1:])
            quality[kind].update(guess, truth)
    for of_kind in quality.values():
        anchorda.all_reduce(of_kind)
    return quality


def margin_counts(stage: Stage, images: LabeledImages, data: Data) -> anchorda.ScoreCalibrator:
    """Return the margins of all pixels of labeled images, for the curves of other minimums."""
    old = stage.labeler
    of_all = anchorda.StageLabeler(
        old.network, old.centroids, whitening=old.whitening, extract=old.extract
    )
    return count_margins(of_all, each_once(images, "margins", data.loading))
