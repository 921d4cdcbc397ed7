"""Second moments of features, and the linear classifier that they make of anchors."""

from contextlib import nullcontext
from typing import NamedTuple, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from . import _ops
from ._checks import (
    check_anchor_groups,
    check_count,
    check_device,
    check_feature_dim,
    check_features,
    check_floating,
    check_labels,
    check_mergeable,
    check_one_per_class,
    check_range,
    check_tensor,
)
from ._ops.reference import has_float64, result_dtype, wide_dtype
from ._state import check_batch, move_buffers, receive_state, reset_state, sent_state


class ClassMoments(NamedTuple):
    """Means and variances of the features of each class; NaN rows where a class is unseen."""

    means: Tensor
    """(C, D) float32."""
    variances: Tensor
    """(C, D) float32: of each channel, divided by the count."""


class LinearDiscriminant(NamedTuple):
    """A linear classifier; see `linear_discriminant`."""

    weight: Tensor
    """(C, D) or (C, M, D) float32; 0 for an unseen class."""
    bias: Tensor
    """(C,) or (C, M) float32; −∞ for an unseen class."""

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (N, C, *) of features (N, D, *): one product, in float32 at least.

        Of several anchors of a class the largest logit counts. Half-precision features are
        converted to float32 first.
        """
        check_features(features)
        check_feature_dim(features, self.weight.shape[-1])
        check_device(features, "features", self.weight, "weight")
        dtype, kind = result_dtype(features), features.device.type
        x, bias = features.to(dtype), self.bias.flatten().to(dtype)
        weight = self.weight.flatten(0, -2).to(dtype)
        available = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if available else nullcontext():
            if features.ndim == 2:
                logits = F.linear(x, weight, bias)
            else:
                weight = weight.expand(len(x), -1, -1)
                logits = torch.baddbmm(bias[:, None], weight, x.flatten(2))
                logits = logits.unflatten(2, features.shape[2:])
        if self.bias.ndim == 2:
            logits = logits.unflatten(1, self.bias.shape).amax(dim=2)
        return logits


def linear_discriminant(
    anchors: Tensor, covariance: Tensor, *, priors: Tensor | None = None, shrinkage: float = 0.01
) -> LinearDiscriminant:
    r"""Return the linear classifier that nearest anchors in the metric of a covariance amount to.

    .. math:: w_k = \Sigma_s^{-1} a_k, \qquad
              b_k = -\frac{1}{2} a_k^\top \Sigma_s^{-1} a_k + \log \pi_k, \qquad
              \Sigma_s = (1 - s)\, \Sigma + s\, \tfrac{\operatorname{tr} \Sigma}{D} I

    The softmax of the logits :math:`w_k^\top x + b_k` is the posterior of Gaussian classes that
    share the covariance and have the priors :math:`\pi_k`. Without priors the largest logit is the
    least Mahalanobis distance :math:`(x - a_k)^\top \Sigma_s^{-1} (x - a_k)`.

    Args:
        anchors: ``(C, D)``, or ``(C, M, D)`` for several of each class, floating point. A row that
            is not finite is absent, and a class without any other row unseen.
        covariance: Σ, ``(D, D)``, floating point, such as that of `WithinClassCovariance`.
        priors: ``(C,)``, how frequent the classes are, scaled to sum 1, such as the counts of the
            source; a class of 0 never wins. ``None`` leaves the logarithms out: equal priors.
        shrinkage: s in [0, 1]: the part of the mean variance that replaces the covariance. Channels
            without variance, as after a ReLU, need s > 0; s = 1 is the Euclidean metric.

    Returns:
        ``LinearDiscriminant(weight, bias)`` on the device of the anchors. Its method ``logits``
        applies it to features ``(N, D, *)``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``shrinkage`` is wrong.

    Source: Fisher's linear discriminant; shrinkage towards the mean variance as in Ledoit and Wolf
    (2004) and scikit-learn.

    >>> anchors = torch.tensor([[0.0, 1.0], [2.0, 0.0], [torch.nan, 0.0]])
    >>> linear_discriminant(anchors, torch.diag(torch.tensor([4.0, 1.0])), shrinkage=0.0)
    LinearDiscriminant(weight=tensor([[0.0000, 1.0000],
            [0.5000, 0.0000],
            [0.0000, 0.0000]]), bias=tensor([-0.5000, -0.5000,    -inf]))
    """
    check_anchor_groups(anchors)
    sigma = _shrunk(covariance, shrinkage)
    dim = anchors.shape[-1]
    if len(sigma) != dim:
        raise ValueError(
            f"Expected `covariance` of shape (D, D) = ({dim}, {dim}) to match `anchors`, but got "
            f"{tuple(covariance.shape)}. Compute both from features of the same layer."
        )
    device = anchors.device
    if has_float64(device):
        check_device(covariance, "covariance", anchors, "anchors")
    wide = device if has_float64(device) else torch.device("cpu")
    rows = anchors.detach().to(wide).double().flatten(0, -2)
    seen = rows.isfinite().all(dim=1)
    rows = torch.where(seen[:, None], rows, 0.0)
    weight: Tensor = torch.linalg.solve_ex(sigma.to(wide), rows.T).result.T
    bias = torch.where(seen, -(weight * rows).sum(dim=1) / 2, -torch.inf)
    bias = bias.reshape(anchors.shape[:-1])
    if priors is not None:
        logs = _log_priors(priors, anchors).to(wide)
        bias = bias + logs.reshape(-1, *[1] * (bias.ndim - 1))
    return LinearDiscriminant(
        weight.float().reshape(anchors.shape).to(device), bias.float().to(device)
    )


def _log_priors(priors: Tensor, anchors: Tensor) -> Tensor:
    """Return the logarithms (C,) of priors, scaled to sum 1, in float64."""
    check_tensor(priors, "priors")
    fix = " Pass the counts of the classes."
    check_one_per_class(priors, "priors", len(anchors), anchors, "anchors", fix)
    shares = priors.detach().to(wide_dtype(priors))
    return (shares / shares.sum()).log()


def whitening_matrix(covariance: Tensor, *, shrinkage: float = 0.01) -> Tensor:
    r"""Matrix that makes the within-class covariance of features the identity.

    .. math:: W = \Sigma_s^{-1/2}, \qquad
              \Sigma_s = (1 - s)\, \Sigma + s\, \tfrac{\operatorname{tr} \Sigma}{D} I

    symmetric, so that Wx are the whitened features of x, and the nearest of the anchors Wa is the
    class of `linear_discriminant`.

    Args:
        covariance: Σ, ``(D, D)``, floating point, as of `WithinClassCovariance`.
        shrinkage: s in [0, 1], as of `linear_discriminant`.

    Returns:
        ``(D, D)`` float32, NaN if the covariance has a NaN.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if ``covariance`` is not square or ``shrinkage`` is out of range.

    Source: Fisher's linear discriminant.

    >>> whitening_matrix(torch.diag(torch.tensor([4.0, 1.0])), shrinkage=0.0)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    sigma = _shrunk(covariance, shrinkage)
    finite = sigma.isfinite().all()
    values, vectors = torch.linalg.eigh(torch.where(finite, sigma, 0.0))
    # Directions without variance, which only an unshrunk matrix has, have no scale.
    scales = torch.where(values > values.amax() * 1e-12, values, torch.inf).rsqrt()
    whitening = torch.where(finite, (vectors * scales) @ vectors.T, torch.nan)
    return whitening.float().to(covariance.device)


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """Return a covariance that is moved towards a multiple of the identity, in float64."""
    check_floating(covariance, "covariance")
    if covariance.ndim != 2 or len(covariance) != covariance.shape[1]:
        raise ValueError(
            f"Expected `covariance` of shape (D, D), but got {tuple(covariance.shape)}. Pass what "
            "WithinClassCovariance.compute() returns."
        )
    shrinkage = check_range(shrinkage, "shrinkage", 0.0, 1.0)
    device = covariance.device if has_float64(covariance.device) else torch.device("cpu")
    sigma = covariance.detach().to(device).double()
    variance = sigma.trace() / len(sigma)
    # Features without any variance have the Euclidean metric.
    variance = torch.where(variance == 0, 1.0, variance)
    identity = torch.eye(len(sigma), dtype=sigma.dtype, device=device)
    return (1 - shrinkage) * sigma + shrinkage * variance * identity


