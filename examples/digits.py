"""Class anchors for plain features (N, D): handwritten digits, turned ones as the target.

Half of scikit-learn's digits are the labeled source; the other half, turned by an angle, is the
target, without labels. A small network is trained on the source; then come stages of anchors, a
margin that labels half of the target, pseudo-labels, and training on both. A control takes as many
steps on the source alone. Several seeds, with their spread.

    pip install ".[examples]"
    python examples/digits.py

The settings are not chosen by the labels of the target: a margin for half of it, a weight of 0.1
and 4 stages are those of ``toy_2d.py``. The labels are used for the printed accuracies alone.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import anchorda

NUM_CLASSES = 10
FEATURE_DIM = 32


class Domain(NamedTuple):
    """Images (N, 1, 8, 8) in [0, 1] and their classes (N,)."""

    images: Tensor
    labels: Tensor


def load_domains(degrees: float, seed: int) -> tuple[Domain, Domain]:
    """Half of the digits as they are, the other half turned; which half, the seed says."""
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
        """Features (N, D) and logits (N, C)."""
        features = self.encoder(images)
        return features, self.classifier(features)


def train(
    network: Network,
    source: Domain,
    target: Tensor,
    stage: anchorda.StageLabeler | None,
    iterations: int,
    generator: torch.Generator,
) -> None:
    """Train on batches of the source and, in a stage, of the pseudo-labeled target as well."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    discriminate, pull = anchorda.DiscriminativeLoss(), anchorda.AnchorDistanceLoss()
    for _ in range(iterations):
        drawn = torch.randint(len(source.labels), (64,), generator=generator)
        labels = source.labels[drawn]
        features, logits = network(source.images[drawn])
        loss = discriminate(logits, labels)
        if stage is not None:
            loss = loss + 0.1 * pull(features, labels, stage.centroids)
            images = target[torch.randint(len(target), (64,), generator=generator)]
            labels = stage(images).labels
            features, logits = network(images)
            loss = loss + discriminate(logits, labels)
            loss = loss + 0.1 * pull(features, labels, stage.centroids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def begin_stage(network: Network, source: Domain, target: Tensor) -> anchorda.StageLabeler:
    """Freeze the network, take its anchors, and choose margins that label half of the target."""
    anchors = anchorda.CategoryAnchors(NUM_CLASSES, FEATURE_DIM)
    stage = anchorda.StageLabeler.from_source(network, [source], anchors)
    calibrator = anchorda.ScoreCalibrator(NUM_CLASSES)
    calibrator.update(*stage(target).by_anchor)
    stage.by_anchor = anchorda.AnchorPseudoLabeler(calibrator.min_score_for_coverage(0.5))
    return stage


@torch.no_grad()
def accuracy(network: Network, domain: Domain) -> float:
    """The fraction of images that the network classifies right."""
    confusion = anchorda.ConfusionMatrix(NUM_CLASSES)
    confusion.update(network(domain.images)[1].argmax(dim=1), domain.labels)
    return confusion.accuracy().item()


def run(seed: int, degrees: float, stages: int, iterations: int) -> dict[str, float]:
    """One seed: the accuracies on the target."""
    source, target = load_domains(degrees, seed)
    results = {}
    for variant in ("control", "adapted"):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        network = Network()
        train(network, source, target.images, None, iterations, generator)
        results["source only"] = accuracy(network, target)
        for _ in range(stages):
            stage = None
            if variant == "adapted":
                stage = begin_stage(network, source, target.images)
            train(network, source, target.images, stage, iterations // 2, generator)
        results[variant] = accuracy(network, target)
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Run all seeds and print a table; return the accuracies by row."""
    parser = argparse.ArgumentParser(description="Class anchors for digits that are turned.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--degrees", type=float, default=35.0, help="how far the target is turned")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=400, help="on the source alone")
    options = parser.parse_args(arguments)

    runs = [
        run(seed, options.degrees, options.stages, options.iterations)
        for seed in range(options.seeds)
    ]
    table = {row: [results[row] for results in runs] for row in runs[0]}
    table["adapted − source only"] = [r["adapted"] - r["source only"] for r in runs]
    print("accuracy on the target (%)")
    for row, values in table.items():
        percent = 100 * torch.tensor(values)
        spread = f" ± {percent.std():.1f}" if len(values) > 1 else ""
        print(
            f"{row:22}", *(f"{value:5.1f}" for value in percent), f"   {percent.mean():.1f}{spread}"
        )
    return table


if __name__ == "__main__":
    main()
