"""The page on ProDA, CPSL and DiGA, in a step with what stands around its lines there.

Networks in train mode with batch normalization and dropout, a teacher that stays so, an image of
which the views are crops, flips and shifts, a step at a quarter of the image's size, two backward
passes, and prototypes of which some are missing.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles import Array
from tests.recipes.pages import run_block, run_body

NUM_CLASSES, DIM = 7, 256
FULL, CROP = (64, 96), (48, 64)
UNSEEN = 5
TEMPERATURE, MOMENTUM, CONSISTENCY = 2.0, 0.1, 10.0
PAGE = "proda.md"


class BaseNet(nn.Module):
    """Stride 8 with one more row and column, a dictionary, dropout before the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, DIM, 8, stride=8, padding=4, bias=False), nn.BatchNorm2d(DIM), nn.Tanh()
        )
        self.dropout = nn.Dropout2d(0.1)
        self.head = nn.Conv2d(DIM, NUM_CLASSES, 1, bias=False)
        nn.init.normal_(self.head.weight, std=0.5)

    def forward(self, x: Tensor, ssl: bool = False) -> dict[str, Tensor]:  # noqa: D102
        feat = self.dropout(self.layers(x))
        return {"feat": feat, "out": self.head(feat)}


class CustomModel:
    """No module, as there; its networks are."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.opt = SimpleNamespace(
            proto_temperature=TEMPERATURE,
            proto_momentum=MOMENTUM,
            train_thred=0.4,
            rce=True,
            rce_alpha=0.1,
            rce_beta=1.0,
            S_pseudo=0.0,
            n_class=NUM_CLASSES,
        )
        self.class_numbers = NUM_CLASSES
        self.BaseNet_DP = self.BaseNet = BaseNet()
        self.BaseNet_ema_DP = self.BaseNet_ema = copy.deepcopy(self.BaseNet)
        self.nets = [self.BaseNet]  # What `eval` and `train` go through: not the teacher.
        self.BaseOpti = torch.optim.SGD(self.BaseNet.parameters(), lr=0.1)

    def full2weak(self, feat: Tensor, params: list[tuple[int, int, bool]]) -> Tensor:
        """Return the weak view's crop of the features of whole images, at a quarter of its size."""
        views = []
        for image, (top, left, flipped) in zip(feat, params, strict=True):
            view = image[:, top // 4 :, left // 4 :][:, : CROP[0] // 4, : CROP[1] // 4]
            views.append(view.flip(-1) if flipped else view)
        return torch.stack(views)

    def label_strong_T(  # noqa: N802
        self, label: Tensor, params: list[tuple[bool, int]], padding: int, scale: int = 1
    ) -> Tensor:
        """Return the strong view of a map: flipped, shifted, with a hole; from outside, padding."""
        views = []
        for image, (flipped, shift) in zip(label, params, strict=True):
            view = image.flip(-1) if flipped else image
            steps = shift // scale
            view = F.pad(view, (steps, 0), value=float(padding))[..., : view.shape[-1]]
            view = view.clone()
            view[:, 2:5, 3:6] = padding
            views.append(view)
        return torch.stack(views)


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize bilinearly with aligned corners, as everywhere in that code."""
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=True)


def step(n: SimpleNamespace) -> None:
    """`CustomModel.step` with the lines of the page; ``n`` has its arguments."""
    self = n.self
    for net in self.nets:
        net.train()
    source_out = self.BaseNet_DP(n.source_x, ssl=True)["out"]
    source_out = enlarge(source_out, n.source_x.shape[2:])
    F.cross_entropy(source_out, n.source_label, ignore_index=250).backward()

    n.threshold_arg = enlarge(n.target_lpsoft, (CROP[0] // 4, CROP[1] // 4))
    with torch.no_grad():
        n.ema_out = self.BaseNet_ema_DP(n.target_image_full)
    for name, value in n.ema_out.items():
        n.ema_out[name] = enlarge(value, (FULL[0] // 4, FULL[1] // 4))
    n.target_out = self.BaseNet_DP(n.target_x)
    for name, value in n.target_out.items():
        n.target_out[name] = enlarge(value, n.threshold_arg.shape[2:])

    run_block(PAGE, 8, vars(n))
    run_block(PAGE, 9, vars(n))
    run_block(PAGE, 10, vars(n))
    run_block(PAGE, 11, vars(n))
    n.loss = n.loss_CTS + CONSISTENCY * n.loss_consist
    n.loss.backward()
    self.BaseOpti.step()
    self.BaseOpti.zero_grad()

    run_block(PAGE, 12, vars(n))
    move_teacher(self)


def move_teacher(model: CustomModel) -> None:
    """Parameters by a moving average, buffers by a copy."""
    with torch.no_grad():
        for moving, new in zip(
            model.BaseNet_ema.parameters(), model.BaseNet.parameters(), strict=True
        ):
            moving.mul_(0.999).add_(new, alpha=0.001)
        for old, buffer in zip(model.BaseNet_ema.buffers(), model.BaseNet.buffers(), strict=True):
            old.copy_(buffer)


def distances(feat: Tensor, prototypes: Tensor) -> Tensor:
    """Return distances to each prototype (N, C, h, w), infinite where there is none."""
    found = (feat.unsqueeze(1) - prototypes.nan_to_num()[:, :, None, None]).norm(dim=2)
    return torch.where(prototypes.isnan().any(dim=1)[:, None, None], torch.inf, found)


def step_by_hand(n: SimpleNamespace, model: CustomModel, prototypes: Tensor) -> dict[str, Any]:
    """Return a step by the equations of the paper's code, with its networks in its order."""
    out = model.BaseNet(n.source_x)["out"]
    source = F.cross_entropy(enlarge(out, n.source_x.shape[2:]), n.source_label, ignore_index=250)
    model.BaseNet_ema.train()
    with torch.no_grad():
        teacher = model.BaseNet_ema(n.target_image_full)
    quarter = (FULL[0] // 4, FULL[1] // 4)
    feat = enlarge(teacher["feat"], quarter)
    called = enlarge(teacher["out"], quarter).argmax(dim=1)
    size = (CROP[0] // 4, CROP[1] // 4)
    weak = enlarge(model.BaseNet(n.target_x)["out"], size)
    strong = enlarge(model.BaseNet(n.target_imageS)["feat"], size)

    soft = enlarge(n.target_lpsoft, size)
    away = distances(model.full2weak(feat, n.target_weak_params), prototypes)
    rectified = soft * torch.softmax(-TEMPERATURE * away, dim=1)
    rectified = rectified / rectified.sum(dim=1, keepdim=True)
    sure, labels = rectified.max(dim=1)
    labels[sure < model.opt.train_thred] = 250

    active = labels != 250
    p = weak.softmax(dim=1).clamp(1e-7, 1)
    one_hot = F.one_hot(torch.where(active, labels, 0), NUM_CLASSES).movedim(-1, 1)
    reverse = -(p * one_hot.clamp(1e-4, 1).log()).sum(dim=1)[active].mean()
    classifier = 0.1 * F.cross_entropy(weak, labels, ignore_index=250) + reverse

    moved = model.label_strong_T(away, n.target_params, padding=250, scale=4)
    inside = moved[:, 0] != 250
    t = torch.softmax(-TEMPERATURE * moved, dim=1)
    log_s = torch.log_softmax(-TEMPERATURE * distances(strong, prototypes), dim=1)
    seen = prototypes.isfinite().all(dim=1)
    terms = t[:, seen] * (t[:, seen].log() - log_s[:, seen])
    consistency = terms.sum(dim=1)[inside].sum() / (inside.sum() * NUM_CLASSES)

    (source + classifier + CONSISTENCY * consistency).backward()
    model.BaseOpti.step()
    model.BaseOpti.zero_grad()
    move_teacher(model)
    moved_prototypes = prototypes.double().clone()
    for image, of_image in zip(feat.double(), called, strict=True):
        for t_class in range(NUM_CLASSES):
            mask = of_image == t_class
            if mask.sum() >= 10:
                mean, old = image[:, mask].mean(dim=1), moved_prototypes[t_class]
                new = (1 - MOMENTUM) * old + MOMENTUM * mean
                moved_prototypes[t_class] = mean if old.isnan().any() else new
    return {
        "labels": labels,
        "loss_CTS": classifier.item(),
        "loss_consist": consistency.item(),
        "prototypes": moved_prototypes,
    }


def draw_step() -> dict[str, Any]:
    """Return the arguments of a step; the weak view is a crop, the strong one made of it."""
    full = torch.randn(2, 3, *FULL).cumsum(dim=3) / 4
    crops = [(16, 8, True), (0, 32, False)]
    weak = [
        full[i, :, top:, left:][:, : CROP[0], : CROP[1]] for i, (top, left, _) in enumerate(crops)
    ]
    target_x = torch.stack([view.flip(-1) if i == 0 else view for i, view in enumerate(weak)])
    return {
        "source_x": torch.randn(2, 3, *CROP),
        "source_label": torch.where(torch.rand(2, *CROP) < 0.1, 250, torch.randint(7, (2, *CROP))),
        "target_x": target_x,
        "target_imageS": target_x.flip(-1) + 0.3 * torch.randn(2, 3, *CROP),
        "target_params": [(True, 8), (False, 12)],
        "target_weak_params": crops,
        "target_image_full": full,
        "target_lpsoft": (2 * torch.randn(2, NUM_CLASSES, *CROP)).softmax(dim=1),
    }


@pytest.fixture
def prototypes() -> Tensor:
    """Return prototypes among the features; one class has none: zeros in their file."""
    torch.manual_seed(1)
    drawn = 0.4 * torch.randn(NUM_CLASSES, DIM)
    drawn[UNSEEN] = 0
    return drawn


@pytest.fixture
def n(prototypes: Tensor, tmp_path: Path) -> SimpleNamespace:
    """Return the model as `train.py` makes it, with the anchors of a file that ProDA wrote."""
    model = CustomModel()
    torch.save(prototypes, tmp_path / "prototypes_on_cityscapes_from_deeplabv2")
    train = SimpleNamespace(
        os=__import__("os"),
        opt=SimpleNamespace(
            resume_path=str(tmp_path / "best_model.pkl"),
            tgt_dataset="cityscapes",
            model_name="deeplabv2",
            proto_momentum=MOMENTUM,
        ),
        model=model,
        device=torch.device("cpu"),
    )
    run_block(PAGE, 5, vars(train))
    run_block(PAGE, 6, vars(train))
    names = SimpleNamespace(self=model, F=F)
    run_block(PAGE, 7, vars(names))
    return names


def test_two_steps(n: SimpleNamespace, prototypes: Tensor) -> None:
    model, expected = copy.deepcopy(n.self), prototypes.clone()
    expected[UNSEEN] = torch.nan
    torch.manual_seed(2)
    for seed in range(2):
        vars(n).update(draw_step())
        n.self.nets[0].eval()  # As a validation leaves it; `step` sets train mode again.
        torch.manual_seed(seed)
        step(n)
        torch.manual_seed(seed)
        model.BaseNet.train()
        by_hand = step_by_hand(n, model, expected)
        labels = n.threshold_arg.squeeze(1)
        assert torch.equal(labels, by_hand["labels"])
        assert len(labels.unique()) > 4
        assert 0.1 < (labels == 250).float().mean() < 0.9
        if seed == 0:
            assert not (labels == UNSEEN).any()
        for name in ("loss_CTS", "loss_consist"):
            assert getattr(n, name).item() == pytest.approx(by_hand[name], rel=1e-4)
        expected = by_hand["prototypes"].float()
        np.testing.assert_allclose(n.self.objective_vectors, expected, rtol=1e-4, atol=1e-5)
        for name, value in n.self.BaseNet_ema.state_dict().items():
            other = model.BaseNet_ema.state_dict()[name]
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
        for old, new in zip(n.self.BaseNet_ema.buffers(), n.self.BaseNet.buffers(), strict=True):
            assert torch.equal(old, new)
        for name, value in n.self.BaseNet.state_dict().items():
            other = model.BaseNet.state_dict()[name]
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5)


def test_an_update_moves_image_by_image(n: SimpleNamespace, prototypes: Tensor) -> None:
    """Both images have the class: two moves, not one with the mean of both."""
    feat = torch.stack([torch.full((DIM, 4, 4), value) for value in (1.0, 3.0)])
    out = F.one_hot(torch.zeros(2, 4, 4, dtype=torch.int64), NUM_CLASSES).movedim(-1, 1).float()
    n.ema_out = {"feat": feat, "out": out}
    run_block(PAGE, 12, vars(n))
    kept = 1 - MOMENTUM
    expected = kept * (kept * prototypes[0] + MOMENTUM * 1.0) + MOMENTUM * 3.0
    torch.testing.assert_close(n.self.objective_vectors[0], expected)
    torch.testing.assert_close(n.self.objective_vectors[1], prototypes[1])


def test_without_the_symmetric_loss(n: SimpleNamespace) -> None:
    n.self.opt.rce = False
    labels = torch.randint(NUM_CLASSES, (2, 1, 5, 6))
    labels[:, :, 0] = 250
    n.target_out, n.threshold_arg = {"out": torch.randn(2, NUM_CLASSES, 5, 6)}, labels
    run_block(PAGE, 10, vars(n))
    expected = F.cross_entropy(n.target_out["out"], labels.squeeze(1), ignore_index=250)
    torch.testing.assert_close(n.loss_CTS, expected)


def vectors_by_hand(outputs: list[tuple[Tensor, Tensor]], min_pixels: int) -> Array:
    """Return a running mean over the images' means of the pixels of each class."""
    means, numbers = np.zeros((NUM_CLASSES, DIM)), np.zeros(NUM_CLASSES)
    for feats, labels in outputs:
        for feat, label in zip(feats.double().numpy(), labels.numpy(), strict=True):
            for t in range(NUM_CLASSES):
                if (label == t).sum() >= min_pixels:
                    mean = feat[:, label == t].mean(axis=1)
                    means[t] = (means[t] * numbers[t] + mean) / (numbers[t] + 1)
                    numbers[t] += 1
    means[numbers == 0] = np.nan
    return means


@pytest.mark.parametrize("source", [False, True])
def test_calc_prototype(source: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = BaseNet().eval()
    opt = SimpleNamespace(n_class=NUM_CLASSES)
    path = tmp_path / "prototypes"
    names = SimpleNamespace(opt=opt, device=torch.device("cpu"), torch=torch, save_path=path)
    run_block(PAGE, 0, vars(names))
    run_block(PAGE, 1, vars(names))
    outputs = []
    for _ in range(3):
        with torch.no_grad():
            names.out = network(torch.randn(2, 3, *FULL).cumsum(dim=3) / 4)
        called = names.out["out"].argmax(dim=1)
        if source:
            nearest = called[:, :8, :12].repeat_interleave(8, 1).repeat_interleave(8, 2)
            wrong = torch.rand(nearest.shape) < 0.2
            names.labels = torch.where(wrong, 250, nearest)
            run_block(PAGE, 2, vars(names))
            small = F.interpolate(names.labels[:, None].float(), called.shape[1:])[:, 0].long()
            called = torch.where(small == called, called, 250)
        else:
            run_block(PAGE, 3, vars(names))
        outputs.append((names.out["feat"], called))
    run_block(PAGE, 4, vars(names))
    expected = vectors_by_hand(outputs, min_pixels=10)
    assert np.isfinite(expected).all(axis=1).sum() > 1
    if source:
        assert np.isnan(expected).any()
    np.testing.assert_allclose(torch.load(path).numpy(), expected, rtol=1e-4, atol=1e-5)


def cosines(feat: Tensor, prototypes: Tensor) -> Tensor:
    return torch.einsum("ndhw,cd->nchw", F.normalize(feat, dim=1), F.normalize(prototypes, dim=1))


def test_cpsl(n: SimpleNamespace) -> None:
    """Learned prototypes, cosines, and targets whose classes have the shares that are asked for."""
    model = n.self
    model.opt.temperature, model.opt.epsilon, model.opt.sinkhorn_iterations = 0.08, 0.05, 3
    model.class_distribution = torch.rand(NUM_CLASSES).softmax(dim=0)
    model.prototypes_ema = torch.randn(NUM_CLASSES, DIM).requires_grad_()
    torch.manual_seed(4)
    vars(n).update(draw_step())
    names = SimpleNamespace(self=model, F=F)
    run_block(PAGE, 13, vars(names))
    vars(names).update(draw_step())
    names.target_out, names.threshold_arg = {}, torch.zeros(2, 1, CROP[0] // 4, CROP[1] // 4)
    names.ema_out = {"feat": torch.randn(2, DIM, FULL[0] // 4, FULL[1] // 4)}
    torch.manual_seed(5)
    run_block(PAGE, 14, vars(names))
    weak = model.full2weak(names.ema_out["feat"], names.target_weak_params)
    moved = model.label_strong_T(cosines(weak, model.prototypes_ema), names.target_params, 250, 4)
    inside = moved[:, 0] != 250
    torch.manual_seed(5)
    feat = model.BaseNet(names.target_imageS)["feat"]
    feat = F.interpolate(feat, (12, 16), mode="bilinear", align_corners=True)
    t = (moved / 0.08).softmax(dim=1)
    log_s = (cosines(feat, model.prototypes_ema) / 0.08).log_softmax(dim=1)
    expected = (t * (t.log() - log_s)).sum(dim=1)[inside].mean() / NUM_CLASSES
    assert names.loss_consist.item() == pytest.approx(expected.item(), rel=1e-4)
    names.loss_consist.backward()
    assert model.prototypes_ema.grad is None  # A constant to the loss.

    names.out = torch.randn(40, NUM_CLASSES).clamp(-1, 1)
    assigned = run_body(PAGE, 15, vars(names))
    q = (names.out.double() / 0.05).exp().T
    q /= q.sum()
    for _ in range(3):
        q *= (model.class_distribution / q.sum(dim=1))[:, None]
        q /= q.sum(dim=0) * q.shape[1]
    torch.testing.assert_close(assigned.double(), 40 * q.T, rtol=1e-4, atol=1e-6)

    names.feat = weak
    weights = run_body(PAGE, 16, vars(names))
    expected_weights = (cosines(weak, model.prototypes_ema) / 0.08).softmax(dim=1)
    torch.testing.assert_close(weights, expected_weights.detach(), rtol=1e-4, atol=1e-6)


def test_diga(prototypes: Tensor, tmp_path: Path) -> None:
    """Labels where the nearest centroid agrees; centroids of both domains, image by image."""
    torch.save(prototypes, tmp_path / "feat_centroids")
    torch.manual_seed(6)
    teacher = BaseNet()
    names = SimpleNamespace(
        args=SimpleNamespace(centroid_dir=str(tmp_path / "feat_centroids")),
        teacher=lambda x: (None, None, *reversed(teacher(x).values())),
        upsample_tgt=nn.Upsample(size=FULL, mode="bilinear", align_corners=True),
        tdatav=torch.randn(2, 3, *FULL),
        slabelv=torch.randint(NUM_CLASSES, (2, *FULL)),
        tlabelv_pseudo_prob=torch.randint(NUM_CLASSES, (2, *FULL)),
        s_feat_tea_aug=torch.randn(2, DIM, 9, 13),
        s_pred_tea_aug_raw=torch.randn(2, NUM_CLASSES, 9, 13),
    )
    names.teacher.parameters = teacher.parameters
    names.tlabelv_pseudo_prob[:, :8] = 255
    run_block(PAGE, 17, vars(names))
    run_block(PAGE, 18, vars(names))
    before = names.anchors.compute()
    assert before[UNSEEN].isnan().all()
    names.anchors.momentum = MOMENTUM  # A move that shows in float32.
    torch.manual_seed(7)
    with torch.no_grad():
        run_block(PAGE, 19, vars(names))
        run_block(PAGE, 20, vars(names))
    torch.manual_seed(7)
    out = teacher(names.tdatav)
    feat = out["feat"].detach()
    nearest = names.upsample_tgt((-distances(feat, before)).softmax(dim=1)).argmax(dim=1)
    agreed = torch.where(nearest == names.tlabelv_pseudo_prob, nearest, 255)
    assert torch.equal(names.tlabelv_pseudo, agreed)
    assert 0.05 < (agreed != 255).float().mean() < 0.5
    expected = before.double()
    for feats, outs, labels in (
        (feat, out["out"], agreed),
        (names.s_feat_tea_aug, names.s_pred_tea_aug_raw, names.slabelv),
    ):
        small = F.interpolate(labels[:, None].float(), (9, 13))[:, 0].long()
        small = torch.where(small == outs.argmax(dim=1), small, 255)
        for image, of_image in zip(feats.double(), small, strict=True):
            for t in range(NUM_CLASSES):
                if (of_image == t).sum() >= 5:
                    mean = image[:, of_image == t].mean(dim=1)
                    old = mean if expected[t].isnan().any() else expected[t]
                    expected[t] = (1 - MOMENTUM) * old + MOMENTUM * mean
    assert (expected - before).abs().nan_to_num().max() > 0.01
    np.testing.assert_allclose(names.anchors.compute(), expected, rtol=1e-4, atol=1e-5)
