"""Scores that rank networks on unlabeled target images: which checkpoint, which setting to use.

Each is a stream: `update` with what a network predicts for a batch, `compute` when the pass is
over; higher is better. No score sees a label of the target. Each can be fooled, in a way that its
docstring names, so compare networks of one task, and look at the predictions of the one you choose.
"""

from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import (
    check_count,
    check_device,
    check_int,
    check_logits,
    check_mergeable,
    check_positive,
    check_same_labels,
)
from ._ops.reference import result_dtype, wide_dtype
from ._sampling import NO_PRIORITY, join_samples, sample_of_classes
from ._state import load_any_shape, move_buffers, receive_state, sent_state, shown
from .evaluation import ConfusionMatrix

_EPSILON = 1e-5
"""Added inside of logarithms by the authors of density and information maximization."""
_ROWS_AT_ONCE = 512


@final
class SoftNeighborhoodDensity(nn.Module):
    r"""Density of the target's predictions: the mean entropy of their soft neighborhoods.

    With the probabilities :math:`p_i` of pixel i, scaled to length 1,

    .. math:: s_{ij} = \frac{\exp(p_i \cdot p_j / T)}{\sum_k \exp(p_i \cdot p_k / T)}, \qquad
              \mathrm{score} = -\frac{1}{n} \sum_i \sum_j s_{ij} \log(s_{ij} + 10^{-5}),

    where the similarity of a pixel to itself is −1. A network that gives a class to pixels that are
    alike has large, dense neighborhoods, and a large score.

    The double sum runs over all pixels that were ever added. Of each predicted class at most
    ``pixels_per_class`` of them are stored, a uniform random sample without replacement; up to
    there the score is exact. Beyond, every stored pixel stands for as many as were seen of its
    class for each that is stored, in both sums. With 256 pixels a class the score of 10⁶ pixels is
    within 1 % of the exact one, which a test shows. The memory is that of
    ``(C, pixels_per_class, C)`` numbers, however long the stream.

    **It misses**: a collapse of all predictions to one class is the densest of all, and so are
    predictions that are nearly uniform everywhere, as of a network that has hardly learned. The
    score grows with the logarithm of the number of pixels, so compare networks on the same images.

    Args:
        temperature: T > 0.
        pixels_per_class: stored pixels of each predicted class, at least 2.
        seed: of the sample. The same stream and seed give the same score.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if an argument, a shape or a device is wrong, or nothing was added.

    Source: Saito et al., "Tune it the Right Way: Unsupervised Validation of Domain Adaptation via
    Soft Neighborhood Density" (arXiv 2108.10860), equations 2 to 4, and its code.

    >>> density = SoftNeighborhoodDensity(temperature=0.05)
    >>> density.update(torch.tensor([[9.0, 0.0], [8.0, 0.0], [0.0, 9.0], [0.0, 8.0]]))
    >>> apart = density.compute()
    >>> density.reset()
    >>> density.update(torch.tensor([[1.0, 0.0], [0.2, 0.0], [0.0, 3.0], [0.0, 0.9]]))
    >>> bool(apart < density.compute())  # two neighborhoods of two; one loose one of four
    True
    """

    counts: Tensor
    """(C,) int64: pixels seen of each predicted class; of shape (0,) before the first."""
    rows: Tensor
    """(C, K, C) float32: the sampled probabilities of each predicted class, scaled to length 1."""
    priorities: Tensor
    """(C, K) int64: random; the pixels of a class with the smallest are its sample, ascending."""

    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(
        self, temperature: float = 0.05, *, pixels_per_class: int = 256, seed: int = 0
    ) -> None:
        super().__init__()
        temperature = check_positive(temperature, "temperature")
        pixels_per_class = check_count(pixels_per_class, "pixels_per_class")
        if pixels_per_class < 2:
            raise ValueError(
                f"Expected `pixels_per_class` of at least 2, but got {pixels_per_class}."
            )
        self.temperature = temperature
        self.pixels_per_class = pixels_per_class
        self.seed = check_int(seed, "seed")
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("rows", torch.zeros(0, pixels_per_class, 0))
        self.register_buffer("priorities", torch.zeros(0, pixels_per_class, dtype=torch.int64))

    def update(self, logits: Tensor) -> None:
        """Add logits ``(N, C, *)``; a pixel with a logit that is not finite is left out."""
        check_logits(logits)
        self._reserve(logits.shape[1])
        check_device(self.counts, "counts", logits, "logits")
        num_classes = logits.shape[1]
        pixels = logits.detach().movedim(1, -1).flatten(0, -2)
        if len(pixels) == 0:
            return
        classes = torch.where(pixels.isfinite().all(dim=1), pixels.argmax(dim=1), num_classes)
        seen, count = self.counts.sum(), self.pixels_per_class
        chosen, priorities, sizes = sample_of_classes(
            classes, num_classes, count, seen=seen, seed=self.seed
        )
        rows = _unit_probabilities(pixels[chosen.flatten()]).view(*chosen.shape, num_classes)
        self._join(rows, priorities)
        self.counts += sizes

    def merge(self, other: Self) -> None:
        """Add what another one with the same settings has seen."""
        check_mergeable(other, self)
        if other.extra_repr() != self.extra_repr():
            raise ValueError(
                f"Expected `other` with {self.extra_repr()}, but got {other.extra_repr()}."
            )
        if len(other.counts) == 0:
            return
        self._reserve(len(other.counts))
        check_device(other.counts, "other", self.counts, "counts")
        self._join(other.rows, other.priorities)
        self.counts += other.counts

    def reset(self) -> None:
        """Forget everything, the number of classes too."""
        self.passed_with_counts = False
        self.counts, self.rows = self.counts.new_zeros(0), self.rows[:0, :, :0].clone()
        self.priorities = self.priorities[:0].clone()

    def compute(self) -> Tensor:
        """Return the score () float64.

        Raises:
            ValueError: if no pixel with finite logits was added.
        """
        stored, dtype = (self.priorities != NO_PRIORITY).flatten(), wide_dtype(self.rows)
        x = self.rows.flatten(0, 1).to(dtype)[stored]
        if len(x) == 0:
            raise ValueError(
                "Expected at least one pixel with finite logits, but got none. Call `update` first."
            )
        seen = self.counts.to(dtype)[:, None].expand_as(self.priorities).flatten()[stored]
        in_sample = self.counts.clamp(max=self.pixels_per_class).to(dtype)
        in_sample = in_sample[:, None].expand_as(self.priorities).flatten()[stored]
        # Of each class a pixel sees itself once, and all others through the rest of its sample.
        of_class = self.priorities.new_tensor(range(len(self.counts)))[:, None]
        of_class = of_class.expand_as(self.priorities).flatten()[stored]
        weights = seen / in_sample
        others = (seen - 1) / (in_sample - 1).clamp(min=1)
        total = x.new_zeros(())
        for start in range(0, len(x), _ROWS_AT_ONCE):
            part = slice(start, min(len(x), start + _ROWS_AT_ONCE))
            index = torch.arange(part.start, part.stop, device=x.device)
            similarities = x[part] @ x.T
            similarities[index - start, index] = -1.0
            multiplicity = torch.where(of_class[part, None] == of_class, others, weights)
            multiplicity[index - start, index] = 1.0
            scores = (similarities - 1.0).div_(self.temperature).exp_()
            s = scores / (scores * multiplicity).sum(dim=1, keepdim=True)
            entropy = -(multiplicity * s * (s + _EPSILON).log()).sum(dim=1)
            total += (weights[part] * entropy).sum()
        return total / weights.sum()

    def _reserve(self, num_classes: int) -> None:
        """Allocate the sample for C classes at the first batch."""
        if not _is_first(self.counts, num_classes):
            return
        k = self.pixels_per_class
        self.counts = self.counts.new_zeros(num_classes)
        self.rows = self.rows.new_zeros(num_classes, k, num_classes)
        self.priorities = self.priorities.new_full((num_classes, k), NO_PRIORITY)

    def _join(self, rows: Tensor, priorities: Tensor) -> None:
        """Keep of the stored and the given rows (C, *, C) those of the smallest priorities."""
        self.rows, self.priorities = join_samples(
            (self.rows, self.priorities), (rows.to(self.rows.dtype), priorities)
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *others: object
    ) -> None:
        # The number of classes is that of the state.
        saved = state_dict.get(prefix + "counts")
        if isinstance(saved, Tensor) and saved.ndim == 1:
            self.reset()
            self._reserve(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *others)

    extra_repr = shown("temperature", "pixels_per_class", "seed")
    _apply = move_buffers
    __getstate__ = sent_state
    __setstate__ = receive_state


