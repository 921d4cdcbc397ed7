"""The AdaptSegNet and ADVENT page, in a loop with what stands around its lines there.

Train mode with batch normalization on one image a step, repeated data sets, float labels, two
forward and two backward passes of `iter_size` parts each, maps of logits that are interpolated
before the discriminator, and labels that nobody has moved to the device.
"""

import copy
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import data

import anchorda
from tests.oracles import Array
from tests.ranks import free_port, run_ranks
from tests.recipes.pages import nearest, run_block

NUM_CLASSES, DIM = 19, 2048
PAGE = "adaptsegnet.md"
IMAGES, REPEATS = 4, 6
HEIGHT, WIDTH = 32, 48
LAMBDA_SEG, LAMBDA_ADV = 0.1, 0.001


class Classifier(nn.Module):
    """A sum of dilated convolutions, added up in place; AdaptSegNet returns after two of four."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        branches = [
            nn.Conv2d(channels, NUM_CLASSES, 3, padding=dilation, dilation=dilation)
            for dilation in (6, 12, 18, 24)
        ]
        # Predictions that vary, among the classes of the images.
        nn.init.normal_(branches[0].weight, std=0.02)
        nn.init.normal_(branches[1].weight, std=0.02)
        branches[0].bias = nn.Parameter(3.0 * (torch.arange(NUM_CLASSES) < 6))
        self.conv2d_list = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.conv2d_list[0](x)
        out += self.conv2d_list[1](x)
        return out


class ResNetMulti(nn.Module):
    """Two maps of logits at stride 8, with one more row and column; no features."""

    def __init__(self, multi_level: bool = True) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 16, 8, stride=8, padding=4, bias=False)
        self.layer3 = nn.Sequential(stem, nn.BatchNorm2d(16))
        block = nn.Conv2d(16, DIM, 1, bias=False)
        self.layer4 = nn.Sequential(block, nn.BatchNorm2d(DIM), nn.ReLU(inplace=True))
        self.layer5 = Classifier(16) if multi_level else None
        self.layer6 = Classifier(DIM)

    def features(self, x: Tensor) -> Tensor:
        """Return the features by the layers alone, without a tap."""
        features: Tensor = self.layer4(self.layer3(x))
        return features

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:  # noqa: D102
        x = self.layer3(x)
        first = None if self.layer5 is None else self.layer5(x)
        return first, self.layer6(self.layer4(x))


class Discriminator(nn.Module):
    """One convolution; remembers the sizes of the maps that came."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(NUM_CLASSES, 1, 4, stride=4)
        self.sizes: set[torch.Size] = set()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        self.sizes.add(x.shape[2:])
        out: Tensor = self.layer(x)
        return out


class Images(data.Dataset[Any]):
    """A list of images repeated up to the number of iterations, in arrays as there."""

    def __init__(self, seed: int, labeled: bool, tuples: bool) -> None:
        draw = np.random.default_rng(seed)
        names = [f"{index:05d}.png" for index in range(IMAGES)] * REPEATS
        self.files = [(name, name) if tuples else {"img": name, "name": name} for name in names]
        self.labeled, self.read = labeled, 0
        coarse = draw.integers(0, 6, (IMAGES, HEIGHT // 8, WIDTH // 8))
        self.labels = coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.float32)
        colors = draw.normal(size=(NUM_CLASSES, 3))[self.labels.astype(int)].transpose(0, 3, 1, 2)
        self.images = (colors + 0.3 * draw.normal(size=colors.shape)).astype(np.float32)
        self.labels[:, :8] = 255

    def __len__(self) -> int:  # noqa: D105
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, ...]:  # noqa: D105
        self.read += 1
        image, labels = self.images[index % IMAGES], self.labels[index % IMAGES]
        size = np.array(image.shape)
        return (image, labels, size, "name") if self.labeled else (image, size, "name")


def loader(seed: int, labeled: bool, tuples: bool = False) -> data.DataLoader[Any]:
    return data.DataLoader(Images(seed, labeled, tuples), batch_size=1, shuffle=True)


