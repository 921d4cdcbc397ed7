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
from segmentation import LightNetwork


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
    network.to(device).eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)

    def encode(images: Tensor) -> Tensor:
        maps = levels(normalize(images, mean, std))
        return torch.cat(
            [F.interpolate(x, maps[:2][-1].shape[2:], mode="bilinear") for x in maps], dim=1
        )

    return encode


def train_probe(batches: list[Batch], num_classes: int, device: str, epochs: int = 20) -> nn.Module:
    """Return a linear classifier of standardized features."""
    scale = nn.BatchNorm2d(dim := batches[0][0].shape[1], affine=False, momentum=None)
    probe = nn.Sequential(scale, nn.Conv2d(dim, num_classes, 1)).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for index in torch.cat([torch.randperm(len(batches)) for _ in range(epochs)]).tolist():
        features, labels = (part.to(device) for part in batches[index])
        optimizer.zero_grad()
        anchorda.discriminative_loss(probe(features.float()), labels).backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def evaluate(
    domain: Domain, encode: Predictor, classify: Predictor, num_classes: int, device: str
) -> float:
    """Return the mean IoU in percent, at the size of the images, over the classes that occur."""
    confusion = anchorda.ConfusionMatrix(num_classes).to(device)
    for images, labels in domain.batches(4, device):
        logits = F.interpolate(classify(encode(images)), labels.shape[1:], mode="bilinear")
        confusion.update(logits.argmax(1), labels)
    return 100 * confusion.iou()[confusion.counts.sum(1) > 0].mean().item()


def main(
    source: Path,  # Folder with images/ and labels/.
    target: Path,  # Folder with images/, and labels/ of those to evaluate on.
    classes: Path,  # Text file, a class a line: `name: id, id`, or `name`.
    encoder: str = "",  # `transformers:NAME` or `timm:NAME`; EfficientNet-Lite0 if empty.
    size: tuple[int, int] = (180, 240),  # Height and width of all images.
    device: str = "cuda" if torch.cuda.is_available() else "cpu",  # Where to compute.
) -> dict[str, list[float]]:
    """Print and return the mIoU of each classifier on held-out source and on target images."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    data, encode = open_data(source, target, classes, size), build_encoder(encoder, device)
    share = Domain(*(part[rank::world] for part in data.source))
    batches, began = list[Batch](), time.perf_counter()
    torch.manual_seed(0)  # of the probe
    with torch.no_grad():
        shape = len(data.classes), encode(share.batch(torch.tensor([0]), device)[0]).shape[1]
        anchors = anchorda.CategoryAnchors(*shape).to(device)
        covariance = anchorda.WithinClassCovariance(*shape).to(device)
        for images, labels in share.batches(4, device):
            features = encode(images)
            labels = anchorda.resize_labels(labels, features.shape[2:], mode="majority")
            anchors.update(features, labels)
            covariance.update(features, labels)
            batches.append((features.cpu().half(), labels.cpu()))  # for the probe alone
    for state in (anchors, covariance):
        anchorda.all_reduce(state)
    means, matrix, passed = anchors.compute(), covariance.compute(), time.perf_counter()
    classifiers: dict[str, Predictor] = {
        "Euclidean": lambda x: -anchorda.anchor_distances(x, means),
        "cosine": lambda x: anchorda.anchor_probabilities(x, means, similarity="cosine"),
        "discriminant": anchorda.linear_discriminant(means, matrix).logits,
        "linear probe": train_probe(batches, shape[0], device),
    }
    print(f"One pass {passed - began:.0f} s, probe {time.perf_counter() - passed:.0f} s more.")
    scores, domains = {}, (data.held_out, data.evaluation)
    for name, classify in classifiers.items() if rank == 0 else []:
        scores[name] = [evaluate(x, encode, classify, shape[0], device) for x in domains]
        print(f"{name:12}", *(f"{value:6.1f}" for value in scores[name]), flush=True)
    return scores


if __name__ == "__main__":
    tyro.cli(main)
