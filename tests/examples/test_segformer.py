"""SegFormer gives the features that its classifier sees, and loads what `transformers` saves."""

import copy
import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch
from networks import build
from torch import Tensor

import anchorda
from tests.test_released import Payload

pytest.importorskip("transformers", reason="transformers is not installed")
from networks.segformer import SegFormer, load_encoder, load_segformer
from safetensors.torch import load_file, save_file
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

# Millions of parameters, encoder and decoder, as published for the 150 classes of ADE20K.
PUBLISHED = {"b0": 3.8, "b1": 13.7, "b2": 27.5, "b3": 47.3, "b4": 64.1, "b5": 84.7}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a whole network of 19 classes, as `transformers` saves it."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(1)
    SegformerForSemanticSegmentation(SegformerConfig(num_labels=19)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ImageNet classifier, as `transformers` saves it."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(2)
    SegformerForImageClassification(SegformerConfig(num_labels=10)).save_pretrained(folder)
    return folder


def images(height: int = 65, width: int = 98) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_as_published(size: str) -> None:
    with torch.device("meta"):
        network = SegFormer(150, size)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == PUBLISHED[size]
    assert network.feature_dim == (256 if size in ("b0", "b1") else 768)


def test_the_classifier_sees_the_features() -> None:
    network = SegFormer(19).train()
    features, logits = network(images())
    assert features.shape == (2, 256, 17, 25)
    assert logits.shape == (2, 19, 17, 25)
    assert torch.equal(network.classifier(features), logits)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.encoder.parameters())


@pytest.mark.parametrize("size", [(29, 29), (33, 65), (50, 37)])
def test_odd_sizes_are_rounded_up(size: tuple[int, int]) -> None:
    with torch.no_grad():
        features, logits = SegFormer(5).eval()(images(*size))
    stride4 = tuple(-(-length // 4) for length in size)
    assert features.shape == (2, 256, *stride4)
    assert logits.shape == (2, 5, *stride4)


def test_a_copy_of_a_used_network_is_independent() -> None:
    network = SegFormer(5).eval()
    with torch.no_grad():
        before = network(images())
        hooks = [len(module._forward_hooks) for module in network.modules()]
        copied = copy.deepcopy(network)
        for parameter in copied.parameters():
            parameter.add_(0.01)
        fresh = SegFormer(5).eval()
        fresh.load_state_dict(copied.state_dict())
        torch.testing.assert_close(copied(images()), fresh(images()), rtol=0, atol=0)
        torch.testing.assert_close(network(images()), before, rtol=0, atol=0)
    assert not torch.equal(copied(images())[0], before[0])
    assert hooks == [len(module._forward_hooks) for module in network.modules()]


def test_logits_are_those_of_transformers_for_normalized_images(saved: Path) -> None:
    theirs = SegformerForSemanticSegmentation.from_pretrained(saved).eval()
    network = SegFormer(19).eval()
    load_segformer(network, str(saved))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = (images() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(network(images())[1], theirs(normalized).logits)


def test_an_encoder_of_imagenet_loads_and_leaves_the_decoder(encoder: Path) -> None:
    network = SegFormer(19)
    before = copy.deepcopy(network.state_dict())
    load_encoder(network, str(encoder))
    theirs = SegformerForImageClassification.from_pretrained(encoder).segformer.state_dict()
    for name, value in network.state_dict().items():
        inner = name.removeprefix("encoder.")
        assert torch.equal(value, theirs[inner] if inner != name else before[name]), name


def test_what_is_missing_is_listed_and_nothing_is_changed(encoder: Path) -> None:
    network = SegFormer(19)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"missing: .*decode_head.linear_fuse.weight") as raised:
        load_segformer(network, str(encoder))
    assert "unexpected: classifier.bias, classifier.weight" in str(raised.value)
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())
    assert network(images())[0].shape[1] == 256  # the decoder still gives features


def test_a_file_that_lacks_some_and_has_more_is_listed(encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder, tmp_path / "other")
    state = load_file(folder / "model.safetensors")
    del state["segformer.encoder.block.0.1.mlp.dense1.bias"]
    state["more.weight"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    network = SegFormer(19)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="but they differ") as raised:
        load_encoder(network, str(folder))
    missing, unexpected = str(raised.value).splitlines()[1:]
    # Named as in the module, which is up to the version of transformers, not as in the file.
    assert "encoder." + missing.removeprefix("missing: ") in before
    assert unexpected == "unexpected: more.weight"
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())


