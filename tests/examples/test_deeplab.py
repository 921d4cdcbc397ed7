"""DeepLabV3+: the released network to the number, weights from files, and frozen batch norm."""

import copy
import io
import json
import math
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks.build import freeze_batch_norm
from networks.deeplab import DeepLab, load_backbone, load_network
from networks.segmenter import Segmenter
from networks.small import SmallSegmenter
from torch import Tensor, nn

from tests.test_released import Payload

IMAGES = torch.rand(2, 3, 33, 50, generator=torch.Generator().manual_seed(0))
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def make(depth: int = 18, *, seed: int = 0) -> DeepLab:
    """Return a network for 5 classes, with statistics of batch norm as after training."""
    torch.manual_seed(seed)
    network = DeepLab(5, depth)
    for name, value in network.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return network.eval()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


def train_step(network: Segmenter, images: Tensor) -> float:
    """Return the loss before a step of training."""
    network.train()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    _, logits = network(images)
    loss = F.cross_entropy(logits, torch.full_like(logits[:, 0], 2, dtype=torch.long))
    loss.backward()
    optimizer.step()
    return loss.item()


# ------------------------------------------------------------------------------------ architecture


def test_outputs_and_state_are_the_released_ones(golden: Path) -> None:
    network = DeepLab(19).eval()
    assert network.feature_dim == 256
    state = network.state_dict()
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes == json.loads((golden / "deeplab_resnet101_state.json").read_text())

    deterministic_tensor = runpy.run_path(str(golden / "inputs.py"))["deterministic_tensor"]
    for name, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(deterministic_tensor(name, tuple(value.shape))))
    image = np.random.RandomState(0).uniform(0, 1, (1, 3, 97, 129)).astype(np.float32)
    outputs: dict[str, Tensor] = {}
    network.backbone.register_forward_hook(lambda _, __, out: outputs.update(backbone_low=out[0]))
    network.aspp.register_forward_hook(lambda _, __, out: outputs.update(aspp=out))
    with torch.no_grad():
        outputs["features"], outputs["logits"] = network(torch.from_numpy(image))

    with np.load(golden / "deeplab_resnet101_forward.npz") as numbers:
        for name, output in outputs.items():
            assert output.shape == tuple(numbers[f"{name}_shape"])
            norm = float(output.double().norm())
            assert norm == pytest.approx(float(numbers[f"{name}_norm"]), rel=3e-7)
            sample = numbers[f"{name}_sample"]
            # Measured: 9e-7 of the largest element.
            difference = np.abs(output.flatten()[::101].numpy() - sample).max()
            assert difference <= 3e-6 * np.abs(sample).max(), name
    assert len(outputs) == 4


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("size", [(33, 65), (50, 37), (64, 96), (1, 1)])
def test_sizes(depth: int, size: tuple[int, int]) -> None:
    with torch.no_grad():
        features, logits = make(depth)(torch.rand(2, 3, *size))
    stride4 = tuple(math.ceil(length / 4) for length in size)
    assert features.shape == (2, 256, *stride4)
    assert logits.shape == (2, 5, *stride4)
    assert features.min() >= 0


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_backbone_is_the_known_one(depth: int) -> None:
    backbone = DeepLab(5, depth).backbone
    # The parameters of torchvision's, less those of its classifier.
    expected = {18: 11_689_512 - 513_000, 50: 25_557_032 - 2_049_000, 101: 44_549_160 - 2_049_000}
    assert sum(parameter.numel() for parameter in backbone.parameters()) == expected[depth]
    dilations = [
        module.dilation[0]
        for module in backbone.layer4.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert dilations == ([2, 2, 4, 4] if depth == 18 else [2, 4, 8])
    assert all(
        module.stride == (1, 1) for module in backbone.layer4.modules() if hasattr(module, "stride")
    )


def test_pyramid() -> None:
    """The image of the golden numbers is too small to tell the larger rates apart."""
    aspp = make().aspp
    convolutions = [
        branch.atrous_conv for branch in (aspp.aspp1, aspp.aspp2, aspp.aspp3, aspp.aspp4)
    ]
    assert [conv.kernel_size for conv in convolutions] == [(1, 1), (3, 3), (3, 3), (3, 3)]
    for rate, conv in zip((6, 12, 18), convolutions[1:], strict=True):
        assert conv.dilation == conv.padding == (rate, rate)


def test_dropout() -> None:
    rates = [module.p for module in make().modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.5, 0.5, 0.1]


def test_unknown_depth() -> None:
    with pytest.raises(ValueError, match=r"one of \[18, 50, 101\], but got 34"):
        DeepLab(5, 34)


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_backbone_is_that_of_transformers(depth: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    basic = depth == 18
    widths = [64, 128, 256, 512] if basic else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(
        hidden_sizes=widths,
        depths={18: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[depth],
        layer_type="basic" if basic else "bottleneck",
    )
    theirs = transformers.ResNetModel(config).eval()
    state = {}
    for name, value in theirs.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
        state[_torchvision_name(name)] = value
    torch.save(state | {"fc.weight": torch.ones(7, 3), "fc.bias": torch.ones(7)}, tmp_path / "f.pt")
    network = make(depth)
    load_backbone(network, tmp_path / "f.pt")

    # The plain ResNet strides where this one dilates.
    for name, module in network.backbone.layer4.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (1, 1)
        if name in ("0.conv1" if basic else "0.conv2", "0.downsample.0"):
            module.stride = (2, 2)
    ours = []
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        module = getattr(network.backbone, layer)
        module.register_forward_hook(lambda _, __, output: ours.append(output))
    with torch.no_grad():
        network.backbone(IMAGES)
        hidden = theirs(IMAGES, output_hidden_states=True).hidden_states[1:]
    assert [output.shape[1] for output in ours] == widths
    for mine, other in zip(ours, hidden, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def _torchvision_name(name: str) -> str:
    name = name.replace("embedder.embedder.convolution", "conv1")
    name = name.replace("embedder.embedder.normalization", "bn1")
    if match := re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", name):
        layer, block, rest = match.groups()
        rest = rest.replace("shortcut.convolution", "downsample.0")
        rest = rest.replace("shortcut.normalization", "downsample.1")
        rest = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", rest)
        rest = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", rest)
        return f"layer{int(layer) + 1}.{block}.{rest}"
    return name


# ----------------------------------------------------------------------------------------- weights


def save_plain(network: DeepLab, path: Path) -> None:
    torch.save(network.state_dict(), path)


def save_parallel(network: DeepLab, path: Path) -> None:
    torch.save(nn.DataParallel(network).state_dict(), path)


def save_without_counts(network: DeepLab, path: Path) -> None:
    state = network.state_dict()
    torch.save({n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}, path)


def save_with_a_score_of_numpy(network: DeepLab, path: Path) -> None:
    content = {"DeepLab": {"model_state": network.state_dict()}, "best_iou": np.float64(0.5)}
    torch.save(content, path)


def save_as_released(network: DeepLab, path: Path) -> None:
    """As the released code does, with the torch and the NumPy of its time."""
    optimizer = torch.optim.SGD(network.parameters(), 0.0, momentum=0.9)
    sum(parameter.sum() for parameter in network.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    parts = {
        "model_state": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "scheduler_state": {"base_lrs": [1e-4], "last_epoch": 7},
    }
    content = {"DeepLab": parts, "iter": 7, "best_iou": np.float64(0.5)}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    now, then = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert now in buffer.getvalue()
    path.write_bytes(buffer.getvalue().replace(now, then))


SAVES = [save_parallel, save_without_counts, save_with_a_score_of_numpy, save_as_released]


@pytest.mark.parametrize("save", [save_plain, *SAVES])
def test_network_is_loaded(save: Callable[[DeepLab, Path], None], tmp_path: Path) -> None:
    saved, network = make(seed=1), make(seed=2)
    assert not same(state_of(saved), state_of(network))
    save(saved, tmp_path / "network.pth")
    load_network(network, tmp_path / "network.pth")
    assert same(state_of(saved), state_of(network))
    with torch.no_grad():
        assert torch.equal(saved(IMAGES)[1], network(IMAGES)[1])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_backbone_is_loaded_without_its_classifier(prefix: str, tmp_path: Path) -> None:
    saved, network = make(seed=1), make(seed=2)
    before = state_of(network)
    state = saved.backbone.state_dict() | {
        "fc.weight": torch.ones(9, 512),
        "fc.bias": torch.ones(9),
    }
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "resnet.pth")
    load_backbone(network, tmp_path / "resnet.pth")
    assert same(state_of(saved.backbone), state_of(network.backbone))
    after = state_of(network)
    assert all(torch.equal(before[n], after[n]) for n in after if not n.startswith("backbone."))


def test_differences_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    network, path = make(), tmp_path / "wrong.pth"
    before = state_of(network)
    state = state_of(make(seed=1))
    del state["aspp.bn1.weight"], state["decoder.bn1.running_var"]
    state["decoder.last_conv.8.bias"] = torch.zeros(19)
    state["fc.bias"] = state["more.weight"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_network(network, path)
    assert str(caught.value).splitlines()[1:] == [
        "missing: aspp.bn1.weight, decoder.bn1.running_var",
        "unexpected: fc.bias, more.weight",
        "of another shape: decoder.last_conv.8.bias (19,) instead of (5,)",
    ]
    assert same(before, state_of(network))


def test_backbone_of_another_depth(tmp_path: Path) -> None:
    torch.save(make(18).backbone.state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"resnet18\.pth") as caught:
        load_backbone(make(50), tmp_path / "resnet18.pth")
    missing, shapes = str(caught.value).splitlines()[1:]
    assert "layer1.0.conv3.weight" in missing
    assert "layer1.0.conv1.weight (64, 64, 3, 3) instead of (64, 64, 1, 1)" in shapes


def test_file_without_the_network_or_with_two(tmp_path: Path) -> None:
    network, path = make(), tmp_path / "other.pth"
    state = network.state_dict()
    torch.save(
        {"FCDiscriminator": {"model_state": nn.Conv2d(1, 1, 1).state_dict()}, "iter": 3}, path
    )
    with pytest.raises(ValueError, match=r"like 'backbone.conv1.weight', but there is none\."):
        load_network(network, path)
    with pytest.raises(ValueError, match=r"like 'conv1.weight', but there is none\."):
        load_backbone(network, path)
    torch.save({"student": state, "ema": {"teacher": state}}, path)
    with pytest.raises(ValueError, match=r"but it holds 2: student, ema\.teacher\."):
        load_network(network, path)


def test_unreadable_files(tmp_path: Path) -> None:
    network, path = make(), tmp_path / "unreadable.pth"
    with pytest.raises(FileNotFoundError, match=r"unreadable\.pth"):
        load_network(network, path)
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    torch.save({"backbone.conv1.weight": Payload(os.mkdir, str(tmp_path / "made"))}, path)
    for content in (path.read_bytes(), whole[: len(whole) // 2], b"no weights", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"unreadable\.pth' to be a file of torch\.save"):
            load_network(network, path)
    assert not (tmp_path / "made").exists()


# -------------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize("make_network", [make, lambda: SmallSegmenter(5)])
def test_frozen_batch_norm_stays(make_network: Callable[[], Segmenter]) -> None:
    thawed = make_network().eval()
    names = [
        f"{prefix}.{name}"
        for prefix, module in thawed.named_modules()
        if isinstance(module, NORMS)
        for name in module.state_dict()
    ]
    assert names
    frozen = copy.deepcopy(thawed)
    freeze_batch_norm(frozen)
    before = state_of(frozen)
    assert same(before, state_of(thawed))
    with torch.no_grad():
        torch.testing.assert_close(frozen(IMAGES), thawed(IMAGES), rtol=0, atol=0)
    copied = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(frozen))

    for network in (frozen, copied):
        train_step(network, IMAGES)
        after = state_of(network)
        assert all(torch.equal(before[name], after[name]) for name in names)
        assert not same(before, after)
    train_step(thawed, IMAGES)
    after = state_of(thawed)
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    assert changed.issuperset(name for name in names if "running" in name)
    assert any(name.endswith("weight") for name in changed)


def test_synchronized_batch_norm_is_frozen_too() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(make())
    freeze_batch_norm(network)
    assert not any(isinstance(module, NORMS) for module in network.modules())
    assert same(state_of(network), state_of(make()))


def test_frozen_network_is_loaded(tmp_path: Path) -> None:
    saved, network = make(seed=1), make(seed=2)
    save_plain(saved, tmp_path / "network.pth")
    freeze_batch_norm(network)
    load_network(network, tmp_path / "network.pth")
    assert same(state_of(saved), state_of(network))
    with torch.no_grad():
        assert torch.equal(saved(IMAGES)[1], network(IMAGES)[1])


# ---------------------------------------------------------------------------------------- training


def test_every_parameter_learns() -> None:
    network = make()
    losses = [train_step(network, IMAGES)]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    losses += [train_step(network, IMAGES) for _ in range(3)]
    assert losses[-1] < losses[0]


def test_one_image_needs_frozen_batch_norm() -> None:
    network = make()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        train_step(network, IMAGES[:1])
    freeze_batch_norm(network)
    assert math.isfinite(train_step(network, IMAGES[:1]))
