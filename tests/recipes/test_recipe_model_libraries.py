"""The page on model libraries: transformers itself, and stand-ins for torchvision and timm."""

import copy
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, flat, rows
from tests.recipes.pages import right_means, run_block

NUM_CLASSES = 5
PAGE = "model_libraries.md"
ONES = [1.0] * NUM_CLASSES
Batches = list[tuple[Tensor, Tensor]]


class DeepLab(nn.Module):
    """A segmentation model of torchvision: features at stride 8, a dictionary at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8))
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


def draw_source(height: int, width: int) -> Batches:
    labels = torch.tensor([0, 1, 2, 3, 4, 255])
    return [
        (torch.randn(2, 3, height, width), labels[torch.randint(6, (2, height, width))])
        for _ in range(2)
    ]


def test_torchvision() -> None:
    network, source = DeepLab(), draw_source(32, 40)
    frozen, received = copy.deepcopy(network).eval(), list[Tensor]()
    network.classifier[-1].register_forward_hook(lambda _, args, __: received.append(args[0]))
    names: dict[str, Any] = {
        "network": network,
        "num_classes": NUM_CLASSES,
        "source_loader": source,
        "target_images": torch.randn(2, 3, 32, 40),
    }
    run_block(PAGE, 0, names)

    def features_of(images: Tensor) -> Tensor:
        """Return the features by hand, in evaluation mode."""
        features: Tensor = frozen.classifier[:2](frozen.backbone(images))
        return features

    features = [(features_of(images), labels) for images, labels in source]
    anchors = right_means([(x, frozen.classifier[-1](x), labels) for x, labels in features])
    assert np.isfinite(anchors).all(axis=1).sum() >= 2
    np.testing.assert_allclose(names["stage"].centroids.numpy(), anchors, rtol=1e-5, atol=1e-6)
    expected, _ = oracles.margin_labels(
        rows(features_of(names["target_images"])), anchors, [0.1] * NUM_CLASSES, True, 255
    )
    assert 0 < (expected != 255).sum() < expected.size
    assert np.array_equal(flat(names["pseudo"].labels), expected)
    # The loss is of the network in training: what its classifier received.
    assert network.training
    pulled = oracles.distance_loss(rows(received[-1]), expected, anchors, "euclidean", "pixel")
    large = [oracles.resize_nearest(image, (32, 40)) for image in expected.reshape(2, 4, 5)]
    entropy = oracles.cross_entropy(rows(names["logits"]), np.stack(large).reshape(-1), ONES, 0.0)
    assert names["loss"].item() == pytest.approx(entropy + 0.1 * pulled, rel=1e-5)
    assert network.backbone[0].weight.grad is not None


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
    anchors = right_means([(features, network.fc(features), labels)])
    expected = oracles.distance_loss(rows(features), flat(labels), anchors, "euclidean", "pixel")
    assert names["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_timm_tokens() -> None:
    network, images = VisionTransformer(), torch.randn(2, 3, 8, 12)
    names: dict[str, Any] = {"network": network, "images": images}
    run_block(PAGE, 2, names)
    assert names["features"].shape == (2, 6, 6)
    assert torch.equal(names["features"], network.patch_embed(images).flatten(2))


def segformer_config() -> Any:  # noqa: ANN401
    from transformers import SegformerConfig

    return SegformerConfig(
        num_labels=NUM_CLASSES,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=6,
        classifier_dropout_prob=0.3,
        drop_path_rate=0.1,
        initializer_range=0.5,
    )


def segformer_anchors(network: Any, source: Batches) -> tuple[Array, list[Tensor]]:  # noqa: ANN401
    """Return anchors by hand in evaluation mode, and the list of recorded features."""
    received = list[Tensor]()
    network.decode_head.dropout.register_forward_hook(lambda _, args, __: received.append(args[0]))
    with torch.no_grad():
        logits = [network(pixel_values=images).logits for images, _ in source]
    labels = [labels for _, labels in source]
    anchors = right_means(list(zip(received, logits, labels, strict=True)))
    received.clear()
    return anchors, received


def test_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import SegformerForSemanticSegmentation

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source, target = draw_source(32, 40), torch.randn(2, 3, 32, 40)
    names: dict[str, Any] = {
        "config": segformer_config(),
        "source_loader": source,
        "target_images": target,
        "torch": torch,
        "anchorda": anchorda,
    }
    torch.manual_seed(1)
    run_block(PAGE, 3, names)
    run_block(PAGE, 4, names)
    torch.manual_seed(1)
    network = SegformerForSemanticSegmentation(segformer_config())
    trained = copy.deepcopy(network).train()
    anchors, received = segformer_anchors(network.eval(), source)
    assert np.isfinite(anchors).all(axis=1).sum() >= 2
    np.testing.assert_allclose(names["stage"].centroids.numpy(), anchors, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        network(pixel_values=target)
    labels, _ = oracles.margin_labels(rows(received[0]), anchors, [0.1] * NUM_CLASSES, True, 255)
    assert 0 < (labels != 255).sum() < labels.size
    assert np.array_equal(flat(names["pseudo"].labels), labels)
    # The losses are of the network in training; its dropout draws, so what it gave is read.
    assert trained.training
    assert names["network"].training
    features, logits = names["features"], names["logits"]
    assert (features == 0).all(dim=(2, 3)).sum() == 0  # Before the dropout of channels.
    pulled = oracles.distance_loss(rows(features), labels, anchors, "euclidean", "pixel")
    entropy = oracles.cross_entropy(rows(logits), labels, ONES, 0.0)
    assert names["loss"].item() == pytest.approx(entropy + 0.1 * pulled, rel=1e-5)
    assert all(p.grad is not None for p in names["network"].segformer.parameters())


def test_transformers_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import TrainingArguments

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source, target = draw_source(32, 40), torch.randn(4, 3, 32, 40)
    images, truth = (torch.cat(parts) for parts in zip(*source, strict=True))
    pairs = [
        {"pixel_values": image, "labels": label, "target_pixel_values": unlabeled}
        for image, label, unlabeled in zip(images, truth, target, strict=True)
    ]
    names: dict[str, Any] = {
        "config": segformer_config(),
        "source_loader": source,
        "pairs": pairs,
        "torch": torch,
        "anchorda": anchorda,
    }
    run_block(PAGE, 3, names)
    network = names["network"]
    start = copy.deepcopy(network)
    with warnings.catch_warnings():  # What accelerate and transformers say of each other.
        warnings.simplefilter("ignore")
        names["arguments"] = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            max_steps=2,
            gradient_accumulation_steps=1,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
            learning_rate=1e-3,
        )
        run_block(PAGE, 5, names)
    trainer = names["trainer"]
    anchors, _ = segformer_anchors(copy.deepcopy(start).eval(), source)
    np.testing.assert_allclose(trainer.stage.centroids.numpy(), anchors, rtol=1e-4, atol=1e-5)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    before, after = (rows(net.decode_head.classifier.weight) for net in (start, network))
    assert not np.array_equal(before, after)
    assert set(network.state_dict()) == set(start.state_dict())

    # The loss of a step by hand: the model's own, and the target's near the anchors.
    network.eval()  # Without dropout, so that it can be computed again.
    batch = {key: torch.stack([pair[key] for pair in pairs[:2]]) for key in pairs[0]}
    loss, outputs = trainer.compute_loss(network, dict(batch), return_outputs=True)
    assert trainer.compute_loss(network, dict(batch)).item() == pytest.approx(loss.item())
    with torch.no_grad():
        own = network(pixel_values=batch["pixel_values"], labels=batch["labels"])
        stage_features, _ = names["extract"](trainer.stage.network, batch["target_pixel_values"])
        features, logits = names["extract"](network, batch["target_pixel_values"])
    labels, _ = oracles.margin_labels(rows(stage_features), anchors, [0.1] * NUM_CLASSES, True, 255)
    assert 0 < (labels != 255).sum() < labels.size
    expected = own.loss.item() + oracles.cross_entropy(rows(logits), labels, ONES, 0.0)
    expected += 0.1 * oracles.distance_loss(rows(features), labels, anchors, "euclidean", "pixel")
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(outputs.logits, own.logits)
