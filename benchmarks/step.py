"""One step of a stage of the example, with anchorda's blocks and with the same written by hand.

    python benchmarks/step.py                                        # the small network
    python benchmarks/step.py --preset gta5                          # the paper's, best on a GPU
    python benchmarks/step.py --preset gta5 --precision bfloat16
    python benchmarks/step.py --preset gta5 --stage-batch 1          # the same on a CPU

Images are drawn, not read; all that a step of the example does with them is timed: labeling by the
frozen network, augmentation, losses, gradients, the optimizer. By hand means the usual way: a
distance map for each class, boolean masks, torch's cross-entropy. The terms of the loss have to be
those of the example's own step with either, or nothing is reported. The blocks are then timed
alone, on features and logits of the same sizes: both pseudo-labelers, the filters over labels, and
the losses with their gradients. With and without take turns. A row for each, in Markdown, goes to
the terminal: operations of the networks, seconds as median (least–most), and the memory
that a step holds beyond the weights and the optimizer's state.
"""

import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gta5_to_cityscapes"))

import torch
import torch.nn.functional as F
from classes import IGNORE, NUM_CLASSES
from data import Data
from engine.loop import Batch, Objective, Term, back_propagate, make_optimizer
from method import Stage, stage_losses
from networks.build import new_network
from networks.segmenter import Segmenter, enlarge, segment
from operators import distance_by_mask, milliseconds, nearest_by_loop, peak_bytes
from readers import LabeledImages, ResizeAndCrop, UnlabeledImages
from seeds import markdown
from settings import Settings, parse_settings
from streams import Loading
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import anchorda

REPEATS = 7
WARM_UPS = 2


class Blocks(NamedTuple):
    """The blocks of the library in a step of the example; ignored labels are 255."""

    label_by_anchor: Callable[[anchorda.StageLabeler, Tensor], Tensor]
    """Of features."""
    label_by_probability: Callable[[anchorda.StageLabeler, Tensor], Tensor]
    """Of logits."""
    resize_labels: Callable[[Tensor, torch.Size], Tensor]
    keep_correct: Callable[[Tensor, Tensor], Tensor]
    """Labels, where the logits agree."""
    classify: Callable[[Tensor, Tensor], Tensor]
    """The loss of logits for labels."""
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The loss of features for labels and anchors."""


WITH_ANCHORDA = Blocks(
    lambda stage, features: stage.by_anchor(features, stage.centroids).labels,
    lambda stage, logits: stage.by_probability(logits).labels,
    anchorda.resize_labels,
    anchorda.keep_correct,
    anchorda.discriminative_loss,
    anchorda.anchor_distance_loss,
)


def anchor_labels_by_hand(stage: anchorda.StageLabeler, features: Tensor) -> Tensor:
    """Return labels by a distance map for each class."""
    nearest, margin = nearest_by_loop(features.float(), stage.centroids)
    return torch.where(margin > stage.by_anchor.min_margin, nearest, IGNORE)


def probability_labels_by_hand(stage: anchorda.StageLabeler, logits: Tensor) -> Tensor:
    """Return labels by the largest of the softmax."""
    probability, best = logits.float().softmax(dim=1).max(dim=1)
    return torch.where(probability > stage.by_probability.min_probability, best, IGNORE)


BY_HAND = Blocks(
    anchor_labels_by_hand,
    probability_labels_by_hand,
    lambda labels, size: F.interpolate(labels[:, None].float(), size)[:, 0].long(),
    lambda labels, logits: labels.where(logits.argmax(dim=1) == labels, IGNORE),
    lambda logits, labels: F.cross_entropy(logits.float(), labels, ignore_index=IGNORE),
    lambda features, labels, anchors: distance_by_mask(features.float(), labels, anchors),
)
WAYS = {"anchorda": WITH_ANCHORDA, "by hand": BY_HAND}


def pseudo_labels(
    blocks: Blocks, stage: anchorda.StageLabeler, features: Tensor, logits: Tensor
) -> dict[str, Tensor]:
    """Return both label maps of the target."""
    return {
        "anchor": blocks.label_by_anchor(stage, features),
        "probability": blocks.label_by_probability(stage, logits),
    }


def block_losses(
    blocks: Blocks,
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    pseudo: Mapping[str, Tensor],
    anchors: Tensor,
    weight: float,
) -> dict[str, Tensor]:
    """Return the losses at the features' resolution; half of the images are source."""
    source, target = features.chunk(2)
    source_logits, target_logits = logits.chunk(2)
    resized = blocks.resize_labels(labels, features.shape[2:])
    correct = blocks.keep_correct(resized, source_logits)
    losses = {"source distance": weight * blocks.pull(source, correct, anchors)}
    for kind, guess in pseudo.items():
        losses[f"{kind} labels"] = blocks.classify(target_logits, guess) / len(pseudo)
        losses[f"{kind} distance"] = weight * blocks.pull(target, guess, anchors) / len(pseudo)
    return losses


