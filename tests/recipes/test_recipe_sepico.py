"""The SePiCo page, with a projection head of its shapes and signatures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, flat, rows
from tests.recipes.pages import run_block

NUM_CLASSES, DIM = 19, 512
PAGE = "sepico.md"


class EncoderDecoderProjector(nn.Module):
    """A backbone at stride 8, and `ProjHead`: two convolutions and the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 64, 8, stride=8)
        self.auxiliary_head = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, DIM, 1))

    def extract_auxiliary_feat(self, img: Tensor) -> Tensor:  # noqa: D102
        return F.normalize(self.auxiliary_head(self.backbone(img)), p=2, dim=1)


class SePiCo:
    """What `forward_train` reaches through ``self``."""

    def __init__(self) -> None:
        self.model, self.ema_model = EncoderDecoderProjector(), EncoderDecoderProjector()

    def get_model(self) -> EncoderDecoderProjector:  # noqa: D102
        return self.model

    def get_ema_model(self) -> EncoderDecoderProjector:  # noqa: D102
        return self.ema_model


def draw(palette: Tensor) -> tuple[Tensor, Tensor]:
    """Cells of 8 × 8 that show one class each, of 16, or nothing; some labels are wrong."""
    cells = torch.randint(17, (2, 6, 7))
    shown = palette[cells].permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 48, 56)
    labels = cells.unsqueeze(1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    wrong = torch.rand(labels.shape) < 0.2
    labels = torch.where(wrong, torch.randint(16, labels.shape), labels)
    return shown + 0.5 * torch.randn(shown.shape), torch.where(labels < 16, labels, 255)


@pytest.fixture
def names() -> dict[str, Any]:
    palette = torch.randn(17, 3, 8, 8)
    return {
        "self": SePiCo(),
        "source_stream": [draw(palette) for _ in range(3)],
        "target_img": draw(palette)[0],
        "contrast_temp": 100.0,
    }


def means(names: dict[str, Any]) -> Array:
    batches = []
    for img, labels in names["source_stream"]:
        feat = names["self"].ema_model.extract_auxiliary_feat(img)
        small = [
            oracles.resize_majority(image.numpy(), (6, 7), 0.75, 255) for image in labels.squeeze(1)
        ]
        batches.append((rows(feat), np.stack(small).reshape(-1)))
    return oracles.stream_anchors(batches, NUM_CLASSES, DIM)[0]


def unit(anchors: Array) -> Array:
    return np.asarray(anchors / np.sqrt((anchors**2).sum(axis=1, keepdims=True)))


def test_anchors_are_the_normalized_means(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    expected = means(names)
    np.testing.assert_allclose(names["anchors"].compute().numpy(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(names["centroids"].numpy(), unit(expected), rtol=1e-5, atol=1e-7)
    seen = np.isfinite(expected).all(axis=1)
    assert 10 < seen.sum() < NUM_CLASSES
    norms = np.sqrt((expected[seen] ** 2).sum(axis=1))
    assert norms.max() < 1  # The mean of unit vectors is shorter.


def test_labels_are_those_of_the_largest_cosine(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    run_block(PAGE, 1, names)
    feat = names["self"].ema_model.extract_auxiliary_feat(names["target_img"])
    anchors = unit(means(names))
    minimum = [0.1] * NUM_CLASSES
    labels, margins = oracles.margin_labels(rows(feat), anchors, minimum, True, 255)
    clear = np.abs(margins - 0.1) > 1e-5
    assert np.array_equal(flat(names["pseudo"].labels)[clear], labels[clear])
    active = labels != 255
    assert 0 < active.sum() < labels.size
    cosines = np.nan_to_num(rows(feat) @ anchors.T, nan=-2)
    assert np.array_equal(labels[active], cosines.argmax(axis=1)[active])


def test_a_short_anchor_wins_what_resembles_nothing() -> None:
    """The pitfall of anchors that are not normalized, in the plane."""
    raw = torch.tensor([[1.0, 0.0], [0.0, 0.1]])  # The second class scatters.
    centroids = F.normalize(raw, dim=1)
    feature = F.normalize(torch.tensor([[-0.5, -1.0]]), dim=1)  # Least like the second.
    assert (feature @ centroids.T).argmax().item() == 0
    assert anchorda.anchor_distances(feature, centroids).argmin().item() == 0
    assert anchorda.anchor_distances(feature, raw).argmin().item() == 1


def test_the_paper_s_margin_labels_nothing_and_a_warning_says_so(names: dict[str, Any]) -> None:
    run_block(PAGE, 0, names)
    centroids = names["centroids"]
    feat = names["self"].ema_model.extract_auxiliary_feat(names["target_img"])
    labels = anchorda.AnchorPseudoLabeler(2.5)(feat, centroids).labels
    assert (labels == 255).all()
    with pytest.warns(UserWarning, match="margin"):
        anchorda.warn_unreachable_margins(2.5, centroids)


def test_the_figures_of_the_page() -> None:
    nearest, second = (math.sqrt(2 - 2 * cosine) for cosine in (0.9, 0.8))
    assert (round(nearest, 2), round(second, 2), round(1 - nearest / second, 2)) == (
        0.45,
        0.63,
        0.29,
    )


def test_losses_of_a_step(names: dict[str, Any]) -> None:
    for number in (0, 1, 2):
        run_block(PAGE, number, names)
    feat = rows(names["self"].model.extract_auxiliary_feat(names["target_img"]))
    anchors, labels = unit(means(names)), flat(names["pseudo"].labels)
    seen = np.flatnonzero(np.isfinite(anchors).all(axis=1))
    losses = []
    for x, y in zip(feat, labels, strict=True):
        if y != 255:
            probabilities = oracles.softmax(x @ anchors[seen].T / 100.0)
            losses.append(-math.log(probabilities[seen.tolist().index(int(y))]))
    contrast = sum(losses) / len(losses)
    assert names["contrast"].item() == pytest.approx(contrast, rel=1e-5)
    pulled = oracles.distance_loss(feat, labels, anchors, "squared", "pixel")
    assert names["loss"].item() == pytest.approx(contrast + 0.1 * pulled, rel=1e-5)
    by_cosine = [2 - 2 * x @ anchors[y] for x, y in zip(feat, labels, strict=True) if y != 255]
    assert pulled == pytest.approx(sum(by_cosine) / len(by_cosine))
    parameters = names["self"].model.parameters()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_squares_of_infinite_distances_have_no_gradient() -> None:
    """Why the page multiplies, and does not square distances."""
    features, labels = torch.randn(3, 2, requires_grad=True), torch.tensor([0, 1, 0])
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, torch.nan]])
    squares = anchorda.anchor_distances(features, anchors).square()
    (gradient,) = torch.autograd.grad(F.cross_entropy(-squares, labels), features)
    assert gradient.isnan().any()
    loss = anchorda.anchor_contrastive_loss(features, labels, anchors)
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient.isfinite().all()
