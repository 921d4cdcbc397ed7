"""What a stage of self-training holds fixed, and how it labels the target with it."""

import copy
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import check_anchor_rows, check_choice
from ._state import move_buffers
from .anchors import CategoryAnchors, keep_correct, resize_labels
from .distributed import all_reduce
from .pseudo_labels import (
    AnchorPseudoLabeler,
    ProbabilityPseudoLabeler,
    PseudoLabels,
    combine_pseudo_labels,
)

Extract = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""What maps a network and images to features (N, D, *) and logits (N, C, *)."""


class StageLabels(NamedTuple):
    """What `StageLabeler` returns."""

    labels: Tensor
    """(N, *) int64: the two combined by the stage's rule."""
    by_anchor: PseudoLabels
    """Labels and margins of the anchors."""
    by_probability: PseudoLabels
    """Labels and probabilities of the classifier."""


def call_network(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
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

    Args:
        network: any module; it is not modified.
        centroids: ``(C, D)``, the anchors; a row that is not finite is an unseen class.
        by_anchor: labels by distance; the default takes the nearest anchor wherever it is.
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
        TypeError: if a dtype is wrong.
        ValueError: if ``centroids`` is not ``(C, D)``, ``rule`` is unknown, the labelers differ in
            their ``ignore_index``, or the network's features or logits do not fit the centroids.

    Source: section 3.4 of CAG-UDA (arXiv 1910.13049): anchors and pseudo-labels stay those of the
    network that a stage began with.

    A network that returns features and logits, and a stage in one pass over a labeled source:

    >>> class Network(nn.Module):
    ...     def forward(self, images):
    ...         return images, torch.cat([-images, images], dim=1)
    >>> source = [(torch.tensor([[[-4.0, -2.0, 3.0]]]), torch.tensor([[0, 0, 1]]))]
    >>> stage = StageLabeler.from_source(
    ...     Network(), source, CategoryAnchors(num_classes=2, feature_dim=1),
    ...     by_anchor=AnchorPseudoLabeler(min_margin=2.5),
    ... )
    >>> stage.centroids
    tensor([[-3.],
            [ 3.]])
    >>> stage(torch.tensor([[[1.0, 2.0, -9.0]]])).labels
    tensor([[255,   1,   0]])

    From here on the loop is the caller's::

        for (images, labels), target in zip(source, target_images):
            pseudo = stage(target).labels
            ...
    """

    centroids: Tensor
    """(C, D) float32: the anchors, fixed."""

    def __init__(
        self,
        network: nn.Module,
        centroids: Tensor,
        *,
        by_anchor: AnchorPseudoLabeler | None = None,
        by_probability: ProbabilityPseudoLabeler | None = None,
        rule: Literal["anchor", "probability", "agree", "union"] = "anchor",
        extract: Extract = call_network,
    ) -> None:
        super().__init__()
        check_anchor_rows(centroids, "centroids")
        check_choice(rule, "rule", ("anchor", "probability", "agree", "union"))
        # Copies: a stage does not change when what it was made from does.
        self.by_anchor = copy.deepcopy(by_anchor or AnchorPseudoLabeler())
        self.by_probability = copy.deepcopy(by_probability or ProbabilityPseudoLabeler())
        if self.by_anchor.ignore_index != self.by_probability.ignore_index:
            raise ValueError(
                "Expected `by_anchor` and `by_probability` of one ignore_index, but got "
                f"{self.by_anchor.ignore_index} and {self.by_probability.ignore_index}."
            )
        self.rule = rule
        self.extract = extract
        self.network = _frozen(network)
        self.register_buffer("centroids", centroids.detach().to(torch.float32, copy=True))
        self.by_anchor.to(centroids.device)
        self.by_probability.to(centroids.device)

    @classmethod
    def from_source(
        cls,
        network: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        anchors: CategoryAnchors,
        *,
        by_anchor: AnchorPseudoLabeler | None = None,
        by_probability: ProbabilityPseudoLabeler | None = None,
        rule: Literal["anchor", "probability", "agree", "union"] = "anchor",
        extract: Extract = call_network,
    ) -> Self:
        """Freeze a network and take its anchors in one pass over labeled source batches.

        Anchors average the features of the pixels that the frozen network classifies right. Where
        ``torch.distributed`` is initialized, every process calls this with its own share of the
        source, and gets the anchors of the whole.

        Args:
            network: see `StageLabeler`.
            batches: pairs of images and labels ``(N, *)`` of any resolution; they are moved to
                the device of ``anchors``, where the network has to be as well.
            anchors: an accumulator, filled here: its settings say how the stream is averaged.
            by_anchor: see `StageLabeler`, as for all that follows.
            by_probability: likewise.
            rule: likewise.
            extract: likewise.

        Raises:
            ValueError: if no source pixel of any class was classified right.
        """
        frozen, device = _frozen(network), anchors.counts.device
        with torch.no_grad():
            for images, labels in batches:
                features, logits = extract(frozen, images.to(device))
                small = resize_labels(labels.to(device), features.shape[2:])
                anchors.update(features, keep_correct(small, logits))
        all_reduce(anchors)
        if not bool(anchors.seen.any()):
            raise ValueError(
                "Expected source batches with labels that the network predicts, but of no class "
                "was a single pixel classified right. Check the labels, and that the network is "
                "trained on these classes."
            )
        return cls(
            frozen,
            anchors.compute(),
            by_anchor=by_anchor,
            by_probability=by_probability,
            rule=rule,
            extract=extract,
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> StageLabels:
        """Label target images."""
        features, logits = self.extract(self.network, images)
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
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(network, wrappers) or hasattr(network, "_orig_mod"):
        inner = network.module if isinstance(network, wrappers) else network._orig_mod
        assert isinstance(inner, nn.Module)
        network = inner
    return copy.deepcopy(network).eval().requires_grad_(False)
