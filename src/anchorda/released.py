"""What the released CAG-UDA code does and its paper does not say, and a reader of its anchor file.

For reproducing its numbers. New work is better served by `anchorda.losses`, whose gradients are
those of the losses they belong to.
"""

import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from typing import IO, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from ._checks import check_anchors, check_device, check_features, check_label_map, check_range
from .anchors import keep_correct, resize_labels
from .losses import discriminative_loss

_MIN_PIXELS = 10
"""An image with fewer correctly predicted pixels of a class has no distance term for it."""


class CagUdaLoss(NamedTuple):
    """What `cag_uda_loss` returns; all scalars, connected to the graph."""

    total: Tensor
    """The sum of the other three: what to call ``backward()`` on."""
    source: Tensor
    """The cross-entropy with the source labels, at their resolution."""
    pseudo: Tensor
    """The mean of the cross-entropies with the two target label maps, at feature resolution."""
    distance: Tensor
    """The distance losses of both domains, times ``distance_weight``."""


def cag_uda_loss(
    source_features: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    target_features: Tensor,
    target_logits: Tensor,
    anchor_labels: Tensor,
    probability_labels: Tensor,
    anchors: Tensor,
    *,
    distance_weight: float = 0.7,
) -> CagUdaLoss:
    r"""The training objective of the released CAG-UDA code.

    .. math:: \ell = \mathrm{CE}(\hat z^s, y^s) +
              \tfrac{1}{2} (\mathrm{CE}(z^t, \hat y^a) + \mathrm{CE}(z^t, \hat y^p)) +
              \lambda (d(x^s, y^s) + d(x^t, \hat y^a))

    with :math:`\hat z^s` the source logits interpolated to the labels, bilinearly with aligned
    corners, and the distance loss

    .. math:: d(x, y) = \frac{10}{|T|} \sum_{(n, c) \in T} 10^{-k_{n,c}} h_{n,c}, \qquad
              h_{n,c} = \frac{1}{D} \sum_j \mathrm{huber}_1(\bar x_{n,c,j} - a_{c,j})

    where :math:`\bar x_{n,c}` is the mean over the pixels of image n that are of class c by their
    label and by the prediction; T holds the images and seen classes with at least 10 such pixels;
    and :math:`k_{n,c}` is the smallest number ≥ 0 that leaves no more than 5 of a term. Labels
    are resized to the features for it, by the nearest pixel.

    The gradient is not that of this loss: what reaches the features from the term (n, c) is
    multiplied by 2 · (pixels averaged) / (h · w), so that each of those pixels receives 2 / (h · w)
    of its mean's gradient however many they are. :math:`10^{-k}` is a constant to it.

    Args:
        source_features: ``(N, D, h, w)``, floating point.
        source_logits: ``(N, C, h, w)``, floating point.
        source_labels: ``(N, H, W)``, any integer dtype, at the resolution of the images.
        target_features: ``(M, D, h', w')``, floating point.
        target_logits: ``(M, C, h', w')``, floating point.
        anchor_labels: ``(M, h', w')``, any integer dtype: pseudo-labels by anchor distance. The
            target's distance loss uses these.
        probability_labels: ``(M, h', w')``, any integer dtype: pseudo-labels by probability.
        anchors: ``(C, D)``, floating point. A row that is not finite is an unseen class.
        distance_weight: λ ≥ 0.

    Returns:
        ``CagUdaLoss(total, source, pseudo, distance)``, float32 (float64 for float64 inputs).
        Where the released code gives NaN, having nothing to average, a part is a zero that is
        connected to the graph. Labels outside [0, C) are ignored. A feature that is not finite is
        left out of its mean, as out of every anchor; it shows in the cross-entropies, by its
        logits.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``distance_weight`` is wrong.

    Source: the released CAG-UDA code (github RogerZhangzz/CAG_UDA). The paper (arXiv 1910.13049)
    has Euclidean distances of pixels, equation 5, and neither the factors of 10 nor that gradient.

    >>> features, logits = torch.ones(1, 2, 3, 4, requires_grad=True), torch.zeros(1, 2, 3, 4)
    >>> labels, ignored = torch.zeros(1, 3, 4, dtype=torch.int64), torch.full((1, 3, 4), 250)
    >>> loss = cag_uda_loss(
    ...     features, logits, labels, features, logits, ignored, ignored, torch.zeros(2, 2)
    ... )
    >>> loss.source, loss.pseudo, loss.distance  # ln 2; nothing labeled; 0.7 · 10 · huber(1)
    (tensor(0.6931), tensor(0.), tensor(3.5000, grad_fn=<MulBackward0>))
    """
    check_features(source_features, "source_features")
    check_anchors(anchors, source_features)
    _check_domain(source_features, source_logits, anchors, "source")
    _check_domain(target_features, target_logits, anchors, "target")
    _check_source_labels(source_labels, source_features)
    _check_target_labels(anchor_labels, target_features, "anchor_labels")
    _check_target_labels(probability_labels, target_features, "probability_labels")
    check_range(distance_weight, "distance_weight", 0.0, math.inf)

    resized = resize_labels(source_labels, source_features.shape[2:])
    # At once, so that the gradients of the two target losses are not added up in half precision.
    source_logits, target_logits = _single(source_logits), _single(target_logits)
    source = discriminative_loss(_interpolate(source_logits, source_labels), source_labels)
    pseudo = 0.5 * (
        discriminative_loss(target_logits, anchor_labels)
        + discriminative_loss(target_logits, probability_labels)
    )
    distance = distance_weight * (
        _distance_loss(source_features, source_logits, resized, anchors)
        + _distance_loss(target_features, target_logits, anchor_labels, anchors)
    )
    return CagUdaLoss(source + pseudo + distance, source, pseudo, distance)


