"""Photometric augmentation: in range, per image, reproducible, and wide enough for dusk."""

import torch
from augment import photometric
from torch import Tensor


def _images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def _augment(images: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return photometric(images)


def test_result_is_in_range_and_input_untouched() -> None:
    images = _images()
    before = images.clone()
    result = _augment(images, 1)
    assert torch.equal(images, before)
    assert result.shape == images.shape
    assert result.dtype == images.dtype
    assert 0 <= float(result.min()) <= float(result.max()) <= 1


def test_torch_s_global_generator_decides() -> None:
    images = _images()
    assert torch.equal(_augment(images, 1), _augment(images, 1))
    assert not torch.equal(_augment(images, 1), _augment(images, 2))


def test_every_image_gets_its_own_change() -> None:
    same = _images(1).expand(8, -1, -1, -1)
    means = _augment(same, 3).mean((1, 2, 3))
    assert len(set(means.tolist())) == 8


def test_range_reaches_from_dusk_to_overexposure() -> None:
    gray = torch.full((256, 3, 8, 8), 0.5)
    means = _augment(gray, 4).mean((1, 2, 3))
    assert float(means.min()) < 0.12
    assert float(means.max()) > 0.75


def test_some_images_lose_their_color() -> None:
    red = torch.zeros(256, 3, 16, 16)
    red[:, 0] = 0.8
    channels = _augment(red, 5).mean((2, 3))
    spread = (channels.amax(1) - channels.amin(1)) / channels.amax(1)
    assert float(spread.min()) < 0.35 < 0.6 < float(spread.max())


def test_blur_smooths_and_keeps_flat_areas_and_borders() -> None:
    flat = torch.full((64, 3, 12, 12), 0.5)
    result = _augment(flat, 6)
    border, center = result[..., 0, :].mean((1, 2)), result.mean((1, 2, 3))
    torch.testing.assert_close(border, center, atol=0.04, rtol=0)
    stripes = torch.zeros(64, 3, 16, 16)
    stripes[..., ::2] = 1
    result = _augment(stripes, 7)
    contrast = (result[..., ::2].mean((1, 2, 3)) - result[..., 1::2].mean((1, 2, 3))).abs()
    assert float(contrast.min()) < 0.1 < 0.5 < float(contrast.max())


def test_double_precision_and_single_image_work() -> None:
    result = _augment(_images(1).double(), 8)
    assert result.dtype == torch.float64
    assert result.shape == (1, 3, 24, 32)
