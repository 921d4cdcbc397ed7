"""Rejections at the public boundary: what was expected, what came, and the likely mend.

Only types, shapes, dtypes, devices and plain Python numbers are looked at, never the values of a
tensor: looking at those would make the host wait for the GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(value: object, name: str) -> None:
    """Reject what is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` to be a torch.Tensor, but got {type(value).__name__}.")


def check_features(features: Tensor, name: str = "features") -> None:
    """Reject what is not a floating-point tensor (N, D, *)."""
    check_tensor(features, name)
    if features.ndim < 2:
        raise ValueError(
            f"Expected `{name}` of shape (N, D, *), batch and channels first, "
            f"but got {tuple(features.shape)}. Add the batch dimension with {name}.unsqueeze(0)."
        )
    _check_floating(features, name)


def check_logits(logits: Tensor) -> None:
    """Reject what is not a floating-point tensor (N, C, *), C ≥ 1."""
    check_features(logits, "logits")
    if logits.shape[1] < 1:
        raise ValueError(
            "Expected `logits` of shape (N, C, *) with at least one class, "
            f"but got {tuple(logits.shape)}."
        )


def check_label_map(labels: Tensor, name: str = "labels") -> None:
    """Reject what is not a tensor (N, *) of an integer dtype."""
    check_tensor(labels, name)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"Expected `{name}` of an integer dtype, but got {labels.dtype}. "
            f"Convert them with {name}.long()."
        )
    if labels.ndim < 1:
        raise ValueError(f"Expected `{name}` of shape (N, *), but got a tensor without dimensions.")


def check_labels(labels: Tensor, features: Tensor, name: str = "features") -> None:
    """Reject labels (N, *) that do not match features or logits (N, D, *)."""
    check_label_map(labels)
    expected = (features.shape[0], *features.shape[2:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"Expected `labels` of shape {_dimensions(len(expected))} = {expected} to match "
            f"`{name}`, but got {tuple(labels.shape)}.{_mend_labels(labels, features, name)}"
        )
    check_device(labels, "labels", features, name)


def check_same_labels(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    """Reject two label maps that are not of one shape and on one device."""
    check_label_map(first, names[0])
    check_label_map(second, names[1])
    mend = f" Resize them with anchorda.resize_labels({names[1]}, {names[0]}.shape[1:])."
    resizable = first.ndim == second.ndim and first.shape[:1] == second.shape[:1]
    _check_alike(second, names[1], first, names[0], mend if resizable else "")


def check_anchors(anchors: Tensor, features: Tensor) -> None:
    """Reject anchors that are not a floating-point tensor (C, D) beside features (N, D, *)."""
    check_tensor(anchors, "anchors")
    _check_floating(anchors, "anchors")
    dim = features.shape[1]
    if anchors.ndim != 2 or anchors.shape[0] < 1 or anchors.shape[1] != dim:
        raise ValueError(
            f"Expected `anchors` of shape (C, D) with D = {dim} to match `features`, but got "
            f"{tuple(anchors.shape)}. Compute the anchors from features of the same layer."
        )
    check_device(anchors, "anchors", features, "features")


def check_anchor_rows(anchors: Tensor, name: str = "anchors") -> None:
    """Reject anchors that are not a floating-point tensor (C, D)."""
    check_tensor(anchors, name)
    _check_floating(anchors, name)
    if anchors.ndim != 2 or anchors.shape[0] < 1:
        raise ValueError(
            f"Expected `{name}` of shape (C, D), one row for each class, "
            f"but got {tuple(anchors.shape)}."
        )


def check_same_anchors(previous: Tensor, anchors: Tensor) -> None:
    """Reject previous anchors that are not of the shape and on the device of the present ones."""
    check_anchor_rows(previous, "previous")
    _check_alike(previous, "previous", anchors, "anchors")


def check_scores(scores: Tensor, labels: Tensor) -> None:
    """Reject scores that are not floating point and of the shape and device of the labels."""
    check_label_map(labels)
    check_tensor(scores, "scores")
    _check_floating(scores, "scores")
    _check_alike(scores, "scores", labels, "labels", " Pass both as a labeler returned them.")


def check_pixel_weights(weights: Tensor | None, labels: Tensor, name: str = "labels") -> None:
    """Reject pixel weights that are not floating point and of the shape and device of the labels.

    ``None`` is a weight of 1 everywhere.
    """
    if weights is None:
        return
    check_tensor(weights, "pixel_weights")
    _check_floating(weights, "pixel_weights")
    _check_alike(weights, "pixel_weights", labels, name)


def check_class_names(names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    """Reject names that are not one for each class; without names, number the classes."""
    if names is None:
        return [str(c) for c in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"Expected `class_names` for {num_classes} classes, but got {len(names)}.")
    return names


def check_per_class(
    values: Tensor, name: str, like: Tensor, like_name: str, num_classes: int
) -> None:
    """Reject per-class values (C,) of another length or device; one value for all is accepted."""
    if values.ndim == 0:
        return
    if values.shape[0] != num_classes:
        raise ValueError(
            f"Expected `{name}` to be one number or of shape (C,) = ({num_classes},), "
            f"but got {tuple(values.shape)}."
        )
    check_device(values, name, like, like_name)


def check_sums(sums: Tensor, counts: Tensor, shape: tuple[int, int]) -> None:
    """Reject class sums that are not floating point (C, D) with integer counts (C,)."""
    check_tensor(sums, "sums")
    _check_floating(sums, "sums")
    check_label_map(counts, "counts")
    if tuple(sums.shape) != shape or tuple(counts.shape) != shape[:1]:
        raise ValueError(
            f"Expected `sums` of shape (C, D) = {shape} and `counts` of shape (C,) = "
            f"{shape[:1]}, but got {tuple(sums.shape)} and {tuple(counts.shape)}."
        )


def check_device(value: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Reject two tensors on different devices."""
    if value.device != like.device:
        raise ValueError(
            f"Expected `{name}` on {like.device} like `{like_name}`, but got {value.device}. "
            f"Move them with .to({like_name}.device)."
        )


def check_int(value: int, name: str) -> None:
    """Reject what is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected `{name}` to be an int, but got {value!r}.")


def check_count(value: int, name: str) -> None:
    """Reject what is not an integer of at least 1."""
    check_int(value, name)
    if value < 1:
        raise ValueError(f"Expected `{name}` of at least 1, but got {value}.")


def check_number(value: float, name: str) -> None:
    """Reject what is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected `{name}` to be a number, but got {value!r}.")


def check_range(value: float, name: str, low: float, high: float) -> None:
    """Reject what is not a number in [low, high]."""
    check_number(value, name)
    if not low <= value <= high:
        raise ValueError(f"Expected `{name}` in [{low}, {high}], but got {value}.")


def check_mergeable(other: object, like: object) -> None:
    """Reject an accumulator of another kind."""
    if type(other) is not type(like):
        expected, got = type(like).__name__, type(other).__name__
        raise TypeError(f"Expected `other` to be {expected}, but got {got}.")


def check_size(size: Sequence[int], labels: Tensor) -> None:
    """Reject a spatial size that labels (N, *) cannot be resized to."""
    spatial = tuple(labels.shape[1:])
    expected = (
        f"Expected `size` to hold {len(spatial)} integers of at least 1, one for each spatial "
        f"dimension of `labels` of shape {tuple(labels.shape)}"
    )
    mend = "Pass the size of the features, features.shape[2:]."
    if not isinstance(size, Sequence) or not all(isinstance(s, (int, torch.SymInt)) for s in size):
        raise TypeError(f"{expected}, but got {size!r}. {mend}")
    if len(size) != len(spatial) or any(s < 1 for s in (*size, *spatial)):
        raise ValueError(f"{expected}, but got {tuple(size)}. {mend}")


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Reject what is not one of the choices."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected `{name}` to be one of {expected}, but got {value!r}.")


def check_ignore_index(ignore_index: int, num_classes: int) -> None:
    """Reject an ignore index that is not an int, or is also the index of a class."""
    check_int(ignore_index, "ignore_index")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"Expected `ignore_index` outside of the {num_classes} classes, but got "
            f"{ignore_index}. Use a negative one, such as -1."
        )


def check_fits(ignore_index: int, labels: Tensor) -> None:
    """Reject an ignore index that is not an int, or that the dtype of the labels cannot hold."""
    check_int(ignore_index, "ignore_index")
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(
            f"Expected `ignore_index` in [{limits.min}, {limits.max}], the range of "
            f"{labels.dtype} labels, but got {ignore_index}. Convert them with labels.long()."
        )


def _check_alike(value: Tensor, name: str, like: Tensor, like_name: str, mend: str = "") -> None:
    if value.shape != like.shape:
        raise ValueError(
            f"Expected `{name}` of shape {tuple(like.shape)} to match `{like_name}`, "
            f"but got {tuple(value.shape)}.{mend}"
        )
    check_device(value, name, like, like_name)


def _check_floating(value: Tensor, name: str) -> None:
    if not value.is_floating_point():
        raise TypeError(
            f"Expected `{name}` of a floating-point dtype, but got {value.dtype}. "
            f"Convert them with {name}.float()."
        )


def _dimensions(rank: int) -> str:
    """The names of the dimensions of a label map, as (N, H, W)."""
    names = {1: "(N,)", 2: "(N, L)", 3: "(N, H, W)", 4: "(N, T, H, W)"}
    return names.get(rank, "(N, *)")


def _mend_labels(labels: Tensor, features: Tensor, name: str) -> str:
    if labels.ndim == features.ndim and labels.shape[1] == 1:
        return " Drop the channel dimension with labels.squeeze(1)."
    if labels.ndim == features.ndim - 1 and labels.shape[0] == features.shape[0]:
        return f" Resize them with anchorda.resize_labels(labels, {name}.shape[2:])."
    return ""