def load_category_anchors(path: str | os.PathLike[str]) -> Tensor:
    """Read an anchor file of the released CAG-UDA code, in either of its two layouts.

    The file is a pickle, but nothing it names is ever imported or called: it is read into a
    description, of which arrays are made here. A file that names anything but what an array
    consists of is refused.

    Args:
        path: a file of ``torch.save``, of any version, or of ``pickle.dump`` up to protocol 4,
            that holds an array ``(C, D)`` or a dict with ``objective_vectors (C, D)`` and
            ``objective_num (C,)``. Arrays are NumPy's or, if saved by torch 1.6 or later, tensors.

    Returns:
        The anchors ``(C, D)`` float32. A row is NaN, its class unseen, where ``objective_num`` is
        0, or, in a file without it, where the row is all zeros, as the released code began it.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it holds something else, or is damaged; the message names the file.

    Source: the released CAG-UDA code (github RogerZhangzz/CAG_UDA), which itself can read but one
    of the layouts at a time.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "category_anchors")
    ...     means, counts = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([80, 0])
    ...     torch.save({"objective_vectors": means, "objective_num": counts}, path)
    ...     load_category_anchors(path)
    tensor([[1., 2.],
            [nan, nan]])
    """
    with open(path, "rb") as file:
        try:
            return _anchors(_read(file))
        except Exception as error:  # Unpickling what is damaged may raise any.
            reason = error if isinstance(error, _UnfitError) else f"it is damaged: {error!r}"
            raise ValueError(
                f"Expected {os.fspath(path)!r} to hold category anchors, an array (C, D) or a "
                f"dict with `objective_vectors` (C, D) and `objective_num` (C,), but {reason}."
            ) from error


