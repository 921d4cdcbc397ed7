"""The contract of a network, and the two functions by which the method calls one."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "float16"]


class Segmenter(nn.Module):
    """A segmentation network that also returns the features that its classifier sees.

    A network of your own is a subclass with `feature_dim` and `forward`; name it in `build.py`.
    """

    feature_dim: int
    """D, the channels of the features."""
    align_corners = False
    """The `align_corners` of bilinear interpolation from the logits to the image."""
    precision: Precision = "float32"
    """The dtype of autocast in `segment`."""
    compiled = False
    """True if `torch.compile` runs the network; a copy of the network has to be compiled anew."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D, h, w) and logits (N, C, h, w) of images (N, 3, H, W) in [0, 1]."""
        raise NotImplementedError


def autocast(network: nn.Module, device: torch.device) -> torch.autocast:
    """Return the precision of a network, as a context."""
    dtype = torch.float16 if network.precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=network.precision != "float32")


def segment(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits of images, at the precision of the network."""
    with autocast(network, images.device):
        # Channels last is the layout in which CPUs and tensor cores convolve fastest.
        features, logits = network(images.contiguous(memory_format=torch.channels_last))
    return features, logits


def enlarge(network: nn.Module, logits: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Return logits (N, C, *size), float32, interpolated to the size of the images."""
    aligned = bool(network.align_corners)
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=aligned)


class ImageNetNormalization(nn.Module):
    """Images in [0, 1] with the mean and the deviation that ImageNet's encoders expect."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images, centered and scaled channel by channel."""
        return (images - self.mean) / self.std


def weights_error(source: object, differences: dict[str, list[str]]) -> ValueError | None:
    """Return an error that lists the differences of weights from a network's, or None."""
    lines = [f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names]
    if not lines:
        return None
    message = f"Expected {str(source)!r} to hold the weights of this network, but they differ."
    return ValueError("\n".join([message, *lines]))
