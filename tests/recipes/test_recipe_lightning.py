"""The Lightning page, with a stand-in for `lightning`, alone and under DDP in two processes."""

import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import anchorda
from tests import oracles
from tests.oracles import Array, flat, rows
from tests.recipes.pages import run_block

NUM_CLASSES, DIM, SECONDS = 4, 5, 120
PAGE = "lightning.md"
Batches = list[tuple[Tensor, Tensor]]


class LightningModule(nn.Module):
    """What the page uses of the real one."""

    @property
    def device(self) -> torch.device:  # noqa: D102
        return next(self.parameters()).device


class Strategy(nn.Module):
    """What Lightning wraps: a module whose `forward` is the module's `training_step`."""

    def __init__(self, module: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.module = module

    def forward(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: D102
        loss: Tensor = self.module.training_step(batch, batch_idx)
        return loss


class Network(nn.Module):
    """Features at half the resolution, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, DIM, 2, stride=2), nn.BatchNorm2d(DIM))
        self.classifier = nn.Conv2d(DIM, NUM_CLASSES, 1, bias=False)
        nn.init.orthogonal_(self.classifier.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        features = self.layers(images)
        return features, self.classifier(features)


def draw_source(rank: int) -> Batches:
    """The share of a rank, drawn the same in any process; class 3 is on rank 1 alone."""
    torch.manual_seed(10 + rank)
    labels = torch.tensor([0, 1, 2, 3 if rank == 1 else 255, 255])
    return [(torch.randn(2, 3, 8, 6), labels[torch.randint(5, (2, 8, 6))]) for _ in range(2 + rank)]


def classes(source: Batches) -> tuple[Any, Any]:
    """`Adaptation` and `MovingAdaptation` of the page, each made with a network of one seed."""
    lightning = ModuleType("lightning")
    lightning.LightningModule = LightningModule  # type: ignore[attr-defined]
    sys.modules["lightning"] = lightning
    names: dict[str, Any] = {}
    try:
        run_block(PAGE, 0, names)
        run_block(PAGE, 1, names)
    finally:
        del sys.modules["lightning"]
    made = []
    for name in ("Adaptation", "MovingAdaptation"):
        torch.manual_seed(0)
        made.append(names[name](Network(), source, NUM_CLASSES, DIM))
    return made[0], made[1]


def fit(module: Any, strategy: nn.Module, source: Batches) -> list[Tensor]:  # noqa: ANN401
    """As a trainer: an epoch of automatic optimization. Returns the losses."""
    optimizer, losses = module.configure_optimizers(), []
    module.train()
    module.on_train_epoch_start()
    for index, batch in enumerate(source[:2]):
        loss = strategy({"source": batch, "target": batch[0].flip(0)}, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def by_hand(network: Network, source: Batches) -> Array:
    batches = []
    for images, labels in source:
        features, logits = network(images)
        small = torch.from_numpy(
            np.stack([oracles.resize_nearest(image.numpy(), (4, 3)) for image in labels])
        )
        batches.append((rows(features), oracles.keep_correct(flat(small), rows(logits), 255)))
    return oracles.stream_anchors(batches, NUM_CLASSES, DIM)[0]


def test_a_pass_of_one_process() -> None:
    source = draw_source(0)
    module, _ = classes(source)
    expected = by_hand(module.network.eval(), source)
    losses = fit(module, Strategy(module), source)
    anchors = module.anchors.compute().numpy()
    assert 1 < np.isfinite(expected).all(axis=1).sum() < NUM_CLASSES
    np.testing.assert_allclose(anchors, expected, rtol=1e-5, atol=1e-6)
    assert module.network.training
    assert all(loss.isfinite() for loss in losses)
    again = by_hand(module.network.eval(), source)
    module.on_train_epoch_start()  # Of the next epoch: nothing of the first is left.
    np.testing.assert_allclose(module.anchors.compute().numpy(), again, rtol=1e-5, atol=1e-6)
    assert "anchors.means" in module.state_dict()  # A child: in the checkpoint.


def test_the_loss_of_a_step() -> None:
    source = draw_source(0)
    module, _ = classes(source)
    module.on_train_epoch_start()
    images, labels = source[0]
    loss = module.training_step({"source": (images, labels), "target": -images}, 0)
    expected, anchors, ones = 0.0, module.anchors.compute().double().numpy(), [1.0] * NUM_CLASSES
    features, logits = module.network(images)
    small = flat(anchorda.resize_labels(labels, (4, 3)))
    expected += oracles.cross_entropy(rows(logits), small, ones, 0.0)
    expected += 0.1 * oracles.distance_loss(rows(features), small, anchors, "euclidean", "pixel")
    features, logits = module.network(-images)
    pseudo, _ = oracles.margin_labels(rows(features), anchors, [0.1] * NUM_CLASSES, True, 255)
    expected += oracles.cross_entropy(rows(logits), pseudo, ones, 0.0)
    expected += 0.1 * oracles.distance_loss(rows(features), pseudo, anchors, "euclidean", "pixel")
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def rank_main(rank: int, folder: str) -> None:
    """Both modules of the page and the wrong way, on one of two ranks."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    source, report = draw_source(rank), {}
    whole, moving = classes(source)
    for name, module in (("whole", whole), ("moving", moving)):
        fit(module, DistributedDataParallel(Strategy(module)), source)
        report[name] = module.anchors.state_dict()
    wrong, _ = classes(source)
    strategy = DistributedDataParallel(Strategy(wrong))
    for index, (images, labels) in enumerate(source[:2]):
        wrong.anchors.update(images[:, :1].expand(-1, DIM, -1, -1), labels)
        strategy({"source": (images, labels), "target": images}, index).backward()
    report["wrong"] = wrong.anchors.state_dict()
    torch.save(report, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    context = spawn(rank_main, (str(folder),), 2, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks did not end"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_pass_of_two_processes_is_one_of_both_shares(reports: list[dict[str, Any]]) -> None:
    sources = [draw_source(0), draw_source(1)]
    module, _ = classes([])
    expected = by_hand(module.network.eval(), sources[0] + sources[1])
    assert np.isfinite(expected).all()  # Class 3 too, which rank 0 has never seen.
    for report in reports:
        np.testing.assert_allclose(report["whole"]["means"], expected, rtol=1e-5, atol=1e-6)
    for name in ("whole", "moving"):
        for buffer in ("means", "counts"):
            assert torch.equal(reports[0][name][buffer], reports[1][name][buffer])


def test_moving_anchors_count_the_batches_of_both_ranks(reports: list[dict[str, Any]]) -> None:
    counts = np.zeros(NUM_CLASSES, np.int64)
    for rank in range(2):
        for _, labels in draw_source(rank)[:2]:
            small = anchorda.resize_labels(labels, (4, 3))
            counts += np.bincount(flat(small)[flat(small) < NUM_CLASSES], minlength=NUM_CLASSES)
    assert reports[0]["moving"]["counts"].tolist() == counts.tolist()
    assert counts[3] > 0


def test_updates_in_the_step_keep_those_of_rank_0_alone(reports: list[dict[str, Any]]) -> None:
    """The row of the table that is wrong: what rank 1 has seen is gone."""
    mine = np.zeros(NUM_CLASSES, np.int64)
    for _, labels in draw_source(0)[:2]:
        mine += np.bincount(flat(labels)[flat(labels) < NUM_CLASSES], minlength=NUM_CLASSES)
    assert [report["wrong"]["counts"].tolist() for report in reports] == [mine.tolist()] * 2
    assert mine[3] == 0
