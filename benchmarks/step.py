"""One step of a stage of the example: operations, seconds, the blocks' share, peak memory.

    python benchmarks/step.py                                        # the small network
    python benchmarks/step.py --preset gta5                          # the paper's, best on a GPU
    python benchmarks/step.py --preset gta5 --precision bfloat16
    python benchmarks/step.py --preset gta5 --stage-batch 1          # the same on a CPU

Images are drawn, not read; all that a step of the example does with them is timed: labeling by the
frozen network, augmentation, losses, gradients, the optimizer. The blocks are then timed alone, on
features and logits of the same sizes: both pseudo-labelers, the filters over labels, and the losses
with their gradients. The row, in Markdown, goes to the terminal.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gta5_to_cityscapes"))

import torch
import train
from classes import IGNORE, NUM_CLASSES
from loop import Objective, back_propagate
from network import Segmenter
from seeds import markdown
from settings import Settings, parse_settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import anchorda

REPEATS = 7


def seconds(run: Callable[[], object], device: torch.device) -> list[float]:
    """Of every repeat, after a first that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return times[1:]


def drawn_stage(network: Segmenter, settings: Settings) -> train.Stage:
    """A stage with anchors drawn around zero, which label about half of the pixels."""
    anchors = torch.rand(NUM_CLASSES, network.feature_dim, device=settings.device)
    labeler = anchorda.StageLabeler(
        network, anchors, extract=lambda net, images: train.segment(net, images, settings)
    )
    counts = torch.ones(NUM_CLASSES, dtype=torch.int64, device=settings.device)
    return train.Stage(labeler, counts)


def blocks(
    features: Tensor, logits: Tensor, labels: Tensor, anchors: Tensor, weight: float
) -> None:
    """What of a step is anchorda's, with half of the images as source and half as target."""
    source, target = features.detach().chunk(2)
    by_anchor = anchorda.AnchorPseudoLabeler(0.0)(target, anchors).labels
    by_probability = anchorda.ProbabilityPseudoLabeler(0.1)(logits.detach().chunk(2)[1]).labels
    features = features.detach().requires_grad_()
    logits = logits.detach().requires_grad_()
    source, target = features.chunk(2)
    source_logits, target_logits = logits.chunk(2)
    resized = anchorda.resize_labels(labels, features.shape[2:])
    correct = anchorda.keep_correct(resized, source_logits)
    loss = weight * anchorda.anchor_distance_loss(source, correct, anchors)
    for guess in (by_anchor, by_probability):
        loss = loss + anchorda.discriminative_loss(target_logits, guess)
        loss = loss + weight * anchorda.anchor_distance_loss(target, guess, anchors)
    loss.backward()


def main() -> None:
    """Print the row."""
    settings = parse_settings(sys.argv[1:])
    device = torch.device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    network = train.new_network(settings)
    stage = drawn_stage(network, settings)
    optimizer, _ = train.make_optimizer(network, settings.stage_learning_rate, 10, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
    count, (height, width) = settings.stage_batch, settings.crop
    source, target = torch.rand(2, count, 3, height, width, device=device).unbind()
    labels = torch.randint(NUM_CLASSES, (count, height, width), device=device)
    labels[:, : height // 8] = IGNORE

    objective = Objective(
        nn.ModuleDict({"network": network}),
        lambda networks, batch: train.paper_losses(
            networks, batch, stage=stage, class_weight=None, settings=settings
        ),
    ).train()

    def step() -> None:
        back_propagate(objective, [source, labels, target], settings.accumulate, scaler)
        scaler.step(optimizer)
        optimizer.zero_grad()
        scaler.update()

    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops() / 1e12
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = seconds(step, device)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e9
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with torch.no_grad():
        features, logits = train.segment(network, torch.cat([source, target]), settings)
    anchors, weight = stage.labeler.centroids, settings.distance_weight
    alone = seconds(lambda: blocks(features, logits, labels, anchors, weight), device)
    total, share = statistics.median(whole), statistics.median(alone)
    print(
        markdown(
            [
                *("network", "crops", "precision", "device", "10¹² operations"),
                *("s a step", "blocks, s", "share", "GB"),
            ],
            [
                [
                    *(settings.network, f"{count} + {count} of {width}×{height}"),
                    *(settings.precision, device.type, f"{operations:.3g}"),
                    *(f"{total:.3f}", f"{share:.4f}"),
                    *(f"{100 * share / total:.1f} %", f"{memory:.1f}"),
                ]
            ],
        )
    )


if __name__ == "__main__":
    main()
