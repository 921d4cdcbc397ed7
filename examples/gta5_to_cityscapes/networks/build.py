"""Networks by name, their initial weights, and the way they are run."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from classes import NUM_CLASSES
from torch import Tensor, nn

from networks.deeplab import DeepLab, load_backbone, load_network
from networks.segmenter import Precision, Segmenter
from networks.small import SmallSegmenter

Name = Literal[
    "small", "light", "deeplab18", "deeplab50", "deeplab101",
    "segformer-b0", "segformer-b1", "segformer-b2", "segformer-b3", "segformer-b4", "segformer-b5",
]  # fmt: skip
NETWORKS: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class NetworkSettings:
    """The network, its initial weights, and how it is run."""

    network: Name = "small"
    """Architecture: small suits a CPU and starts from nothing; light suits a CPU and starts from
    ImageNet weights; deeplab101 is the paper's; segformer needs the package transformers."""
    weights: str | None = None
    """Weights of a whole network to start from.
    DeepLab: a file, such as one of the released code. SegFormer: a folder or a name on the hub."""
    backbone: str | None = None
    """ImageNet weights of the encoder to start from.
    DeepLab: a file of torchvision's ResNet. SegFormer: a folder or a name on the hub."""
    batch_norm: Literal["train", "freeze", "sync"] = "train"
    """Batch norm: train it; freeze its statistics, scale and shift;
    or train it with statistics over all GPUs (sync)."""
    precision: Precision = "float32"
    """Precision of the network, by autocast."""
    compile: bool = False
    """Compile the network with torch.compile."""

    def check(self) -> None:
        """Raise a ValueError that names the flags which do not fit together."""
        if self.network in ("small", "light") and (self.backbone or self.weights):
            raise ValueError("--backbone and --weights are of other networks: choose a --network")
        if self.network.startswith("deeplab"):
            for path in filter(None, (self.backbone, self.weights)):
                if not Path(path).is_file():
                    raise ValueError(f"there is no file of weights {path}")
        if self.backbone and self.weights:
            raise ValueError("--weights are of a whole network, its backbone included: give one")
        _require_package(self.network)


def new_network(
    settings: NetworkSettings, seed: int, device: torch.device, num_classes: int = NUM_CLASSES
) -> Segmenter:
    """Return the network to begin with, the same for the same seed."""
    torch.manual_seed(seed)
    network = build_network(settings.network, num_classes)
    load_weights(network, whole=settings.weights, backbone=settings.backbone)
    network.precision = settings.precision
    if settings.batch_norm == "freeze":
        freeze_batch_norm(network)
    elif settings.batch_norm == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to(device)
    if settings.compile:
        network.compiled = True
        network.compile()
    return network


def build_network(name: str, num_classes: int = NUM_CLASSES) -> Segmenter:
    """Return one of `NETWORKS`, with weights drawn from torch's global generator.

    Raises:
        ValueError: if there is no such network, or it needs a package that is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(f"Expected one of the networks {', '.join(NETWORKS)}, but got {name!r}.")
    if name == "small":
        return SmallSegmenter(num_classes)
    if name.startswith("deeplab"):
        return DeepLab(num_classes, depth=int(name.removeprefix("deeplab")))
    # Imported here: not everybody has these packages, and transformers takes seconds to import.
    _require_package(name)
    if name == "light":
        from networks.light import LightSegmenter

        return LightSegmenter(num_classes)
    from networks.segformer import SegFormer

    return SegFormer(num_classes, size=name.removeprefix("segformer-"))


def _require_package(network: str) -> None:
    needed = {"light": "efficientnet_lite_pytorch", "segformer": "transformers"}
    kind = network.partition("-")[0]
    if kind in needed and importlib.util.find_spec(needed[kind]) is None:
        extra = "segformer" if kind == "segformer" else "examples"
        raise ValueError(
            f"The network {network} needs the package {needed[kind]}, which is not installed. "
            f'Install it with: pip install ".[{extra}]"'
        )


def load_weights(network: Segmenter, *, whole: str | None, backbone: str | None) -> None:
    """Load the weights of a whole network, or of its backbone alone; see the loaders' modules.

    Raises:
        ValueError: if they are of another network; the message lists what differs.
    """
    if whole is None and backbone is None:
        return
    if isinstance(network, DeepLab):
        if whole is not None:
            load_network(network, Path(whole))
        if backbone is not None:
            load_backbone(network, Path(backbone))
        return
    from networks.segformer import SegFormer, load_encoder, load_segformer

    assert isinstance(network, SegFormer)
    if whole is not None:
        load_segformer(network, whole)
    if backbone is not None:
        load_encoder(network, backbone)


def freeze_batch_norm(network: nn.Module) -> None:
    """Fix the statistics, the scale and the shift of every batch norm at what they are now.

    Call it before the optimizer is made: they are buffers then, no parameters.
    """
    # Other modules of the same names replace them. The same ones in evaluation mode would be thawed
    # unnoticed by train(), by a copy or by the conversion to synchronized batch norm.
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, name, _FrozenBatchNorm(child))


class _FrozenBatchNorm(nn.Module):
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name, value in norm.state_dict().items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
