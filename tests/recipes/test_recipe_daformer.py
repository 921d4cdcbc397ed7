"""The DAFormer page, with a segmentor and a DACS of mmseg's shapes, dtypes and signatures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracles
from tests.oracles import flat, rows
from tests.recipes.pages import run_block

NUM_CLASSES, CHANNELS, STRIDES = 19, 256, (4, 8, 16, 32)
PAGE = "daformer.md"
Metas = Sequence[dict[str, Any]]


class DecodeHead(nn.Module):
    """`DAFormerHead` with embeddings and a fusion of one convolution each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in STRIDES)
        self.fuse_layer = nn.Sequential(nn.Conv2d(8 * len(STRIDES), CHANNELS, 1), nn.ReLU())
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(CHANNELS, NUM_CLASSES, 1)
        self.align_corners, self.ignore_index = False, 255

    def forward(self, inputs: list[Tensor]) -> Tensor:  # noqa: D102
        embedded = [
            F.interpolate(layer(x), inputs[0].shape[2:], mode="bilinear", align_corners=False)
            for layer, x in zip(self.embed_layers, inputs, strict=True)
        ]
        features = self.fuse_layer(torch.cat(embedded, dim=1))
        logits: Tensor = self.conv_seg(self.dropout(features))
        return logits

    def forward_train(  # noqa: D102
        self,
        inputs: list[Tensor],
        img_metas: Metas,
        gt_semantic_seg: Tensor,
        train_cfg: None,
        seg_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits = F.interpolate(
            self(inputs), gt_semantic_seg.shape[2:], mode="bilinear", align_corners=False
        )
        labels = gt_semantic_seg.squeeze(1)
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=self.ignore_index)
        if seg_weight is not None:
            losses = losses * seg_weight.float()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return {"loss_seg": losses.mean(), "acc_seg": accuracy}


class EncoderDecoder(nn.Module):
    """The segmentor: a backbone of four maps, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(nn.Conv2d(3, 8, stride, stride) for stride in STRIDES)
        self.decode_head = DecodeHead()

    def extract_feat(self, img: Tensor) -> list[Tensor]:  # noqa: D102
        return [layer(img) for layer in self.backbone]

    def encode_decode(self, img: Tensor, img_metas: Metas) -> Tensor:  # noqa: D102
        logits = self.decode_head(self.extract_feat(img))
        return F.interpolate(logits, img.shape[2:], mode="bilinear", align_corners=False)

    def forward_train(  # noqa: D102
        self,
        img: Tensor,
        img_metas: Metas,
        gt_semantic_seg: Tensor,
        seg_weight: Tensor | None = None,
        return_feat: bool = False,
    ) -> dict[str, Any]:
        x = self.extract_feat(img)
        losses: dict[str, Any] = {"features": x} if return_feat else {}
        decoded = self.decode_head.forward_train(x, img_metas, gt_semantic_seg, None, seg_weight)
        losses.update({f"decode.{name}": value for name, value in decoded.items()})
        return losses


class DACS:
    """What `forward_train` reaches through ``self``."""

    def __init__(self) -> None:
        self.model, self.ema_model = EncoderDecoder(), EncoderDecoder()
        self.ema_model.requires_grad_(False)
        self.ema_model.load_state_dict(self.model.state_dict())  # as in its first `forward_train`

    def get_model(self) -> EncoderDecoder:  # noqa: D102
        return self.model

    def get_ema_model(self) -> EncoderDecoder:  # noqa: D102
        return self.ema_model

    def _parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        loss = torch.stack([value for key, value in losses.items() if "loss" in key]).sum()
        return loss, {key: value.item() for key, value in losses.items()}


def draw_labels(*shape: int) -> Tensor:
    """Patches of 8 × 8 pixels, so that most cells of stride 4 have a majority; some ignored."""
    patches = torch.randint(NUM_CLASSES + 2, (*shape[:2], shape[2] // 8, shape[3] // 8))
    labels = patches.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    labels[:, :, :3] = torch.randint(NUM_CLASSES, labels[:, :, :3].shape)
    return torch.where(labels < NUM_CLASSES, labels, 255)


def features_of(model: EncoderDecoder, img: Tensor) -> Tensor:
    """By hand: what the head's fusion returns."""
    embedded = [
        F.interpolate(layer(x), scale_factor=s / 4, mode="bilinear", align_corners=False)
        for layer, x, s in zip(
            model.decode_head.embed_layers, model.extract_feat(img), STRIDES, strict=True
        )
    ]
    features: Tensor = model.decode_head.fuse_layer(torch.cat(embedded, dim=1))
    return features


def majority(labels: Tensor) -> Tensor:
    height, width = labels.shape[2] // 4, labels.shape[3] // 4
    small = [
        oracles.resize_majority(image.numpy(), (height, width), 0.75, 255)
        for image in labels.squeeze(1)
    ]
    return torch.from_numpy(np.stack(small))


