"""Checks at the public boundary, and conversion of the numbers that users pass.

A rejection says what was expected, what came, and a likely fix. Numbers are accepted as Python
numbers, NumPy scalars, and arrays or tensors without dimensions; values for each class also as
arrays or sequences. The checks that convert return the value in the form that the library computes
with; the others return nothing.

Of tensors only types, shapes, dtypes, layouts and devices are inspected, never the values: reading
those makes the host wait for the GPU. A number that is passed as a tensor is the exception.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PerClass: TypeAlias = float | Sequence[float] | Tensor | npt.NDArray[np.number]
"""One number for all classes, or one for each."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)
_INT64 = torch.iinfo(torch.int64)


def check_tensor(value: object, name: str) -> None:
    """Reject what is not a dense tensor."""
    if not isinstance(value, Tensor):
        fix = ""
        if isinstance(value, np.ndarray):
            fix = f" Convert it with torch.from_numpy({name})."
        elif isinstance(value, (list, float, int, np.generic)):
            fix = f" Convert it with torch.as_tensor({name})."
        raise TypeError(f"Expected `{name}` to be a torch.Tensor, but got {type_of(value)}.{fix}")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout)
        fix = f"torch.nested.to_padded_tensor({name}, 255)"
        raise TypeError(
            f"Expected `{name}` to be a dense tensor, but got a {kind} one. "
            f"Convert it with {fix if value.is_nested else f'{name}.to_dense()'}."
        )


def check_features(features: Tensor, name: str = "features") -> None:
    """Reject what is not a floating-point tensor (N, D, *)."""
    check_tensor(features, name)
    if features.ndim < 2:
        raise ValueError(
            f"Expected `{name}` of shape (N, D, *), batch and channels first, "
            f"but got {tuple(features.shape)}. Add the batch dimension with {name}.unsqueeze(0)."
        )
    check_floating(features, name)


def check_feature_dim(features: Tensor, dim: int, fix: str = "") -> None:
    """Reject features (N, D, *) of another number of channels. ``fix`` may name that, as ``{}``."""
    if features.shape[1] != dim:
        raise ValueError(
            f"Expected `features` of shape (N, D, *) with D = {dim}, but got "
            f"{tuple(features.shape)}.{fix.format(features.shape[1])}"
        )


