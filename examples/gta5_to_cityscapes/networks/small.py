"""A small network that a CPU can train from nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.segmenter import Segmenter


class SmallSegmenter(Segmenter):
    """A residual encoder to stride 16 and a light decoder back to stride 4, 1.4 million parameters.

    Most of the work is done at strides 8 and 16, where it is cheap: the finer a residual block's
    resolution, the more updates it costs in the same time.

    Args:
        num_classes: C.
        feature_dim: D, the channels of the features that the classifier sees.
    """

    def __init__(self, num_classes: int, feature_dim: int = 64) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.stride4 = nn.Sequential(_conv(3, 24, stride=2), _conv(24, 48, stride=2))
        self.stride8 = nn.Sequential(_conv(48, 96, stride=2), _Residual(96))
        self.stride16 = nn.Sequential(
            _conv(96, 160, stride=2), _Residual(160), _Residual(160, dilation=2)
        )
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(160, 160, 1))
        # Each stride joins the decoder by a sum: cheaper than convolving a concatenation.
        self.join4 = nn.Conv2d(48, feature_dim, 1, bias=False)
        self.join8 = nn.Conv2d(96, feature_dim, 1, bias=False)
        self.join16 = nn.Conv2d(160, feature_dim, 1, bias=False)
        self.decode8 = _conv(feature_dim, feature_dim)
        self.decode4 = nn.Sequential(_conv(feature_dim, feature_dim), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(feature_dim, num_classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D, H/4, W/4) and logits (N, C, H/4, W/4), sizes rounded up."""
        # Channels last is the layout in which the CPU convolves fastest.
        images = images.contiguous(memory_format=torch.channels_last)
        at4 = self.stride4(images - 0.5)
        at8 = self.stride8(at4)
        at16 = self.stride16(at8)
        at16 = self.join16(at16 + self.context(at16))
        at8 = self.decode8(_resize_like(at16, at8) + self.join8(at8))
        features = self.decode4(_resize_like(at8, at4) + self.join4(at4))
        return features, self.classifier(features)


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(channels, channels, dilation=dilation)
        norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(norm.weight)  # at first the block only passes its input on
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False), norm
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def _conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _resize_like(x: Tensor, reference: Tensor) -> Tensor:
    return F.interpolate(x, reference.shape[2:], mode="bilinear", align_corners=False)
