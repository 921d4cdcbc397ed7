"""Adapt a segmentation network to your own images: the method, to read, run and copy.

    python examples/segmentation.py --source DIR --target DIR --classes FILE --output runs/own
    python examples/segmentation.py --predict FOLDER --output runs/own

DIR holds ``images/`` and ``labels/``, which ``image_folders.py`` describes and reads into memory.
Target images with a label are for the evaluation alone; if all have one, every third is.
"""

import copy
import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import kornia.augmentation as K
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import anchorda
import image_folders
from image_folders import IGNORE, Batch, Data, DataError, Domain, open_data
from light_network import build_network

MARK = 256  # added to pseudo-labels, to tell them from pasted true labels
DECAY = 0.98  # of moving averages of the weights


@dataclasses.dataclass(frozen=True)
class Options:
    """Adapt a segmentation network from labeled source images to unlabeled target images."""

    output: Path  # Folder for the results.
    source: Path | None = None  # Folder with images/ and labels/.
    target: Path | None = None  # Folder with images/, and labels/ of those to evaluate on, if any.
    classes: Path | None = None  # Text file, a class a line: `name: id, id`, or `name`.
    predict: Path | None = None  # Write masks of the images in this folder instead of training.
    size: Annotated[tuple[int, int], tyro.conf.arg(metavar="H W")] = (180, 240)  # Size of images.
    network: str = ""  # `module:function`, a network in place of `LightNetwork`.
    labels: Literal["probability", "agree", "rectify"] = "probability"  # With anchors, or without.
    teacher: Literal["average", "stage"] = "average"  # Labels by a moving average, or a fixed copy.
    mix: bool = True  # Paste pixels of source classes into the target images.
    best_by: Literal["last", "source", "information", "agreement"] = "last"  # Choice in a stage.
    control: bool = False  # Also train as many steps on the source alone, to compare with.
    warmup_iterations: int = 360  # Steps of the warm-up, at most.
    stages: int = 3  # Rounds of labeling the target and training on it.
    stage_iterations: int = 60  # Steps of a stage.
    batch: int = 4  # Images of each domain in a step.
    rate: float = 1e-3  # Learning rate at the start of a phase.
    seed: int = 0  # Seed of all that is drawn at random.
    threads: int = torch.get_num_threads()  # CPU threads.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # Where to train.
    resume: bool = False  # Go on after the last finished phase of an interrupted run.


