"""The page on model libraries: transformers itself, and stand-ins for torchvision and timm."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, flat, rows
from tests.recipes.pages import run_block

NUM_CLASSES = 5
PAGE = "model_libraries.md"
ONES = [1.0] * NUM_CLASSES
Batches = list[tuple[Tensor, Tensor]]


def small(labels: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(
        np.stack([oracles.resize_nearest(image.numpy(), size) for image in labels])
    )


class DeepLab(nn.Module):
    """A segmentation model of torchvision: features at stride 8, a dictionary at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 8, stride=8)
        self.classifier = nn.Sequential(
            nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, NUM_CLASSES, 1)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # noqa: D102
        out = self.classifier(self.backbone(x))
        out = F.interpolate(out, x.shape[-2:], mode="bilinear", align_corners=False)
        return OrderedDict(out=out)


class ConvNet(nn.Module):
    """A convolutional classifier of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.fc = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6, NUM_CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:  # noqa: D102
        features: Tensor = self.layers(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # noqa: D102
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:  # noqa: D102
        return self.fc


class VisionTransformer(nn.Module):
    """A vision transformer of timm: a class token, then the patches, the channels last."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 4, stride=4)
        self.cls_token = nn.Parameter(torch.full((1, 1, 6), 7.0))

    def forward_features(self, x: Tensor) -> Tensor:  # noqa: D102
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)


def anchors_by_hand(features: list[Tensor], labels: list[Tensor]) -> Array:
    batches = [(rows(x), flat(y)) for x, y in zip(features, labels, strict=True)]
    return oracles.stream_anchors(batches, NUM_CLASSES, features[0].shape[1])[0]


def draw_source(height: int, width: int) -> Batches:
    labels = torch.tensor([0, 1, 2, 3, 4, 255])
    return [
        (torch.randn(2, 3, height, width), labels[torch.randint(6, (2, height, width))])
        for _ in range(2)
    ]


def assert_step(
    names: dict[str, Any], features: Tensor, logits: Tensor, anchors: Array, resized: bool
) -> None:
    """The labels and the loss of a page's step."""
    labels, _ = oracles.margin_labels(rows(features), anchors, [0.1] * NUM_CLASSES, True, 255)
    assert 0 < (labels != 255).sum() < labels.size
    assert np.array_equal(flat(names["pseudo"].labels), labels)
    pulled = oracles.distance_loss(rows(features), labels, anchors, "euclidean", "pixel")
    if resized:
        maps = labels.reshape(len(features), *features.shape[2:])
        labels = np.stack([oracles.resize_nearest(image, logits.shape[2:]) for image in maps])
    entropy = oracles.cross_entropy(rows(logits), labels.reshape(-1), ONES, 0.0)
    assert names["loss"].item() == pytest.approx(entropy + 0.1 * pulled, rel=1e-5)


def test_torchvision() -> None:
    network, source = DeepLab(), draw_source(32, 40)
    names: dict[str, Any] = {
        "network": network,
        "num_classes": NUM_CLASSES,
        "source_loader": source,
        "target_images": torch.randn(2, 3, 32, 40),
    }
    run_block(PAGE, 0, names)

    def features_of(images: Tensor) -> Tensor:
        features: Tensor = network.classifier[:2](network.backbone(images))
        return features

    features = [features_of(images) for images, _ in source]
    kept = []
    for x, (_, labels) in zip(features, source, strict=True):
        logits = rows(network.classifier[-1](x))
        kept.append(
            torch.from_numpy(oracles.keep_correct(flat(small(labels, (4, 5))), logits, 255))
        )
    anchors = anchors_by_hand(features, kept)
    assert np.isfinite(anchors).all(axis=1).sum() >= 2
    np.testing.assert_allclose(names["centroids"].numpy(), anchors, rtol=1e-5, atol=1e-6)
    target = names["target_images"]
    assert_step(names, features_of(target), network(target)["out"], anchors, resized=True)
    assert network.backbone.weight.grad is not None


def test_timm_classifier() -> None:
    network, images = ConvNet(), torch.randn(9, 3, 8, 8)
    nn.init.orthogonal_(network.fc.weight, gain=30)
    labels = network.forward_head(network.forward_features(images)).argmax(dim=1)
    labels[:3] = torch.tensor([255, 0, 1])
    names: dict[str, Any] = {
        "network": network,
        "images": images,
        "labels": labels,
        "num_classes": NUM_CLASSES,
        "anchorda": anchorda,
    }
    run_block(PAGE, 1, names)
    features = network.layers(images).mean(dim=(2, 3))
    kept = oracles.keep_correct(flat(labels), rows(network.fc(features)), 255)
    anchors = anchors_by_hand([features], [torch.from_numpy(kept)])
    expected = oracles.distance_loss(rows(features), flat(labels), anchors, "euclidean", "pixel")
    assert names["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_timm_tokens() -> None:
    network, images = VisionTransformer(), torch.randn(2, 3, 8, 12)
    names: dict[str, Any] = {"network": network, "images": images}
    run_block(PAGE, 2, names)
    assert names["features"].shape == (2, 6, 6)
    assert torch.equal(names["features"], network.patch_embed(images).flatten(2))


def test_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = SegformerConfig(
        num_labels=NUM_CLASSES,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=6,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        initializer_range=0.5,
    )
    source = draw_source(32, 40)
    names: dict[str, Any] = {
        "config": config,
        "source_loader": source,
        "target_images": torch.randn(2, 3, 32, 40),
        "torch": torch,
        "anchorda": anchorda,
    }
    torch.manual_seed(1)
    run_block(PAGE, 3, names)
    torch.manual_seed(1)
    network, received = SegformerForSemanticSegmentation(config).eval(), list[Tensor]()
    network.decode_head.dropout.register_forward_hook(lambda _, __, out: received.append(out))
    with torch.no_grad():
        for images, _ in source:
            network(pixel_values=images)
    anchors = anchors_by_hand(received, [small(labels, (8, 10)) for _, labels in source])
    assert np.isfinite(anchors).all()
    np.testing.assert_allclose(names["centroids"].numpy(), anchors, rtol=1e-4, atol=1e-5)

    received.clear()
    target = names["target_images"]
    logits = network.train()(pixel_values=target).logits
    assert logits.shape == (2, NUM_CLASSES, 8, 10)
    assert received[0].shape == (2, 6, 8, 10)
    assert_step(names, received[0], logits, anchors, resized=False)
    assert all(p.grad is not None for p in names["network"].segformer.parameters())