def _single(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _interpolate(logits: Tensor, labels: Tensor) -> Tensor:
    size = labels.shape[1:]
    scaled: Tensor = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    return scaled


def _distance_loss(features: Tensor, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    num_classes, pixels = anchors.shape[0], features.shape[2] * features.shape[3]
    anchors = anchors.detach()
    correct = keep_correct(labels.long(), logits, ignore_index=-1)
    sums, counts = _ops.image_sums(features, correct, num_classes)
    counts = counts[..., None].to(sums.dtype)
    means = _scale_gradient(sums / counts.clamp(min=1), 2 * counts / pixels)
    present = (counts[..., 0] >= _MIN_PIXELS) & anchors.isfinite().all(dim=1)
    classes = torch.where(present, torch.arange(num_classes, device=features.device), -1)
    terms: Tensor = _ops.pixel_losses(means.mT, classes, anchors, "smooth_l1")
    # As many tens as the released code's `while term > 5: term /= 10`, for any term in float32.
    tens = 10.0 ** torch.arange(38, device=terms.device, dtype=terms.dtype)
    too_many = (terms.detach()[..., None] > 5 * tens).sum(dim=-1, dtype=terms.dtype)
    loss: Tensor = 10 * (terms / 10.0**too_many).sum() / present.sum().clamp(min=1)
    return loss


def _scale_gradient(values: Tensor, scale: Tensor) -> Tensor:
    """The same values, to the last bit, whose gradient is multiplied by the scale."""
    constant = values.detach()
    return constant + scale * (values - constant)


def _check_domain(features: Tensor, logits: Tensor, anchors: Tensor, domain: str) -> None:
    check_features(features, f"{domain}_features")
    check_features(logits, f"{domain}_logits")
    if features.ndim != 4 or features.shape[1] != anchors.shape[1]:
        raise ValueError(
            f"Expected `{domain}_features` of shape (N, D, h, w) with D = {anchors.shape[1]} to "
            f"match `anchors`, but got {tuple(features.shape)}."
        )
    check_device(features, f"{domain}_features", anchors, "anchors")
    expected = (features.shape[0], anchors.shape[0], *features.shape[2:])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"Expected `{domain}_logits` of shape (N, C, h, w) = {expected} to match "
            f"`{domain}_features` and `anchors`, but got {tuple(logits.shape)}. "
            "Pass the logits of the classifier before they are interpolated."
        )
    check_device(logits, f"{domain}_logits", features, f"{domain}_features")


def _check_source_labels(labels: Tensor, features: Tensor) -> None:
    check_label_map(labels, "source_labels")
    if labels.ndim != 3 or labels.shape[0] != features.shape[0]:
        mend = ""
        if labels.ndim == 4 and labels.shape[1] == 1:
            mend = " Drop the channel dimension with source_labels.squeeze(1)."
        raise ValueError(
            f"Expected `source_labels` of shape (N, H, W) with N = {features.shape[0]} to match "
            f"`source_features`, but got {tuple(labels.shape)}.{mend}"
        )
    check_device(labels, "source_labels", features, "source_features")


def _check_target_labels(labels: Tensor, features: Tensor, name: str) -> None:
    check_label_map(labels, name)
    expected = (features.shape[0], *features.shape[2:])
    if tuple(labels.shape) != expected:
        mend = f" Resize them with anchorda.resize_labels({name}, target_features.shape[2:])."
        resizable = labels.ndim == 3 and labels.shape[0] == features.shape[0]
        raise ValueError(
            f"Expected `{name}` of shape (N, h, w) = {expected} to match `target_features`, "
            f"but got {tuple(labels.shape)}.{mend if resizable else ''}"
        )
    check_device(labels, name, features, "target_features")


class _UnfitError(ValueError):
    """Why a file is none of category anchors, as the end of a sentence about it."""


@dataclass
class _Built:
    """What a pickle asks to be built: by which global, from which arguments, with which state."""

    name: str
    arguments: tuple[object, ...]
    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


@dataclass
class _Global:
    """A global that a pickle names. A call of it is noted, not made."""

    name: str

    def __call__(self, *arguments: object) -> _Built:
        return _Built(self.name, arguments)


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
# None of them is imported; these are the names that arrays and tensors are described with.
_GLOBALS = {
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("torch._utils._rebuild_tensor_v2", "collections.OrderedDict"),
    *(f"torch.{storage}" for storage in _STORAGES),
}
_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what files of torch before 1.6 begin with


@final
class _Reader(pickle._Unpickler):
    """Reads a pickle into plain values, `_Global` and `_Built`.

    It builds on the unpickler in Python, as that in C takes registered extensions from a cache
    without asking.
    """

    def __init__(self, pickled: IO[bytes], archive: zipfile.ZipFile | None = None) -> None:
        super().__init__(pickled)
        self._archive = archive

    def find_class(self, module: str, name: str) -> _Global:
        if not name:
            raise pickle.UnpicklingError("it ends within a name")
        if f"{module}.{name}" not in _GLOBALS:
            raise _UnfitError(
                f"it names {module}.{name}, which no array needs; nothing of it was run"
            )
        return _Global(name)

    def get_extension(self, code: int) -> None:
        raise _UnfitError(f"it names the pickle extension {code}; nothing of it was run")

    def persistent_load(self, pid: object) -> tuple[torch.dtype, bytes]:
        match pid:
            case ("storage", _Global(kind), str(key), *_) if self._archive:
                return _STORAGES[kind], self._archive.read(_member(self._archive, f"data/{key}"))
            case ("storage", *_):
                raise _UnfitError("it holds a tensor in the format of torch before 1.6")
        raise pickle.UnpicklingError("it refers to what is outside of it")


def _read(file: IO[bytes]) -> object:
    """What a file holds, described by `_Reader`."""
    is_archive = file.read(2) == b"PK"
    file.seek(0)
    if is_archive:
        with zipfile.ZipFile(file) as archive, archive.open(_member(archive, "data.pkl")) as data:
            return _Reader(data, archive).load()
    content = _Reader(file).load()
    if content == _TORCH_MAGIC:
        _Reader(file).load()  # the version of the format
        _Reader(file).load()  # the sizes of the writer's types
        content = _Reader(file).load()
    return content


def _member(archive: zipfile.ZipFile, name: str) -> str:
    """The full name of a member: torch puts all of them into one folder, named as the file."""
    return archive.namelist()[0].partition("/")[0] + "/" + name


def _anchors(content: object) -> Tensor:
    match content:
        case {"objective_vectors": vectors, "objective_num": counts}:
            anchors, seen = _tensor(vectors), _tensor(counts) > 0
        case dict():
            keys = ", ".join(repr(key[:40]) for key in list(content)[:5] if isinstance(key, str))
            raise _UnfitError(f"it is a dict of other keys: {keys}")
        case _:
            anchors = _tensor(content)
            seen = (anchors != 0).any(dim=-1)
    if not anchors.is_floating_point() or anchors.ndim != 2 or 0 in anchors.shape:
        raise _UnfitError(f"its anchors are {anchors.dtype} of shape {tuple(anchors.shape)}")
    if seen.shape != anchors.shape[:1]:
        raise _UnfitError(f"its counts are of shape {tuple(seen.shape)} for {len(anchors)} anchors")
    anchors = torch.where(seen[:, None], anchors, torch.nan).float()
    if not (anchors.isfinite().all(dim=1) | anchors.isnan().all(dim=1)).all():
        raise _UnfitError("some of its anchors are not finite")
    return anchors


def _tensor(value: object) -> Tensor:
    """A tensor from the description of an array or tensor."""
    match value:
        case _Built(
            "_reconstruct",
            state=(
                _,
                tuple(shape),
                _Built("dtype", (str(code), *_), (_, "<" | ">" | "|" as order, *_)),
                bool(is_fortran),
                bytes() | _Built("encode", (str(), "latin1")) as data,
            ),
        ) if code in _DTYPES:
            raw = data if isinstance(data, bytes) else str(data.arguments[0]).encode("latin1")
            flat = np.frombuffer(raw, np.dtype(str(order) + code))
            array = flat.reshape(shape, order="F" if is_fortran else "C")
            # A copy in this machine's byte order, and in a dtype that torch has, exact for counts.
            return torch.from_numpy(array.astype(np.float64 if code[0] == "f" else np.int64))
        case _Built(
            "_rebuild_tensor_v2",
            ((torch.dtype() as dtype, bytes(data)), int(offset), tuple(size), tuple(stride), *_),
        ):
            if math.prod(size) > len(data):
                raise _UnfitError("it holds a tensor that is larger than its data")
            # Checked by torch to stay within the data.
            return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(size, stride, offset)
    other = "an array of another kind" if isinstance(value, _Built) else type(value).__name__
    raise _UnfitError(f"it holds {other} in place of an array of numbers")