def check_same_pixels(
    value: Tensor, name: str, features: Tensor, channels: int | None = None
) -> None:
    """Reject what is not a floating-point tensor (N, C, *) over the pixels of the features."""
    check_features(value, name)
    expected_channels = value.shape[1] if channels is None else channels
    if value.shape != (features.shape[0], expected_channels, *features.shape[2:]):
        of_channels = "C" if channels is None else channels
        expected = ", ".join(map(str, (features.shape[0], of_channels, *features.shape[2:])))
        raise ValueError(
            f"Expected `{name}` of shape ({expected}) to match `features`, "
            f"but got {tuple(value.shape)}."
        )
    check_device(value, name, features, "features")


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Reject what is not a floating-point tensor (N, C, *), C ≥ 2."""
    check_features(logits, name)
    if logits.shape[1] < 2:
        fix = (
            " For two classes with one logit, pass "
            f"torch.cat([-{name} / 2, {name} / 2], dim=1), whose softmax is the sigmoid."
        )
        raise ValueError(
            f"Expected `{name}` of shape (N, C, *) with at least two classes, "
            f"but got {tuple(logits.shape)}.{fix if logits.shape[1] else ''}"
        )


def check_label_map(labels: Tensor, name: str = "labels") -> None:
    """Reject what is not a tensor (N, *) of an integer dtype."""
    check_integers(labels, name)
    if labels.ndim < 1:
        raise ValueError(f"Expected `{name}` of shape (N, *), but got a tensor without dimensions.")


def check_labels(
    labels: Tensor, features: Tensor, name: str = "features", labels_name: str = "labels"
) -> None:
    """Reject labels (N, *) that do not match features or logits (N, D, *)."""
    check_label_map(labels, labels_name)
    expected = (features.shape[0], *features.shape[2:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"Expected `{labels_name}` of shape {_dimensions(len(expected))} = {expected} to match "
            f"`{name}`, but got {tuple(labels.shape)}."
            f"{_fix_labels(labels, labels_name, features, name)}"
        )
    check_device(labels, labels_name, features, name)


def check_same_labels(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    """Reject two label maps that are not of one shape and on one device."""
    check_label_map(first, names[0])
    check_label_map(second, names[1])
    check_alike(second, names[1], first, names[0], _fix_same(first, second, names))


def check_anchors(anchors: Tensor, features: Tensor) -> None:
    """Reject anchors that are not a floating-point tensor (C, D) or (C, M, D) beside features."""
    check_floating(anchors, "anchors")
    dim = features.shape[1]
    if not _has_anchors(anchors) or anchors.shape[-1] != dim:
        fix = "Compute the anchors from features of the same layer."
        if anchors.ndim == 2 and features.ndim > 2 and anchors.shape[1] == features.shape[-1]:
            fix = "Move the channels of the features to dimension 1: features.movedim(-1, 1)."
        elif anchors.ndim == 2 and anchors.shape[0] == dim:
            fix = "Compute them from features of the same layer, or transpose them with anchors.T."
        raise ValueError(
            f"Expected `anchors` of shape (C, D) or (C, M, D) with D = {dim} to match `features`, "
            f"but got {tuple(anchors.shape)}. {fix}"
        )
    check_device(anchors, "anchors", features, "features")


def check_anchor_groups(anchors: Tensor, name: str = "anchors") -> None:
    """Reject anchors that are not a floating-point tensor (C, D) or (C, M, D)."""
    check_floating(anchors, name)
    if not _has_anchors(anchors):
        raise ValueError(
            f"Expected `{name}` of shape (C, D) or (C, M, D), one anchor or several for each "
            f"class, but got {tuple(anchors.shape)}."
        )


def check_anchor_rows(anchors: Tensor, name: str = "anchors") -> None:
    """Reject anchors that are not a floating-point tensor (C, D)."""
    check_floating(anchors, name)
    if anchors.ndim != 2 or anchors.shape[0] < 1 or anchors.shape[1] < 1:
        raise ValueError(
            f"Expected `{name}` of shape (C, D), one row for each class, "
            f"but got {tuple(anchors.shape)}."
        )


def check_scores(scores: Tensor, labels: Tensor) -> None:
    """Reject scores that are not floating point and of the shape and device of the labels."""
    check_label_map(labels)
    check_floating(scores, "scores")
    fix = _fix_same(labels, scores, ("labels", "scores")) if scores.ndim > labels.ndim else ""
    check_alike(scores, "scores", labels, "labels", fix or " Pass both as a labeler returned them.")


def check_pixel_weights(weights: Tensor | None, labels: Tensor, name: str = "labels") -> None:
    """Reject pixel weights that are not floating point and of the shape and device of the labels.

    ``None`` is a weight of 1 everywhere.
    """
    if weights is None:
        return
    check_floating(weights, "pixel_weights")
    check_alike(weights, "pixel_weights", labels, name)


def check_class_names(names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Return one name for each class; without names, number the classes."""
    if names is None:
        return [str(c) for c in range(num_classes)]
    is_vector = isinstance(names, np.ndarray) and names.ndim == 1
    is_sequence = is_vector or (isinstance(names, Sequence) and not isinstance(names, str))
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"Expected `class_names` to be a sequence of strings, but got {described(names)}."
        )
    if len(names) != num_classes:
        raise ValueError(f"Expected `class_names` for {num_classes} classes, but got {len(names)}.")
    return [str(name) for name in names]


def as_per_class(value: PerClass, name: str) -> Tensor:
    """Return a tensor () or (C,) of one number, or of one for each class."""
    expected = (
        f"Expected `{name}` to be one number, or a tensor, array or sequence of shape (C,) with "
        "one for each class"
    )
    values = None
    if isinstance(value, Tensor):
        check_tensor(value, name)
        if value.dtype in FLOATS or value.dtype in INTEGERS:
            values = value
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "iuf":
            values = from_array(value, torch.float64)
    elif isinstance(value, (list, tuple)):
        numbers_ = [_as_float(number) for number in value]
        if None not in numbers_:
            values = torch.tensor(numbers_, dtype=torch.float64)
    elif (number := _as_float(value)) is not None:
        values = torch.tensor(number, dtype=torch.float64)
    if values is None:
        raise TypeError(f"{expected}, but got {described(value)}.")
    if values.ndim > 1:
        raise ValueError(f"{expected}, but got {tuple(values.shape)}.")
    return values


def check_per_class(
    values: Tensor, name: str, like: Tensor, like_name: str, num_classes: int
) -> None:
    """Reject per-class values (C,) of another length or device; one value for all is accepted."""
    if values.ndim == 0 and values.is_meta == like.is_meta:
        return
    if values.ndim > 0 and tuple(values.shape) != (num_classes,):
        raise ValueError(
            f"Expected `{name}` to be one number or of shape (C,) = ({num_classes},), "
            f"but got {tuple(values.shape)}."
        )
    check_device(values, name, like, like_name)


