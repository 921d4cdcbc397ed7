"""The page of SePiCo, its lines inside of a step with what surrounds them there.

The stand-in has the shapes, signatures and order of the real `SePiCo.forward_train`: a teacher in
train mode with dropout off whose parameters alone are averaged, weak and strong views, weights with
rows of zeros, contrasts of source and target, and the mixed images after them.
"""

import copy
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, Labels, rows
from tests.recipes.pages import RECIPES, assert_labels, evaluated, majority, right_means, run_block
from tests.recipes.test_recipe_daformer import (
    HOOD,
    SKY,
    Config,
    UDADataset,
    build_dataloader,
    draw_labels,
    stop_dropout,
    update_ema,
    weights_of,
)

PAGE = "sepico.md"
NUM_CLASSES, CHANNELS, SIZE, RATIO, TEMPERATURE = 6, 5, 32, 0.75, 0.1
Metas = Sequence[dict[str, Any]]
Statistics = tuple[Array, Array]


class ProjHead(nn.Module):
    """Two convolutions with batch normalization, and the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, CHANNELS, 1)
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.normalize(self.convs(x), p=2, dim=1)


class DecodeHead(nn.Module):
    """Dropout and a classifier at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.conv_seg = nn.Dropout2d(0.1), nn.Conv2d(8, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.conv_seg(self.dropout(x))
        return logits

    def forward_test(self, x: Tensor, img_metas: Metas | None, test_cfg: None) -> Tensor:  # noqa: D102
        return self.forward(x)


class Projector(nn.Module):
    """`EncoderDecoderProjector`."""

    test_cfg = None

    def __init__(self) -> None:
        super().__init__()
        # The dropout stands for the DropPath of the encoder.
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.Dropout(0.2)
        )
        self.decode_head, self.auxiliary_head = DecodeHead(), ProjHead()

    def extract_feat(self, img: Tensor) -> Tensor:  # noqa: D102
        maps: Tensor = self.backbone(img)
        return maps

    def extract_auxiliary_feat(self, img: Tensor) -> Tensor:  # noqa: D102
        features: Tensor = self.auxiliary_head(self.extract_feat(img))
        return features

    def encode_decode(self, img: Tensor, img_metas: Metas | None) -> Tensor:  # noqa: D102
        return F.interpolate(self.decode_head(self.extract_feat(img)), img.shape[2:])


class Contrast(NamedTuple):
    """Arguments and value of a call of a contrast."""

    feat: Tensor
    mask: Tensor
    weight: Tensor | None
    loss: Tensor
    names: dict[str, Any]


