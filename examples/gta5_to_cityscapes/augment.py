"""Strong photometric augmentation of image batches, in plain torch."""

import math

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = (0.299, 0.587, 0.114)


def photometric(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Change color, light and sharpness of each image at random, as weather and cameras do.

    The ranges are wide on purpose: they reach from haze to dusk, so that a network trained on
    daylight meets dark, tinted and noisy pictures before it leaves its source domain.

    Args:
        images: (N, 3, H, W), floating point in [0, 1]; not modified.
        generator: Source of randomness; None takes torch's global one.

    Returns:
        Images of the same shape in [0, 1].
    """
    draw = _Draw(images, generator)
    images = images.pow(draw.factor(0.6, 2.0))
    images = _recolor(images, draw).clamp_(0, 1)
    images = _blur(images, draw.amount(0.0, 1.2))
    noise = torch.empty_like(images).normal_(generator=generator)
    return images.addcmul_(noise, draw.amount(0.0, 0.04)).clamp_(0, 1)


class _Draw:
    """Draws numbers per image, shaped to broadcast over it.

    Each image has a strength that scales all its changes, so that mild ones stay common however
    far the ranges reach; without it a network hardly meets its source domain any more.
    """

    def __init__(self, images: Tensor, generator: torch.Generator | None) -> None:
        self.images = images
        self.generator = generator
        self.strength = self.uniform(0.0, 1.0)

    def uniform(self, low: float, high: float, channels: int = 1) -> Tensor:
        values = self.images.new_empty(len(self.images), channels, 1, 1)
        return values.uniform_(low, high, generator=self.generator)

    def amount(self, low: float, high: float) -> Tensor:
        return self.strength * self.uniform(low, high)

    def factor(self, low: float, high: float, channels: int = 1) -> Tensor:
        exponents = self.uniform(math.log(low), math.log(high), channels)
        return torch.exp(self.strength * exponents)


def _recolor(images: Tensor, draw: _Draw) -> Tensor:
    """Apply hue, saturation, contrast, cast and brightness: all affine, so one matrix product."""
    luma = images.new_tensor(_LUMA)
    eye = torch.eye(3, dtype=images.dtype, device=images.device)
    mean = images.mean((2, 3)).unsqueeze(2)

    # Hue turns colors about the gray axis.
    angle = draw.amount(-0.3, 0.3).squeeze(-1)
    cross = eye.roll(1, 0) - eye.roll(1, 1)
    hue = angle.cos() * eye + (1 - angle.cos()) / 3 + angle.sin() / math.sqrt(3) * cross

    saturation = draw.factor(0.3, 1.6).squeeze(-1)
    saturation = saturation * (draw.uniform(0, 1).squeeze(-1) > 0.1)  # sometimes gray
    color = saturation * eye + (1 - saturation) * luma

    contrast = draw.factor(0.5, 1.6).squeeze(-1)
    light = draw.factor(0.25, 1.4).squeeze(-1) * draw.factor(0.85, 1.18, 3).squeeze(-1)
    matrix = light * (color @ hue)
    offset = matrix @ mean * (1 - contrast)
    flat = torch.baddbmm(offset, matrix * contrast, images.flatten(2))
    return flat.view(images.shape)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own 5x5 Gaussian, one axis after the other."""
    offsets = torch.arange(-2, 3, dtype=images.dtype, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=0.05).flatten(1)) ** 2)
    taps = (kernels / kernels.sum(1, keepdim=True)).view(-1, 5, 1, 1, 1).unbind(1)
    # Sums of shifted views: on a CPU faster than a convolution with one group per channel.
    for axis, border in ((2, (0, 0, 2, 2)), (3, (2, 2, 0, 0))):
        size = images.shape[axis]
        padded = functional.pad(images, border, mode="replicate")
        images = taps[0] * padded.narrow(axis, 0, size)
        for shift, tap in enumerate(taps[1:], start=1):
            images.addcmul_(tap, padded.narrow(axis, shift, size))
    return images