def check_one_per_class(
    values: Tensor, name: str, num_classes: int, like: Tensor, like_name: str, fix: str = ""
) -> None:
    """Reject per-class values (C,) of another shape or device than a tensor with C classes."""
    if tuple(values.shape) != (num_classes,):
        raise ValueError(
            f"Expected `{name}` of shape (C,) = ({num_classes},) to match `{like_name}`, "
            f"but got {tuple(values.shape)}.{fix}"
        )
    check_device(values, name, like, like_name)


def from_array(value: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    """Copy an array: it may be read-only, or in a byte order or dtype that torch does not have."""
    return torch.from_numpy(value.astype(np.float64 if dtype.is_floating_point else np.int64))


def as_floats(
    value: Tensor | npt.NDArray[np.generic], name: str, device: torch.device | None = None
) -> Tensor:
    """Return a floating-point tensor as it is, and an array as a float64 tensor on a device."""
    if not isinstance(value, np.ndarray):
        check_floating(value, name)
        return value
    if value.dtype.kind != "f":
        raise TypeError(
            f"Expected `{name}` of a floating-point dtype, but got {value.dtype}. "
            f"Convert it with {name}.astype('float64')."
        )
    return from_array(value, torch.float64).to(device)


def as_integers(
    value: Tensor | npt.NDArray[np.generic], name: str, device: torch.device | None = None
) -> Tensor:
    """Return an integer tensor as it is, and an array as an int64 tensor on a device."""
    if not isinstance(value, np.ndarray):
        check_integers(value, name)
        return value
    if value.dtype.kind not in "iu":
        raise TypeError(
            f"Expected `{name}` of an integer dtype, but got {value.dtype}. "
            f"Convert it with {name}.astype('int64')."
        )
    return from_array(value, torch.int64).to(device)


def check_sums(sums: Tensor, counts: Tensor, shape: tuple[int, int] | None = None) -> None:
    """Reject class sums that are not floating point (C, D) with integer counts (C,)."""
    check_floating(sums, "sums")
    check_integers(counts, "counts")
    size = f" = {shape}" if shape else ""
    fits = tuple(sums.shape) == shape if shape else sums.ndim == 2
    if not fits or counts.shape != sums.shape[:1]:
        raise ValueError(
            f"Expected `sums` of shape (C, D){size} and `counts` of shape (C,), one for each row, "
            f"but got {tuple(sums.shape)} and {tuple(counts.shape)}."
        )
    check_device(counts, "counts", sums, "sums")


def check_device(value: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Reject two tensors on different devices."""
    if value.device != like.device:
        raise ValueError(
            f"Expected `{name}` on {like.device} like `{like_name}`, but got {value.device}. "
            f"Move them with .to({like_name}.device)."
        )


def check_int(value: int, name: str) -> int:
    """Return an integer of any kind as an int, or as it is where torch traces it as a symbol."""
    number = _as_int(value)
    if number is None:
        raise TypeError(f"Expected `{name}` to be an int, but got {described(value)}.")
    if not _INT64.min <= number <= _INT64.max:
        raise ValueError(f"Expected `{name}` in the range of int64, but got {described(number)}.")
    return number


def check_class_ids(classes: Sequence[int], name: str = "classes") -> list[int]:
    """Return class ids as a list of ints."""
    is_vector = isinstance(classes, (np.ndarray, Tensor)) and classes.ndim == 1
    if not is_vector and (isinstance(classes, str) or not isinstance(classes, Sequence)):
        raise TypeError(
            f"Expected `{name}` to be a sequence of ints, but got {described(classes)}."
        )
    return [check_int(c, name) for c in classes]


def check_count(value: int, name: str) -> int:
    """Return an integer of at least 1 as an int."""
    value = check_int(value, name)
    if value < 1:
        raise ValueError(f"Expected `{name}` of at least 1, but got {value}.")
    return value


def check_number(value: float, name: str) -> float:
    """Return a real number of any kind as a float."""
    number = _as_float(value)
    if number is None:
        raise TypeError(f"Expected `{name}` to be a number, but got {described(value)}.")
    return number


def check_range(value: float, name: str, low: float, high: float) -> float:
    """Return a number in [low, high] as a float."""
    value = check_number(value, name)
    if not low <= value <= high:
        raise ValueError(f"Expected `{name}` in [{low}, {high}], but got {value}.")
    return value


def check_positive(value: float, name: str) -> float:
    """Return a finite number above 0 as a float."""
    value = check_number(value, name)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"Expected `{name}` above 0 and finite, but got {value}.")
    return value


def check_type(value: object, name: str, kind: type, fix: str = "") -> None:
    """Reject a value of another class."""
    if not isinstance(value, kind):
        raise TypeError(f"Expected `{name}` to be {kind.__name__}, but got {type_of(value)}.{fix}")


def check_flag(value: bool, name: str) -> bool:
    """Return a truth value of Python or NumPy as a bool."""
    if isinstance(value, bool):
        return value
    if isinstance(value, np.bool_):
        return value == np.True_
    raise TypeError(f"Expected `{name}` to be True or False, but got {described(value)}.")


def check_mergeable(other: object, like: object) -> None:
    """Reject an accumulator of another kind."""
    if type(other) is not type(like):
        expected, got = type(like).__name__, type_of(other)
        raise TypeError(f"Expected `other` to be {expected}, but got {got}.")


def check_size(size: Sequence[int], labels: Tensor) -> tuple[int, ...]:
    """Return a spatial size that labels (N, *) can be resized to, as integers."""
    spatial = tuple(labels.shape[1:])
    expected = (
        f"Expected `size` to hold {len(spatial)} integers of at least 1, one for each spatial "
        f"dimension of `labels` of shape {tuple(labels.shape)}"
    )
    fix = "Pass the size of the features, features.shape[2:]."
    is_vector = isinstance(size, (np.ndarray, Tensor)) and size.ndim == 1
    if not isinstance(size, Sequence) and not is_vector:
        raise TypeError(f"{expected}, but got {described(size)}. {fix}")
    if not all(_as_int(s) is not None for s in size):
        raise TypeError(f"{expected}, but got {described(size)}. {fix}")
    sizes = tuple([check_int(s, "size") for s in size])
    if len(sizes) == len(spatial) - 1 and 1 in (spatial[0], spatial[-1]):
        fix = f"Drop the channel dimension with labels.squeeze({1 if spatial[0] == 1 else -1})."
    elif len(sizes) == len(spatial) + 1:
        fix = "Add the batch dimension with labels.unsqueeze(0)."
    if len(sizes) != len(spatial) or any(s < 1 for s in (*sizes, *spatial)):
        raise ValueError(f"{expected}, but got {sizes}. {fix}")
    return sizes


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    """Reject what is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected `{name}` to be one of {expected}, but got {described(value)}.")


def check_ignore_index(ignore_index: int, num_classes: int) -> int:
    """Return an ignore index that is not the index of a class as an int."""
    ignore_index = check_int(ignore_index, "ignore_index")
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"Expected `ignore_index` outside of the {num_classes} classes, but got "
            f"{ignore_index}. Use a negative one, such as -1."
        )
    return ignore_index


def check_fits(ignore_index: int, labels: Tensor) -> int:
    """Return an ignore index that the dtype of the labels can hold as an int."""
    ignore_index = check_int(ignore_index, "ignore_index")
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(
            f"Expected `ignore_index` in [{limits.min}, {limits.max}], the range of "
            f"{labels.dtype} labels, but got {ignore_index}. Convert them with labels.long()."
        )
    return ignore_index


def check_values(value: Tensor, name: str) -> None:
    """Reject a tensor on the meta device where its values are read."""
    if value.is_meta:
        raise ValueError(
            f"Expected `{name}` with values, but got a tensor on the meta device. "
            "Load or compute them first."
        )


def check_floating(value: Tensor, name: str) -> None:
    """Reject what is not a tensor of a floating-point dtype that torch computes in."""
    check_tensor(value, name)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"Expected `{name}` of a floating-point dtype, but got {value.dtype}. "
            f"Convert them with {name}.{'dequantize' if value.is_quantized else 'float'}()."
        )


