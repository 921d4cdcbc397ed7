"""Labels of the target by a frozen network, its anchors, and labelers."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, final, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from ._checks import (
    as_floats,
    check_anchor_groups,
    check_choice,
    check_features,
    check_label_map,
    check_logits,
    check_per_class,
    structure_of,
    type_of,
)
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
"""A function of a network and images that returns features (N, D, *) and logits (N, C, *)."""

Rule = Literal["anchor", "probability", "agree", "union"]
"""The labels of a stage: those of one labeler, or both combined."""

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
    """Call a network that returns both features and logits."""
    outputs: tuple[Tensor, Tensor] = network(images)
    return outputs


@final
class StageLabeler(nn.Module):
    r"""Everything that stays fixed in a stage: a frozen network, the anchors, and the labelers.

    The network is copied, out of a ``DistributedDataParallel`` or ``torch.compile`` wrapper if it
    is in one; it is not modified. The copy needs no gradients and is in evaluation mode, and no
    parent module can change that: ``modules()``, ``children()``, ``parameters()`` and ``buffers()``
    of the stage and of its parents leave the copy out, and with them ``train()``, ``apply``,
    ``requires_grad_``, ``torch.optim.swa_utils.update_bn``, averages of weights, optimizers, and
    the wrappers for several GPUs. Labeling runs under ``torch.no_grad``. All of the stage is in
    ``state_dict`` and follows ``.to(device)``; ``.half()`` casts the network alone.

    Both labelers label every pixel until others are assigned: a minimum that is calibrated on a
    stage's own scores needs all of them first.

    Args:
        network: any module that ``copy.deepcopy`` copies. Tensors of a graph that it holds as
            attributes, such as the weights of ``torch.nn.utils.weight_norm`` after a forward pass,
            are copied without the graph.
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
        TypeError: if a dtype is wrong, ``extract`` is a module, the network cannot be copied, or
            what is returned is not features and logits.
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
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"Expected `network` to be a torch.nn.Module, but got {type_of(network)}. "
                "Wrap a function in a module whose `forward` calls it."
            )
        centroids = as_floats(centroids, "centroids")
        check_anchor_groups(centroids, "centroids")
        check_choice(rule, "rule", get_args(Rule))
        if isinstance(extract, nn.Module):
            raise TypeError(
                "Expected `extract` to be a function of the network and images, but got a module, "
                "which would not be frozen. Pass it as `network`."
            )
        if not callable(extract):
            raise TypeError(
                "Expected `extract` to be a function of the network and images, but got "
                f"{type_of(extract)}."
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
        """Freeze a network and compute its anchors in one pass over labeled source batches.

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
            TypeError: if a batch is not a pair of images and labels, or the network does not return
                features and logits.
            ValueError: if ``anchors`` has already seen something or differs between processes, or
                if there is no batch, no label in [0, C), or no source pixel that is classified
                right.
        """
        if not isinstance(anchors, CategoryAnchors):
            raise TypeError(
                f"Expected `anchors` to be CategoryAnchors, but got {type_of(anchors)}. "
                "Pass an empty accumulator, not what its compute() returns."
            )
        check_agreement(anchors, group)
        if bool(anchors.seen.any()):
            raise ValueError(
                "Expected `anchors` that have seen nothing yet, but got some that have: they would "
                "mix two networks. Call anchors.reset(), or make new ones for each stage."
            )
        # Made of no anchors yet, so that the network is copied once.
        stage = cls(network, anchors.compute(), extract=extract)
        device = next(stage.network.parameters(), anchors.counts).device
        num_classes, num_batches = anchors.num_classes, 0
        labeled = torch.zeros((), dtype=torch.int64, device=device)
        with torch.no_grad():
            for batch in _iterated(batches):
                images, labels = _images_and_labels(batch)
                features, logits = _outputs(extract, stage.network, images.to(device), num_classes)
                small = resize_labels(labels.to(device), features.shape[2:])
                anchors.update(features, keep_correct(small.long(), logits, ignore_index=-1))
                labeled += ((small.long() >= 0) & (small.long() < num_classes)).sum()
                num_batches += 1
        all_reduce(anchors, group=group)
        if not bool(anchors.seen.any()):
            raise ValueError(_nothing_seen(num_batches, int(labeled), num_classes))
        stage.centroids.copy_(anchors.compute())
        return stage.to(device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> StageLabels:
        """Label target images."""
        self._check_labelers()
        if not torch.compiler.is_compiling():
            self.network.eval()  # It may have been reached by its name.
        features, logits = _outputs(self.extract, self.network, images, len(self.centroids))
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
        """Reject a rule and labelers that do not fit: they may be assigned at any time."""
        check_choice(self.rule, "rule", get_args(Rule))
        for name, kind in (
            ("by_anchor", AnchorPseudoLabeler),
            ("by_probability", ProbabilityPseudoLabeler),
        ):
            if not isinstance(getattr(self, name), kind):
                got = type_of(getattr(self, name))
                raise TypeError(f"Expected `{name}` to be {kind.__name__}, but got {got}.")
        if self.by_anchor.ignore_index != self.by_probability.ignore_index:
            raise ValueError(
                "Expected `by_anchor` and `by_probability` of one ignore_index, but got "
                f"{self.by_anchor.ignore_index} and {self.by_probability.ignore_index}."
            )
        margin, probability = self.by_anchor.min_margin, self.by_probability.min_probability
        for name, minimum in (("min_margin", margin), ("min_probability", probability)):
            check_per_class(minimum, name, self.centroids, "centroids", len(self.centroids))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The labelers; the frozen network is left out, as of all that goes through modules."""
        for name, child in super().named_children():
            if name != "network":
                yield name, child

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The stage and its labelers; see `named_children`."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self.named_children():
            path = f"{prefix}.{name}" if prefix else name
            yield from child.named_modules(memo, path, remove_duplicate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in (self.network, self.by_anchor, self.by_probability):
            child._apply(fn)
        move_buffers(self, fn)
        return self

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return f"centroids={tuple(self.centroids.shape)}, rule={self.rule!r}"


class _DetachedCopies(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors that belong to a graph: detached."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _frozen(network: nn.Module) -> nn.Module:
    """Copy a network, out of whatever wraps it, in evaluation mode and without gradients."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif isinstance(compiled := getattr(network, "_orig_mod", None), nn.Module):
            network = compiled
        else:
            break
    try:
        with _DetachedCopies():
            return copy.deepcopy(network).eval().requires_grad_(False)
    except Exception as error:  # Copying runs code of the network, which may raise any.
        raise TypeError(
            "Expected `network` to be a module that copy.deepcopy copies, as StageLabeler freezes "
            f"a copy, but got {type_of(network)}, whose copy fails: {error} Remove the attribute "
            "that cannot be copied, or define __deepcopy__ or __getstate__ of the class that has "
            "it."
        ) from error


def _iterated(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[object]:
    try:
        return iter(batches)
    except TypeError:
        raise TypeError(
            "Expected `batches` to be an iterable of pairs (images, labels), such as a DataLoader, "
            f"but got {type_of(batches)}."
        ) from None


def _images_and_labels(batch: object) -> tuple[Tensor, Tensor]:
    """Return the two entries of a batch; reject what other codes' loaders give."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        fix = "((images, labels) for images, labels, *_ in loader)"
        if isinstance(batch, Mapping):
            fix = '((batch["image"], batch["label"]) for batch in loader), with your own keys'
        raise TypeError(
            "Expected `batches` to give pairs (images, labels), but got a "
            f"{structure_of(batch)}. Pass {fix}."
        )
    images, labels = batch
    check_label_map(labels)
    if not callable(getattr(images, "to", None)):
        raise TypeError(
            "Expected images that are moved to a device with .to(device), but got a "
            f"{structure_of(images)}. Pass a tensor, stacked by the loader."
        )
    return images, labels


def _outputs(
    extract: Extract, network: nn.Module, images: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return the features and logits of images; reject outputs that do not fit."""
    outputs = extract(network, images)
    if (
        not isinstance(outputs, (tuple, list))
        or len(outputs) != 2
        or not all(isinstance(output, Tensor) for output in outputs)
    ):
        raise TypeError(
            "Expected the network, or `extract`, to return features (N, D, *) and logits "
            f"(N, C, *), but got a {structure_of(outputs)}. Pass `extract`, a function of the "
            "network and images that returns these two tensors; FeatureTap reads features that a "
            "network does not return."
        )
    features, logits = outputs
    check_features(features)
    check_logits(logits)
    expected = (features.shape[0], num_classes, *features.shape[2:])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"Expected `logits` of shape (N, C, *) = {expected} to match `features` and the "
            f"anchors, but got {tuple(logits.shape)}. Let `extract` return first the features, "
            "then the logits of these classes at the resolution of the features."
        )
    return features, logits


def _nothing_seen(num_batches: int, labeled: int, num_classes: int) -> str:
    """Say why no anchor could be computed."""
    if num_batches == 0:
        return (
            "Expected `batches` to give at least one batch, but got none. An iterator that was "
            "used before is empty, and so is a loader with drop_last=True over fewer images than "
            "a batch has. Pass the loader itself, or a new iterator."
        )
    if labeled == 0:
        return (
            f"Expected source labels in [0, {num_classes}), but got none in {num_batches} batches: "
            "all are ignored. Map the ids of the label files to the ids of the classes."
        )
    return (
        "Expected source pixels that the network classifies right, but got none among "
        f"{labeled} that are labeled. Check that the network is trained on these classes, in this "
        "order, and that its features are finite."
    )
