"""Derivatives by `torch.func` and in forward mode: those of `backward`, or an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import anchorda
from tests.oracles import draw

# Of torch's own code, where it loads what forward mode needs.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
FEATURES, LABELS, _, ANCHORS = draw((2, 3, 4), dtype=torch.float64)
ANCHORS[3] = torch.nan
SEVERAL = torch.stack([ANCHORS, ANCHORS.flip(0)], dim=1)
# Functions of the features whose values are finite.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "euclidean": lambda x: anchorda.anchor_distance_loss(x, LABELS, ANCHORS),
    "squared": lambda x: anchorda.anchor_distance_loss(x, LABELS, SEVERAL, distance="squared"),
    "smooth_l1": lambda x: anchorda.anchor_distance_loss(
        x, LABELS, ANCHORS, distance="smooth_l1", average="class"
    ),
    "contrastive": lambda x: anchorda.anchor_contrastive_loss(x, LABELS, ANCHORS),
    "cosine": lambda x: anchorda.anchor_contrastive_loss(x, LABELS, ANCHORS, similarity="cosine"),
    "distances": lambda x: anchorda.anchor_distances(x, ANCHORS)[:, :3],
    "several": lambda x: anchorda.anchor_distances(x, SEVERAL),
    "centroids": lambda x: anchorda.image_centroids(x, LABELS, 4)[0].nan_to_num(),
    "between maps": lambda x: anchorda.feature_distance_loss(x, torch.zeros_like(x)),
}


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Return one of the functions."""
    return FUNCTIONS[request.param]


def jacobian(function: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Return the Jacobian by `backward`, one result after the other."""
    leaf = features.clone().requires_grad_()
    values = function(leaf)
    grads = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values.reshape(-1)]
    return torch.stack(grads).view(*values.shape, *features.shape)


def test_reverse_and_forward_mode(function: Callable[[Tensor], Tensor]) -> None:
    expected = jacobian(function, FEATURES)
    tangent = torch.randn_like(FEATURES)
    directional = (expected * tangent).sum(dim=tuple(range(-FEATURES.ndim, 0)))
    pulled = torch.func.vjp(function, FEATURES)[1]
    (found,) = pulled(torch.ones_like(directional))
    dims = tuple(range(directional.ndim))
    torch.testing.assert_close(found, expected.sum(dim=dims) if dims else expected)
    pushed = torch.func.jvp(function, (FEATURES,), (tangent,))[1]
    torch.testing.assert_close(pushed, directional)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(FEATURES, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, directional)
    if not dims:
        torch.testing.assert_close(torch.func.grad(function)(FEATURES), expected)


# Torch says of its loop over samples that it is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["euclidean", "contrastive", "distances"])
def test_gradients_of_samples(name: str) -> None:
    def of_sample(x: Tensor, y: Tensor) -> Tensor:
        x, y = x[None], y[None]
        if name == "euclidean":
            return anchorda.anchor_distance_loss(x, y, ANCHORS)
        if name == "contrastive":
            return anchorda.anchor_contrastive_loss(x, y, ANCHORS)
        return anchorda.anchor_distances(x, ANCHORS)[:, :3].sum()

    found = torch.func.vmap(torch.func.grad(of_sample))(FEATURES, LABELS)
    expected = [torch.func.grad(of_sample)(x, y) for x, y in zip(FEATURES, LABELS, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_second_derivative_is_an_error_in_every_mode(
    function: Callable[[Tensor], Tensor],
) -> None:
    def total(x: Tensor) -> Tensor:
        return function(x).square().sum()

    leaf = FEATURES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    message = "has no derivative.*differentiable once, in the features"
    with pytest.raises(RuntimeError, match=message):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(torch.func.grad(total), (FEATURES,), (torch.ones_like(FEATURES),))


def test_labels_and_class_sums_carry_no_derivative() -> None:
    leaf = FEATURES.clone().requires_grad_()
    scores = anchorda.AnchorPseudoLabeler()(leaf, ANCHORS).scores
    sums = anchorda.class_sums(leaf, LABELS, 4).sums
    assert not scores.requires_grad
    assert not sums.requires_grad
    of_sums = torch.func.jvp(
        lambda x: anchorda.class_sums(x, LABELS, 4).sums, (FEATURES,), (FEATURES,)
    )
    tangent = of_sums[1]
    assert not tangent.any()