def at_full_size(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits at the resolution of the images."""
    maps = [F.interpolate(x, images.shape[2:], mode="bilinear") for x in network(images)]
    return maps[0], maps[1]


def crop(images: Tensor, labels: Tensor) -> Batch:
    """Draw crops, of other scales and half of them flipped."""
    height, width = (length * 3 // 4 for length in labels.shape[1:])
    resized = K.RandomResizedCrop((height, width), scale=(0.3, 1.0))
    draw = K.AugmentationSequential(resized, K.RandomHorizontalFlip(), data_keys=["input", "mask"])
    images, masks = draw(images, labels[:, None].float())
    return images, masks[:, 0].long()


def distort(images: Tensor) -> Tensor:
    """Change color, light and sharpness strongly."""
    color, gray = K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.1)
    draw = K.AugmentationSequential(color, gray, K.RandomGaussianBlur((5, 5), (0.1, 2.0), p=0.5))
    distorted: Tensor = draw(images)
    return distorted


def mix(source: Batch, target: Batch, classes: int) -> Batch:
    """Paste pixels of some classes of a source image into a target image (arXiv 2007.08702)."""
    paste = K.RandomTransplantation(excluded_labels=[IGNORE], data_keys=["input", "mask"])
    images, labels = (torch.cat(parts) for parts in zip(target, source, strict=True))
    acceptors, donors = torch.arange(len(images)).chunk(2)
    for _ in range(classes):
        pairs = {"batch_prob": torch.ones(len(images)), "acceptor_indices": acceptors}
        images, labels = paste(images, labels, params={**pairs, "donor_indices": donors})
    return images[: len(acceptors)], labels[: len(acceptors)]


Objective = Callable[[nn.Module, Batch, Tensor], Tensor]  # of network, source, and target images
BeginStage = Callable[[nn.Module, Data, Options], Objective]  # of the network it starts from


def source_alone(network: nn.Module, data: Data, options: Options) -> Objective:
    """Begin the warm-up or a stage of the control."""
    weights = data.class_weights().to(options.device)

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        images, labels = crop(*source)
        _, logits = at_full_size(network, distort(images))
        return anchorda.discriminative_loss(logits, labels, weight=weights)

    return objective


Label = Callable[[nn.Module, Tensor], Batch]  # of network and target: labels, weights (N, H, W)
BeginLabels = Callable[[nn.Module, Data, Options], Label]


@torch.no_grad()
def freeze(network: nn.Module, data: Data, options: Options) -> anchorda.StageLabeler:
    """Return what labels the target: a copy of the network, and its anchors if they are asked."""
    features, _ = network.eval()(data.target.batch(torch.arange(1), options.device)[0])
    shape = len(data.classes), features.shape[1]
    if options.labels == "probability":
        stage = anchorda.StageLabeler(network, torch.zeros(shape), extract=at_full_size)
    else:
        anchors = anchorda.CategoryAnchors(*shape).to(options.device)
        covariance = anchorda.WithinClassCovariance(*shape).to(options.device)
        batches = data.source.batches(options.batch, options.device)
        stage = anchorda.StageLabeler.from_source(
            network, batches, anchors, covariance=covariance, extract=at_full_size
        )
    stage.to(options.device).rule = options.labels
    return stage


def label_all(network: nn.Module, data: Data, options: Options) -> Label:
    """Begin to label every target pixel; a label weighs as much as its probability."""
    stage = freeze(network, data, options)

    def label(network: nn.Module, target: Tensor) -> Batch:
        if options.teacher == "average":
            stage.follow(network, DECAY)
        labels, _, (_, scores) = stage(target)
        return labels, scores

    return label


def self_training(
    network: nn.Module, data: Data, options: Options, begin_labels: BeginLabels = label_all
) -> Objective:
    """Begin a stage that trains on labels of the target, pasted over by pixels of the source."""
    weights = data.class_weights().to(options.device)
    label = begin_labels(network, data, options)

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        source, (target, _) = crop(*source), crop(target, source[1])
        pseudo, of_pixels = label(network, target)
        mixed = target, pseudo + MARK
        if options.mix:
            mixed = mix(source, mixed, classes=len(data.classes) // 2)
        _, logits = at_full_size(network, distort(torch.cat([source[0], mixed[0]])))
        on_source, on_mixed = logits.chunk(2)
        loss = anchorda.discriminative_loss(on_source, source[1], weight=weights)
        # Only true labels are weighted: on pseudo-labels, errors of rare classes would grow.
        labels, is_pseudo = mixed[1] % MARK, mixed[1] >= MARK
        of_true = weights[labels.clamp(max=len(weights) - 1)]
        of_pixels = torch.where(is_pseudo, of_pixels, of_true)
        mixed_loss = anchorda.discriminative_loss(on_mixed, labels, pixel_weights=of_pixels)
        return (loss + mixed_loss) / 2

    return objective


def train(
    name: str, network: nn.Module, objective: Objective, data: Data, options: Options, steps: int
) -> Iterator[nn.Module]:
    """Minimize an objective; yield the moving average of the network after each step."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), options.rate, fused=True)
    rate = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps) ** 0.9)
    for _ in (progress := tqdm(range(steps), name)):
        draw = options.batch, options.device
        source, (target, _) = data.source.draw(*draw), data.target.draw(*draw)
        loss = objective(network.train(), source, target)
        if not loss.isfinite():
            raise FloatingPointError(f"{name}: the loss is {loss}. Try a lower --rate.")
        progress.set_postfix(loss=f"{loss:.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        average.update_parameters(network)
        yield average.module


@torch.no_grad()
def score(network: nn.Module, by: str, data: Data, options: Options) -> float:
    """Return the mean IoU on held-out source, or a score of the unlabeled target."""
    if by == "source":
        return evaluate(network, data.held_out, data, options)["mean"]
    information, agreement = (
        anchorda.InformationMaximization(),
        anchorda.LabelAgreement(len(data.classes)),
    )
    for images, _ in data.target.batches(options.batch, options.device):
        (_, logits), (_, flipped) = (network.eval()(x) for x in (images, images.flip(3)))
        information.update(logits)
        agreement.update(logits.argmax(1), flipped.flip(3).argmax(1))
    return (information if by == "information" else agreement).compute().item()


def best(
    averages: Iterable[nn.Module], steps: int, by: str, data: Data, options: Options
) -> nn.Module:
    """Return the last network, or the one with the best score; stop when it gets no better."""
    if by == "last":
        return deque(averages, 1).pop()
    best_score, best_step = -float("inf"), 0
    for step, average in enumerate(averages, 1):
        if step % min(50, max(1, steps // 6)) == 0 or step == steps:
            value = score(average, by, data, options)
            if value > best_score:
                network, best_score, best_step = copy.deepcopy(average), value, step
        if step >= best_step + 200:
            break
    print(f"step {best_step} is the best by {by}: {best_score:.3f}")
    return network


def run_phase(
    name: str, number: int, network: nn.Module, begin: BeginStage, data: Data, options: Options
) -> nn.Module:
    """Return the moving average of a network after the warm-up, number 0, or after a stage."""
    network, path = copy.deepcopy(network), options.output / "phases" / f"{name}-{number}.pt"
    fixed = ["size", "network", "warmup_iterations", "stage_iterations", "batch", "rate", "seed"]
    fixed += ["labels", "teacher", "mix", "best_by"] if number else []
    settings = {name: getattr(options, name) for name in fixed}
    settings |= {"images": [len(domain.images) for domain in data[1:5]], "classes": data.classes}
    if options.resume and path.exists():
        network.load_state_dict(image_folders.load_weights(path, settings))
        return network
    torch.manual_seed(options.seed + 1000 * number)
    objective = begin(network, data, options)
    steps = options.stage_iterations if number else options.warmup_iterations
    averages = train(f"{name} {number}", network, objective, data, options, steps)
    network = best(averages, steps, options.best_by if number else "source", data, options)
    saved = {"settings": settings, "weights": network.state_dict()}
    image_folders.save(path, partial(torch.save, saved))
    return network


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    """Return the most probable classes as maps (N, H, W) of a size (H, W)."""
    _, logits = network.eval()(images.to(next(network.parameters()).device))
    return F.interpolate(logits, size, mode="bilinear").argmax(1)


def evaluate(network: nn.Module, domain: Domain, data: Data, options: Options) -> dict[str, float]:
    """Return the IoU of each class, NaN where it has no truth, and their mean."""
    confusion = anchorda.ConfusionMatrix(len(data.classes)).to(options.device)
    for images, labels in domain.batches(options.batch, options.device):
        confusion.update(predict(network, images, options.size), labels)
    iou = torch.where(confusion.counts.sum(1) > 0, confusion.iou(), torch.nan)
    return dict(zip([*data.classes, "mean"], [*iou.tolist(), iou.nanmean().item()], strict=True))


def run(options: Options, data: Data, begin_stage: BeginStage = self_training) -> None:
    """Train, evaluate, and write network, pictures and scores."""
    torch.manual_seed(options.seed)
    network = build_network(options.network, len(data.classes), options.device)
    networks = {"source only": run_phase("source only", 0, network, source_alone, data, options)}
    controls = {"control": source_alone} if options.control else {}
    for name, begin in {**controls, "adapted": begin_stage}.items():
        networks[name] = networks["source only"]
        for number in range(1, options.stages + 1):
            networks[name] = run_phase(name, number, networks[name], begin, data, options)
    saved = {"network": options.network, "classes": data.classes, "size": options.size}
    saved["weights"] = networks["adapted"].state_dict()
    image_folders.save(options.output / "network.pt", partial(torch.save, saved))
    predictors = {name: partial(predict, x, size=options.size) for name, x in networks.items()}
    shown = data.evaluation if len(data.evaluation.images) else data.target
    pictures = image_folders.draw_pictures(shown, predictors, data.classes)
    image_folders.save(options.output / "pictures.png", partial(pictures.savefig, dpi=100))
    if shown is data.evaluation:
        scores = {name: evaluate(x, shown, data, options) for name, x in networks.items()}
        image_folders.write_scores(options.output / "scores.json", scores)
    print(f"network.pt and pictures.png are in {options.output}.")


def main(arguments: Sequence[str] | None = None, begin_stage: BeginStage = self_training) -> None:
    """Train or predict, as the command line says; another method is another `begin_stage`."""
    options = tyro.cli(Options, args=arguments)
    torch.set_num_threads(options.threads)
    try:
        if options.predict is not None:
            saved = torch.load(options.output / "network.pt", options.device, weights_only=True)
            network = build_network(saved["network"], len(saved["classes"]), options.device)
            network.load_state_dict(saved["weights"])
            how = saved["classes"], saved["size"], partial(predict, network)
            image_folders.write_masks(options.predict, options.output / "masks", *how)
        elif options.source is None or options.target is None or options.classes is None:
            sys.exit("Expected --source, --target and --classes to train, or --predict.")
        else:
            data = open_data(options.source, options.target, options.classes, options.size)
            run(options, data, begin_stage)
    except (DataError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