class SePiCo(nn.Module):
    """The order of `forward_train`; at two places the lines of the page, and its losses."""

    feat_distributions: anchorda.ClassVariances
    calc_layers: list[int]

    def __init__(self, block: int, weighted: bool = False) -> None:
        super().__init__()
        self.num_classes, self.proj_dim, self.scale_min_ratio = NUM_CLASSES, CHANNELS, RATIO
        self.block, self.weighted, self.local_iter = block, weighted, 0
        self.model, self.ema_model = Projector(), Projector()
        self.names: dict[str, Any] = {"self": self, "anchorda": anchorda, "torch": torch, "F": F}
        run_block(PAGE, 0, self.names)
        self.contrasts = list[Contrast]()

    def get_model(self) -> Projector:  # noqa: D102
        return self.model

    def get_ema_model(self) -> Projector:  # noqa: D102
        return self.ema_model

    def contrast(
        self, img: Tensor, mask: Tensor, mean: Tensor, covariance: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Run `forward_train` of mode "aux"."""
        feat = self.model.extract_auxiliary_feat(img)
        loss, names = contrast(self.block, feat, mask, mean, covariance, weight)
        self.contrasts.append(Contrast(feat, mask, weight, loss, names))
        return loss

    def forward_train(
        self,
        img: Tensor,
        img_metas: Metas,
        gt_semantic_seg: Tensor,
        target_img: Tensor,
        target_img_metas: Metas,
    ) -> None:
        """One step."""
        update_ema(self.ema_model, self.model, self.local_iter)
        weak_img, weak_target_img = img.clone(), target_img.clone()
        stop_dropout(self.ema_model)
        softmax = self.ema_model.encode_decode(weak_target_img, target_img_metas).softmax(dim=1)
        probability, pseudo_label = softmax.max(dim=1)
        img, target_img = 0.8 * img + 0.1, 0.8 * target_img + 0.1  # The strong views.
        pseudo_weight = weights_of(probability, 0.3)
        weak_gt_semantic_seg = gt_semantic_seg.clone().detach()
        ema_src_feat = self.ema_model.extract_auxiliary_feat(weak_img)
        names = self.names
        names |= {key: value for key, value in locals().items() if key != "names"}
        run_block(PAGE, 1, names)
        mean, covariance = names["mean"], names["covariance"]
        loss = F.cross_entropy(
            self.model.encode_decode(img, img_metas), gt_semantic_seg.squeeze(1), ignore_index=255
        )
        (loss + self.contrast(img, gt_semantic_seg, mean, covariance, None)).backward()
        pseudo_lbl = pseudo_label.clone()
        pseudo_lbl[pseudo_weight == 0.0] = 255
        weight = pseudo_weight if self.weighted else None
        self.contrast(target_img, pseudo_lbl.unsqueeze(1), mean, covariance, weight).backward()
        self.local_iter += 1


def contrast(
    block: int,
    feat: Tensor,
    mask: Tensor,
    mean: Tensor,
    covariance: Tensor,
    weight: Tensor | None = None,
    edits: dict[str, str] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return arguments and value of `proto_contrastive` or `dist_contrastive`."""
    names: dict[str, Any] = {
        "feat": feat,
        "mask": mask,
        "weight": weight,
        "mean": mean,
        "covariance": covariance,
        "ratio": 1.0,
        "contrast_temp": TEMPERATURE,
        "scale_min_ratio": RATIO,
        "ignore_index": 255,
        "anchorda": anchorda,
        "F": F,
    }
    if block == 2:
        run_block(PAGE, 2, names, edits)
    else:
        run_block(PAGE, 3, names, edits)
    return names["loss"], names


def statistics(batches: Sequence[tuple[Array, Labels]]) -> Statistics:
    """Return means and population variances of each class, NaN where unseen."""
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    means = np.full((NUM_CLASSES, x.shape[1]), math.nan)
    variances = means.copy()
    for c in np.unique(y[y < NUM_CLASSES]):
        means[c], variances[c] = x[y == c].mean(axis=0), x[y == c].var(axis=0)
    return means, variances


def loss_by_hand(
    x: Array, y: Labels, moments: Statistics, block: int, weights: Array | None = None
) -> float:
    """Return the mean over labeled pixels, over seen classes alone, of the loss of that block."""
    means, variances = moments
    seen = [k for k in range(NUM_CLASSES) if np.isfinite(means[k]).all()]
    losses = []
    for i, (feature, label) in enumerate(zip(x, y, strict=True)):
        if label not in seen:
            continue
        spread = [(feature**2 * variances[k]).sum() / 2 for k in seen]
        scores = np.array([feature @ means[k] for k in seen])
        if block == 3:
            scores = scores + np.array(spread) / TEMPERATURE
        loss = -math.log(oracles.softmax(scores / TEMPERATURE)[seen.index(int(label))])
        if block == 3:
            loss += spread[seen.index(int(label))] / TEMPERATURE**2
        losses.append(loss * (1 if weights is None else weights[i]))
    return sum(losses) / max(1, len(losses))


class Run(NamedTuple):
    """A training of two steps, and the teacher's source features of each."""

    uda: SePiCo
    batches: list[tuple[Array, Labels]]


def train(block: int, weighted: bool = False) -> Run:
    uda, batches = SePiCo(block, weighted), []
    optimizer = torch.optim.SGD(uda.model.parameters(), lr=0.05)
    uda.train()
    metas: Metas = [{}, {}]
    for _ in range(2):
        img, target = torch.randn(2, 2, 3, SIZE, SIZE)
        labels = draw_labels()
        optimizer.zero_grad()
        uda.contrasts = []
        uda.forward_train(img, metas, labels, target, metas)
        feat = uda.names["ema_src_feat"]
        teacher = copy.deepcopy(uda.ema_model)  # In train mode: by the statistics of the batch.
        torch.testing.assert_close(feat, teacher.extract_auxiliary_feat(img))
        batches.append((rows(feat), majority(labels, feat.shape[2:], RATIO)))
        optimizer.step()
    return Run(uda, batches)


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_and_losses_of_a_step(block: int, weighted: bool) -> None:
    uda, batches = train(block, weighted)
    expected = statistics(batches)
    assert np.isfinite(expected[0]).all(axis=1).tolist() == [True] * 5 + [False]
    for got, by_hand in zip(uda.feat_distributions.compute(), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), by_hand, rtol=1e-4, atol=1e-6)
    assert (np.linalg.norm(expected[0][:5], axis=1) < 0.98).all()  # Not normalized again.

    source, target = uda.contrasts
    assert torch.equal(source.mask, uda.names["gt_semantic_seg"])
    # The target's labels are the weak view's, without the rows of weight 0; its pixels the strong.
    assert torch.equal(target.mask[:, 0, SKY:-HOOD], uda.names["pseudo_label"][:, SKY:-HOOD])
    assert (target.mask[:, :, :SKY] == 255).all()
    assert (target.mask == NUM_CLASSES - 1).any()  # A label of a class that was never seen.
    for call in (source, target):
        weights = None
        if call.weight is not None:
            weights = F.avg_pool2d(call.weight, 4).double().numpy().reshape(-1)
            assert 0 < weights.min() + 1e-9 < weights.max() < 1
        small = majority(call.mask, call.feat.shape[2:], RATIO)
        loss = loss_by_hand(rows(call.feat), small, expected, block, weights)
        assert call.loss.item() == pytest.approx(loss, rel=1e-4)
    parameters = uda.model.auxiliary_head.parameters()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_the_majority_has_the_setting_s_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks 1, 2 and 3 pass `scale_min_ratio` on."""
    monkeypatch.setattr(f"{__name__}.RATIO", 0.4)
    uda, batches = train(2)
    expected = statistics(batches)
    np.testing.assert_allclose(
        uda.feat_distributions.compute().means.numpy(), expected[0], rtol=1e-4, atol=1e-6
    )
    labels = torch.randint(NUM_CLASSES - 1, (2, 1, SIZE, SIZE))
    feat = F.normalize(torch.randn(2, CHANNELS, 8, 8), dim=1).requires_grad_()
    small = majority(labels, (8, 8), RATIO)
    assert 0 < (small != 255).sum() < small.size
    means, variances = (torch.from_numpy(part).float() for part in expected)
    for block in (2, 3):
        loss, _ = contrast(block, feat, labels, means, variances)
        by_hand = loss_by_hand(rows(feat), small, expected, block)
        assert loss.item() == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize(("block", "name"), [(2, "proto"), (3, "distribution")])
def test_losses_are_the_code_s(
    block: int, name: str, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All classes are seen; the regularizer that follows the lines in the code is included."""
    stored = np.load(golden / "peers" / "sepico.npz")
    scalars = dict(zip(stored["scalar_names"], stored["scalars"], strict=True))
    monkeypatch.setattr(f"{__name__}.TEMPERATURE", scalars["loss.temperature"])
    monkeypatch.setattr(f"{__name__}.RATIO", scalars["loss.min_ratio"])
    feat = torch.from_numpy(stored["loss.features"]).requires_grad_()
    labels = torch.from_numpy(stored["loss.labels"]).unsqueeze(1)
    mean, variance = (torch.from_numpy(stored[f"loss.{key}"]) for key in ("means", "variances"))
    # In the golden file a class without features is the zero vector.
    loss, names = contrast(block, feat, labels, mean, variance)
    assert loss.item() == pytest.approx(scalars[f"loss.{name}"], rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, feat, retain_graph=True)
    expected = torch.from_numpy(stored[f"loss.{name}_grad"])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    loss = loss + proto_reg(names["feat"], names["mean"])
    assert loss.item() == pytest.approx(scalars[f"loss.{name}_with_regularizer"], rel=1e-5)