@pytest.fixture
def stage_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the file of the page, importable under both of its names."""
    return install(monkeypatch)


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("anchor_stage")
    run_block(PAGE, 0, vars(module))
    for name in ("advent", "advent.domain_adaptation"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("anchor_stage", "advent.domain_adaptation.anchor_stage"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


def trained(multi_level: bool = True) -> ResNetMulti:
    """Return weights whose running statistics are not those of a batch."""
    torch.manual_seed(1)
    model = ResNetMulti(multi_level)
    with torch.no_grad():
        for _ in range(3):
            model(2 + torch.randn(1, 3, HEIGHT, WIDTH))
    return model


def names_of_main(model: ResNetMulti, iter_size: int) -> SimpleNamespace:
    """Return the names in `main`."""
    args = {"iter_size": iter_size, "num_classes": NUM_CLASSES, "restore_from": "warm_up.pth"}
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(**args),
        device=torch.device("cpu"),
        trainloader=loader(2, labeled=True),
        targetloader=loader(3, labeled=False),
        interp=nn.Upsample(size=(HEIGHT, WIDTH), mode="bilinear", align_corners=True),
        interp_target=nn.Upsample(size=(HEIGHT, 56), mode="bilinear", align_corners=True),
        discriminator=Discriminator(),
        torch=torch,
        log=[],
    )


def adaptsegnet() -> SimpleNamespace:
    """Return the names in `main`, up to the loop over iterations."""
    n = names_of_main(ResNetMulti(), iter_size=2)
    torch.save(trained().state_dict(), n.args.restore_from)
    run_block(PAGE, 1, vars(n))  # The import.
    run_block(PAGE, 2, vars(n))  # The warm-up's weights.
    assert all(
        torch.equal(*pair)
        for pair in zip(n.model.state_dict().values(), trained().state_dict().values(), strict=True)
    )
    n.model.train()
    return n


def segmentation_loss(pred: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(pred, labels, ignore_index=255)


def fooled(discriminator: Discriminator, pred: Tensor) -> Tensor:
    out = discriminator(pred.softmax(dim=1))
    return F.binary_cross_entropy_with_logits(out, torch.zeros_like(out))


def adaptsegnet_steps(n: SimpleNamespace, batches: list[Any]) -> None:
    """One iteration of the loop: `iter_size` times source, backward, target, backward."""
    sums = {"loss_seg1": 0.0, "loss_seg2": 0.0, "loss_adv": 0.0}
    for (source, labels), target in batches:
        n.images, n.labels = source.to(n.device), labels.long().to(n.device)
        run_block(PAGE, 4, vars(n))
        loss_seg1 = segmentation_loss(n.pred1, n.labels)
        loss_seg2 = segmentation_loss(n.pred2, n.labels)
        n.loss = loss_seg2 + LAMBDA_SEG * loss_seg1
        run_block(PAGE, 5, vars(n))
        n.loss = n.loss / n.args.iter_size
        n.loss.backward()
        sums["loss_seg1"] += loss_seg1.item() / n.args.iter_size
        sums["loss_seg2"] += loss_seg2.item() / n.args.iter_size

        n.images = target.to(n.device)
        run_block(PAGE, 6, vars(n))
        adversarial = fooled(n.discriminator, n.pred_target1)
        adversarial = adversarial + fooled(n.discriminator, n.pred_target2)
        n.loss = LAMBDA_ADV * adversarial
        run_block(PAGE, 7, vars(n))
        n.loss = n.loss / n.args.iter_size
        n.loss.backward()
        sums["loss_adv"] += adversarial.item() / n.args.iter_size

        # The discriminator's own step reads the source's maps again, detached.
        fooled(n.discriminator, n.pred1.detach())
        fooled(n.discriminator, n.pred2.detach())
    n.log.append(sums)


def advent(multi_level: bool) -> SimpleNamespace:
    """Return the names in `train_advent`, up to the loop over iterations."""
    n = SimpleNamespace(
        model=trained(multi_level).train(),
        num_classes=NUM_CLASSES,
        device=torch.device("cpu"),
        trainloader=loader(2, labeled=True, tuples=True),
        targetloader=loader(3, labeled=True, tuples=True),
        discriminator=Discriminator(),
        current_losses={},
    )
    run_block(PAGE, 8, vars(n))  # The import.
    return n


def advent_step(n: SimpleNamespace, source: Tensor, labels: Tensor, target: Tensor) -> None:
    """One iteration; the labels are as they come from the loader, and so are the images."""
    n.images_source, n.labels = source, labels
    run_block(PAGE, 10, vars(n))
    auxiliary: Any = 0
    if n.model.layer5 is not None:
        auxiliary = segmentation_loss(enlarge(n.pred_src_aux), labels.long())
    main = segmentation_loss(enlarge(n.pred_src_main), labels.long())
    n.loss = main + LAMBDA_SEG * auxiliary
    run_block(PAGE, 11, vars(n))
    n.loss.backward()

    n.images = target
    run_block(PAGE, 12, vars(n))
    adversarial = fooled(n.discriminator, enlarge(n.pred_trg_main))
    if n.model.layer5 is not None:
        adversarial = adversarial + fooled(n.discriminator, enlarge(n.pred_trg_aux))
    n.loss = LAMBDA_ADV * adversarial
    run_block(PAGE, 13, vars(n))
    n.loss.backward()
    n.current_losses = {"loss_seg_src_main": main, "loss_adv_trg_main": adversarial}
    run_block(PAGE, 14, vars(n))


def batches_of(n: SimpleNamespace, count: int) -> list[Any]:
    source, target = n.trainloader.dataset, n.targetloader.dataset
    pairs = []
    for index in range(count):
        image, labels = source.images[index], source.labels[index]
        pair = torch.from_numpy(image)[None], torch.from_numpy(labels)[None]
        pairs.append((pair, torch.from_numpy(target.images[index + 1])[None]))
    return pairs


def enlarge(pred: Tensor, width: int = WIDTH) -> Tensor:
    return F.interpolate(pred, (HEIGHT, width), mode="bilinear", align_corners=True)


def small(labels: Tensor) -> Tensor:
    return torch.from_numpy(nearest(labels, (5, 7)).reshape(1, 5, 7))


def anchors_by_hand(model: ResNetMulti, source: Images) -> Array:
    """Return the class means of the pixels that the network in train mode calls right."""
    model = copy.deepcopy(model).train()
    sums, counts = np.zeros((NUM_CLASSES, DIM)), np.zeros(NUM_CLASSES)
    for image, labels in zip(source.images, source.labels, strict=True):
        with torch.no_grad():
            x = torch.from_numpy(image)[None]
            features, logits = model.features(x)[0], model(x)[1]
        assert logits is not None
        called, truth = logits[0].argmax(dim=0), small(torch.from_numpy(labels)[None])[0]
        for i, j in np.ndindex(5, 7):
            if called[i, j] == truth[i, j]:
                sums[truth[i, j]] += features[:, i, j].double().numpy()
                counts[truth[i, j]] += 1
    with np.errstate(invalid="ignore"):
        anchors: Array = sums / counts[:, None]
    return anchors


def labels_by_hand(features: Tensor, anchors: Array, minimum: Tensor) -> Tensor:
    """Return the nearest anchor where it is nearer than the next by a part of that distance."""
    x = features[0].detach().double().numpy()
    labels = torch.full((1, 5, 7), 255)
    for i, j in np.ndindex(5, 7):
        distances = np.linalg.norm(x[:, i, j] - anchors, axis=1)
        distances = np.where(np.isnan(distances), np.inf, distances)
        first, second = np.argsort(distances)[:2]
        margin = (distances[second] - distances[first]) / distances[second]
        assert abs(margin - minimum[first]) > 1e-6
        if margin > minimum[first]:
            labels[0, i, j] = int(first)
    return labels


def pull(features: Tensor, labels: Tensor, anchors: Array) -> Tensor:
    """Return the mean of Huber terms over the pixels of seen classes and over the channels."""
    rows = torch.from_numpy(anchors).float()
    seen = torch.zeros(256, dtype=torch.bool)
    seen[:NUM_CLASSES] = rows.isfinite().all(dim=1)
    chosen = seen[labels]
    assert chosen.any()
    return F.smooth_l1_loss(features.movedim(1, -1)[chosen], rows[labels[chosen]])


def by_hand(
    model: ResNetMulti, batches: list[Any], n: SimpleNamespace, width: int
) -> list[dict[str, Tensor]]:
    """Return every loss of an iteration, of plain torch, and its gradients in ``model``."""
    frozen, minimum = copy.deepcopy(model).train(), n.stage.labeler.min_margin
    anchors = anchors_by_hand(model, n.trainloader.dataset)
    parts = []
    for (source, labels), target in batches:
        first, second = model(source)
        part = {
            "seg2": segmentation_loss(enlarge(second), labels.long()),
            "anchor": 0.1 * pull(model.features(source), small(labels), anchors),
        }
        with torch.no_grad():
            pseudo = labels_by_hand(frozen.features(target), anchors, minimum)
        assert 0 < (pseudo != 255).sum() < pseudo.numel()
        first_target, second_target = model(target)
        part["pseudo"] = segmentation_loss(second_target, pseudo)
        part["pseudo"] += 0.1 * pull(model.features(target), pseudo, anchors)
        part["adv"] = LAMBDA_ADV * fooled(n.discriminator, enlarge(second_target, width))
        if first is not None:
            part["seg1"] = segmentation_loss(enlarge(first), labels.long())
            part["seg2"] = part["seg2"] + LAMBDA_SEG * part["seg1"]
            fooled_first = fooled(n.discriminator, enlarge(first_target, width))
            part["adv"] = part["adv"] + LAMBDA_ADV * fooled_first
        total = part["seg2"] + part["anchor"] + part["pseudo"] + part["adv"]
        (total / len(batches)).backward()
        parts.append({name: value.detach() for name, value in part.items()})
    return parts


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    """Up to rounding, also where batch normalization makes the exact gradient 0."""
    wanted = {name: x.grad for name, x in expected.named_parameters() if x.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    got = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (got[name] - gradient).abs().max().item()
        assert error < 1e-4 * gradient.abs().max() + 1e-6 * largest, name


@pytest.fixture
def n(stage_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """AdaptSegNet's `main`, with its stage."""
    monkeypatch.chdir(tmp_path)
    names = adaptsegnet()
    run_block(PAGE, 3, vars(names))
    return names


