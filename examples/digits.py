"""Seven methods, and self-training, on features (N, D): digits, turned ones as the target.

Half of scikit-learn's digits are the labeled source; the other half, turned by an angle, is the
target, without labels. A small network is trained on the source. Then come stages: each method
starts from the same network and takes as many steps as a control on the source alone. The blocks
are those of the methods for maps, `examples/methods`, whose files have the papers' words.

    pip install ".[examples]"
    python examples/digits.py                      # the seven methods, five seeds, 1:50 minutes
    python examples/digits.py --method self_training agree rectify

Nothing was chosen by the labels of the target, which are used for the printed accuracies alone: the
weights are the papers', the margin labels half of the target, and averages move by 0.01 a step.
"""

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anchorda
from anchorda.stages import Rule

NUM_CLASSES = 10
FEATURE_DIM = 32
MOMENTUM = 0.01  # of moving averages: of weights, prototypes and shares


class Domain(NamedTuple):
    """Images (N, 1, 8, 8) in [0, 1] and their classes (N,)."""

    images: Tensor
    labels: Tensor


def load_domains(degrees: float, seed: int) -> tuple[Domain, Domain]:
    """Return half of the digits as they are, and the other half turned; the seed draws which."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    source, target = order.chunk(2)
    return (
        Domain(images[source], labels[source]),
        Domain(turned(images[target], degrees), labels[target]),
    )


def turned(images: Tensor, degrees: float) -> Tensor:
    """Turn images around their middle, interpolating linearly."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Network(nn.Module):
    """Two convolutions and a layer of features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURE_DIM),
        )
        self.classifier = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D) and logits (N, C)."""
        features = self.encoder(images)
        return features, self.classifier(features)


Objective = Callable[[Network, Domain, Tensor], Tensor]  # of network, source and target batches
Method = Callable[[Network, Domain, Tensor], Objective]  # of the network that a stage starts from


def source_loss(network: Network, source: Domain) -> Tensor:
    """Return the cross-entropy of labeled images."""
    return anchorda.discriminative_loss(network(source.images)[1], source.labels)


def control(start: Network, source: Domain, target: Tensor) -> Objective:
    """Train on the source alone."""
    return lambda network, batch, images: source_loss(network, batch)


def self_training(
    start: Network, source: Domain, target: Tensor, rule: Rule = "probability"
) -> Objective:
    """Label the target by a teacher: all of it, where anchors agree, or rectified by anchors."""
    shape = NUM_CLASSES, FEATURE_DIM
    stage = anchorda.StageLabeler.from_source(
        start,
        [source],
        anchorda.CategoryAnchors(*shape),
        covariance=anchorda.WithinClassCovariance(*shape),
    )
    stage.rule = rule

    def objective(network: Network, batch: Domain, images: Tensor) -> Tensor:
        stage.follow(network, decay=1 - MOMENTUM)
        _, logits = network(distort(images))
        loss = anchorda.discriminative_loss(logits, stage(images).labels)
        return source_loss(network, batch) + loss

    return objective


def cag_uda(start: Network, source: Domain, target: Tensor) -> Objective:
    """Label by source anchors with a margin, and pull both domains to them."""
    stage = label_half(start, source, target)

    def objective(network: Network, batch: Domain, images: Tensor) -> Tensor:
        features, logits = network(batch.images)
        loss = anchorda.discriminative_loss(logits, batch.labels)
        pull = anchorda.anchor_distance_loss(features, batch.labels, stage.centroids)
        labels = stage(images).labels
        features, logits = network(images)
        loss = loss + anchorda.discriminative_loss(logits, labels)
        pull = pull + anchorda.anchor_distance_loss(features, labels, stage.centroids)
        return loss + 0.1 * pull

    return objective


def label_half(start: Network, source: Domain, target: Tensor) -> anchorda.StageLabeler:
    """Freeze the network, compute its anchors, and choose margins for half of the target."""
    anchors = anchorda.CategoryAnchors(NUM_CLASSES, FEATURE_DIM)
    stage = anchorda.StageLabeler.from_source(start, [source], anchors)
    calibrator = anchorda.ScoreCalibrator(NUM_CLASSES)
    calibrator.update(*stage(target).by_anchor)
    stage.by_anchor = anchorda.AnchorPseudoLabeler(calibrator.min_score_for_coverage(0.5))
    return stage