@pytest.fixture
def names() -> dict[str, Any]:
    uda = DACS()
    for model in (uda.model, uda.ema_model):
        model.decode_head.dropout.eval()
    metas: Metas = [{"img_norm_cfg": {}}] * 2
    img, labels = torch.randn(2, 3, 64, 96), draw_labels(2, 1, 64, 96)
    # Of the predicted class here and there, so that `keep_correct` keeps something.
    predicted = uda.model.encode_decode(img, metas).argmax(dim=1, keepdim=True)
    labels = torch.where(
        torch.rand(2, 1, 8, 12).repeat_interleave(8, 2).repeat_interleave(8, 3) < 0.5,
        predicted,
        labels,
    )
    return {
        "self": uda,
        "source_loader": [{"img": img, "img_metas": metas, "gt_semantic_seg": labels}],
        "img": img,
        "img_metas": metas,
        "gt_semantic_seg": labels,
        "target_img": torch.randn(2, 3, 64, 96),
        "target_img_metas": metas,
    }


def by_hand(names: dict[str, Any]) -> oracles.Array:
    """The anchors of the source batch as float64 loops."""
    model, labels = names["self"].model, majority(names["gt_semantic_seg"])
    features = features_of(model, names["img"])
    logits = model.decode_head.conv_seg(features)
    kept = oracles.keep_correct(flat(labels), rows(logits), 255)
    anchors, _ = oracles.stream_anchors([(rows(features), kept)], NUM_CLASSES, CHANNELS)
    return anchors


def test_anchors_are_those_of_a_loop(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    expected = by_hand(names)
    assert np.isfinite(expected).all(axis=1).sum() >= 2
    np.testing.assert_allclose(names["centroids"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_labels_and_their_weight(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    features = features_of(names["self"].ema_model, names["target_img"])
    nothing = [-np.inf] * NUM_CLASSES
    labels, margins = oracles.margin_labels(rows(features), by_hand(names), nothing, True, 255)
    small = labels.reshape(2, 16, 24)
    expected = np.stack([oracles.resize_nearest(image, (64, 96)) for image in small])
    agree = names["pseudo_label"].numpy() == expected
    assert agree.mean() > 0.999  # But for features that are as far from two anchors.
    assert names["pseudo_label"].dtype == torch.int64
    weight = names["pseudo_weight"]
    assert weight.shape == (2, 64, 96)
    assert 0 < weight[0, 0, 0].item() < 1
    np.testing.assert_allclose(weight.numpy(), np.mean(margins > 0.25), atol=2 / margins.size)
    weight[:, :5] = 0  # As `pseudo_weight_ignore_top` does: not of one memory.
    assert weight[:, 5:].min() == weight.max()


def test_losses_of_a_step(names: dict[str, Any]) -> None:
    uda = names["self"]
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    run_block(PAGE, 2, names)
    expected = oracles.distance_loss(
        rows(features_of(uda.model, names["img"])),
        flat(majority(names["gt_semantic_seg"])),
        by_hand(names),
        "euclidean",
        "pixel",
    )
    assert expected > 0
    losses = names["clean_losses"]
    assert losses["loss_anchor"].item() == pytest.approx(0.1 * expected, rel=1e-5)
    assert len(losses.pop("features")) == 4
    loss, log_vars = uda._parse_losses(losses)
    assert log_vars["loss_anchor"] == losses["loss_anchor"].item()
    assert loss.item() == pytest.approx(sum(v for k, v in log_vars.items() if "loss" in k))
    loss.backward()
    assert all(p.grad is not None for p in uda.model.parameters())


def test_losses_of_mixed_images(names: dict[str, Any]) -> None:
    uda = names["self"]
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    run_block(PAGE, 2, names)
    # As DACS mixes: pixels of some source classes, of weight 1, over the target.
    labels, weight = names["gt_semantic_seg"], names["pseudo_weight"]
    mask = labels < 9
    weight[:, :7] = 0
    names["pseudo_weight"] = torch.where(mask.squeeze(1), 1.0, weight)
    names["mixed_img"] = torch.where(mask, names["img"], names["target_img"])
    names["mixed_lbl"] = torch.where(mask, labels, names["pseudo_label"].unsqueeze(1))
    run_block(PAGE, 3, names)
    weight = names["pseudo_weight"]
    kept = torch.where(weight.unsqueeze(1) == 0, 255, names["mixed_lbl"])
    pulled = oracles.distance_loss(
        rows(features_of(uda.model, names["mixed_img"])),
        flat(majority(kept)),
        by_hand(names),
        "euclidean",
        "pixel",
    )
    expected = 0.1 * weight.double().mean().item() * pulled
    assert names["mix_losses"]["loss_anchor"].item() == pytest.approx(expected, rel=1e-5)
    assert set(names["mix_losses"]) == {
        "features",
        "decode.loss_seg",
        "decode.acc_seg",
        "loss_anchor",
    }


def test_ignored_pixels_are_in_the_mean_of_the_cross_entropy() -> None:
    """Why unsure pixels that are left out want a weight of 1, as the page says."""
    model = EncoderDecoder().eval()
    img, labels = torch.randn(1, 3, 32, 32), torch.randint(NUM_CLASSES, (1, 1, 32, 32))
    whole = model.forward_train(img, [], labels, torch.ones(1, 32, 32))["decode.loss_seg"]
    halves = []
    for half in (slice(0, 16), slice(16, 32)):
        ignored = labels.clone()
        ignored[:, :, half] = 255
        halves.append(model.forward_train(img, [], ignored)["decode.loss_seg"])
    torch.testing.assert_close(whole, halves[0] + halves[1])
