"""The network: what the method asks of one, and a small one that a CPU can train."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Segmenter(nn.Module):
    """What training asks of a network: any module with this attribute and this forward."""

    feature_dim: int
    """D, the channels of the features that the classifier sees."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D, h, w) and logits (N, C, h, w) of images (N, 3, H, W) in [0, 1]."""
        raise NotImplementedError


class SmallSegmenter(Segmenter):
    """A residual encoder to stride 16 and a decoder back to stride 4, 1.5 million parameters.

    Args:
        num_classes: C.
        feature_dim: D, the channels of the features that the classifier sees.
    """

    def __init__(self, num_classes: int, feature_dim: int = 64) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.stem = _conv(3, 32, stride=2)
        self.stride4 = nn.Sequential(_conv(32, 48, stride=2), _Residual(48), _Residual(48))
        self.stride8 = nn.Sequential(_conv(48, 96, stride=2), _Residual(96), _Residual(96))
        self.stride16 = nn.Sequential(
            _conv(96, 128, stride=2), _Residual(128), _Residual(128, dilation=2)
        )
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(128, 128, 1))
        self.decode8 = _conv(128 + 96, 96)
        self.decode4 = nn.Sequential(_conv(96 + 48, feature_dim), nn.Dropout2d(0.1))
        self.classifier = nn.Conv2d(feature_dim, num_classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D, H/4, W/4) and logits (N, C, H/4, W/4), sizes rounded up."""
        at4 = self.stride4(self.stem(images - 0.5))
        at8 = self.stride8(at4)
        at16 = self.stride16(at8)
        at16 = at16 + self.context(at16)
        at8 = self.decode8(torch.cat([_resize_like(at16, at8), at8], dim=1))
        features = self.decode4(torch.cat([_resize_like(at8, at4), at4], dim=1))
        return features, self.classifier(features)


class _Residual(nn.Module):
    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(channels, channels, dilation=dilation)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(channels),
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