def proto_reg(feat: Tensor, mean: Tensor) -> Tensor:
    """Return the regularizer that the code adds, of the features (n, D) of labeled pixels."""
    scores = feat.mean(dim=0, keepdim=True) @ mean.T / TEMPERATURE
    return scores.log_softmax(dim=1).sum() / (len(mean) * math.log(len(mean)))


@pytest.mark.parametrize("block", [2, 3])
def test_an_unseen_class_is_left_out_or_a_zero_as_in_the_code(block: int) -> None:
    page = (RECIPES / PAGE).read_text(encoding="utf-8")
    zeros = "mean = mean.nan_to_num()", "covariance = covariance.nan_to_num()"
    assert all(f"`{line}`" in page for line in zeros)
    mean, covariance = torch.randn(NUM_CLASSES, CHANNELS), torch.rand(NUM_CLASSES, CHANNELS)
    mean[2] = covariance[2] = math.nan
    feat = F.normalize(torch.randn(2, CHANNELS, 8, 8), dim=1).requires_grad_()
    labels = draw_labels(NUM_CLASSES)
    small = majority(labels, (8, 8), RATIO)
    assert (small == 2).any()
    loss, names = contrast(block, feat, labels, mean, covariance)
    moments = mean.double().numpy(), covariance.double().numpy()
    by_hand = loss_by_hand(rows(feat), small, moments, block)
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    assert proto_reg(names["feat"], names["mean"]).isfinite()
    edits = {"loss = anchorda": f"{zeros[0]}\n{zeros[1]}\nloss = anchorda"}
    loss, _ = contrast(block, feat, labels, mean, covariance, edits=edits)
    moments = np.nan_to_num(moments[0]), np.nan_to_num(moments[1])
    by_hand = loss_by_hand(rows(feat), small, moments, block)
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_prototypes_of_one_and_of_several_layers_are_children() -> None:
    """In the checkpoint; without parameters, so that its own wrapper leaves them unwrapped."""
    page = (RECIPES / PAGE).read_text(encoding="utf-8")
    (line,) = re.findall(r"`(self\.feat_distributions = torch\.nn\.ModuleList.+?)`", page)
    uda = SePiCo(2)
    assert any(name.startswith("feat_distributions.") for name in uda.state_dict())
    assert not list(uda.feat_distributions.parameters())
    del uda.feat_distributions
    uda.calc_layers = [0, 2]
    line = line.replace("...", "self.num_classes, self.proj_dim")
    exec(line, {"self": uda, "torch": torch, "anchorda": anchorda})
    assert sum("feat_distributions.1." in name for name in uda.state_dict()) > 0


