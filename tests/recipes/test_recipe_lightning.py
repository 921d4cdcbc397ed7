"""The Lightning page with `lightning` itself, alone and with its DDP strategy in two processes."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, Labels, rows
from tests.ranks import free_port, run_ranks
from tests.recipes.pages import nearest, right_means, run_block

pytest.importorskip("lightning", reason="lightning is not installed")

NUM_CLASSES, DIM = 4, 5
PAGE = "lightning.md"
Batches = list[tuple[Tensor, Tensor]]


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
    """Return the share of a rank, drawn the same in any process; class 3 is on rank 1 alone."""
    torch.manual_seed(10 + rank)
    labels = torch.tensor([0, 1, 2, 3 if rank == 1 else 255, 255])
    return [(torch.randn(2, 3, 8, 6), labels[torch.randint(5, (2, 8, 6))]) for _ in range(2)]


def make(name: str, source: Batches) -> Any:  # noqa: ANN401
    """Return `Adaptation` or `MovingAdaptation` of the page, with a network of one seed."""
    names: dict[str, Any] = {}
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    torch.manual_seed(0)
    return names[name](Network(), source, NUM_CLASSES, DIM)


@contextmanager
def quiet() -> Iterator[None]:
    """Return a trainer without Lightning's advice as warnings, such as on more workers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fit(module: Any, source: Batches, epochs: int = 1, **options: Any) -> None:  # noqa: ANN401
    """Lightning's own trainer, over lists as loaders."""
    with quiet():
        import lightning

        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
        target = [images.flip(0) for images, _ in source]
        # Loaders, for Lightning looks into lists for more loaders.
        data: dict[str, Any] = {"source": source, "target": target}
        trainer.fit(
            module,
            {name: torch.utils.data.DataLoader(x, batch_size=None) for name, x in data.items()},
        )


