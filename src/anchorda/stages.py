"""Labels of the target by a frozen network, its anchors, and labelers."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, final, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from ._checks import (
    as_floats,
    check_anchor_groups,
    check_choice,
    check_features,
    check_flag,
    check_label_map,
    check_logits,
    check_per_class,
    check_positive,
    check_range,
    check_type,
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
    anchor_probabilities,
    combine_pseudo_labels,
    rectify,
)
from .statistics import WithinClassCovariance, whitening_matrix

Extract = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
"""A function of a network and images that returns features (N, D, *) and logits (N, C, *)."""

Rule = Literal["anchor", "probability", "agree", "union", "rectify"]
"""The labels of a stage: those of one labeler, or both combined."""

_EVERYTHING = float("-inf")


class StageLabels(NamedTuple):
    """The labels of target images by a stage."""

    labels: Tensor
    """(N, *) int64: the two combined by the stage's rule."""
    by_anchor: PseudoLabels
    """Labels and margins of the anchors."""
    by_probability: PseudoLabels
    """Labels and probabilities of the classifier; with the rule ``"rectify"``, the rectified."""


def _call_network(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Call a network that returns both features and logits."""
    outputs: tuple[Tensor, Tensor] = network(images)
    return outputs


def average_views(
    extract: Extract = _call_network, *, scales: Sequence[float] = (1.0,), flip: bool = True
) -> Extract:
    r"""Return an ``extract`` that averages several views of each image.

    .. math:: \bar x = \frac{1}{V} \sum_v T_v^{-1} f(T_v I), \qquad
              \bar z = \log \frac{1}{V} \sum_v T_v^{-1} \operatorname{softmax} g(T_v I)

    over the scales, each as it is and flipped left to right. Features and probabilities are resized
    to the resolution of the first scale's.

    Args:
        extract: maps a network and images ``(N, 3, H, W)`` to features and logits.
        scales: factors of the height and width of the images.
        flip: also average the flipped images.

    Returns:
        A function of network and images ``(N, 3, H, W)``: features, and the logarithm of the
        averaged probabilities as logits.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if there is no scale, or one is not positive.

    Source: the inference of SHOT's and DAFormer's codes; flips and scales average out errors that
    depend on the position of an object.

    >>> class Network(nn.Module):
    ...     def forward(self, images):
    ...         return images, images[:, :2]
    >>> images = torch.randn(1, 3, 4, 4)
    >>> stage = StageLabeler(Network(), torch.randn(2, 3), extract=average_views())
    >>> torch.equal(stage(images).labels, stage(images.flip(-1)).labels.flip(-1))
    True
    """
    scales = tuple(check_positive(scale, "scales") for scale in scales)
    if not scales:
        raise ValueError("Expected `scales` to have an entry, but got none. Pass (1.0,).")
    check_flag(flip, "flip")
    return partial(_average_views, extract=extract, scales=scales, flip=flip)


def _average_views(
    network: nn.Module, images: Tensor, *, extract: Extract, scales: tuple[float, ...], flip: bool
) -> tuple[Tensor, Tensor]:
    features, probabilities = list[Tensor](), list[Tensor]()
    for scale in scales:
        size = [max(1, round(length * scale)) for length in images.shape[2:]]
        scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear")
        for flipped in (False, True) if flip else (False,):
            maps = extract(network, scaled.flip(-1) if flipped else scaled)
            x, logits = (m.flip(-1) if flipped else m for m in maps)
            features.append(_resized(x, features or [x]))
            probabilities.append(_resized(logits.float().softmax(dim=1), probabilities or [x]))
    return torch.stack(features).mean(dim=0), torch.stack(probabilities).mean(dim=0).log()


def _resized(maps: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Return maps at the resolution of the first of others."""
    size = like[0].shape[2:]
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="bilinear")


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

    Labels that move: `follow` moves the copy towards the trained network, as the teacher of
    self-training does, and ``stage.centroids = anchors.compute()`` the anchors. Views of an image
    are averaged by ``extract=average_views()``.

    Args:
        network: any module that ``copy.deepcopy`` copies. Tensors of a graph that it holds as
            attributes, such as the weights of ``torch.nn.utils.weight_norm`` after a forward pass,
            are copied without the graph.
        centroids: ``(C, D)`` or ``(C, M, D)``, the anchors; see `AnchorPseudoLabeler`.
        by_anchor: labels by distance; warned of where no pixel can exceed its minimum margin.
        by_probability: labels by the classifier.
        rule: which labels `StageLabels.labels` holds: those of one labeler; or both combined, by
            "agree" and "union" as `combine_pseudo_labels` does, and by "rectify" as `rectify`
            does, the probabilities of the classifier times the soft assignment to the anchors. The
            paper keeps both maps and averages two losses: for that, take ``by_anchor.labels`` and
            ``by_probability.labels``.
        whitening: ``(D, D)``, the metric of the distances to the anchors, as `whitening_matrix`
            returns it: features and centroids are multiplied by it. Nearest anchors are then those
            of `linear_discriminant`.
        temperature: τ > 0 of the soft assignment: softmax(−‖x − a‖₂ / τ), as in ProDA, and with
            ``whitening`` W the posterior softmax(−‖W(x − a)‖₂² / 2τ) of the discriminant.
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
    """(C, D) or (C, M, D) float32: the anchors; others may be assigned."""
    whitening: Tensor | None
    """(D, D) float32, or None: the metric of the distances."""
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
        whitening: Tensor | None = None,
        temperature: float = 1.0,
        extract: Extract = _call_network,
    ) -> None:
        super().__init__()
        fix = " Wrap a function in a module whose `forward` calls it."
        check_type(network, "network", nn.Module, fix)
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
        self.temperature = temperature
        self.extract = extract
        self.network = _frozen(network)
        self.register_buffer("centroids", centroids.detach().to(torch.float32, copy=True))
        self.register_buffer("whitening", None)
        if whitening is not None:
            check_features(whitening, "whitening")
            self.whitening = whitening.detach().to(torch.float32, copy=True)
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
        covariance: WithinClassCovariance | None = None,
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
            covariance: an empty accumulator, filled by the same features, whose metric becomes the
                stage's ``whitening``.
            extract: see `StageLabeler`.
            group: the processes that take part; ``None`` is all of them.

        Raises:
            TypeError: if a batch is not a pair of images and labels, or the network does not return
                features and logits.
            ValueError: if an accumulator has already seen something or differs between processes,
                or if there is no batch, no label in [0, C), or no source pixel that is classified
                right.
        """
        fix = " Pass an empty accumulator, not what its compute() returns."
        check_type(anchors, "anchors", CategoryAnchors, fix)
        states: list[CategoryAnchors | WithinClassCovariance] = [anchors]
        if covariance is not None:
            check_type(covariance, "covariance", WithinClassCovariance, fix)
            states.append(covariance)
        for name, state in zip(("anchors", "covariance"), states, strict=False):
            check_agreement(state, group)
            if bool((state.counts > 0).any()):
                raise ValueError(
                    f"Expected `{name}` to have seen nothing yet, but it has: it would mix two "
                    f"networks. Call {name}.reset(), or make a new one for each stage."
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
                correct = keep_correct(small.long(), logits, ignore_index=-1)
                for state in states:
                    state.update(features, correct)
                labeled += ((small.long() >= 0) & (small.long() < num_classes)).sum()
                num_batches += 1
        for state in states:
            all_reduce(state, group=group)
        if not bool(anchors.seen.any()):
            raise ValueError(_nothing_seen(num_batches, int(labeled), num_classes))
        stage.centroids.copy_(anchors.compute())
        if covariance is not None:
            stage.whitening = whitening_matrix(covariance.compute())
        return stage.to(device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> StageLabels:
        """Label target images."""
        features, logits = self._features_and_logits(images)
        by_anchor = self.by_anchor(*self._in_metric(features))
        if self.rule == "rectify":
            logits = rectify(logits.softmax(dim=1), self._assignments(features)).log()
        by_probability = self.by_probability(logits)
        if self.rule == "anchor":
            labels = by_anchor.labels
        elif self.rule == "probability" or self.rule == "rectify":
            labels = by_probability.labels
        else:
            labels = combine_pseudo_labels(
                by_anchor.labels,
                by_probability.labels,
                self.rule,
                ignore_index=self.by_anchor.ignore_index,
            )
        return StageLabels(labels, by_anchor, by_probability)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return soft labels ``(N, C, *)`` of target images, by the rule.

        The classifier's probabilities, the soft assignment to the anchors, or their product, for
        the rules "probability", "anchor" and "rectify".

        Raises:
            ValueError: if the rule is another one.
        """
        features, logits = self._features_and_logits(images)
        if self.rule == "anchor":
            return self._assignments(features)
        probabilities = logits.softmax(dim=1, dtype=torch.float32)
        if self.rule == "probability":
            return probabilities
        if self.rule == "rectify":
            return rectify(probabilities, self._assignments(features))
        raise ValueError(
            f"Expected a rule with probabilities, but got rule={self.rule!r}, which compares "
            'labels. Set stage.rule = "rectify", or take stage(images).labels.'
        )

    @torch.no_grad()
    def follow(self, network: nn.Module, decay: float) -> None:
        """Move the frozen copy towards a network: the teacher of self-training.

        Parameters and floating-point buffers become ``decay`` · own + (1 − ``decay``) · network's;
        other buffers are copied. The anchors stay until others are assigned.

        Args:
            network: of the architecture that the stage was made from, wrapped or not.
            decay: in [0, 1]; 0 copies the network. It should be near 1 − 1 / (steps it averages).

        Raises:
            TypeError: if ``network`` is no module.
            ValueError: if its tensors are others than the copy's, or ``decay`` is out of range.
        """
        check_type(network, "network", nn.Module)
        decay = check_range(decay, "decay", 0.0, 1.0)
        own, new = _tensors(self.network), _tensors(_unwrapped(network))
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in new.items()}:
            differing = sorted(
                k
                for k in own.keys() | new.keys()
                if k not in own or k not in new or own[k].shape != new[k].shape
            )
            raise ValueError(
                "Expected `network` to have the parameters and buffers of the stage's copy, but "
                f"{differing[:3]} differ. Make a new stage of that network."
            )
        for name, tensor in own.items():
            value = new[name].detach().to(tensor)
            if tensor.is_floating_point():
                tensor.lerp_(value, 1 - decay)
            else:
                tensor.copy_(value)

    def _features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._check_labelers()
        if not torch.compiler.is_compiling():
            self.network.eval()  # It may have been reached by its name.
        return _outputs(self.extract, self.network, images, len(self.centroids))

    def _in_metric(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and centroids in the metric of the distances."""
        if self.whitening is None:
            return features, self.centroids
        whitened = torch.einsum("nd...,de->ne...", features.float(), self.whitening)
        return whitened, self.centroids @ self.whitening

    def _assignments(self, features: Tensor) -> Tensor:
        """Return the soft assignment (N, C, *) to the anchors."""
        where = self._in_metric(features)
        if self.whitening is None:
            return anchor_probabilities(*where, temperature=self.temperature)
        return anchor_probabilities(*where, similarity="squared", temperature=2 * self.temperature)

    def _check_labelers(self) -> None:
        """Reject a rule and labelers that do not fit: they may be assigned at any time."""
        check_choice(self.rule, "rule", get_args(Rule))
        check_positive(self.temperature, "temperature")
        dim = self.centroids.shape[-1]
        if self.whitening is not None and tuple(self.whitening.shape) != (dim, dim):
            raise ValueError(
                f"Expected `whitening` of shape (D, D) = ({dim}, {dim}) to match the centroids, "
                f"but got {tuple(self.whitening.shape)}. Compute both from features of the same "
                "layer."
            )
        check_type(self.by_anchor, "by_anchor", AnchorPseudoLabeler)
        check_type(self.by_probability, "by_probability", ProbabilityPseudoLabeler)
        if self.by_anchor.ignore_index != self.by_probability.ignore_index:
            raise ValueError(
                "Expected `by_anchor` and `by_probability` of one ignore_index, but got "
                f"{self.by_anchor.ignore_index} and {self.by_probability.ignore_index}."
            )
        margin, probability = self.by_anchor.min_margin, self.by_probability.min_probability
        for name, minimum in (("min_margin", margin), ("min_probability", probability)):
            check_per_class(minimum, name, self.centroids, "centroids", len(self.centroids))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *others: object
    ) -> None:
        saved = state_dict.get(prefix + "whitening")
        self.whitening = None if saved is None else self.centroids.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *others)

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
        return move_buffers(self, fn)

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        metric = "" if self.whitening is None else ", whitening"
        return f"centroids={tuple(self.centroids.shape)}, rule={self.rule!r}{metric}"


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


def _unwrapped(network: nn.Module) -> nn.Module:
    """Return a network out of its wrappers."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif isinstance(compiled := getattr(network, "_orig_mod", None), nn.Module):
            network = compiled
        else:
            return network


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _frozen(network: nn.Module) -> nn.Module:
    """Copy a network out of its wrappers, in evaluation mode and without gradients."""
    network = _unwrapped(network)
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
