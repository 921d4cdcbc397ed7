"""A user's training code with every public name, as a strict type checker sees it; never run.

`test_downstream.py` checks it as a project of its own, against the installed package.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from typing_extensions import assert_type

import anchorda
from anchorda import plots
from anchorda.released import CagUdaLoss, cag_uda_loss, load_category_anchors

Batches = Iterable[tuple[Tensor, Tensor]]


def make_anchors(network: nn.Module, source: Batches) -> Tensor:
    anchors = anchorda.CategoryAnchors(num_classes=19, feature_dim=256, max_count=3000)
    for images, labels in source:
        features, logits = extract(network, images)
        labels = anchorda.resize_labels(labels, features.shape[2:], mode="majority", min_ratio=0.5)
        correct = anchorda.keep_correct(labels, logits, ignore_index=250)
        anchors.update(*anchorda.image_centroids(features, correct, 19, min_pixels=10))
        sums = anchorda.class_sums(features, correct, num_classes=19)
        assert_type(sums, anchorda.ClassSums)
        anchors.update_sums(*anchorda.all_reduce_class_sums(sums))
    assert_type(anchors.seen, Tensor)
    assert_type(anchors.counts, Tensor)
    anchors.merge(anchorda.CategoryAnchors(19, 256, max_count=3000))
    anchorda.all_reduce(anchors)
    return anchors.compute()


def make_clusters(source: Batches) -> Tensor:
    clusters = anchorda.AnchorClusters(19, 256, anchors_per_class=4, seed=1)
    move = torch.tensor(1.0)
    while move > 0.01:
        for features, labels in source:
            clusters.update(features, labels)
        anchorda.all_reduce(clusters)
        move = clusters.step()
    return clusters.compute()


def make_discriminant(source: Batches) -> anchorda.LinearDiscriminant:
    covariance = anchorda.WithinClassCovariance(num_classes=19, feature_dim=256)
    variances = anchorda.ClassVariances(num_classes=19, feature_dim=256)
    for features, labels in source:
        covariance.update(features, labels)
        variances.update(features, labels)
        sums, counts = anchorda.soft_class_sums(features, features.softmax(dim=1))
        assert_type(sums / counts[:, None], Tensor)
    for state in (covariance, variances):
        anchorda.all_reduce(state)
    moments = variances.compute()
    assert_type(moments, anchorda.ClassMoments)
    discriminant = anchorda.linear_discriminant(moments.means, covariance.compute(), shrinkage=0.1)
    assert_type(discriminant.logits(moments.means), Tensor)
    return discriminant


def to_numpy_and_back(anchors: anchorda.CategoryAnchors, path: Path) -> anchorda.CategoryAnchors:
    centroids: npt.NDArray[np.float32] = anchors.compute().numpy()
    counts: npt.NDArray[np.int64] = anchors.counts.numpy()
    again = anchorda.CategoryAnchors.from_centroids(centroids, counts, max_count=3000)
    assert_type(again, anchorda.CategoryAnchors)
    moving = anchorda.CategoryAnchors.from_centroids(load_category_anchors(path), momentum=0.1)
    moving.reset()
    return moving


def extract(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    features, logits = network(images)
    return features, logits


def extract_tapped(network: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    with anchorda.FeatureTap(network[-1], of="input") as tap:
        logits = network(images)
    assert_type(tap.features, Tensor)
    return tap.features, logits


def make_stage(
    network: nn.Module, source: Batches, target: Iterable[Tensor]
) -> anchorda.StageLabeler:
    anchors = anchorda.CategoryAnchors(19, 256)
    covariance = anchorda.WithinClassCovariance(19, 256)
    views = anchorda.average_views(extract, scales=(1.0, 1.25))
    stage = anchorda.StageLabeler.from_source(
        network, source, anchors, covariance=covariance, extract=views
    )
    assert_type(stage, anchorda.StageLabeler)
    assert_type(anchorda.whitening_matrix(covariance.compute(), shrinkage=0.1), Tensor)
    stage.follow(network, 0.99)
    calibrator = anchorda.ScoreCalibrator(num_classes=19)
    for images in target:
        calibrator.update(*stage(images).by_anchor)
    curve = calibrator.curve()
    assert_type(curve, anchorda.PrecisionCoverage)
    assert_type(curve.precision, Tensor)
    minimum = calibrator.min_score_for_coverage(0.2)
    minimum = torch.maximum(minimum, calibrator.min_score_for_precision(0.5, min_count=10))
    anchorda.warn_unreachable_margins(minimum, stage.centroids, class_names=["road"] * 19)
    assert_type(anchorda.margin_limits(stage.centroids), Tensor)
    health = anchorda.anchor_health(stage.centroids, anchors.counts, previous=None)
    assert_type(health, anchorda.AnchorHealth)
    assert_type(health.table(), str)
    by_anchor = anchorda.AnchorPseudoLabeler(minimum, ignore_index=255)
    by_probability = anchorda.ProbabilityPseudoLabeler(0.95)
    return anchorda.StageLabeler(
        network,
        stage.centroids,
        by_anchor=by_anchor,
        by_probability=by_probability,
        rule="agree",
        extract=extract,
    )


def train(network: nn.Module, centroids: Tensor, target: Iterable[Tensor]) -> None:
    labeler = anchorda.AnchorPseudoLabeler(min_margin=2.5)
    by_probability = anchorda.ProbabilityPseudoLabeler(torch.full((19,), 0.9))
    distance = anchorda.AnchorDistanceLoss("smooth_l1", average="class")
    discriminate = anchorda.DiscriminativeLoss(weight=torch.ones(19), label_smoothing=0.1)
    contrast = anchorda.AnchorContrastiveLoss(temperature=0.1, similarity="cosine")
    for images in target:
        features, logits = extract(network, images)
        pseudo: anchorda.PseudoLabels = labeler(features, centroids)
        labels = anchorda.combine_pseudo_labels(
            pseudo.labels, by_probability(logits).labels, "union"
        )
        assert_type(labels, Tensor)
        assignments = anchorda.anchor_probabilities(
            features, centroids, similarity="squared", temperature=2.0
        )
        scores = anchorda.sinkhorn_assignments(logits.flatten(1), shares=[0.5, 0.5], epsilon=0.1)
        assert_type(scores, Tensor)
        assert_type(anchorda.rectify(logits.softmax(dim=1), assignments), Tensor)
        loss = (
            distance(features, labels, centroids)
            + discriminate(logits, labels)
            + contrast(features, labels, centroids, pixel_weights=pseudo.scores)
            + anchorda.anchor_distance_loss(features, labels, centroids, distance="squared")
            + anchorda.discriminative_loss(logits, labels)
            + anchorda.anchor_contrastive_loss(features, labels, centroids, temperature=0.1)
            + anchorda.anchor_distances(features, centroids).amin(dim=1).mean()
        )
        loss.backward()


def train_as_others(network: nn.Module, moments: anchorda.ClassMoments, target: Batches) -> None:
    consistency = anchorda.AnchorConsistencyLoss(0.5, similarity="dot")
    distribution = anchorda.AnchorDistributionLoss(temperature=100.0)
    symmetric = anchorda.SymmetricCrossEntropyLoss(alpha=0.1, beta=1.0)
    information = anchorda.InformationMaximizationLoss()
    distance = anchorda.FeatureDistanceLoss(classes=[6, 7])
    for images, labels in target:
        features, logits = extract(network, images)
        anchors, teacher = moments.means, logits.softmax(dim=1)
        loss = (
            consistency(features, teacher, anchors)
            + distribution(features, labels, *moments)
            + symmetric(logits, labels)
            + information(logits)
            + distance(features, features.detach(), labels)
            + anchorda.anchor_consistency_loss(features, teacher, anchors, temperature=0.5)
            + anchorda.anchor_distribution_loss(features, labels, *moments, temperature=100.0)
            + anchorda.symmetric_cross_entropy(logits, labels, pixel_weights=teacher.amax(dim=1))
            + anchorda.information_maximization_loss(logits)
            + anchorda.feature_distance_loss(features, features.detach(), labels, classes=[1])
        )
        loss.backward()


def released_step(step: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    loss = cag_uda_loss(*step, torch.zeros(19, 256), distance_weight=0.7)
    assert_type(loss, CagUdaLoss)
    return loss.total


def choose(networks: list[nn.Module], target: list[Tensor]) -> Tensor:
    best: list[Tensor] = []
    for network in networks:
        density = anchorda.SoftNeighborhoodDensity(temperature=0.05)
        information, norm = anchorda.InformationMaximization(), anchorda.NuclearNorm()
        agreement = anchorda.LabelAgreement(num_classes=19)
        for images in target:
            features, logits = network(images)
            for score in (density, information, norm):
                score.update(logits)
            agreement.update(logits.argmax(dim=1), features.argmax(dim=1))
        anchorda.all_reduce(density)
        assert_type(density.compute(), Tensor)
        best.append(information.compute() + norm.compute() + agreement.compute())
    return torch.stack(best)


def draw(axes: Axes, features: Tensor, labels: Tensor, anchors: Tensor, scores: Tensor) -> Axes:
    calibrator = anchorda.ScoreCalibrator(num_classes=19)
    colors = plots.class_colors(19)
    plots.plot_features(axes, features, labels, anchors, projection="discriminants")
    plots.plot_anchor_distances(axes, anchors)
    plots.plot_scores(axes, calibrator, 0.5)
    plots.plot_coverage_and_precision(axes, {"target": calibrator}, 3, [0.5] * 19)
    return plots.plot_labels(axes, labels[0], scores[0], colors=colors)


def evaluate(stage: anchorda.StageLabeler, batches: Batches) -> Tensor:
    confusion = anchorda.ConfusionMatrix(num_classes=19)
    quality = anchorda.PseudoLabelQuality(num_classes=19)
    for images, labels in batches:
        given: anchorda.StageLabels = stage(images)
        quality.update(given.labels, labels)
        confusion.update(given.by_probability.labels, labels)
    for state in (confusion, quality):
        anchorda.all_reduce(state)
    assert_type(quality.precision(), Tensor)
    assert_type(quality.recall(), Tensor)
    assert_type(quality.coverage(), Tensor)
    return torch.stack([confusion.mean_iou(), confusion.accuracy(), *confusion.iou()])