def test_the_stage_reads_every_image_once(n: SimpleNamespace) -> None:
    assert len(n.trainloader) == IMAGES * REPEATS
    assert n.trainloader.dataset.read == IMAGES
    assert n.targetloader.dataset.read == IMAGES


def test_anchors_are_those_of_the_mode_that_is_trained(
    n: SimpleNamespace, stage_module: ModuleType
) -> None:
    before = copy.deepcopy(n.model.state_dict())
    n.model.eval()  # As an evaluation leaves it.
    stage = stage_module.AnchorStage(
        n.model, n.trainloader, n.targetloader, NUM_CLASSES, torch.device("cpu")
    )
    expected = anchors_by_hand(n.model, n.trainloader.dataset)
    assert 2 <= np.isfinite(expected).all(axis=1).sum() < NUM_CLASSES
    np.testing.assert_allclose(stage.centroids.numpy(), expected, rtol=1e-4, atol=1e-4)
    # In eval mode the features are elsewhere, farther than classes are apart.
    n.model.eval()
    (images, _), _ = batches_of(n, 1)[0]
    moved = (n.model.features(images) - n.model.train().features(images)).norm(dim=1).mean()
    seen = expected[np.isfinite(expected).all(axis=1)]
    assert moved > np.linalg.norm(seen[0] - seen[1]) / 2
    # The network's own running statistics and weights are as they were, and go on by themselves.
    n.model.load_state_dict(before)
    for parameter in n.model.parameters():
        parameter.data.zero_()
    np.testing.assert_allclose(
        anchors_by_hand(stage.frozen, n.trainloader.dataset), expected, rtol=1e-5
    )
    assert not any(parameter.requires_grad for parameter in stage.frozen.parameters())


