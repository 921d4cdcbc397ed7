"""The page on classification, with a small network whose last layer is ``fc``."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracles
from tests.oracles import flat, rows
from tests.recipes.pages import run_block

NUM_CLASSES, DIM = 4, 6
PAGE = "classification.md"


class ResNet(nn.Module):
    """Pooled features, `fc`, and logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, DIM, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.fc(self.layers(images).flatten(1))
        return logits


@pytest.fixture
def names() -> dict[str, Any]:
    network = ResNet()
    nn.init.orthogonal_(network.fc.weight, gain=30)
    nn.init.zeros_(network.fc.bias)
    source = []
    for _ in range(4):
        images = torch.randn(16, 3, 7, 7)
        others = torch.randint(-1, NUM_CLASSES, (16,))
        labels = torch.where(torch.rand(16) < 0.5, network(images).argmax(dim=1), others)
        source.append((images, labels))
    return {
        "network": network,
        "num_classes": NUM_CLASSES,
        "source_loader": source,
        "target_loader": [torch.randn(16, 3, 7, 7) for _ in range(4)],
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.0),
    }


def centroids(names: dict[str, Any]) -> oracles.Array:
    network, batches = names["network"], []
    for images, labels in names["source_loader"]:
        features = network.layers(images).flatten(1)
        kept = oracles.keep_correct(flat(labels), rows(network(images)), 255)
        batches.append((rows(features), kept))
    return oracles.stream_anchors(batches, NUM_CLASSES, DIM)[0]


def test_a_stage_holds_the_anchors_of_a_loop(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    expected = torch.from_numpy(centroids(names)).float()
    assert expected.isfinite().all(dim=1).sum() >= 2
    torch.testing.assert_close(
        names["stage"].centroids, expected, rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_labels_cover_what_was_asked_for(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    labels = torch.cat([names["stage"](images).labels for images in names["target_loader"]])
    assert 0.75 < (labels != 255).double().mean() < 0.95
    assert labels.shape == (64,)


def test_losses_of_a_step(names: dict[str, Any]) -> None:
    """The learning rate is 0, so that the network is still the one of the last step."""
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    network, ones, anchors = names["network"], [1.0] * NUM_CLASSES, centroids(names)
    images, labels = names["source_loader"][-1]
    target = names["target_loader"][-1]
    expected = 0.0
    for x, y in ((images, labels), (target, names["stage"](target).labels)):
        features = rows(network.layers(x).flatten(1))
        expected += oracles.cross_entropy(rows(network(x)), flat(y), ones, 0.0)
        expected += 0.1 * oracles.distance_loss(features, flat(y), anchors, "euclidean", "pixel")
    assert names["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert network.layers[0].weight.grad.abs().sum() > 0