def step_losses(
    networks: nn.ModuleDict,
    batch: Batch,
    *,
    blocks: Blocks,
    stage: anchorda.StageLabeler,
    augment: Callable[[Tensor], Tensor],
    weight: float,
) -> dict[str, Term]:
    """Return the losses of `method.stage_losses`, with exchangeable blocks."""
    source, labels, target = batch
    with torch.no_grad():
        pseudo = pseudo_labels(blocks, stage, *segment(stage.network, target))
    network, both = networks["network"], torch.cat([source, target])
    features, logits = segment(network, augment(both))
    whole = enlarge(network, logits[: len(source)], labels.shape[1:])
    losses = {"source": blocks.classify(whole, labels)} | block_losses(
        blocks, features, logits, labels, pseudo, stage.centroids, weight
    )
    return {name: Term(loss, loss.new_ones(())) for name, loss in losses.items()}


def blocks_alone(
    blocks: Blocks,
    stage: anchorda.StageLabeler,
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: float,
) -> None:
    """Return a call of the blocks of a step alone, with gradients, on computed features."""
    pseudo = pseudo_labels(blocks, stage, features.chunk(2)[1], logits.chunk(2)[1])
    features = features.detach().requires_grad_()
    logits = logits.detach().requires_grad_()
    losses = block_losses(blocks, features, logits, labels, pseudo, stage.centroids, weight)
    torch.stack([*losses.values()]).sum().backward()


@torch.no_grad()
def settle(network: Segmenter, images: Tensor) -> None:
    """Fit the statistics of batch norm, without which an untrained network's outputs explode."""
    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1.0
    segment(network.train(), images)
    for layer in layers:
        layer.momentum = 0.1