def test_a_labeling_pass() -> None:
    uda, _ = train(2)
    img, target = torch.randn(2, 3, 3, SIZE, SIZE)
    labels = torch.cat([draw_labels(), draw_labels()])[:3]
    source = [{"img": x, "gt_semantic_seg": y} for x, y in zip(img, labels, strict=True)]
    names = uda.names | {
        "model": uda,
        "cfg": Config(data=Config(samples_per_gpu=2, workers_per_gpu=0)),
        "distributed": False,
        "build_dataloader": build_dataloader,
        "datasets": [UDADataset(source, [{"img": x} for x in target])],
    }
    teacher = evaluated(uda.ema_model, uda.model)
    with torch.no_grad():
        run_block(PAGE, 4, names)
        features = teacher.extract_auxiliary_feat(img)
        logits = teacher.decode_head(teacher.extract_feat(img))
        anchors = right_means([(features, logits, labels.squeeze(1))])
        anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
        assert np.isfinite(anchors).all(axis=1).sum() >= 2
        np.testing.assert_allclose(names["stage"].centroids.numpy(), anchors, rtol=1e-4, atol=1e-5)
        feat = rows(teacher.extract_auxiliary_feat(target[2:]))
    minimum = names["stage"].by_anchor.min_margin.tolist()
    expected = assert_labels(names["pseudo_labels"], feat, anchors, minimum)
    active = expected != 255
    cosines = np.nan_to_num(feat @ anchors.T, nan=-2)
    assert np.array_equal(expected[active], cosines.argmax(axis=1)[active])


def test_a_short_anchor_wins_what_resembles_nothing() -> None:
    """The reason to normalize anchors for labels by distance, in the plane."""
    raw = torch.tensor([[1.0, 0.0], [0.0, 0.1]])  # The second class scatters.
    centroids = F.normalize(raw, dim=1)
    feature = F.normalize(torch.tensor([[-0.5, -1.0]]), dim=1)  # Least like the second.
    assert (feature @ centroids.T).argmax().item() == 0
    assert anchorda.anchor_distances(feature, centroids).argmin().item() == 0
    assert anchorda.anchor_distances(feature, raw).argmin().item() == 1