def check_integers(value: Tensor, name: str) -> None:
    """Reject what is not a tensor of an integer dtype."""
    check_tensor(value, name)
    if value.dtype not in INTEGERS:
        raise TypeError(
            f"Expected `{name}` of an integer dtype, but got {value.dtype}. "
            f"Convert them with {name}.long()."
        )


def described(value: object) -> str:
    """Describe what came, in one short line."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type_of(value)} of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:40]}… ({type_of(value)})"


def structure_of(value: object) -> str:
    """Name the type of a value and, of a collection, its keys or the types of its entries."""
    kind = type_of(value)
    if isinstance(value, Tensor):
        return f"{kind} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        entries = ", ".join(described(key) for key in value)
        return f"{kind} with {entries}" if entries else f"{kind} without keys"
    if isinstance(value, (tuple, list)):
        entries = ", ".join(type_of(item) for item in value[:8])
        return (
            f"{kind} of {entries}{', …' if len(value) > 8 else ''}"
            if entries
            else f"{kind} of nothing"
        )
    return kind


def type_of(value: object) -> str:
    """Name the type of a value as its users write it."""
    kind = type(value)
    return f"numpy.{kind.__name__}" if kind.__module__ == "numpy" else kind.__name__


def _as_int(value: object) -> int | None:
    """Return an integer of any kind as an int, and None for anything else."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, torch.SymInt):
        return cast(int, value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu":
        return int(value)
    if _is_scalar(value) and value.dtype in INTEGERS:
        return int(value)
    return None


def _as_float(value: object) -> float | None:
    """Return a real number of any kind as a float, and None for anything else."""
    if isinstance(value, float):
        return value
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return cast(float, value)
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, np.integer, np.floating, numbers.Real)):
        try:
            return float(value)
        except OverflowError:  # of an int beyond all floats
            return float("inf") if cast(int, value) > 0 else float("-inf")
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iuf":
        return float(value)
    if _is_scalar(value) and (value.dtype in FLOATS or value.dtype in INTEGERS):
        return float(value.detach())
    return None


