"""Strong photometric augmentation of image batches."""

import kornia.augmentation as K
import torch
from torch import Tensor

# The ranges are wide on purpose: they reach from haze to dusk, so that a network trained on
# daylight meets dark, tinted and noisy images before it leaves its source domain.
_STRONGEST = K.AugmentationSequential(
    K.RandomGamma((0.6, 2.0), p=1.0),
    K.ColorJitter(
        brightness=(0.1, 1.5), contrast=(0.5, 1.6), saturation=(0.3, 1.6), hue=0.05, p=1.0
    ),
    K.RandomRGBShift(0.08, 0.08, 0.08, p=1.0),
    K.RandomGrayscale(p=0.1),
    K.RandomGaussianBlur((5, 5), (0.1, 1.2), p=1.0),
    K.RandomGaussianNoise(std=0.04, p=1.0),
)


def photometric(images: Tensor) -> Tensor:
    """Change color, light and sharpness of each image at random, as weather and cameras do.

    Each image is blended with its strongest version by a weight of its own, so that mild changes
    are common however far the ranges reach; without it a network hardly meets its source domain.

    Args:
        images: (N, 3, H, W), floating point in [0, 1]; not modified.

    Returns:
        Images of the same shape in [0, 1]; their random numbers are of torch's global generator.
    """
    weight = torch.rand(len(images), 1, 1, 1).to(images)
    return images.lerp(_STRONGEST(images), weight).clamp(0, 1)