def proda(start: Network, source: Domain, target: Tensor) -> Objective:
    """Rectify fixed soft labels by the assignment to prototypes that follow the target."""
    first, teacher, prototypes = frozen(start), moving_average(start), moving_anchors()

    def objective(network: Network, batch: Domain, images: Tensor) -> Tensor:
        teacher.update_parameters(network)
        with torch.no_grad():
            features, logits = teacher(images)
            prototypes.update(features, logits.argmax(dim=1))
            assigned = anchorda.anchor_probabilities(features, prototypes.compute())
            labels = anchorda.rectify(first(images)[1].softmax(dim=1), assigned).argmax(dim=1)
        _, logits = network(images)
        features, _ = network(distort(images))
        consistency = anchorda.anchor_consistency_loss(features, assigned, prototypes.compute())
        loss = source_loss(network, batch) + anchorda.symmetric_cross_entropy(logits, labels)
        regularizer: Tensor = -logits.log_softmax(dim=1).mean()
        return loss + 10 / NUM_CLASSES * consistency + 0.1 * regularizer

    return objective


def cpsl(start: Network, source: Domain, target: Tensor) -> Objective:
    """Assign a batch to prototypes all together, and predict that from another view."""
    first, teacher, prototypes = frozen(start), moving_average(start), moving_anchors()
    shares = torch.full((NUM_CLASSES,), 1 / NUM_CLASSES)

    def objective(network: Network, batch: Domain, images: Tensor) -> Tensor:
        teacher.update_parameters(network)
        with torch.no_grad():
            features, logits = teacher(images)
            features, predicted = normalize(features), logits.softmax(dim=1)
            prototypes.update(features, predicted.argmax(dim=1))
            shares.lerp_(predicted.mean(dim=0), MOMENTUM)
            scores = features @ normalize(prototypes.compute().nan_to_num()).T
            assigned = anchorda.sinkhorn_assignments(scores, shares=shares)
            labels = anchorda.rectify(first(images)[1].softmax(dim=1), assigned).argmax(dim=1)
        _, logits = network(images)
        features, _ = network(distort(images))
        loss = source_loss(network, batch) + anchorda.symmetric_cross_entropy(logits, labels)
        return loss + 0.1 * anchorda.anchor_consistency_loss(
            features, assigned, prototypes.compute(), similarity="cosine", temperature=0.08
        )

    return objective


def sepico(start: Network, source: Domain, target: Tensor) -> Objective:
    """Contrast both domains to the distributions of the source's classes."""
    teacher = moving_average(start)
    distributions = anchorda.ClassVariances(NUM_CLASSES, FEATURE_DIM)

    def objective(network: Network, batch: Domain, images: Tensor) -> Tensor:
        teacher.update_parameters(network)
        with torch.no_grad():
            distributions.update(normalize(teacher(batch.images)[0]), batch.labels)
            scores, labels = teacher(images)[1].softmax(dim=1).max(dim=1)
            weights = (scores >= 0.968).float().mean().expand(len(images))
        features, logits = network(torch.cat([batch.images, distort(images)]))
        moments = distributions.compute()
        contrast = anchorda.anchor_distribution_loss(
            normalize(features), torch.cat([batch.labels, labels]), *moments, temperature=100.0
        )
        source_logits, target_logits = logits.split([len(batch.images), len(images)])
        loss = anchorda.discriminative_loss(source_logits, batch.labels) + contrast
        return loss + anchorda.discriminative_loss(target_logits, labels, pixel_weights=weights)

    return objective


def diga(start: Network, source: Domain, target: Tensor) -> Objective:
    """Use fixed labels where the nearest centroid of the teacher's feature agrees."""
    first, teacher, centroids = frozen(start), moving_average(start), moving_anchors()
    nearest = anchorda.AnchorPseudoLabeler(float("-inf"))

    def objective(network: Network, batch: Domain, images: Tensor) -> Tensor:
        teacher.update_parameters(network)
        with torch.no_grad():
            stored = first(images)[1].argmax(dim=1)
            features, _ = teacher(images)
            centroids.update(teacher(batch.images)[0], batch.labels)
            centroids.update(features, stored)
            by_centroid = nearest(features, centroids.compute()).labels
            labels = anchorda.combine_pseudo_labels(stored, by_centroid, "agree")
        _, logits = network(distort(images))
        return source_loss(network, batch) + anchorda.discriminative_loss(logits, labels)

    return objective


def shot(start: Network, source: Domain, target: Tensor) -> Objective:
    """Move the features of the target to where a fixed classifier is sure; no source is used."""
    start.classifier.requires_grad_(False)
    with torch.no_grad():
        features, logits = start(target)
        x = normalize(F.pad(features, (0, 1), value=1.0))
        members = logits.softmax(dim=1)
        for _ in range(2):  # by probabilities, then by the labels of those centroids
            sums, counts = anchorda.soft_class_sums(x, members)
            centroids = (sums / counts[:, None]).float()
            similar = anchorda.anchor_probabilities(x, centroids, similarity="cosine")
            members = F.one_hot(similar.argmax(dim=1), NUM_CLASSES).float()

    def objective(network: Network, batch: Domain, images: Tensor) -> Tensor:
        features, logits = network(images)
        x = normalize(F.pad(features.detach(), (0, 1), value=1.0))
        similar = anchorda.anchor_probabilities(x, centroids, similarity="cosine")
        loss = anchorda.discriminative_loss(logits, similar.argmax(dim=1))
        return anchorda.information_maximization_loss(logits) + 0.3 * loss

    return objective


