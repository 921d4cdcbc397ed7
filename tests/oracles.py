"""The same mathematics as loops over float64 NumPy arrays, to be checked by eye.

Every function takes rows: features ``x (P, D)``, logits ``z (P, C)``, labels ``y (P,)``, anchors
``a (C, D)``. `rows` makes them from tensors of the library's shapes.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

# Label-map shapes: no, one, two and three spatial dimensions; no image; no pixel; odd sizes.
SHAPES = [(5,), (0,), (2, 7), (2, 0), (2, 5, 3), (0, 2, 3), (1, 33, 1), (3, 2, 3, 5)]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
# Elements a block of an operator may hold, from pixel by pixel to all at once.
BLOCKS = [1, 7, 64, 2**19]
LAYOUTS = ["contiguous", "transposed", "strided", "channels_last", "expanded"]


class Problem(NamedTuple):
    """Random arguments that fit each other."""

    features: Tensor
    labels: Tensor
    logits: Tensor
    anchors: Tensor


def draw(
    shape: Sequence[int], dim: int = 3, num_classes: int = 4, dtype: torch.dtype = torch.float32
) -> Problem:
    """Return features (N, D, *), labels (N, *) of which some are ignored, logits, and anchors."""
    n, *spatial = shape
    ignored = torch.tensor([-1, 250, 255, num_classes, -(2**40), 2**40])
    labels = torch.randint(num_classes, tuple(shape))
    labels = torch.where(torch.rand(*shape) < 0.7, labels, ignored[torch.randint(6, tuple(shape))])
    return Problem(
        torch.randn(n, dim, *spatial).to(dtype),
        labels,
        (3 * torch.randn(n, num_classes, *spatial)).to(dtype),
        2 * torch.randn(num_classes, dim),
    )


def pairwise(
    first: Iterable[Any], second: Iterable[Any], *others: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """Return rows in which every two values of different axes meet, instead of the product of all.

    The first two axes are crossed and the others turned along them: each must be no longer than
    those, and no two of the others of one length.
    """
    rows_ = itertools.product(enumerate(first), enumerate(list(second)))
    return [(a, b, *(axis[(i + j) % len(axis)] for axis in others)) for (i, a), (j, b) in rows_]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values in another layout; "expanded" repeats the first image."""
    if layout == "transposed":
        order = list(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "strided":
        view = tensor.new_full([2 * size for size in tensor.shape], 77)
        view = view[tuple([slice(1, None, 2)] * tensor.ndim)]
        return view.copy_(tensor)
    if layout == "channels_last" and tensor.ndim > 1:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def rows(tensor: Tensor) -> Array:
    """Return (N, K, *) as float64 rows (P, K): the pixels of one image after the other."""
    channels_last = tensor.detach().double().movedim(1, -1)
    return np.asarray(channels_last.reshape(-1, tensor.shape[1]).numpy())


def flat(labels: Tensor) -> Labels:
    """Return labels (N, *) as int64 (P,), in the order of `rows`."""
    return np.asarray(labels.long().reshape(-1).numpy())


def class_sums(x: Array, y: Labels, num_classes: int) -> tuple[Array, Labels]:
    sums, counts = np.zeros((num_classes, x.shape[1])), np.zeros(num_classes, np.int64)
    for feature, label in zip(x, y, strict=True):
        if 0 <= label < num_classes and all(math.isfinite(value) for value in feature):
            sums[label] += feature
            counts[label] += 1
    return sums, counts


def soft_class_sums(x: Array, p: Array) -> tuple[Array, Array]:
    sums, counts = np.zeros((p.shape[1], x.shape[1])), np.zeros(p.shape[1])
    for feature, probabilities in zip(x, p, strict=True):
        if np.isfinite(feature).all() and np.isfinite(probabilities).all():
            for c, probability in enumerate(probabilities):
                sums[c] += probability * feature
                counts[c] += probability
    return sums, counts


def within_class_scatter(x: Array, y: Labels, num_classes: int) -> tuple[Array, Array, Labels]:
    """Return means (C, D), NaN where unseen, scatters (C, D, D) about them, and counts (C,)."""
    sums, counts = class_sums(x, y, num_classes)
    means = np.full(sums.shape, math.nan)
    scatters = np.zeros((*sums.shape, x.shape[1]))
    for c in range(num_classes):
        if counts[c] > 0:
            means[c] = sums[c] / counts[c]
    for feature, label in zip(x, y, strict=True):
        if 0 <= label < num_classes and np.isfinite(feature).all():
            scatters[label] += np.outer(feature - means[label], feature - means[label])
    return means, scatters, counts


def image_centroids(
    x: Array, y: Labels, num_classes: int, min_pixels: int, ignore_index: int
) -> tuple[Array, Labels]:
    """Return the means (C, D) and labels (C,) of one image."""
    sums, counts = class_sums(x, y, num_classes)
    means, labels = np.full(sums.shape, math.nan), np.full(num_classes, ignore_index)
    for c in range(num_classes):
        if counts[c] > 0:
            means[c] = sums[c] / counts[c]
        if counts[c] >= min_pixels:
            labels[c] = c
    return means, labels


def stream_anchors(
    batches: Iterable[tuple[Array, Labels]],
    num_classes: int,
    dim: int,
    max_count: int | None = None,
    momentum: float | None = None,
) -> tuple[Array, Labels]:
    """Return anchors (C, D), NaN where unseen, and counts, batch after batch."""
    anchors, seen = np.full((num_classes, dim), math.nan), np.zeros(num_classes, np.int64)
    for x, y in batches:
        sums, counts = class_sums(x, y, num_classes)
        for c in range(num_classes):
            if counts[c] == 0:
                continue
            mean = sums[c] / counts[c]
            if seen[c] == 0:
                anchors[c] = mean
            elif momentum is not None:
                anchors[c] = (1 - momentum) * anchors[c] + momentum * mean
            else:
                anchors[c] = (seen[c] * anchors[c] + counts[c] * mean) / (seen[c] + counts[c])
            seen[c] += counts[c]
            if max_count is not None:
                seen[c] = min(seen[c], max_count)
    return anchors, seen


def distance(feature: Array, anchor: Array) -> float:
    return math.dist(feature, anchor)


def anchor_distances(x: Array, a: Array) -> Array:
    """Return (P, C), infinite for unseen classes, else NaN for non-finite features."""
    distances = np.full((len(x), len(a)), math.inf)
    for i, feature in enumerate(x):
        for k, anchor in enumerate(a):
            if np.isfinite(anchor).all():
                finite = np.isfinite(feature).all()
                distances[i, k] = distance(feature, anchor) if finite else math.nan
    return distances


def margin_labels(
    x: Array, a: Array, min_margin: Sequence[float], relative: bool, ignore_index: int
) -> tuple[Labels, Array]:
    return nearest_labels(anchor_distances(x, a), min_margin, relative, ignore_index)


def nearest_labels(
    distances: Array, min_margin: Sequence[float], relative: bool, ignore_index: int
) -> tuple[Labels, Array]:
    labels, scores = np.full(len(distances), ignore_index, np.int64), np.zeros(len(distances))
    for i, of_classes in enumerate(distances):
        candidates = sorted((d, k) for k, d in enumerate(of_classes) if math.isfinite(d))
        if not candidates:
            continue
        nearest, label = candidates[0]
        second = candidates[1][0] if len(candidates) > 1 else math.inf
        if not relative:
            scores[i] = second - nearest
        elif second == math.inf:
            scores[i] = 1.0
        elif second > 0:
            scores[i] = (second - nearest) / second
        if scores[i] > min_margin[label]:
            labels[i] = label
    return labels, scores


def softmax(z: Array) -> Array:
    exponentials = np.array([math.exp(value - max(z)) for value in z])
    return np.asarray(exponentials / sum(exponentials))


def probability_labels(
    z: Array, min_probability: Sequence[float], ignore_index: int
) -> tuple[Labels, Array]:
    labels, scores = np.full(len(z), ignore_index, np.int64), np.zeros(len(z))
    for i, logits in enumerate(z):
        if np.isnan(logits).any() or max(logits) in (math.inf, -math.inf):
            continue
        probabilities = softmax(logits)
        label = int(np.argmax(probabilities))
        scores[i] = probabilities[label]
        if scores[i] > min_probability[label]:
            labels[i] = label
    return labels, scores


def keep_correct(y: Labels, z: Array, ignore_index: int) -> Labels:
    kept = np.full(len(y), ignore_index, np.int64)
    for i, (label, logits) in enumerate(zip(y, z, strict=True)):
        if not np.isnan(logits).any() and int(np.argmax(logits)) == label:
            kept[i] = label
    return kept


def resize_nearest(labels: Labels, size: Sequence[int]) -> Labels:
    """Resize one label map (*) to (*size)."""
    resized = np.empty(size, np.int64)
    for cell in itertools.product(*map(range, size)):
        pixel = [i * old // new for i, old, new in zip(cell, labels.shape, size, strict=True)]
        resized[cell] = labels[tuple(pixel)]
    return resized


def resize_majority(
    labels: Labels, size: Sequence[int], min_ratio: float, ignore_index: int
) -> Labels:
    """Resize one label map (*) to (*size)."""
    resized = np.full(size, ignore_index, np.int64)
    for cell in itertools.product(*map(range, size)):
        ranges = [
            range(math.floor(i * old / new), math.ceil((i + 1) * old / new))
            for i, old, new in zip(cell, labels.shape, size, strict=True)
        ]
        inside = [int(labels[pixel]) for pixel in itertools.product(*ranges)]
        winner = min(set(inside), key=lambda label: (-inside.count(label), label))
        if inside.count(winner) / len(inside) >= min_ratio:
            resized[cell] = winner
    return resized


def pixel_distance(feature: Array, anchor: Array, kind: str) -> float:
    if kind == "euclidean":
        return distance(feature, anchor)
    if kind == "squared":
        return distance(feature, anchor) ** 2
    sizes = [abs(float(value - center)) for value, center in zip(feature, anchor, strict=True)]
    return sum(0.5 * s**2 if s < 1 else s - 0.5 for s in sizes) / len(sizes)


def distance_loss(
    x: Array, y: Labels, a: Array, kind: str, average: str, weights: Array | None = None
) -> float:
    of_class: dict[int, list[float]] = {}
    for i, (feature, label) in enumerate(zip(x, y, strict=True)):
        if 0 <= label < len(a) and np.isfinite(a[label]).all():
            loss = pixel_distance(feature, a[label], kind) * (1 if weights is None else weights[i])
            of_class.setdefault(int(label), []).append(loss)
    groups = list(of_class.values())
    if average == "pixel":
        groups = [[loss] for group in groups for loss in group]
    return sum(sum(group) / len(group) for group in groups) / max(1, len(groups))


def similarity_of(feature: Array, anchor: Array, kind: str) -> float:
    if kind == "euclidean":
        return -distance(feature, anchor)
    if kind == "squared":
        return -(distance(feature, anchor) ** 2)
    product = float(sum(value * center for value, center in zip(feature, anchor, strict=True)))
    if kind == "dot" or product == 0:
        return product
    return product / math.sqrt(sum(feature**2)) / math.sqrt(sum(anchor**2))


def anchor_probabilities(x: Array, a: Array, kind: str, temperature: float) -> Array:
    """Return (P, C), 0 for unseen classes, else NaN for features that are not finite."""
    probabilities = np.zeros((len(x), len(a)))
    seen = [k for k in range(len(a)) if np.isfinite(a[k]).all()]
    for i, feature in enumerate(x):
        if not np.isfinite(feature).all():
            probabilities[i, seen] = math.nan
        elif seen:
            similarities = [similarity_of(feature, a[k], kind) / temperature for k in seen]
            probabilities[i, seen] = softmax(np.array(similarities))
    return probabilities


def rectify(p: Array, w: Array) -> Array:
    rectified = np.zeros(p.shape)
    for i in range(len(p)):
        total = sum(p[i] * w[i])
        if total != 0:
            rectified[i] = p[i] * w[i] / total
    return rectified


def contrastive_loss(
    x: Array,
    y: Labels,
    a: Array,
    temperature: float,
    weights: Array | None = None,
    kind: str = "euclidean",
) -> float:
    losses = []
    for i, (feature, label) in enumerate(zip(x, y, strict=True)):
        if 0 <= label < len(a) and np.isfinite(a[label]).all():
            probabilities = anchor_probabilities(feature[None], a, kind, temperature)
            loss = -math.log(probabilities[0, label])
            losses.append(loss * (1 if weights is None else weights[i]))
    return sum(losses) / max(1, len(losses))


def sinkhorn(s: Array, shares: Sequence[float], epsilon: float, iterations: int) -> Array:
    """Return the assignments as CPSL writes them."""
    q = np.exp(s / epsilon)
    q = q / q.sum()
    for _ in range(iterations):
        for k in range(q.shape[1]):
            if q[:, k].sum() > 0:
                q[:, k] *= shares[k] / q[:, k].sum()
        for i in range(len(q)):
            if q[i].sum() > 0:
                q[i] /= q[i].sum() * len(q)
    return np.asarray(q * len(q))


def k_means_step(x: Array, y: Labels, a: Array) -> tuple[Array, float]:
    """Return anchors (C, M, D) after one step, and the largest move."""
    members: dict[tuple[int, int], list[Array]] = {}
    for feature, label in zip(x, y, strict=True):
        if 0 <= label < len(a) and np.isfinite(feature).all():
            present = [m for m in range(a.shape[1]) if np.isfinite(a[label, m]).all()]
            if present:
                nearest = min(present, key=lambda m: (distance(feature, a[label, m]), m))
                members.setdefault((int(label), nearest), []).append(feature)
    moved, largest = a.copy(), 0.0
    for key, features in members.items():
        moved[key] = sum(features) / len(features)
        largest = max(largest, distance(moved[key], a[key]))
    return moved, largest


def consistency_loss(x: Array, t: Array, a: Array, kind: str, temperature: float) -> float:
    """Return the loss for a teacher's t (P, C); a pixel without any seen class is inactive."""
    losses = []
    seen = [k for k in range(len(a)) if np.isfinite(a[k]).all()]
    for feature, teacher in zip(x, t, strict=True):
        if np.isfinite(teacher).all() and any(teacher[seen] > 0):
            p = anchor_probabilities(feature[None], a, kind, temperature)[0]
            terms = [teacher[k] * math.log(teacher[k] / p[k]) for k in seen if teacher[k] > 0]
            losses.append(sum(terms))
    return float(sum(losses) / max(1, len(losses)))


def distribution_loss(x: Array, y: Labels, m: Array, v: Array, temperature: float) -> float:
    """Return SePiCo's form: cross-entropy of biased scores, plus the own class's bias."""
    losses = []
    seen = [k for k in range(len(m)) if np.isfinite(m[k]).all() and np.isfinite(v[k]).all()]
    for feature, label in zip(x, y, strict=True):
        if label in seen:
            biases = [sum(feature**2 * v[k]) / (2 * temperature**2) for k in seen]
            scores = [sum(feature * m[k]) / temperature for k in seen]
            own = seen.index(int(label))
            p = softmax(np.array(scores) + np.array(biases))
            losses.append(-math.log(p[own]) + biases[own])
    return float(sum(losses) / max(1, len(losses)))


def symmetric_cross_entropy(z: Array, y: Labels, alpha: float, beta: float) -> float:
    losses = []
    for logits, label in zip(z, y, strict=True):
        if 0 <= label < len(logits):
            p = softmax(logits)
            reverse = 0.0
            for k, probability in enumerate(p):
                target = 1.0 if k == label else 1e-4
                reverse -= min(max(probability, 1e-7), 1.0) * math.log(target)
            losses.append(-alpha * math.log(p[label]) + beta * reverse)
    return float(sum(losses) / max(1, len(losses)))


def information_maximization(z: Array) -> float:
    def entropy(p: Array) -> float:
        return -float(sum(value * math.log(value + 1e-5) for value in p))

    if len(z) == 0:
        return 0.0
    probabilities = np.array([softmax(logits) for logits in z])
    mean = probabilities.sum(axis=0) / len(z)
    return sum(entropy(p) for p in probabilities) / len(z) - entropy(mean)


def feature_distance(x: Array, r: Array, y: Labels, classes: Sequence[int]) -> float:
    losses = [distance(a, b) for a, b, label in zip(x, r, y, strict=True) if label in classes]
    return float(sum(losses) / max(1, len(losses)))


def cross_entropy(
    z: Array, y: Labels, weight: Sequence[float], smoothing: float, weights: Array | None = None
) -> float:
    """Return the weighted mean; smoothing moves that part of the target evenly to all classes.

    The weight of a class enters the divisor, that of a pixel does not.
    """
    total, norm = 0.0, 0.0
    for i, (logits, label) in enumerate(zip(z, y, strict=True)):
        if not 0 <= label < len(logits):
            continue
        probabilities = softmax(logits)
        for c, probability in enumerate(probabilities):
            target = smoothing / len(logits) + (1 - smoothing) * (c == label)
            loss = -weight[c] * target * math.log(probability)
            total += loss * (1 if weights is None else weights[i])
        norm += weight[label]
    return total / norm if norm else 0.0


def confusion(predictions: Labels, truth: Labels, num_classes: int) -> Labels:
    """Return (C, C + 1): truth by prediction, the last column for those outside [0, C)."""
    counts = np.zeros((num_classes, num_classes + 1), np.int64)
    for predicted, true in zip(predictions, truth, strict=True):
        if 0 <= true < num_classes:
            counts[true, predicted if 0 <= predicted < num_classes else num_classes] += 1
    return counts
