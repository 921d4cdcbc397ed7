"""The ProDA page, with a model of its shapes, dtypes and signatures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracles
from tests.oracles import Array, Labels, flat, rows
from tests.recipes.pages import run_block

NUM_CLASSES, DIM = 19, 256
PAGE = "proda.md"


class BaseNet(nn.Module):
    """`ResNet101` of ProDA: stride 8 with one more row and column, and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, DIM, 8, stride=8, padding=4), nn.Tanh())
        self.head = nn.Conv2d(DIM, NUM_CLASSES, 1, bias=False)

    def forward(self, x: Tensor, ssl: bool = False, lbl: None = None) -> dict[str, Tensor]:  # noqa: D102
        feat = self.layers(x)
        return {"feat": feat, "out": self.head(feat)}


class CustomModel:
    """No module, as there; its networks are."""

    def __init__(self) -> None:
        self.BaseNet_DP, self.BaseNet_ema_DP = BaseNet(), BaseNet()

    def eval(self) -> None:  # noqa: D102
        self.BaseNet_DP.eval()


@pytest.fixture
def names() -> dict[str, Any]:
    lpsoft = (3 * torch.randn(2, NUM_CLASSES, 64, 96)).softmax(dim=1)
    return {
        "model": CustomModel(),
        "target_train_loader": [
            {"img": torch.randn(2, 3, 64, 96), "label": torch.randint(19, (2, 64, 96))}
            for _ in range(4)
        ],
        "target_lpsoft": lpsoft,
        "target_image_full": torch.randn(2, 3, 64, 96),
        "target_imageS": torch.randn(2, 3, 64, 96),
        "proto_temperature": 1.0,
        "train_thred": 0.0,
    }


def image_vectors(outputs: dict[str, Tensor]) -> list[tuple[int, Array]]:
    """ProDA's `calculate_mean_vector`: of every image, the means of classes of ten pixels."""
    vectors = []
    for feat, out in zip(outputs["feat"], outputs["out"], strict=True):
        x, y = rows(feat[None]), flat(out[None].argmax(dim=1))
        for t in range(NUM_CLASSES):
            if (y == t).sum() >= 10:
                vectors.append((t, x[y == t].mean(axis=0)))
    return vectors


def prototypes(names: dict[str, Any]) -> Array:
    """ProDA's `update_objective_SingleVector(..., "mean")`, one vector after the other."""
    anchors, numbers = np.zeros((NUM_CLASSES, DIM)), np.zeros(NUM_CLASSES)
    for data in names["target_train_loader"]:
        for t, vector in image_vectors(names["model"].BaseNet_DP(data["img"], ssl=True)):
            anchors[t] = (anchors[t] * numbers[t] + vector) / (numbers[t] + 1)
            numbers[t] = min(numbers[t] + 1, 3000)
    anchors[numbers == 0] = math.nan
    return anchors


def rectified(names: dict[str, Any], anchors: Array) -> tuple[Labels, Array]:
    """ProDA's labels and their probabilities, pixel by pixel."""
    soft = F.interpolate(
        names["target_lpsoft"].double(), scale_factor=0.25, mode="bilinear", align_corners=True
    )
    feat = names["model"].BaseNet_ema_DP(names["target_image_full"])["feat"].double()
    feat = F.interpolate(feat, soft.shape[2:], mode="bilinear", align_corners=True)
    weights = []
    for of_classes in oracles.anchor_distances(rows(feat), anchors):
        scaled = -names["proto_temperature"] * (of_classes - of_classes.min())
        weights.append(oracles.softmax(scaled))
    products = np.array(weights) * rows(soft)
    products /= products.sum(axis=1, keepdims=True)
    labels, sure = products.argmax(axis=1), products.max(axis=1)
    labels[sure < names["train_thred"]] = 250
    return labels, sure


def test_stride_8_has_one_more(names: dict[str, Any]) -> None:
    out = names["model"].BaseNet_DP(torch.randn(1, 3, 64, 96))
    assert out["feat"].shape == (1, DIM, 9, 13)
    assert out["out"].shape == (1, NUM_CLASSES, 9, 13)


def test_prototypes_are_those_of_a_loop(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    expected = prototypes(names)
    seen = np.isfinite(expected).all(axis=1)
    assert 1 < seen.sum() < NUM_CLASSES  # Some classes have ten pixels in no image.
    np.testing.assert_allclose(names["centroids"].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train_thred", [0.0, 0.6])
def test_labels_are_rectified(names: dict[str, Any], train_thred: float) -> None:
    names["train_thred"] = train_thred
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    expected, sure = rectified(names, prototypes(names))
    assert names["labels"].shape == (2, 16, 24)
    got = flat(names["labels"])
    clear = np.abs(sure - train_thred) > 1e-5
    assert (got == expected)[clear].mean() > 0.999
    assert (got == 250).any() == (train_thred > 0)
    assert len(np.unique(got)) > 3
    unseen = np.flatnonzero(np.isnan(prototypes(names)).any(axis=1))
    assert not np.isin(got, unseen).any()


def test_losses_of_a_step(names: dict[str, Any]) -> None:
    names["train_thred"] = 0.5
    for number in (0, 1, 2):
        run_block(PAGE, number, names)
    out = names["model"].BaseNet_DP(names["target_imageS"])
    resized = {
        name: F.interpolate(value, (16, 24), mode="bilinear", align_corners=True)
        for name, value in out.items()
    }
    labels = flat(names["labels"])
    entropy = oracles.cross_entropy(rows(resized["out"]), labels, [1.0] * NUM_CLASSES, 0.0)
    contrast = oracles.contrastive_loss(rows(resized["feat"]), labels, prototypes(names), 1.0)
    assert names["loss"].item() == pytest.approx(entropy + 0.1 * contrast, rel=1e-5)
    assert names["model"].BaseNet_DP.layers[0].weight.grad.abs().sum() > 0


def test_prototypes_move_from_where_they_were(names: dict[str, Any]) -> None:
    for number in (0, 1, 3):
        run_block(PAGE, number, names)
    anchors = prototypes(names)
    vectors = image_vectors(names["model"].BaseNet_ema_DP(names["target_image_full"]))
    for t in range(NUM_CLASSES):
        of_class = [vector for c, vector in vectors if c == t]
        if of_class:
            mean = np.mean(of_class, axis=0)
            unseen = np.isnan(anchors[t]).any()
            anchors[t] = mean if unseen else 0.9999 * anchors[t] + 0.0001 * mean
    assert vectors
    np.testing.assert_allclose(names["centroids"].numpy(), anchors, rtol=1e-5, atol=1e-6)