def _settings(self: "Scatters") -> str:
    """Return the settings, as ``repr`` shows them."""
    num_classes, feature_dim = self.means.shape
    return f"num_classes={num_classes}, feature_dim={feature_dim}"


@final
class WithinClassCovariance(nn.Module):
    r"""Covariance of features about the mean of their class, shared by all classes, from a stream.

    .. math:: \Sigma = \frac{1}{\sum_c n_c} \sum_c \sum_{i : y_i = c} (x_i - m_c)(x_i - m_c)^\top

    with :math:`m_c` the mean of the :math:`n_c` features of class c: one pass, exact in any order
    and split of the stream. Ignored labels and features that are not finite do not contribute. The
    state is float64 with int64 counts, and ``update`` does not communicate between processes.

    Args:
        num_classes: C.
        feature_dim: D.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if a number, a shape or a device is wrong.

    Source: the covariance of Fisher's linear discriminant; the update of Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

    >>> covariance = WithinClassCovariance(num_classes=2, feature_dim=1)
    >>> covariance.update(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1]))
    >>> covariance.compute()  # (1 + 1 + 0) / 3
    tensor([[0.6667]], dtype=torch.float64)
    """

    means: Tensor
    """(C, D) float64: the class means, 0 where a class is unseen."""
    counts: Tensor
    """(C,) int64: the features of each class."""
    scatter: Tensor
    """(D, D) float64: the sum of (x − m)(x − m)ᵀ. Read it through `compute`."""
    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        _register_means(self, num_classes, feature_dim)
        dim = self.means.shape[1]
        self.register_buffer("scatter", self.means.new_zeros(dim, dim))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``(N, D, *)`` with labels ``(N, *)``."""
        _update(self, features, labels)

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same settings has seen."""
        _merge_other(self, other)

    def compute(self) -> Tensor:
        """Return the covariance (D, D) in float64; NaN if nothing was seen."""
        return self.scatter / self.counts.sum()

    reset = reset_state
    extra_repr = _settings
    _apply = move_buffers
    __getstate__ = sent_state
    __setstate__ = receive_state