@final
class InformationMaximization(nn.Module):
    r"""Certain of each pixel, and undecided over all of them: what SHOT maximizes, as a score.

    .. math:: \mathrm{score} = H(\frac{1}{n} \sum_i p_i) - \frac{1}{n} \sum_i H(p_i), \qquad
              H(p) = -\sum_c p_c \log(p_c + 10^{-5}),

    an estimate of the mutual information of pixels and predicted classes, between 0 and log C.
    Exact, in one pass and constant memory.

    **It misses** that classes have shares of their own: equal shares score best, in a street as
    well, and an overconfident network scores above a calibrated one.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or a device is wrong, or the number of classes changes.

    Source: Liang et al., "Do We Really Need to Access the Source Data?" (SHOT, arXiv 2002.08546),
    equation 3, with the constant of its code.

    >>> information = InformationMaximization()
    >>> information.update(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))
    >>> round(information.compute().item(), 3)
    0.692
    """

    sums: Tensor
    """(C,) float64: of the probabilities; of shape (0,) before the first pixel."""
    entropy: Tensor
    """() float64: the sum of the pixels' entropies."""
    counts: Tensor
    """() int64: pixels seen."""

    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("entropy", torch.zeros((), dtype=torch.float64))
        self.register_buffer("counts", torch.zeros((), dtype=torch.int64))

    def update(self, logits: Tensor) -> None:
        """Add logits ``(N, C, *)``; a pixel with a logit that is not finite is left out."""
        check_logits(logits)
        check_device(self.counts, "counts", logits, "logits")
        self.sums = _same_classes(self.sums, logits.shape[1])
        probabilities, is_finite = _probabilities(logits)
        entropies = -(probabilities * (probabilities + _EPSILON).log()).sum(dim=1)
        self.sums += probabilities.sum(dim=0, dtype=self.sums.dtype)
        # A left-out row is 0, and 0·log(10⁻⁵) is 0.
        self.entropy += entropies.sum(dtype=self.entropy.dtype)
        self.counts += is_finite.sum()

    def merge(self, other: Self) -> None:
        """Add what another one has seen."""
        check_mergeable(other, self)
        check_device(other.counts, "other", self.counts, "counts")
        if len(other.sums) > 0:
            self.sums = _same_classes(self.sums, len(other.sums))
            self.sums += other.sums
        self.entropy += other.entropy
        self.counts += other.counts

    def reset(self) -> None:
        """Forget everything, the number of classes too."""
        self.passed_with_counts = False
        self.sums = self.sums.new_zeros(0)
        self.entropy.zero_()
        self.counts.zero_()

    def compute(self) -> Tensor:
        """Return the score () float64; NaN without a finite pixel."""
        mean = self.sums / self.counts
        of_mean = -(mean * (mean + _EPSILON).log()).sum()
        score: Tensor = of_mean - self.entropy / self.counts
        return torch.where(self.counts > 0, score, torch.nan)

    _apply = move_buffers
    __getstate__ = sent_state
    __setstate__ = receive_state
    _load_from_state_dict = load_any_shape