def test_another_size_or_number_of_classes_is_named(saved: Path, encoder: Path) -> None:
    for load, source in ((load_encoder, encoder), (load_segformer, saved)):
        with pytest.raises(ValueError, match=r"SegFormer of size b1, .* is of size b0\. Choose"):
            load(SegFormer(19, "b1"), str(source))
    with pytest.raises(ValueError, match=r"classifier.bias \(19,\) instead of \(7,\)"):
        load_segformer(SegFormer(7), str(saved))


def test_a_size_without_a_name_is_described(tmp_path: Path) -> None:
    config = SegformerConfig(depths=[1, 1, 1, 1])
    SegformerForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of depths \[1, 1, 1, 1\] and widths \[32, 64, 160"):
        load_encoder(SegFormer(19), str(tmp_path))


def test_a_pickled_file_is_read_but_never_run(encoder: Path, tmp_path: Path) -> None:
    shutil.copy(encoder / "config.json", tmp_path)
    state = load_file(encoder / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    pickled, network = SegFormer(19), SegFormer(19)
    load_encoder(pickled, str(tmp_path))
    load_encoder(network, str(encoder))
    for name, value in network.encoder.state_dict().items():
        assert torch.equal(value, pickled.encoder.state_dict()[name]), name

    torch.save(
        state | {"more": Payload(os.mkdir, str(tmp_path / "made"))}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match="cannot be loaded: Weights only load failed"):
        load_encoder(network, str(tmp_path))
    assert not (tmp_path / "made").exists()


def test_a_damaged_file_is_named(encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder, tmp_path / "damaged")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"damaged' to be a folder .* cannot be loaded"):
        load_encoder(SegFormer(19), str(folder))


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    for source in ("nvidia/mit-b5", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match="to be a folder that save_pretrained has written"):
            load_encoder(SegFormer(19), source)


def test_it_works_in_a_stage_and_in_half_precision() -> None:
    torch.manual_seed(0)
    network = SegFormer(19)
    batch = images(), torch.randint(0, 19, (2, 65, 98))
    anchors = anchorda.CategoryAnchors(19, network.feature_dim)
    stage = anchorda.StageLabeler.from_source(network, [batch], anchors)
    assert stage(images()).labels.shape == (2, 17, 25)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(images())[1].isfinite().all()
    assert network.half()(images().half())[1].isfinite().all()
    assert not {"mean", "std"} & network.state_dict().keys()


def test_by_name(encoder: Path) -> None:
    network = build.build_network("segformer-b0")
    assert isinstance(network, SegFormer)
    build.load_weights(network, whole=None, backbone=str(encoder))
    theirs = SegformerForImageClassification.from_pretrained(encoder).segformer.state_dict()
    assert torch.equal(
        network.state_dict()["encoder." + next(iter(theirs))], next(iter(theirs.values()))
    )


def test_without_transformers_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    settings = build.NetworkSettings(network="segformer-b0")
    for begin in (settings.check, lambda: build.build_network("segformer-b0")):
        with pytest.raises(ValueError, match=r'pip install "\.\[segformer\]"'):
            begin()


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match="Expected `size` to be one of"):
        SegFormer(19, "b6")
    with pytest.raises(ValueError, match="segformer-b5, but got 'unet'"):
        build.build_network("unet")