def clear_minimum(scores: Tensor) -> Tensor:
    """Return the middle of the widest gap between the quartiles: rounding crosses no gap."""
    ordered = scores.flatten().sort().values
    middle = ordered[len(ordered) // 4 : 3 * len(ordered) // 4 + 2]
    widest = middle.diff().argmax()
    return middle[widest : widest + 2].mean()


def drawn_stage(network: Segmenter, images: Tensor) -> Stage:
    """Return a stage whose anchors are features, with minimums that half of them exceed."""
    anchors = torch.zeros(NUM_CLASSES, network.feature_dim, device=images.device)
    labeler = anchorda.StageLabeler(network, anchors, extract=segment)
    with torch.no_grad():
        features, _ = segment(labeler.network, images)
    pixels = features.movedim(1, -1).flatten(0, -2).float()
    labeler.centroids = pixels[torch.randperm(len(pixels), device=pixels.device)[:NUM_CLASSES]]
    _, by_anchor, by_probability = labeler(images)
    labeler.by_anchor = anchorda.AnchorPseudoLabeler(clear_minimum(by_anchor.scores))
    labeler.by_probability = anchorda.ProbabilityPseudoLabeler(clear_minimum(by_probability.scores))
    counts = torch.ones(NUM_CLASSES, dtype=torch.int64, device=images.device)
    return Stage(labeler, counts)


def drawn_batch(settings: Settings) -> list[Tensor]:
    """Return the source images, their labels, an eighth of them ignored, and target images."""
    count, (height, width) = settings.stages.stage_batch, settings.data.crop
    device = settings.run.device
    source, target = torch.rand(2, count, 3, height, width, device=device).unbind()
    labels = torch.randint(NUM_CLASSES, (count, height, width), device=device)
    labels[:, : height // 8] = IGNORE
    return [source, labels, target]


def no_images(settings: Settings) -> Data:
    """Return the augmentation of the settings, and no images: a batch is drawn."""
    transform = ResizeAndCrop(settings.data.resize)
    labeled, unlabeled = LabeledImages([], transform), UnlabeledImages([], transform)
    return Data(
        source=labeled,
        source_whole=labeled,
        held_out=labeled,
        target=unlabeled,
        target_whole=unlabeled,
        evaluation=labeled,
        analysis=None,
        evaluated=(),
        class_weight=None,
        photometric=settings.data.photometric,
        loading=Loading(0, torch.device(settings.run.device)),
    )


@torch.no_grad()
def check_losses(objectives: Mapping[str, Objective], batch: Batch) -> None:
    """Every objective has to have the terms of the first, with the same random numbers."""
    values = {}
    for who, objective in objectives.items():
        torch.manual_seed(0)
        values[who] = {name: term.loss.float() for name, term in objective(batch).items()}
    first = next(iter(values.values()))
    for who, terms in values.items():
        for name, loss in terms.items():
            # A pixel at the very minimum may be labeled by one and not by the other.
            close = torch.isclose(loss, first[name], rtol=2e-3, atol=0.0)
            assert close, f"{who}: {name} is {loss:.6g}, in the example {first[name]:.6g}"


def in_turns(runs: Mapping[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Return ascending seconds of every repeat, after some that are not counted."""
    times: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(WARM_UPS + REPEATS):
        for who, run in runs.items():
            took = milliseconds(run, device) / 1000
            if turn >= WARM_UPS:
                times[who].append(took)
    return {who: sorted(of_one) for who, of_one in times.items()}


def measure(settings: Settings) -> list[list[str]]:
    """Return a row of the table for each way."""
    device = torch.device(settings.run.device).type
    network = new_network(settings.network, settings.run.seed, torch.device(settings.run.device))
    batch = drawn_batch(settings)
    settle(network, batch[2].repeat(2, 1, 1, 1))
    stage = drawn_stage(network, batch[2])
    optimizer = make_optimizer(network, settings.stages.stage_learning_rate, settings.training)
    scaler = torch.amp.GradScaler(device, enabled=network.precision == "float16")
    data, weight = no_images(settings), settings.stages.distance_weight
    networks = nn.ModuleDict({"network": network})
    example = Objective(
        networks, partial(stage_losses, stage=stage, data=data, settings=settings.stages)
    )
    ways = {
        who: Objective(
            networks,
            partial(
                step_losses,
                blocks=blocks,
                stage=stage.labeler,
                augment=data.augment,
                weight=weight,
            ),
        )
        for who, blocks in WAYS.items()
    }
    networks.train()
    check_losses({"the example": example, **ways}, batch)

    def step(objective: Objective) -> None:
        back_propagate(objective, batch, settings.training.accumulate, scaler)
        scaler.step(optimizer)
        optimizer.zero_grad()
        scaler.update()

    steps = {who: partial(step, objective) for who, objective in ways.items()}
    whole = in_turns(steps, device)
    with torch.no_grad():
        both = torch.cat([batch[0], batch[2]])
        features, logits = segment(network, both)
    alone = in_turns(
        {
            who: partial(blocks_alone, blocks, stage.labeler, features, logits, batch[1], weight)
            for who, blocks in WAYS.items()
        },
        device,
    )
    count, (height, width) = settings.stages.stage_batch, settings.data.crop
    rows = []
    for who, run in steps.items():
        with FlopCounterMode(display=False) as counter:
            run()
        total, share = statistics.median(whole[who]), statistics.median(alone[who])
        rows.append(
            [
                *(who, settings.network.network, f"{count} + {count} of {width}×{height}"),
                *(network.precision, device, f"{counter.get_total_flops() / 1e12:.3g}"),
                f"{total:.3f} ({whole[who][0]:.3f}–{whole[who][-1]:.3f})",
                f"{share:.4f} ({alone[who][0]:.4f}–{alone[who][-1]:.4f})",
                *(f"{100 * share / total:.1f} %", f"{peak_bytes(run, device) / 1e9:.2f}"),
            ]
        )
    return rows


def main() -> None:
    """Print the rows."""
    settings = parse_settings(sys.argv[1:])
    stages = settings.stages
    if (stages.labels, stages.objective, stages.mix) != ("both", "paper", False):
        sys.exit("This is the step of the paper's protocol alone, not of self-training.")
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    head = [
        *("blocks", "network", "crops", "precision", "device", "10¹² operations"),
        *("s a step", "blocks alone, s", "share", "GB"),
    ]
    print(markdown(head, measure(settings)))


if __name__ == "__main__":
    main()
