"""Class anchors in two dimensions: the whole method on points that can be looked at.

Three classes of points; the target's are turned against the source's. A tiny network is trained on
the source. Then, stage by stage: anchors from the source, a margin that labels half of the target,
pseudo-labels, and training on both. It ends with the accuracies and a picture.

    python examples/toy_2d.py --output runs/toy_2d.png

The true labels of the target are used for the printed numbers and for nothing else.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import anchorda

NUM_CLASSES = 3
IGNORED = 255
COLORS = ("#0072b2", "#d55e00", "#009e73")


class Domain(NamedTuple):
    """Points (N, 2) and their classes (N,)."""

    points: Tensor
    labels: Tensor


def draw_domain(num_points: int, degrees: float, generator: torch.Generator) -> Domain:
    """Draw three long clouds of points around the origin, turned by an angle."""
    labels = torch.arange(num_points) % NUM_CLASSES
    along = 2 + 0.6 * torch.randn(num_points, generator=generator)
    across = 0.35 * torch.randn(num_points, generator=generator)
    angles = 2 * math.pi * labels / NUM_CLASSES + math.radians(degrees)
    x = along * angles.cos() - across * angles.sin()
    y = along * angles.sin() + across * angles.cos()
    return Domain(torch.stack([x, y], dim=1), labels)


class Network(nn.Module):
    """A network whose features have two dimensions, so that they can be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
        self.classifier = nn.Linear(2, NUM_CLASSES)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 2) and logits (N, C)."""
        features = self.encoder(points)
        return features, self.classifier(features)


def train(
    network: Network,
    source: Domain,
    target: Tensor,
    stage: anchorda.StageLabeler | None,
    iterations: int,
) -> None:
    """Train on the source and, in a stage, on the target's pseudo-labels as well."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    discriminate, pull = anchorda.DiscriminativeLoss(), anchorda.AnchorDistanceLoss()
    for _ in range(iterations):
        features, logits = network(source.points)
        loss = discriminate(logits, source.labels)
        if stage is not None:
            loss = loss + 0.1 * pull(features, source.labels, stage.centroids)
            features, logits = network(target)
            labels = stage(target).labels
            loss = loss + discriminate(logits, labels)
            loss = loss + 0.1 * pull(features, labels, stage.centroids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def begin_stage(network: Network, source: Domain, target: Tensor) -> anchorda.StageLabeler:
    """Freeze the network, take its anchors, and choose margins that label half of the target."""
    anchors = anchorda.CategoryAnchors(NUM_CLASSES, feature_dim=2)
    stage = anchorda.StageLabeler.from_source(network, [source], anchors)
    calibrator = anchorda.ScoreCalibrator(NUM_CLASSES)
    calibrator.update(*stage(target).by_anchor)
    stage.by_anchor = anchorda.AnchorPseudoLabeler(calibrator.min_score_for_coverage(0.5))
    return stage


@torch.no_grad()
def accuracy(network: Network, domain: Domain) -> float:
    """Return the fraction of points that the network classifies right."""
    confusion = anchorda.ConfusionMatrix(NUM_CLASSES)
    confusion.update(network(domain.points)[1].argmax(dim=1), domain.labels)
    return confusion.accuracy().item()


def show_points(axes: Axes, source: Domain, target: Domain) -> None:
    """Draw both domains as they are given, the target as crosses in the colors of its truth."""
    for label, color in enumerate(COLORS):
        x, y = source.points[source.labels == label].T
        axes.scatter(x, y, s=14, color=color, alpha=0.25, linewidths=0)
        x, y = target.points[target.labels == label].T
        axes.scatter(x, y, s=14, color=color, marker="x", linewidths=0.8)
    title = "given: source (dots), target (crosses)"
    axes.set(title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5))


@torch.no_grad()
def show_stage(axes: Axes, stage: anchorda.StageLabeler, target: Domain, title: str) -> None:
    """Draw the feature plane: where a feature gets a label, the target's features, the anchors."""
    features, _ = stage.network(target.points)
    labels = stage(target.points).labels
    everything = torch.cat([features, stage.centroids])
    middle = (everything.amin(dim=0) + everything.amax(dim=0)) / 2
    reach = 1.1 * (everything - middle).abs().amax().item()
    (left, low), (right, high) = (middle - reach).tolist(), (middle + reach).tolist()
    across, up = torch.linspace(left, right, 300), torch.linspace(low, high, 300)
    plane = torch.stack(torch.meshgrid(across, up, indexing="xy"))
    regions = stage.by_anchor(plane[None], stage.centroids).labels[0]
    for label, color in enumerate(COLORS):
        axes.contourf(across, up, regions == label, levels=(0.5, 1.5), colors=[color], alpha=0.15)
    for label, color in [*enumerate(COLORS), (IGNORED, "0.6")]:
        x, y = features[labels == label].T
        axes.scatter(x, y, s=14, color=color, linewidths=0)
    x, y = features[(labels != IGNORED) & (labels != target.labels)].T
    axes.scatter(x, y, s=60, facecolors="none", edgecolors="black")
    x, y = stage.centroids.T
    axes.scatter(x, y, s=260, c=COLORS, marker="*", edgecolors="black")
    axes.set(title=title, xlim=(left, right), ylim=(low, high))


def save_picture(
    path: Path,
    first: anchorda.StageLabeler,
    last: anchorda.StageLabeler,
    source: Domain,
    target: Domain,
) -> None:
    """Draw the data, and the pseudo-labels of the first and of the last stage."""
    figure = Figure((10.5, 4.1), dpi=140, layout="constrained")
    given, before, after = figure.subplots(1, 3)
    show_points(given, source, target)
    show_stage(before, first, target, "pseudo-labels, first stage")
    show_stage(after, last, target, "pseudo-labels, last stage")
    for axes in (given, before, after):
        axes.set(aspect="equal", xticks=[], yticks=[])
    figure.supxlabel(
        "stars: anchors; colored: labeled; gray: ignored; circled: labeled wrong; "
        "shaded: where the margin exceeds its minimum", fontsize=9,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run it all; return the accuracy on the target after every phase."""
    parser = argparse.ArgumentParser(description="Class anchors in two dimensions, with a picture.")
    parser.add_argument("--output", type=Path, default=Path("runs/toy_2d.png"), help="the picture")
    parser.add_argument("--degrees", type=float, default=50.0, help="how far the target is turned")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    source = draw_domain(300, 0.0, generator)
    target = draw_domain(300, options.degrees, generator)
    network = Network()

    train(network, source, target.points, None, iterations=300)
    results = {"source only": accuracy(network, target)}
    stages = []
    for number in range(1, options.stages + 1):
        stage = begin_stage(network, source, target.points)
        stages.append(stage)
        train(network, source, target.points, stage, iterations=150)
        results[f"stage {number}"] = accuracy(network, target)

    print(f"accuracy on the target, source only: {results['source only']:.1%}")
    for number, stage in enumerate(stages, start=1):
        labels = stage(target.points).labels
        labeled = labels != IGNORED
        right = (labels == target.labels)[labeled]
        print(
            f"stage {number}: {labeled.double().mean():.1%} labeled, "
            f"{right.double().mean():.1%} of them right; "
            f"accuracy afterwards: {results[f'stage {number}']:.1%}"
        )
    save_picture(options.output, stages[0], stages[-1], source, target)
    print(f"picture: {options.output}")
    return results


if __name__ == "__main__":
    main()