def record_losses(module: Any) -> list[float]:  # noqa: ANN401
    """Return results of `training_step` from now on."""
    losses, step = list[float](), module.training_step

    def recorded(batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss: Tensor = step(batch, batch_idx)
        losses.append(loss.item())
        return loss

    module.training_step = recorded
    return losses


def resized(labels: Tensor) -> Labels:
    return nearest(labels, (4, 3))


def by_hand(network: Network, source: Batches) -> Array:
    return right_means([(*network(images), labels) for images, labels in source])


def step_by_hand(
    network: Network, frozen: Network | None, batch: tuple[Tensor, Tensor], anchors: Array
) -> float:
    """Return the loss of a step with labels of the frozen or of the trained network."""
    images, labels = batch
    total, ones = 0.0, [1.0] * NUM_CLASSES
    for domain, small in ((images, resized(labels)), (images.flip(0), None)):
        features, logits = network(domain)
        if small is None:
            labeled = features if frozen is None else frozen(domain)[0]
            small, _ = oracles.margin_labels(rows(labeled), anchors, [0.1] * 4, True, 255)
            assert 0 < (small != 255).sum() < small.size
        total += oracles.cross_entropy(rows(logits), small, ones, 0.0)
        total += 0.1 * oracles.distance_loss(rows(features), small, anchors, "euclidean", "pixel")
    return total


def test_stages_of_a_trainer() -> None:
    source = draw_source(0)
    module = make("Adaptation", source)
    start, losses = copy.deepcopy(module.network), record_losses(module)
    fit(module, source)
    frozen = copy.deepcopy(start).eval()
    anchors = by_hand(frozen, source)
    assert 1 < np.isfinite(anchors).all(axis=1).sum() < NUM_CLASSES
    (stage,) = module.stage
    np.testing.assert_allclose(stage.centroids.numpy(), anchors, rtol=1e-5, atol=1e-6)
    assert losses[0] == pytest.approx(step_by_hand(start, frozen, source[0], anchors), rel=1e-5)
    assert losses[0] != pytest.approx(step_by_hand(start, None, source[0], anchors), rel=1e-3)
    assert not any("stage" in name for name in module.state_dict())
    assert all(p.grad is not None for p in module.network.parameters())


def test_every_epoch_begins_a_stage() -> None:
    source = draw_source(0)
    module = make("Adaptation", source)
    first = by_hand(copy.deepcopy(module.network).eval(), source)
    fit(module, source, epochs=2)
    (stage,) = module.stage
    assert np.abs(np.nan_to_num(stage.centroids.numpy() - first)).max() > 1e-4


def test_moving_anchors_of_a_trainer() -> None:
    source = draw_source(0)
    module = make("MovingAdaptation", source)
    network, losses = copy.deepcopy(module.network), record_losses(module)
    fit(module, source)
    optimizer, batches = torch.optim.SGD(network.parameters(), lr=1e-3), []
    for batch in source:  # The same steps by hand, in train mode.
        features, _ = copy.deepcopy(network)(batch[0])
        batches.append((rows(features), resized(batch[1])))
        anchors, _ = oracles.stream_anchors(batches, NUM_CLASSES, DIM, momentum=0.01)
        expected = step_by_hand(copy.deepcopy(network), None, batch, anchors)
        assert losses[len(batches) - 1] == pytest.approx(expected, rel=1e-4)
        if len(batches) == 1:
            module_step = make("MovingAdaptation", source)
            module_step.network = network
            optimizer.zero_grad()
            step = {"source": batch, "target": batch[0].flip(0)}
            module_step.training_step(step, 0).backward()
            optimizer.step()
    np.testing.assert_allclose(module.anchors.compute().numpy(), anchors, rtol=1e-4, atol=1e-5)
    assert "anchors.means" in module.state_dict()  # A child: in the checkpoint.


def rank_main(rank: int, folder: str, port: int) -> None:
    """Both modules of the page and the wrong way, on one of two ranks."""
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    source, report = draw_source(rank), {}
    for name in ("Adaptation", "MovingAdaptation", "wrong"):
        module = make("MovingAdaptation" if name == "wrong" else name, source)
        if name == "wrong":  # `update` in each step.
            anchors = module.anchors = anchorda.CategoryAnchors(NUM_CLASSES, DIM)

            def wrong(batch: dict[str, Any], index: int, module: Any = module) -> Tensor:  # noqa: ANN401
                features, logits = module.network(batch["source"][0])
                labels = anchorda.resize_labels(batch["source"][1], features.shape[2:])
                module.anchors.update(features.detach(), labels)
                loss: Tensor = module.discriminate(logits, labels)
                return loss

            module.training_step = wrong
        fit(module, source, strategy="ddp", devices=2)
        if name == "Adaptation":
            report[name] = {"centroids": module.stage[0].centroids}
        else:
            anchors = module.anchors
            report[name] = anchors.state_dict()
    torch.save(report, Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, rank_main, str(folder), free_port(), seconds=300)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def counts_of(ranks: int) -> Labels:
    counts = np.zeros(NUM_CLASSES, np.int64)
    for rank in range(ranks):
        for _, labels in draw_source(rank):
            small = resized(labels)
            counts += np.bincount(small[small < NUM_CLASSES], minlength=NUM_CLASSES)
    return counts


def test_a_stage_of_two_processes_is_one_of_both_shares(reports: list[dict[str, Any]]) -> None:
    network = make("Adaptation", []).network.eval()
    expected = by_hand(network, draw_source(0) + draw_source(1))
    assert np.isfinite(expected[3]).all()  # Which rank 0 has never seen.
    for report in reports:
        got = report["Adaptation"]["centroids"].numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_moving_anchors_count_the_batches_of_both_ranks(reports: list[dict[str, Any]]) -> None:
    first, second = (report["MovingAdaptation"] for report in reports)
    assert all(torch.equal(first[buffer], second[buffer]) for buffer in first)
    assert first["counts"].tolist() == counts_of(2).tolist()
    assert first["counts"][3] > 0


def test_updates_in_the_step_are_rank_0_s_alone(reports: list[dict[str, Any]]) -> None:
    """The row of the table that is wrong: what rank 1 saw in the first step is gone."""
    mine, other = (report["wrong"]["counts"] for report in reports)
    assert mine.tolist() == counts_of(1).tolist()
    assert mine[3] == 0
    labels = resized(draw_source(0)[0][1])
    last = resized(draw_source(1)[1][1])
    counts = np.bincount(labels[labels < 4], minlength=4) + np.bincount(last[last < 4], minlength=4)
    assert other.tolist() == counts.tolist()