@final
class NuclearNorm(nn.Module):
    r"""The nuclear norm of all predictions: certain ones, of as many classes as possible.

    With the probabilities as the rows of P, n×C, and its singular values σ,

    .. math:: \mathrm{score} = \frac{1}{\sqrt{n \min(n, C)}} \sum_k \sigma_k(P),

    between 0 and 1. The singular values come from PᵀP, which adds up over a stream, so that it is
    exact in one pass and constant memory.

    **It misses** the same as `InformationMaximization`, though rare classes count for more: a
    class of share s adds about the square root of s.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or a device is wrong, or the number of classes changes.

    Source: Cui et al., "Towards Discriminability and Diversity" (BNM, arXiv 2003.12237), equation
    7; recommended as a score by Musgrave et al., "Three New Validators and a Large-Scale Benchmark
    Ranking for Unsupervised Domain Adaptation" (arXiv 2208.07360).

    >>> norm = NuclearNorm()
    >>> norm.update(torch.tensor([[40.0, 0.0], [0.0, 40.0], [40.0, 0.0], [0.0, 40.0]]))
    >>> norm.compute()
    tensor(1., dtype=torch.float64)
    """

    gram: Tensor
    """(C, C) float64: PᵀP; of shape (0, 0) before the first pixel."""
    counts: Tensor
    """() int64: pixels seen."""

    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gram", torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros((), dtype=torch.int64))

    def update(self, logits: Tensor) -> None:
        """Add logits ``(N, C, *)``; a pixel with a logit that is not finite is left out."""
        check_logits(logits)
        check_device(self.counts, "counts", logits, "logits")
        self.gram = _same_classes(self.gram, logits.shape[1])
        probabilities, is_finite = _probabilities(logits)
        wide = probabilities.to(self.gram.dtype)
        self.gram += wide.T @ wide
        self.counts += is_finite.sum()

    def merge(self, other: Self) -> None:
        """Add what another one has seen."""
        check_mergeable(other, self)
        check_device(other.counts, "other", self.counts, "counts")
        if len(other.gram) > 0:
            self.gram = _same_classes(self.gram, len(other.gram))
            self.gram += other.gram
        self.counts += other.counts

    def reset(self) -> None:
        """Forget everything, the number of classes too."""
        self.passed_with_counts = False
        self.gram = self.gram.new_zeros(0, 0)
        self.counts.zero_()

    def compute(self) -> Tensor:
        """Return the score () float64; NaN without a finite pixel."""
        singular_values: Tensor = torch.linalg.eigvalsh(self.gram).clamp(min=0).sqrt()
        counts = self.counts.to(self.gram.dtype)
        return singular_values.sum() / (counts * counts.clamp(max=len(self.gram))).sqrt()

    _apply = move_buffers
    __getstate__ = sent_state
    __setstate__ = receive_state
    _load_from_state_dict = load_any_shape