@final
class ClassVariances(nn.Module):
    r"""Mean and variance of each channel for each class, from a stream.

    .. math:: m_c = \frac{1}{n_c} \sum_{i : y_i = c} x_i, \qquad
              v_c = \frac{1}{n_c} \sum_{i : y_i = c} (x_i - m_c)^2

    One pass, exact in any order and split of the stream. Ignored labels and features that are not
    finite do not contribute. The state is float64 with int64 counts, and ``update`` does not
    communicate between processes.

    Args:
        num_classes: C.
        feature_dim: D.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if a number, a shape or a device is wrong.

    Source: SePiCo (arXiv 2204.08808), whose code has a mean and variance of 0 for an unseen class.

    >>> variances = ClassVariances(num_classes=2, feature_dim=1)
    >>> variances.update(torch.tensor([[1.0], [5.0]]), torch.tensor([0, 0]))
    >>> variances.compute()
    ClassMoments(means=tensor([[3.],
            [nan]]), variances=tensor([[4.],
            [nan]]))
    """

    means: Tensor
    """(C, D) float64: the class means, 0 where a class is unseen. Read them through `compute`."""
    counts: Tensor
    """(C,) int64: the features of each class."""
    scatter: Tensor
    """(C, D) float64: the sums of (x − m)² of each channel."""
    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        _register_means(self, num_classes, feature_dim)
        self.register_buffer("scatter", torch.zeros_like(self.means))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``(N, D, *)`` with labels ``(N, *)``."""
        _update(self, features, labels)

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same settings has seen."""
        _merge_other(self, other)

    def compute(self) -> ClassMoments:
        """Return the moments, NaN in the rows of unseen classes."""
        seen, counts = (self.counts > 0)[:, None], self.counts[:, None]
        means = torch.where(seen, self.means, torch.nan)
        return ClassMoments(means.float(), (self.scatter / counts).float())

    reset = reset_state
    extra_repr = _settings
    _apply = move_buffers
    __getstate__ = sent_state
    __setstate__ = receive_state


Scatters: TypeAlias = WithinClassCovariance | ClassVariances


def scatter_of_means(state: Scatters, offsets: Tensor, counts: Tensor) -> Tensor:
    """Return Σ n · δδᵀ of offsets δ (C, D) of class means, in the form of the state's scatter."""
    weighted = offsets * counts[:, None]
    if isinstance(state, WithinClassCovariance):
        return weighted.T @ offsets
    return weighted * offsets


def _register_means(state: Scatters, num_classes: int, feature_dim: int) -> None:
    num_classes = check_count(num_classes, "num_classes")
    feature_dim = check_count(feature_dim, "feature_dim")
    state.register_buffer("means", torch.zeros(num_classes, feature_dim, dtype=torch.float64))
    state.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))


def _update(state: Scatters, features: Tensor, labels: Tensor) -> None:
    check_batch(features, state.means, type(state).__name__)
    check_labels(labels, features)
    features = features.detach()
    sums, counts = _ops.class_sums(features, labels, len(state.counts))
    means = sums / counts[:, None].clamp(min=1)
    shared = isinstance(state, WithinClassCovariance)
    _merge(state, means, counts, _ops.scatter(features, labels, means, shared))


def _merge_other(state: Scatters, other: Scatters) -> None:
    check_mergeable(other, state)
    name = type(state).__name__
    if other.means.shape != state.means.shape:
        raise ValueError(
            f"Expected `other` to be {name}({state.extra_repr()}), but got "
            f"{name}({other.extra_repr()}). Merge equal settings only."
        )
    check_device(other.means, "other", state.means, name)
    _merge(state, other.means, other.counts, other.scatter)


def _merge(state: Scatters, means: Tensor, counts: Tensor, scatter: Tensor) -> None:
    """Add the means, counts and scatter of other features."""
    means, counts, scatter = means.to(state.means), counts.to(state.counts), scatter.to(state.means)
    total = (state.counts + counts).clamp(min=1).to(state.means.dtype)
    offsets = torch.where((counts > 0)[:, None], means - state.means, 0.0)
    between = scatter_of_means(state, offsets, state.counts * (counts / total))
    state.scatter.add_(scatter + between)
    state.means.add_(offsets * (counts / total)[:, None])
    state.counts.add_(counts)