def test_the_stage_leaves_the_networks_statistics_alone(
    stage_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = adaptsegnet()
    before = copy.deepcopy(names.model.state_dict())
    run_block(PAGE, 3, vars(names))
    for name, value in names.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_half_of_the_pixels_are_labeled(n: SimpleNamespace) -> None:
    images = [torch.from_numpy(image)[None] for image in n.targetloader.dataset.images]
    everything = anchorda.AnchorPseudoLabeler(float("-inf"), relative=True)
    labeled, called = torch.zeros(NUM_CLASSES), torch.zeros(NUM_CLASSES)
    for image in images:
        features = n.stage.frozen.features(image)
        nearest = everything(features, n.stage.centroids).labels
        called += nearest.flatten().bincount(minlength=NUM_CLASSES)
        kept = n.stage.label(image).labels
        labeled += kept.flatten().bincount(minlength=256)[:NUM_CLASSES]
    shares = (labeled / called)[called > 4]
    assert len(shares) > 1
    assert (shares >= 0.5).all()
    assert (shares < 0.8).all()
    # A margin that nobody has measured labels next to nothing of the same features.
    fixed = anchorda.AnchorPseudoLabeler(0.5, relative=True)
    assert (fixed(features, n.stage.centroids).labels == 255).float().mean() > 0.8


def test_an_iteration_of_adaptsegnet(
    n: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, batches = copy.deepcopy(n.model), batches_of(n, n.args.iter_size)
    adaptsegnet_steps(n, batches)
    assert n.discriminator.sizes == {(HEIGHT, WIDTH), (HEIGHT, 56)}
    parts = by_hand(expected, batches, n, width=56)
    assert_same_gradients(n.model, expected)
    means = {name: np.mean([part[name].item() for part in parts]) for name in parts[0]}
    (logged,) = n.log
    assert logged["loss_seg1"] == pytest.approx(means["seg1"], rel=1e-4)
    assert logged["loss_adv"] * LAMBDA_ADV == pytest.approx(means["adv"], rel=1e-4)
    for line, part in zip(capsys.readouterr().out.splitlines(), parts, strict=True):
        shown = [f"loss_{name} = {part[name].item():.3f}" for name in ("anchor", "pseudo")]
        assert line == " ".join(shown)


@pytest.mark.parametrize("multi_level", [True, False])
def test_an_iteration_of_advent(stage_module: ModuleType, multi_level: bool) -> None:
    names = advent(multi_level)
    run_block(PAGE, 9, vars(names))
    assert names.trainloader.dataset.read == names.targetloader.dataset.read == IMAGES
    expected, batches = copy.deepcopy(names.model), batches_of(names, 1)
    (source, labels), target = batches[0]
    advent_step(names, source, labels, target)
    assert names.discriminator.sizes == {(HEIGHT, WIDTH)}
    (part,) = by_hand(expected, batches, names, width=WIDTH)
    assert_same_gradients(names.model, expected)
    for name in ("anchor", "pseudo"):
        assert names.current_losses[f"loss_{name}"].item() == pytest.approx(
            part[name].item(), rel=1e-4
        )
    assert "loss_seg_src_main" in names.current_losses


def test_everything_is_moved_to_the_device(stage_module: ModuleType) -> None:
    """The device without values: a tensor that is left on the CPU is an error."""
    names = advent(multi_level=True)
    names.model, names.device = names.model.to("meta"), torch.device("meta")
    run_block(PAGE, 9, vars(names))
    (source, labels), target = batches_of(names, 1)[0]
    names.images_source, names.labels, names.loss = source, labels, torch.zeros((), device="meta")
    for number in (10, 11):
        run_block(PAGE, number, vars(names))
    names.images = target
    for number in (12, 13):
        run_block(PAGE, number, vars(names))
    names.loss.backward()
    assert names.loss.is_meta


def rank_main(rank: int, port: int, folder: str) -> None:
    """AdaptSegNet on one of two processes, each with images of its own."""
    torch.set_num_threads(1)
    settings = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in settings.items()}
    install(pytest.MonkeyPatch())
    n = names_of_main(trained(), iter_size=1)
    run_block(PAGE, 15, vars(n))
    run_block(PAGE, 1, vars(n))
    run_block(PAGE, 3, vars(n))
    for batch in [batches_of(n, 2)[rank]] * 2:
        adaptsegnet_steps(n, [batch])  # The second fails where a parameter had no gradient.
    torch.save(
        {
            "centroids": n.stage.centroids,
            "minimum": n.stage.labeler.min_margin,
            "read": n.trainloader.dataset.read,
            "gradient": n.model.module.layer3[0].weight.grad,
        },
        f"{folder}/{rank}.pt",
    )


def test_two_processes(n: SimpleNamespace, tmp_path: Path) -> None:
    run_ranks(2, rank_main, free_port(), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for report in (first, second):
        assert report["read"] == IMAGES / 2
        torch.testing.assert_close(report["centroids"], n.stage.centroids, equal_nan=True)
        torch.testing.assert_close(report["minimum"], n.stage.labeler.min_margin)
    assert torch.equal(first["gradient"], second["gradient"])
