"""The AdaptSegNet page, with a network of its shapes, and its float labels."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, flat, rows
from tests.recipes.pages import run_block

NUM_CLASSES, DIM = 19, 2048
PAGE = "adaptsegnet.md"


class ClassifierModule(nn.Module):
    """A sum of dilated convolutions, added up in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(channels, NUM_CLASSES, 3, padding=dilation, dilation=dilation)
            for dilation in (6, 12)
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.conv2d_list[0](x)
        out += self.conv2d_list[1](x)
        return out


class ResNetMulti(nn.Module):
    """Two maps of logits at stride 8, with one more row and column; no features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer3 = nn.Sequential(nn.Conv2d(3, 1024, 8, stride=8, padding=4), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(1024, DIM, 1), nn.ReLU(inplace=True))
        self.layer5, self.layer6 = ClassifierModule(1024), ClassifierModule(DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        x = self.layer3(x)
        return self.layer5(x), self.layer6(self.layer4(x))


Item = tuple[Tensor, Tensor, Tensor, list[str]]


def draw_item(model: ResNetMulti) -> Item:
    """A batch of one image, as there; a half of the labels is what the network predicts."""
    images = torch.randn(1, 3, 48, 64)
    nearest = model(images)[1].argmax(dim=1)[:, :6, :8]
    predicted = nearest.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    others = torch.randint(NUM_CLASSES, (1, 48, 64))
    labels = torch.where(torch.rand(1, 48, 64) < 0.5, predicted, others).float()
    labels[:, :5] = 255
    return images, labels, torch.tensor([[48, 64, 3]]), ["00001.png"]


@pytest.fixture
def names() -> dict[str, Any]:
    model = ResNetMulti()
    target = torch.randn(1, 3, 48, 64), torch.tensor([[48, 64, 3]]), ["aachen.png"]
    return {
        "model": model,
        "trainloader": [draw_item(model) for _ in range(3)],
        "batch": draw_item(model),
        "target_batch": target,
        "interp": nn.Upsample(size=(48, 64), mode="bilinear", align_corners=True),
    }


def features_of(model: ResNetMulti, images: Tensor) -> Tensor:
    features: Tensor = model.layer4(model.layer3(images))
    return features


def small(labels: Tensor) -> Tensor:
    resized = [oracles.resize_nearest(image.numpy(), (7, 9)) for image in labels.long()]
    return torch.from_numpy(np.stack(resized))


def by_hand(names: dict[str, Any]) -> Array:
    model, batches = names["model"], []
    for images, labels, _, _ in names["trainloader"]:
        kept = oracles.keep_correct(flat(small(labels)), rows(model(images)[1]), 255)
        batches.append((rows(features_of(model, images)), kept))
    return oracles.stream_anchors(batches, NUM_CLASSES, DIM)[0]


def test_conventions(names: dict[str, Any]) -> None:
    images, labels, *_ = names["batch"]
    assert labels.dtype == torch.float32
    assert [x.shape for x in names["model"](images)] == [(1, NUM_CLASSES, 7, 9)] * 2
    assert features_of(names["model"], images).shape == (1, DIM, 7, 9)


def test_anchors_are_those_of_a_loop(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    expected = by_hand(names)
    assert np.isfinite(expected).all(axis=1).sum() >= 2
    np.testing.assert_allclose(names["centroids"].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert names["model"].training


def test_float_labels_are_an_error_that_says_what_to_do(names: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"torch.float32. Convert them with labels.long\(\)."):
        anchorda.resize_labels(names["batch"][1], (7, 9))


def test_source_step(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    model, interp = names["model"], names["interp"]
    images, labels, *_ = names["batch"]
    expected, ones = 0.0, [1.0] * NUM_CLASSES
    for weight, pred in zip((0.1, 1.0), model(images), strict=True):
        expected += weight * oracles.cross_entropy(rows(interp(pred)), flat(labels), ones, 0.0)
    pulled = oracles.distance_loss(
        rows(features_of(model, images)), flat(small(labels)), by_hand(names), "euclidean", "pixel"
    )
    assert pulled > 0
    assert names["loss"].item() == pytest.approx(expected + 0.01 * pulled, rel=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_target_step(names: dict[str, Any]) -> None:
    for number in (0, 1, 2):
        run_block(PAGE, number, names)
    model, images = names["model"], names["target_batch"][0]
    features, anchors = features_of(model, images), by_hand(names)
    minimum = [0.1] * NUM_CLASSES
    labels, _ = oracles.margin_labels(rows(features), anchors, minimum, True, 255)
    assert 0 < (labels != 255).sum() < labels.size
    assert np.array_equal(flat(names["pseudo"].labels), labels)
    ones = [1.0] * NUM_CLASSES
    entropy = oracles.cross_entropy(rows(model(images)[1]), labels, ones, 0.0)
    pulled = oracles.distance_loss(rows(features), labels, anchors, "euclidean", "pixel")
    assert names["loss"].item() == pytest.approx(entropy + 0.01 * pulled, rel=1e-5)


def test_a_tap_on_a_branch_of_the_classifier_sees_the_sum(names: dict[str, Any]) -> None:
    classifier = names["model"].layer6
    with anchorda.FeatureTap(classifier.conv2d_list[0]) as tap:
        _, pred2 = names["model"](names["batch"][0])
    assert torch.equal(tap.features, pred2)