METHODS: dict[str, Method] = {
    "control": control,
    "self_training": self_training,
    "agree": partial(self_training, rule="agree"),
    "rectify": partial(self_training, rule="rectify"),
    "cag_uda": cag_uda,
    "proda": proda,
    "cpsl": cpsl,
    "sepico": sepico,
    "diga": diga,
    "shot": shot,
}
PAPERS = ["cag_uda", "proda", "cpsl", "sepico", "diga", "shot", "t3a"]


def frozen(network: Network) -> Network:
    """Return a copy that stays as it is."""
    return copy.deepcopy(network).requires_grad_(False)


def moving_average(network: Network) -> AveragedModel:
    """Return a copy that follows the weights of a network: its teacher."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(1 - MOMENTUM))


def moving_anchors() -> anchorda.CategoryAnchors:
    """Return anchors that follow the features that they are shown."""
    return anchorda.CategoryAnchors(NUM_CLASSES, FEATURE_DIM, momentum=MOMENTUM)


def distort(images: Tensor) -> Tensor:
    """Return another view: noise, and a shift of up to one pixel."""
    rows, columns = (int(step) - 1 for step in torch.randint(3, (2,)))
    return images.roll((rows, columns), dims=(2, 3)) + 0.1 * torch.randn_like(images)


@torch.no_grad()
def t3a(network: Network, target: Tensor, supports: int = 100) -> Tensor:
    """Return the classes of the target by supports of least entropy in place of the classifier."""
    features, logits = network(target)
    rows = torch.cat([network.classifier.weight, features])
    logits = torch.cat([network.classifier(network.classifier.weight), logits])
    entropy = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
    labels = logits.argmax(dim=1)
    for c in range(NUM_CLASSES):
        of_class = (labels == c).nonzero().flatten()
        labels[of_class[entropy[of_class].argsort()[supports:]]] = -1
    sums, _ = anchorda.class_sums(normalize(rows), labels, NUM_CLASSES)
    adjusted: Tensor = features @ normalize(sums.float()).T
    return adjusted.argmax(dim=1)


def train(
    network: Network, objective: Objective, source: Domain, target: Tensor, steps: int
) -> None:
    """Minimize an objective over random batches of both domains."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, fused=True)
    for _ in range(steps):
        drawn = torch.randint(len(source.labels), (64,))
        batch = Domain(source.images[drawn], source.labels[drawn])
        loss = objective(network, batch, target[torch.randint(len(target), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that are classified right."""
    confusion = anchorda.ConfusionMatrix(NUM_CLASSES)
    confusion.update(predicted, labels)
    return confusion.accuracy().item()


def run(seed: int, methods: Sequence[str], options: argparse.Namespace) -> dict[str, float]:
    """Return the accuracies on the target of one seed."""
    source, target = load_domains(options.degrees, seed)
    torch.manual_seed(seed)
    start = Network()
    train(start, control(start, source, target.images), source, target.images, options.iterations)
    with torch.no_grad():
        results = {"source only": accuracy(start(target.images)[1].argmax(dim=1), target.labels)}
    for name in methods:
        if name == "t3a":
            results[name] = accuracy(t3a(start, target.images), target.labels)
            continue
        torch.manual_seed(seed + 1)
        network = copy.deepcopy(start)
        for _ in range(options.stages):
            objective = METHODS[name](network, source, target.images)
            train(network, objective, source, target.images, options.iterations // 4)
        with torch.no_grad():
            predicted = network(target.images)[1].argmax(dim=1)
        results[name] = accuracy(predicted, target.labels)
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Run all seeds and print a table; return the accuracies by row."""
    every = [*METHODS, "t3a"]
    parser = argparse.ArgumentParser(description="Seven methods on digits that are turned.")
    parser.add_argument("--method", nargs="+", choices=every, default=PAPERS, help="rows to run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--degrees", type=float, default=35.0, help="how far the target is turned")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=400, help="a stage has a fourth")
    options = parser.parse_args(arguments)

    methods = list(dict.fromkeys(["control", *options.method]))
    runs = [run(seed, methods, options) for seed in range(options.seeds)]
    table = {row: [results[row] for results in runs] for row in runs[0]}
    print("accuracy on the target (%)")
    for row, values in table.items():
        percent = 100 * torch.tensor(values)
        spread = f" ± {percent.std():.1f}" if len(values) > 1 else ""
        print(
            f"{row:13}", *(f"{value:5.1f}" for value in percent), f"   {percent.mean():.1f}{spread}"
        )
    return table


if __name__ == "__main__":
    main()
