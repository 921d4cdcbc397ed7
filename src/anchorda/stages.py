"""What a stage of self-training holds fixed, and how it labels the target with it."""

import copy
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, final, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import as_floats, check_anchor_groups, check_choice, check_per_class
from ._state import move_buffers
from .anchors import CategoryAnchors, keep_correct, resize_labels
from .calibration import warn_unreachable_margins
from .distributed import all_reduce, check_agreement
from .pseudo_labels import (
    AnchorPseudoLabeler,
    ProbabilityPseudoLabeler,
    PseudoLabels,
    combine_pseudo_labels,
)

Extract = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""What maps a network and images to features (N, D, *) and logits (N, C, *)."""

Rule = Literal["anchor", "probability", "agree", "union"]
"""Whose labels a stage gives: one labeler's, or both combined."""

_EVERYTHING = float("-inf")


class StageLabels(NamedTuple):
    """What `StageLabeler` returns."""

    labels: Tensor
    """(N, *) int64: the two combined by the stage's rule."""
    by_anchor: PseudoLabels
    """Labels and margins of the anchors."""
    by_probability: PseudoLabels
    """Labels and probabilities of the classifier."""


def _call_network(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The default way to features and logits: the network returns both."""
    features, logits = network(images)
    return features, logits


@final
class StageLabeler(nn.Module):
    r"""Everything that stays fixed in a stage: a frozen network, the anchors, and the labelers.

    The network is copied, out of a ``DistributedDataParallel`` or ``torch.compile`` wrapper if it
    is in one. The copy asks for no gradients and stays in evaluation mode, whatever becomes of the
    original, and also when a parent module is set to training. Labeling runs under
    ``torch.no_grad``. All of it is in ``state_dict`` and follows ``.to(device)``; of a ``.half()``
    only the network takes notice.

    Both labelers label every pixel until others take their place, by assignment: a minimum that is
    calibrated on a stage's own scores needs all of them first.

    Args:
        network: any module that ``copy.deepcopy`` copies; it is not modified.
        centroids: ``(C, D)`` or ``(C, M, D)``, the anchors; see `AnchorPseudoLabeler`.
        by_anchor: labels by distance; warned of where no pixel can exceed its minimum margin.
        by_probability: labels by the classifier.
        rule: which labels `StageLabels.labels` holds: those of one labeler, or both combined as
            `combine_pseudo_labels` does. The paper keeps both maps and averages two losses: for
            that, take ``by_anchor.labels`` and ``by_probability.labels``.
        extract: maps the network and images to features and logits, for a network that does not
            return just these two, or wants an autocast around it.

    Shape:
        - images: whatever ``extract`` takes, on the labeler's device.
        - Output: `StageLabels` at the resolution of the features.

    Raises:
        TypeError: if a dtype is wrong, or ``extract`` is a module.
        ValueError: if ``centroids`` is of another shape, ``rule`` is unknown, the labelers have
            another number of classes or differ in their ``ignore_index``, or the network's features
            or logits do not fit the centroids or each other.

    Source: the stages of CAG-UDA (arXiv 1910.13049) and of its released code: anchors and
    pseudo-labels stay those of the network that a stage began with.

    A network that returns features and logits, and a stage in one pass over a labeled source:

    >>> class Network(nn.Module):
    ...     def forward(self, images):
    ...         return images, torch.cat([-images, images], dim=1)
    >>> source = [(torch.tensor([[[-4.0, -2.0, 3.0]]]), torch.tensor([[0, 0, 1]]))]
    >>> anchors = CategoryAnchors(num_classes=2, feature_dim=1)
    >>> stage = StageLabeler.from_source(Network(), source, anchors)
    >>> stage.centroids
    tensor([[-3.],
            [ 3.]])
    >>> stage.by_anchor = AnchorPseudoLabeler(min_margin=2.5)
    >>> stage(torch.tensor([[[1.0, 2.0, -9.0]]])).labels
    tensor([[255,   1,   0]])

    From here on the loop is the caller's::

        for (images, labels), target in zip(source, target_images):
            pseudo = stage(target).labels
            ...
    """

    centroids: Tensor
    """(C, D) or (C, M, D) float32: the anchors, fixed."""
    network: nn.Module
    """The frozen copy."""
    by_anchor: AnchorPseudoLabeler
    """What labels by distance; another one may be assigned."""
    by_probability: ProbabilityPseudoLabeler
    """What labels by probability; another one may be assigned."""

    def __init__(
        self,
        network: nn.Module,
        centroids: Tensor | npt.NDArray[np.floating],
        *,
        by_anchor: AnchorPseudoLabeler | None = None,
        by_probability: ProbabilityPseudoLabeler | None = None,
        rule: Rule = "anchor",
        extract: Extract = _call_network,
    ) -> None:
        super().__init__()
        centroids = as_floats(centroids, "centroids")
        check_anchor_groups(centroids, "centroids")
        check_choice(rule, "rule", get_args(Rule))
        if isinstance(extract, nn.Module):
            raise TypeError(
                "Expected `extract` to be a function of the network and images, but got a module, "
                "which would not be frozen. Pass it as `network`."
            )
        self.rule = rule
        self.extract = extract
        self.network = _frozen(network)
        self.register_buffer("centroids", centroids.detach().to(torch.float32, copy=True))
        # Copies: a stage does not change when what it was made from does.
        self.by_anchor = copy.deepcopy(by_anchor or AnchorPseudoLabeler(_EVERYTHING))
        self.by_probability = copy.deepcopy(by_probability or ProbabilityPseudoLabeler(_EVERYTHING))
        self.by_anchor.to(centroids.device)
        self.by_probability.to(centroids.device)
        self._check_labelers()
        if by_anchor is not None and not by_anchor.relative:
            warn_unreachable_margins(by_anchor.min_margin, centroids)

    @classmethod
    def from_source(
        cls,
        network: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        anchors: CategoryAnchors,
        *,
        extract: Extract = _call_network,
        group: dist.ProcessGroup | None = None,
    ) -> Self:
        """Freeze a network and take its anchors in one pass over labeled source batches.

        Anchors average the features of the pixels that the frozen network classifies right.

        Where ``torch.distributed`` is initialized, every process of the group calls this, each with
        its own share of the source, and gets the anchors of the whole by `all_reduce`; an exception
        in the batches of one leaves the others waiting for it. The network has to be the same
        everywhere, running statistics of batch normalization included.

        Args:
            network: see `StageLabeler`.
            batches: pairs of images and labels ``(N, *)`` of any resolution; both are moved to the
                network's device.
            anchors: an empty accumulator on that device, filled here: its settings say how the
                stream is averaged.
            extract: see `StageLabeler`.
            group: the processes that take part; ``None`` is all of them.

        Raises:
            ValueError: if ``anchors`` has already seen something, differs between processes, or if
                no source pixel of any class was classified right.
        """
        check_agreement(anchors, group)
        if bool(anchors.seen.any()):
            raise ValueError(
                "Expected `anchors` that have seen nothing yet, but got some that have: they would "
                "mix two networks. Call anchors.reset(), or make new ones for each stage."
            )
        # Made of no anchors yet, so that the network is copied once.
        stage = cls(network, anchors.compute(), extract=extract)
        device = next(stage.network.parameters(), anchors.counts).device
        with torch.no_grad():
            for images, labels in batches:
                features, logits = extract(stage.network, images.to(device))
                _check_outputs(features, logits, anchors.num_classes)
                small = resize_labels(labels.to(device), features.shape[2:])
                anchors.update(features, keep_correct(small, logits))
        all_reduce(anchors, group=group)
        if not bool(anchors.seen.any()):
            raise ValueError(
                "Expected source batches with labels that the network predicts, but of no class "
                "was a single pixel classified right. Check the labels, and that the network is "
                "trained on these classes."
            )
        stage.centroids.copy_(anchors.compute())
        return stage.to(device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> StageLabels:
        """Label target images."""
        self._check_labelers()
        features, logits = self.extract(self.network, images)
        _check_outputs(features, logits, len(self.centroids))
        by_anchor = self.by_anchor(features, self.centroids)
        by_probability = self.by_probability(logits)
        if self.rule == "anchor":
            labels = by_anchor.labels
        elif self.rule == "probability":
            labels = by_probability.labels
        else:
            labels = combine_pseudo_labels(
                by_anchor.labels,
                by_probability.labels,
                self.rule,
                ignore_index=self.by_anchor.ignore_index,
            )
        return StageLabels(labels, by_anchor, by_probability)

    def _check_labelers(self) -> None:
        """Labelers are assigned at any time, so they are looked at each time."""
        if self.by_anchor.ignore_index != self.by_probability.ignore_index:
            raise ValueError(
                "Expected `by_anchor` and `by_probability` of one ignore_index, but got "
                f"{self.by_anchor.ignore_index} and {self.by_probability.ignore_index}."
            )
        margin, probability = self.by_anchor.min_margin, self.by_probability.min_probability
        for name, minimum in (("min_margin", margin), ("min_probability", probability)):
            check_per_class(minimum, name, self.centroids, "centroids", len(self.centroids))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything but the network, which stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children():
            child._apply(fn)
        move_buffers(self, fn)
        return self

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return f"centroids={tuple(self.centroids.shape)}, rule={self.rule!r}"


def _frozen(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode and without gradients, out of whatever wraps the network."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif isinstance(compiled := getattr(network, "_orig_mod", None), nn.Module):
            network = compiled
        else:
            return copy.deepcopy(network).eval().requires_grad_(False)


def _check_outputs(features: Tensor, logits: Tensor, num_classes: int) -> None:
    """Reject what `extract` returns if the two do not fit; the labelers look at the rest."""
    expected = (features.shape[0], num_classes, *features.shape[2:])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"Expected `logits` of shape (N, C, *) = {expected} to match `features` and the "
            f"anchors, but got {tuple(logits.shape)}. Let `extract` return the logits of these "
            "classes at the resolution of the features."
        )
