"""Parts that the methods of this folder share, over the functions of `segmentation.py`."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parents[1]))

import anchorda
from image_folders import Data
from segmentation import Options


def feature_dim(network: nn.Module, data: Data, options: Options) -> int:
    """Return D, the number of channels of a network's features."""
    images, _ = data.target.batch(torch.arange(1), options.device)
    with torch.no_grad():
        features, _ = network.eval()(images)
    return int(features.shape[1])


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Return a copy that follows the weights of a network: its teacher."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.eval()


def source_loss(logits: Tensor, labels: Tensor, data: Data) -> Tensor:
    """Return the cross-entropy at the resolution of the labels; rare classes weigh more."""
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    weight = (len(data.classes) * data.frequency).clamp(min=1e-3).rsqrt()
    return anchorda.discriminative_loss(logits, labels, weight=weight.to(logits.device))


def at_size(maps: Tensor, size: torch.Size) -> Tensor:
    """Return maps (N, C, *) at the resolution (H, W) of labels."""
    return F.interpolate(maps, size, mode="bilinear")