@final
class LabelAgreement(nn.Module):
    r"""Agreement of two labelers, such as a classifier and the nearest anchors.

    With :math:`M_{ck}` the pixels that the first calls c and the second k, the mean over the
    classes that either of them ever gives:

    .. math:: \mathrm{score} = \frac{1}{|\mathcal{C}|} \sum_{c \in \mathcal{C}}
              \frac{M_{cc}}{\sum_k M_{ck} + \sum_k M_{kc} - M_{cc}}

    Each class has the same weight, however few pixels it has. A pixel that either of the two leaves
    unlabeled is not counted.

    **It misses** what both get wrong together: two labelers on the same features share most of
    their errors, and where both call everything one class they agree throughout.

    Args:
        num_classes: C.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if ``num_classes``, a shape or a device is wrong.

    Source: the agreement of classifier and centroids labels the target in DiGA (arXiv 2304.02222);
    as a score it is the mean IoU of the two.

    >>> agreement = LabelAgreement(num_classes=3)
    >>> agreement.update(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 1, 1, 2]]))
    >>> agreement.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.confusion = ConfusionMatrix(num_classes)

    @property
    def counts(self) -> Tensor:
        """(C, C + 1) int64: pixels by the first's and the second's label; the last column is 0."""
        return self.confusion.counts

    @property
    def passed_with_counts(self) -> bool:
        """True in a process that was started with this accumulator, already filled."""
        return self.confusion.passed_with_counts

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add the labels of both, ``(N, *)`` of any integer dtype."""
        check_same_labels(first, second, ("first", "second"))
        num_classes = len(self.counts)
        of_second = second.long()
        is_class = (of_second >= 0) & (of_second < num_classes)
        self.confusion.update(of_second, torch.where(is_class, first.long(), -1))

    def merge(self, other: Self) -> None:
        """Add what another one of as many classes has counted."""
        check_mergeable(other, self)
        self.confusion.merge(other.confusion)

    def reset(self) -> None:
        """Forget everything."""
        self.confusion.reset()

    def compute(self) -> Tensor:
        """Return the score () float64; NaN without a pixel that both label."""
        return self.confusion.iou().nanmean()


def _is_first(state: Tensor, num_classes: int) -> bool:
    """Return True if a state is of no classes yet; reject another number than C."""
    if len(state) not in (0, num_classes):
        raise ValueError(
            f"Expected {len(state)} classes as before, but got {num_classes}. "
            "Use one score for each network, or call reset() between them."
        )
    return len(state) == 0


def _same_classes(state: Tensor, num_classes: int) -> Tensor:
    """Return the state if it is of C classes; zeros if it is of none yet."""
    is_first = _is_first(state, num_classes)
    return state.new_zeros([num_classes] * state.ndim) if is_first else state


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (P, C), 0 where a logit is not finite, and which are finite (P,)."""
    pixels = logits.detach().movedim(1, -1).flatten(0, -2)
    is_finite = pixels.isfinite().all(dim=1)
    probabilities = pixels.softmax(dim=1, dtype=result_dtype(pixels))
    return torch.where(is_finite[:, None], probabilities, 0.0), is_finite


def _unit_probabilities(pixels: Tensor) -> Tensor:
    """Probabilities of logits (P, C), scaled to length 1, float32; 0 where one is not finite."""
    probabilities, _ = _probabilities(pixels)
    return nn.functional.normalize(probabilities.float(), dim=1)
