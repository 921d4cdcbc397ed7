"""The paper's network: DeepLabV3+ on a ResNet, its weights from files, and frozen batch norm."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.segmenter import Segmenter, weights_error


class DeepLab(Segmenter):
    """DeepLabV3+ at output stride 16, the released CAG-UDA network to the last name and number.

    It sees images as they are, in [0, 1] and RGB: nothing is subtracted from them. While it trains
    with batch norm not frozen, a batch needs two images: a global mean is normalized over it.

    Args:
        num_classes: C.
        depth: of the ResNet, 18, 50 or 101. The paper's is 101; 50 differs in the number of blocks
            alone, 18 is the same with its own kind of block and a quarter of the channels.
    """

    feature_dim = 256
    align_corners = True

    def __init__(self, num_classes: int, depth: int = 101) -> None:
        super().__init__()
        if depth not in _RESNETS:
            raise ValueError(f"Expected `depth` to be one of {[*_RESNETS]}, but got {depth}.")
        self.backbone = _ResNet(_RESNETS[depth])
        self.aspp = _Aspp(512 * _RESNETS[depth].block.expansion)
        self.decoder = _Decoder(64 * _RESNETS[depth].block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, 256, H/4, W/4) and logits (N, C, H/4, W/4), sizes rounded up."""
        low, high = self.backbone(images)
        features, logits = self.decoder(low, self.aspp(high))
        return features, logits


# The modules below are named and nested as the released ones, whose state loads as it is.


class _Basic(nn.Module):
    """The residual block of ResNet-18; its 3×3 convolutions are dilated."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv3(inputs, width, stride, dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.downsample(x), inplace=True)


class _Bottleneck(nn.Module):
    """The residual block of deeper ones; its 3×3 convolution is dilated."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = F.relu(self.bn2(self.conv2(inner)), inplace=True)
        return F.relu(self.bn3(self.conv3(inner)) + self.downsample(x), inplace=True)


_Block = type[_Basic] | type[_Bottleneck]


class _Kind(NamedTuple):
    block: _Block
    counts: tuple[int, int, int, int]
    """Number of blocks of each layer."""


_RESNETS = {
    18: _Kind(_Basic, (2, 2, 2, 2)),
    50: _Kind(_Bottleneck, (3, 4, 6, 3)),
    101: _Kind(_Bottleneck, (3, 4, 23, 3)),
}


class _ResNet(nn.Module):
    """Named as torchvision's, without the classifier; the last layer is dilated, not strided."""

    def __init__(self, kind: _Kind) -> None:
        super().__init__()
        first, second, third, fourth = kind.counts
        inputs = [64] + [width * kind.block.expansion for width in (64, 128, 256)]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _layer(kind.block, inputs[0], 64, 1, [1] * first)
        self.layer2 = _layer(kind.block, inputs[1], 128, 2, [1] * second)
        self.layer3 = _layer(kind.block, inputs[2], 256, 2, [1] * third)
        # For ResNet-18, of which nothing was released: two blocks, so the first two dilations.
        self.layer4 = _layer(kind.block, inputs[3], 512, 1, [2, 4, 8][:fourth])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of the first layer, at stride 4, and of the last, at stride 16."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        low = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        return low, self.layer4(self.layer3(self.layer2(low)))