def _is_scalar(value: object) -> TypeGuard[Tensor]:
    """Return True for a tensor () whose value can be read."""
    return isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta


def _has_anchors(anchors: Tensor) -> bool:
    """Return True for shapes (C, D) and (C, M, D) with C, M ≥ 1."""
    return anchors.ndim in (2, 3) and 0 not in anchors.shape[:-1]


def check_alike(value: Tensor, name: str, like: Tensor, like_name: str, fix: str = "") -> None:
    """Reject a tensor of another shape or device than that of another."""
    if value.shape != like.shape:
        raise ValueError(
            f"Expected `{name}` of shape {tuple(like.shape)} to match `{like_name}`, "
            f"but got {tuple(value.shape)}.{fix}"
        )
    check_device(value, name, like, like_name)


def _dimensions(rank: int) -> str:
    """Name the dimensions of a label map, as (N, H, W)."""
    names = {1: "(N,)", 2: "(N, L)", 3: "(N, H, W)", 4: "(N, T, H, W)"}
    return names.get(rank, "(N, *)")


def _fix_labels(labels: Tensor, labels_name: str, features: Tensor, name: str) -> str:
    """Suggest how labels and features can be made to match."""
    shape, rank = tuple(labels.shape), features.ndim
    if shape == tuple(features.shape[:-1]):
        return f" Move the channels of `{name}` to dimension 1: {name}.movedim(-1, 1)."
    if labels.ndim == rank and 1 in (shape[1], shape[-1]):
        dim = 1 if shape[1] == 1 else -1
        return f" Drop the channel dimension with {labels_name}.squeeze({dim})."
    if labels.ndim == rank and shape[1] == features.shape[1]:
        return f" Make class ids of one-hot labels with {labels_name}.argmax(dim=1)."
    if labels.ndim == rank - 2 and features.shape[0] == 1:
        return f" Add the batch dimension with {labels_name}.unsqueeze(0)."
    if rank == 4 and shape == (features.shape[0], features.shape[3], features.shape[2]):
        return f" Exchange height and width with {labels_name}.mT."
    if labels.ndim == rank - 1 and rank > 2 and shape[0] == features.shape[0]:
        return f" Resize them with anchorda.resize_labels({labels_name}, {name}.shape[2:])."
    return ""


def _fix_same(first: Tensor, second: Tensor, names: tuple[str, str]) -> str:
    """Suggest how two label maps can be made to match."""
    for one, other, name in ((first, second, names[0]), (second, first, names[1])):
        if one.ndim == other.ndim + 1 and one.ndim > 1:
            for dim in (1, -1):
                if one.shape[dim] == 1 and one.squeeze(dim).shape[:1] == other.shape[:1]:
                    return f" Drop the channel dimension with {name}.squeeze({dim})."
    if first.ndim == second.ndim and first.ndim > 1 and first.shape[:1] == second.shape[:1]:
        return f" Resize them with anchorda.resize_labels({names[1]}, {names[0]}.shape[1:])."
    return ""
