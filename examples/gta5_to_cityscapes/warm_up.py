"""The warm-up: source training, with or without output-space adversarial alignment (AdaptSegNet).

AdaptSegNet: Tsai et al., CVPR 2018, on a single level.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from data import Data
from engine.loop import Batch, Term
from limits import Count, Positive, Weight
from method import source_term
from networks.segmenter import autocast, enlarge, segment
from torch import Tensor, nn


@dataclass(frozen=True)
class WarmUpSettings:
    """The warm-up, which trains the network that labels the target for stage 1."""

    warmup: Literal["source", "adversarial"] = "source"
    """Train on the source alone, or also align the target's predictions with it (AdaptSegNet)."""
    warmup_checkpoint: Path | None = None
    """Checkpoint of an earlier warm-up to start from, instead of training one."""
    warmup_iterations: Count = 900
    """Iterations of the warm-up, and of the baseline."""
    warmup_batch: Positive = 4
    """Images of each domain in a step of the warm-up."""
    warmup_learning_rate: Weight = 0.003
    """Learning rate at the start of the warm-up."""
    adversarial_weight: Weight = 0.001
    """Weight of the loss that aligns the target's predictions."""
    discriminator_learning_rate: Weight = 1e-4
    """Learning rate of the discriminator, whose optimizer is Adam."""
    baseline: bool = False
    """First train a network on the source without augmentation, to compare with."""

    def check(self) -> None:
        """Raise a ValueError that names the flags which do not fit together."""
        if self.warmup_checkpoint is not None and not self.warmup_checkpoint.is_file():
            raise ValueError(f"there is no warm-up checkpoint {self.warmup_checkpoint}")


def source_losses(networks: nn.ModuleDict, batch: Batch, *, data: Data) -> dict[str, Term]:
    """Return the cross-entropy of the source alone."""
    images, labels = batch
    network = networks["network"]
    _, logits = segment(network, data.augment(images))
    logits = enlarge(network, logits, labels.shape[1:])
    return {"source": source_term(logits, labels, data.class_weight)}


def adversarial_losses(
    networks: nn.ModuleDict, batch: Batch, *, data: Data, weight: float
) -> dict[str, Term]:
    """Return the losses of the source, of the alignment, and of the discriminator."""
    source, labels, target = batch
    network, discriminator = networks["network"], networks["discriminator"]
    _, logits = segment(network, data.augment(torch.cat([source, target])))
    source_logits, target_logits = enlarge(network, logits, labels.shape[1:]).split(len(source))
    with autocast(network, logits.device):
        alignment = alignment_loss(discriminator, target_logits)
        discrimination = discrimination_loss(discriminator, source_logits, target_logits)
    images = logits.new_tensor(len(target), dtype=torch.float32)
    return {
        "source": source_term(source_logits, labels, data.class_weight),
        "adversarial": Term(weight * alignment, images),
        "discriminator": Term(discrimination, images),
    }


class Discriminator(nn.Module):
    """Classifier of domains by maps of class probabilities, with one logit per patch.

    Five convolutions 4×4 with stride 2, leaky ReLUs of slope 0.2 between them.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = (num_classes, 64, 128, 256, 512)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 2, padding=1))

    def forward(self, probabilities: Tensor) -> Tensor:
        """Return logits (N, 1, h, w), positive for source, of probabilities (N, C, H, W)."""
        logits: Tensor = self.layers(probabilities)
        return logits


def alignment_loss(discriminator: nn.Module, target: Tensor) -> Tensor:
    r"""Return the network's loss: the discriminator should call target predictions source.

    .. math:: -\mathrm{mean} \log \sigma(D(\mathrm{softmax}(z^t)))

    The discriminator gets no gradient from it.

    Args:
        discriminator: D.
        target: (N, C, H, W), logits z of the target at the size of the images.
    """
    fixed = {name: value.detach() for name, value in discriminator.named_parameters()}
    judged = torch.func.functional_call(discriminator, fixed, (target.softmax(dim=1),))
    return _cross_entropy(judged, 1.0)


def discrimination_loss(discriminator: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    r"""Return the loss of the discriminator, on predictions that get no gradient from it.

    .. math:: -\tfrac12 \mathrm{mean} \log \sigma(D(\mathrm{softmax}(z^s)))
              -\tfrac12 \mathrm{mean} \log (1 - \sigma(D(\mathrm{softmax}(z^t))))
    """
    judged_source = discriminator(source.detach().softmax(dim=1))
    judged_target = discriminator(target.detach().softmax(dim=1))
    return 0.5 * (_cross_entropy(judged_source, 1.0) + _cross_entropy(judged_target, 0.0))


def _cross_entropy(logits: Tensor, truth: float) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))
