"""A classifier of pixels in one pass over the source: a frozen encoder, anchors, and no training.

    python examples/frozen_features.py --source DIR --target DIR --classes classes.txt

The folders are those of ``segmentation.py``. Several processes, as of ``torchrun``, share the pass.
"""

import importlib
import os
import time
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from kornia.enhance import normalize
from torch import Tensor, nn

import anchorda
from image_folders import Batch, Domain, Predictor, open_data
from light_network import LightNetwork


def build_encoder(name: str, device: str) -> Predictor:
    """Return a frozen encoder: images in [0, 1] to its levels, as channels of one map."""
    kind, _, model = name.partition(":")
    if kind == "timm":
        timm = importlib.import_module("timm")
        network = levels = timm.create_model(model, pretrained=True, features_only=True)
    elif kind == "transformers":
        network = importlib.import_module("transformers").AutoBackbone.from_pretrained(model)
        levels = lambda x: network(x).feature_maps  # noqa: E731
    else:
        network = LightNetwork(2).encoder
        levels = lambda x: [*accumulate(network, lambda y, part: part(y), initial=x)][1:]  # noqa: E731
    network.to(device).eval().requires_grad_(False)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)

    def encode(images: Tensor) -> Tensor:
        maps = levels(normalize(images.to(device), mean, std))
        return torch.cat(
            [F.interpolate(x, maps[:2][-1].shape[2:], mode="bilinear") for x in maps], 1
        )

    return encode


def train_probe(batches: list[Batch], shape: tuple[int, int], seed: int) -> nn.Module:
    """Return a linear classifier of standardized features after 20 epochs."""
    torch.manual_seed(seed)
    scale = nn.BatchNorm2d(shape[1], affine=False, momentum=None)
    probe = nn.Sequential(scale, nn.Conv2d(shape[1], shape[0], 1))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20 * len(batches))
    for index in torch.cat([torch.randperm(len(batches)) for _ in range(20)]).tolist():
        features, labels = batches[index]
        optimizer.zero_grad()
        anchorda.discriminative_loss(probe(features.float()), labels).backward()
        optimizer.step()
        schedule.step()
    return probe.eval().requires_grad_(False)


def evaluate(
    domain: Domain, encode: Predictor, classifiers: dict[str, Predictor], num_classes: int
) -> list[float]:
    """Return mean IoUs in percent, at the size of the images, over the classes that occur."""
    confusions = [anchorda.ConfusionMatrix(num_classes) for _ in classifiers]
    for images, labels in domain.batches(4, "cpu"):
        features = encode(images).cpu()
        for confusion, classify in zip(confusions, classifiers.values(), strict=True):
            logits = F.interpolate(classify(features), labels.shape[1:], mode="bilinear")
            confusion.update(logits.argmax(1), labels)
    return [100 * c.iou()[c.counts.sum(1) > 0].mean().item() for c in confusions]


def main(
    source: Path,  # Folder with images/ and labels/.
    target: Path,  # Folder with images/, and labels/ of those to evaluate on.
    classes: Path,  # Text file, a class a line: `name: id, id`, or `name`.
    encoder: str = "",  # `transformers:NAME` or `timm:NAME`; EfficientNet-Lite0 if empty.
    size: tuple[int, int] = (180, 240),  # Height and width of all images.
    probes: tuple[int, ...] = (0,),  # Seeds of linear probes.
    device: str = "cuda" if torch.cuda.is_available() else "cpu",  # Where to encode.
) -> dict[str, list[float]]:
    """Print and return the mIoU of each classifier on held-out source and on target images."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    data, encode = open_data(source, target, classes, size), build_encoder(encoder, device)
    began, batches = time.perf_counter(), list[Batch]()
    shape = len(data.classes), encode(data.source.batch(torch.tensor([0]), "cpu")[0]).shape[1]
    anchors, covariance = anchorda.CategoryAnchors(*shape), anchorda.WithinClassCovariance(*shape)
    for images, labels in Domain(*(part[rank::world] for part in data.source)).batches(4, "cpu"):
        features = encode(images).cpu()
        labels = anchorda.resize_labels(labels, features.shape[2:], mode="majority")
        anchors.update(features, labels)
        covariance.update(features, labels)
        batches.append((features.half(), labels))  # for the probes alone
    anchorda.all_reduce(anchors)
    anchorda.all_reduce(covariance)
    means, matrix, passed = anchors.compute(), covariance.compute(), time.perf_counter()
    classifiers: dict[str, Predictor] = {
        "Euclidean": lambda x: -anchorda.anchor_distances(x, means),
        "cosine": lambda x: anchorda.anchor_probabilities(x, means, similarity="cosine"),
        "discriminant, equal priors": anchorda.linear_discriminant(means, matrix).logits,
        "discriminant": anchorda.linear_discriminant(means, matrix, priors=anchors.counts).logits,
    }
    classifiers |= {f"linear probe {seed}": train_probe(batches, shape, seed) for seed in probes}
    print(f"One pass {passed - began:.0f} s, probes {time.perf_counter() - passed:.0f} s more.")
    domains = [evaluate(x, encode, classifiers, shape[0]) for x in (data.held_out, data.evaluation)]
    scores = {name: [*of_one] for name, *of_one in zip(classifiers, *domains, strict=True)}
    for name, values in scores.items() if rank == 0 else []:
        print(f"{name:26}", *(f"{value:6.1f}" for value in values))
    return scores


if __name__ == "__main__":
    tyro.cli(main)