class _Aspp(nn.Module):
    """Atrous spatial pyramid pooling: several dilations and the whole image, side by side."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.aspp1 = _Atrous(inputs, nn.Conv2d(inputs, 256, 1, bias=False))
        self.aspp2 = _Atrous(inputs, _conv3(inputs, 256, 1, dilation=6))
        self.aspp3 = _Atrous(inputs, _conv3(inputs, 256, 1, dilation=12))
        self.aspp4 = _Atrous(inputs, _conv3(inputs, 256, 1, dilation=18))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inputs, 256, 1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(inplace=True),
        )
        self.conv1 = nn.Conv2d(5 * 256, 256, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(256)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.global_avg_pool(x).expand(-1, -1, *x.shape[2:])
        branches = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), whole]
        x = F.relu(self.bn1(self.conv1(torch.cat(branches, dim=1))), inplace=True)
        dropped: Tensor = self.dropout(x)
        return dropped


class _Atrous(nn.Module):
    def __init__(self, inputs: int, conv: nn.Conv2d) -> None:
        super().__init__()
        self.atrous_conv = conv
        self.bn = nn.BatchNorm2d(256)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)), inplace=True)


class _Decoder(nn.Module):
    def __init__(self, low_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(low_channels, 48, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(48)
        self.last_conv = nn.Sequential(
            *(_conv3(256 + 48, 256), nn.BatchNorm2d(256), nn.ReLU(inplace=True), nn.Dropout(0.5)),
            *(_conv3(256, 256), nn.BatchNorm2d(256), nn.ReLU(inplace=True), nn.Dropout(0.1)),
            nn.Conv2d(256, num_classes, 1),
        )

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low = F.relu(self.bn1(self.conv1(low)), inplace=True)
        high = F.interpolate(high, low.shape[2:], mode="bilinear", align_corners=True)
        features = self.last_conv[:-1](torch.cat([high, low], dim=1))
        return features, self.last_conv[-1](features)


def _layer(
    block: _Block, inputs: int, width: int, stride: int, dilations: Sequence[int]
) -> nn.Sequential:
    first = block(inputs, width, stride, dilations[0])
    outputs = width * block.expansion
    return nn.Sequential(first, *(block(outputs, width, 1, d) for d in dilations[1:]))


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a projection of a block's input to its output's shape; empty if they agree."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _conv3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)


# ----------------------------------------------------------------------------------------- weights


def load_network(network: nn.Module, path: Path) -> None:
    """Load the weights of a whole network, such as a checkpoint of the released code.

    The file holds a state dict, or anything in which there is one of this network, such as
    `{"DeepLab": {"model_state": …}, "iter": …}`; saved from `DataParallel` or not.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it cannot be read, or names or shapes differ, which are listed; the network
            is as it was.
    """
    _load(network, path)


def load_backbone(network: DeepLab, path: Path) -> None:
    """Load the weights of a ResNet in torchvision's layout into the backbone.

    Its classifier is dropped; all else, and what is raised, is as in `load_network`.
    """
    _load(network.backbone, path, dropped=("fc.weight", "fc.bias"))


def _load(module: nn.Module, path: Path, dropped: Sequence[str] = ()) -> None:
    own = module.state_dict()
    found = {
        place: state for place, state in _states(_read(path)) if not own.keys().isdisjoint(state)
    }
    if len(found) != 1:
        holds = f"it holds {len(found)}: {', '.join(found)}" if found else "there is none"
        raise ValueError(
            f"Expected {str(path)!r} to hold one state dict with names like {next(iter(own))!r}, "
            f"but {holds}."
        )
    ((_, state),) = found.items()
    state = {name: value for name, value in state.items() if name not in dropped}
    # Files of torch before 0.4.1 do not count batches, and nothing here depends on the count.
    differences = {
        "missing": [n for n in own if n not in state and not n.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ],
    }
    error = weights_error(path, differences)
    if error is not None:
        raise error
    module.load_state_dict(state, strict=False)


def _states(content: object, place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dict of names and tensors in what a file holds, with the keys that lead to it."""
    if not isinstance(content, dict):
        return
    if all(isinstance(n, str) and isinstance(v, Tensor) for n, v in content.items()):
        yield place, {name.removeprefix("module."): value for name, value in content.items()}
    for key, value in content.items():
        yield from _states(value, f"{place}.{key}".removeprefix("."))


class _Ignored:
    """Stands for a NumPy scalar: the released code saves its score, one, beside the weights."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_NUMPY_SCALAR = (
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
)


def _read(path: Path) -> object:
    with path.open("rb") as file, torch.serialization.safe_globals([*_NUMPY_SCALAR]):
        try:
            content: object = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # Unpickling what is damaged may raise any.
            raise ValueError(
                f"Expected {str(path)!r} to be a file of torch.save that holds tensors and plain "
                "values alone, but it is damaged or holds something else; nothing of it was run."
            ) from error
    return content
