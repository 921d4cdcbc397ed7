"""Pictures of features, anchors, scores and labels; needs matplotlib, the extra ``plots``.

Every function draws on the ``Axes`` that it is given and returns it, so that pictures combine with
one's own figures, and log to TensorBoard with ``writer.add_figure(tag, axes.figure)``. Nothing here
is imported by ``import anchorda``; write ``from anchorda import plots``.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._checks import (
    PerClass,
    as_per_class,
    check_anchor_rows,
    check_anchors,
    check_choice,
    check_class_names,
    check_count,
    check_features,
    check_label_map,
    check_labels,
    check_per_class,
    check_scores,
    check_tensor,
)
from .calibration import ScoreCalibrator
from .pseudo_labels import anchor_distances

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise ImportError(
        "Expected matplotlib for anchorda.plots, but it is not installed. "
        'Install it with pip install "anchorda[plots]".'
    ) from error

Array: TypeAlias = NDArray[np.float64]
Color: TypeAlias = str | tuple[float, float, float]
Projection = Literal["anchors", "discriminants", "tsne"]

_OKABE_ITO = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
)
_MARKERS = "os^Dv<>P"
_MOST_POINTS = 4000
_GRID = "0.85"


def class_colors(num_classes: int) -> list[Color]:
    """Return C colors: the eight of Okabe and Ito, safe for color-blind readers, then lighter ones.

    More than eight classes cannot be told apart by color alone. `plot_features` therefore also
    gives them markers, and writes the names beside the anchors.

    Args:
        num_classes: C.

    Returns:
        C colors of matplotlib.

    Raises:
        TypeError: if ``num_classes`` is not an integer.
        ValueError: if it is below 1.

    Source: Okabe and Ito, "Color Universal Design" (2008).

    >>> class_colors(2)
    [(0.0, 0.4470588235294118, 0.6980392156862745), (0.9019607843137255, 0.6235294117647059, 0.0)]
    """
    num_classes = check_count(num_classes, "num_classes")
    colors: list[Color] = []
    for index in range(num_classes):
        light = min(0.75, 0.45 * (index // len(_OKABE_ITO)))
        red, green, blue = to_rgb(_OKABE_ITO[index % len(_OKABE_ITO)])
        colors.append(tuple(v + (1 - v) * light for v in (red, green, blue)))  # type: ignore[arg-type]
    return colors


def plot_features(
    axes: Axes,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    projection: Projection = "anchors",
    class_names: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
) -> Axes:
    r"""Draw features and anchors in the plane, with a color and a marker for each class.

    The plane is that of the first two principal components of the anchors (``"anchors"``): the
    distances between anchors are shown as well as a plane can, and features are projected onto it
    orthogonally. ``"discriminants"`` scales it by the within-class scatter of the given features,
    Fisher's linear discriminants, which shows classes apart that a classifier can tell apart.
    ``"tsne"`` embeds features and anchors together; it needs scikit-learn, and the distances
    between its groups mean nothing.

    At most 4,000 features are drawn, evenly taken from those with a label.

    Args:
        axes: drawn on.
        features: ``(N, D, *)``, floating point.
        labels: ``(N, *)``, any integer dtype; a label outside [0, C) is not drawn.
        anchors: ``(C, D)``, or ``(C, M, D)``; a row that is not finite is not drawn.
        projection: see above.
        class_names: C names, written beside the anchors; numbers by default.
        colors: C colors; by default those of `class_colors`.

    Returns:
        ``axes``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``projection`` is wrong, or no feature or fewer than two
            anchors are left to draw.
        ImportError: for ``"tsne"`` without scikit-learn.

    Source: Fisher, "The use of multiple measurements in taxonomic problems" (1936); van der Maaten
    and Hinton, "Visualizing data using t-SNE" (2008).

    >>> from matplotlib.figure import Figure
    >>> features, labels = torch.randn(50, 8), torch.arange(50) % 2
    >>> anchors = torch.stack([features[::2].mean(0), features[1::2].mean(0)])
    >>> axes = plot_features(Figure().subplots(), features, labels, anchors)
    >>> axes.get_title()
    ''
    """
    check_choice(projection, "projection", get_args(Projection))
    check_features(features)
    check_labels(labels, features)
    check_anchors(anchors, features)
    num_classes = len(anchors)
    names = check_class_names(class_names, num_classes)
    shades = class_colors(num_classes) if colors is None else colors
    x, y = _labeled_rows(features, labels, num_classes)
    points, of_class = _anchor_points(anchors)
    if len(x) == 0 or len(points) < 2:
        raise ValueError(
            f"Expected labeled features and at least two anchors, but got {len(x)} features "
            f"and {len(points)} anchors. Check that labels are in [0, {num_classes})."
        )
    flat_x, flat_points = _project(x, y, points, of_class, projection)
    for c in range(num_classes):
        marker = _MARKERS[c // len(_OKABE_ITO) % len(_MARKERS)]
        horizontal, vertical = flat_x[y == c].T
        axes.scatter(
            horizontal, vertical, s=6, color=[shades[c]], marker=marker, alpha=0.45, linewidths=0
        )
    for c, (horizontal, vertical) in zip(of_class.tolist(), flat_points, strict=True):
        marker = _MARKERS[c // len(_OKABE_ITO) % len(_MARKERS)]
        axes.scatter(
            horizontal,
            vertical,
            s=70,
            color=[shades[c]],
            marker=marker,
            edgecolors="black",
            zorder=3,
        )
    axes.margins(0.12)
    axes.set_xticks([])
    axes.set_yticks([])
    _write_names(axes, flat_points, [names[c] for c in of_class])
    return axes


def plot_anchor_distances(
    axes: Axes, anchors: Tensor, *, class_names: Sequence[str] | None = None
) -> Axes:
    r"""Draw the distances between anchors as a heat map, classes that are near beside each other.

    Classes are in the order of the leaves of average linkage, so that groups of classes show as
    blocks on the diagonal. The numbers are in the units of the features.

    Args:
        axes: drawn on.
        anchors: ``(C, D)``, or ``(C, M, D)``: then the distance of two classes is that of their
            nearest two anchors. An unseen class is left out.
        class_names: C names; numbers by default.

    Returns:
        ``axes``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if the shape is wrong, or fewer than two classes are seen.

    Source: Sokal and Michener, "A statistical method for evaluating systematic relationships"
    (1958), the average linkage.

    >>> from matplotlib.figure import Figure
    >>> anchors = torch.tensor([[0.0], [5.0], [0.5]])
    >>> axes = plot_anchor_distances(Figure().subplots(), anchors, class_names=["a", "b", "c"])
    >>> sorted(label.get_text() for label in axes.get_xticklabels())
    ['a', 'b', 'c']
    """
    check_anchor_rows(anchors.flatten(0, 1) if anchors.ndim == 3 else anchors)
    names = check_class_names(class_names, len(anchors))
    distances = _class_distances(anchors)
    seen = np.flatnonzero(np.isfinite(distances).any(axis=1))
    if len(seen) < 2:
        raise ValueError(f"Expected at least two seen classes, but got {len(seen)}.")
    order = seen[_linkage_order(distances[np.ix_(seen, seen)])]
    shown = distances[np.ix_(order, order)]
    np.fill_diagonal(shown, np.nan)
    low, high = np.nanmin(shown), np.nanmax(shown)
    image = axes.imshow(shown, cmap="viridis", vmin=low, vmax=high)
    size = 8 if len(order) <= 12 else 6
    for row, column in zip(*np.nonzero(~np.isnan(shown)), strict=True):
        value = shown[row, column]
        color = "white" if value < (low + high) / 2 else "black"  # viridis starts dark
        text = f"{value:.2g}" if high < 10 else f"{value:.0f}"
        axes.text(column, row, text, color=color, fontsize=size, ha="center", va="center")
    labels = [names[c] for c in order]
    axes.set_xticks(range(len(order)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(order)), labels)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, label="distance between anchors", shrink=0.8)
    return axes


def plot_scores(
    axes: Axes,
    calibrator: ScoreCalibrator,
    minimum: PerClass | None = None,
    *,
    class_names: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
) -> Axes:
    """Draw a histogram of the scores of each class that was called, with its minimum drawn in.

    The scores are on a logarithmic axis, as the calibrator's bins are. What lies right of the
    black line gets a pseudo-label; the share that does is written at the right.

    Args:
        axes: drawn on.
        calibrator: scores of a labeler, by called class.
        minimum: one number, or ``(C,)``; infinite for a class that is not labeled.
        class_names: C names; numbers by default.
        colors: C colors; by default those of `class_colors`.

    Returns:
        ``axes``.

    Raises:
        ValueError: if ``minimum`` or ``class_names`` are not one for each class, or no score was
            counted.

    Source: the class-wise thresholds of CBST (arXiv 1810.07911).

    >>> from matplotlib.figure import Figure
    >>> calibrator = ScoreCalibrator(num_classes=2)
    >>> calibrator.update(torch.tensor([0, 0, 1]), torch.tensor([0.5, 1.0, 2.0]))
    >>> axes = plot_scores(Figure().subplots(), calibrator, 0.7)
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['1', '0']
    """
    num_classes = calibrator.num_classes
    names = check_class_names(class_names, num_classes)
    shades = class_colors(num_classes) if colors is None else colors
    counts = calibrator.counts.sum(dim=0).cpu().double().numpy()
    called = np.flatnonzero(counts.sum(axis=1) > 0).tolist()
    if len(called) == 0:
        raise ValueError("Expected a calibrator with scores, but got none. Call `update` first.")
    edges = calibrator.edges.cpu().double().numpy()
    minimums = _per_class(minimum, calibrator)
    merged, bins = _histogram(counts, edges)
    for row, c in enumerate(reversed(called)):
        height = 0.85 * merged[c] / merged[c].max()
        axes.stairs(row + height, bins, baseline=row, fill=True, color=shades[c], alpha=0.8)
        if minimums is not None:
            share = counts[c, edges[:-1] >= minimums[c]].sum() / counts[c].sum()
            if np.isfinite(minimums[c]):
                at = max(minimums[c], bins[0])
                axes.plot([at, at], [row, row + 0.9], color="black", linewidth=1.5)
            axes.text(
                1.01,
                row + 0.3,
                f"{100 * share:.0f} %",
                transform=axes.get_yaxis_transform(),
                fontsize=8,
            )
    _set_logarithmic(axes, bins[0], bins[-1])
    axes.set_yticks(np.arange(len(called)) + 0.35, [names[c] for c in reversed(called)])
    axes.set_ylim(-0.1, len(called))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("score")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return axes


def plot_coverage_and_precision(
    axes: Axes,
    calibrators: Mapping[str, ScoreCalibrator],
    label: int,
    minimum: PerClass | None = None,
) -> Axes:
    """Draw what a minimum score does to the labels of one class: its coverage and its precision.

    Coverage is a thin line, precision a thick one, where pixels were judged by their truth. One
    color is one stream: the source and the target beside each other show what a precision that was
    measured on the source promises on the target.

    Args:
        axes: drawn on.
        calibrators: by a name for the legend.
        label: the class, in [0, C).
        minimum: one number, or ``(C,)``: drawn as a vertical line.

    Returns:
        ``axes``.

    Raises:
        ValueError: if there is no calibrator, the class is not in [0, C), or ``minimum`` is not one
            for each class.

    Source: the risk-coverage curve of Geifman and El-Yaniv (arXiv 1705.08500).

    >>> from matplotlib.figure import Figure
    >>> source = ScoreCalibrator(num_classes=2)
    >>> labels = torch.tensor([0, 0, 0])
    >>> source.update(labels, torch.tensor([0.5, 1.0, 2.0]), truth=torch.tensor([1, 0, 0]))
    >>> axes = plot_coverage_and_precision(Figure().subplots(), {"source": source}, 0, 0.7)
    >>> [line.get_label() for line in axes.get_lines()][:2]
    ['source: coverage', 'source: precision']
    """
    if not calibrators:
        raise ValueError("Expected at least one calibrator, but got none.")
    low, high = np.inf, -np.inf
    for (name, calibrator), color in zip(calibrators.items(), _cycled_colors(), strict=False):
        if not 0 <= label < calibrator.num_classes:
            raise ValueError(
                f"Expected `label` in [0, {calibrator.num_classes}), the classes of {name!r}, "
                f"but got {label}."
            )
        curve = calibrator.curve()
        x = curve.min_scores.cpu().double().numpy()
        coverage, precision = (100 * part[label].cpu().numpy() for part in curve[1:])
        axes.plot(x, coverage, color=color, linewidth=1, label=f"{name}: coverage")
        axes.plot(x, precision, color=color, linewidth=2.2, label=f"{name}: precision")
        between = x[(coverage > 0) & (coverage < 99) & (x > 0) & np.isfinite(x)]
        low, high = min([low, *between[:1]]), max([high, *between[-1:]])
    minimums = _per_class(minimum, calibrator)
    if minimums is not None and np.isfinite(minimums[label]):
        axes.axvline(minimums[label], color="black", linewidth=1.2)
    _set_logarithmic(axes, low, high)
    axes.set(xlabel="minimum score", ylabel="percent", ylim=(0, 102))
    axes.grid(color=_GRID, linewidth=0.5)
    axes.legend(fontsize=8, frameon=False)
    return axes


def plot_labels(
    axes: Axes,
    labels: Tensor,
    scores: Tensor | None = None,
    *,
    image: Tensor | None = None,
    colors: Sequence[Color],
) -> Axes:
    """Draw a label map, over its image if that is given; unlabeled pixels are left empty.

    With scores, a pixel is the more opaque the higher its score ranks in the map, so that the
    picture does not depend on their scale.

    Args:
        axes: drawn on.
        labels: ``(H, W)``, any integer dtype; a label outside [0, C) is not drawn.
        scores: ``(H, W)``, floating point.
        image: ``(3, H', W')`` in [0, 1], of any resolution.
        colors: of the C classes, as `class_colors` returns them.

    Returns:
        ``axes``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape is wrong.

    Source: the pictures of pseudo-labels in the papers of self-training, such as CBST (arXiv
    1810.07911).

    >>> from matplotlib.figure import Figure
    >>> axes = plot_labels(Figure().subplots(), torch.tensor([[0, 255]]), colors=class_colors(2))
    >>> axes.get_images()[0].get_array().shape
    (1, 2, 4)
    """
    check_label_map(labels)
    if labels.ndim != 2:
        raise ValueError(
            f"Expected `labels` of shape (H, W), one map, but got {tuple(labels.shape)}. "
            "Draw one image of the batch, such as labels[0]."
        )
    ids = labels.detach().long().cpu().numpy()
    is_class = (ids >= 0) & (ids < len(colors))
    table = np.array([to_rgb(color) for color in colors]).reshape(-1, 3)
    opacity = np.where(is_class, 1.0, 0.0)
    if scores is not None:
        check_scores(scores, labels)
        opacity *= 0.15 + 0.85 * _ranks(scores.detach().float().cpu().numpy(), is_class)
    if image is not None:
        check_tensor(image, "image")
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(
                "Expected `image` of shape (3, H, W), floating point in [0, 1], but got "
                f"{tuple(image.shape)} {image.dtype}."
            )
        pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        axes.imshow(pixels, extent=(0, ids.shape[1], ids.shape[0], 0), aspect="equal")
        opacity *= 0.75
    colored = np.concatenate([table[np.where(is_class, ids, 0)], opacity[..., None]], axis=2)
    extent = (0, ids.shape[1], ids.shape[0], 0)
    axes.imshow(colored, extent=extent, interpolation="nearest", aspect="equal")
    axes.set_axis_off()
    return axes


def _labeled_rows(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Array, Array]:
    """Return features (P, D) with a label in [0, C), evenly taken, and their labels (P,)."""
    x = features.detach().movedim(1, -1).flatten(0, -2)
    y = labels.detach().long().flatten()
    chosen = torch.nonzero((y >= 0) & (y < num_classes) & x.isfinite().all(dim=1)).flatten()
    chosen = chosen[:: max(1, -(-len(chosen) // _MOST_POINTS))]
    return x[chosen].cpu().double().numpy(), y[chosen].cpu().numpy()


def _anchor_points(anchors: Tensor) -> tuple[Array, NDArray[np.int64]]:
    """Return the finite anchors (A, D) and the class of each."""
    rows = anchors.detach().cpu().double()
    rows = rows.unsqueeze(1) if rows.ndim == 2 else rows
    classes = torch.arange(len(rows))[:, None].expand(rows.shape[:2])
    finite = rows.isfinite().all(dim=2)
    return rows[finite].numpy(), classes[finite].numpy()


def _project(
    x: Array, y: Array, points: Array, of_class: NDArray[np.int64], projection: Projection
) -> tuple[Array, Array]:
    """Return features (P, 2) and anchors (A, 2) in the plane."""
    if projection == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise ImportError(
                'Expected scikit-learn for projection="tsne", but it is not installed. '
                'Install it with pip install scikit-learn, or use "anchors".'
            ) from error
        perplexity = min(30.0, (len(x) + len(points) - 1) / 3)
        embedded = TSNE(perplexity=perplexity, random_state=0).fit_transform(
            np.concatenate([x, points])
        )
        return embedded[: len(x)], embedded[len(x) :]
    center = points.mean(axis=0)
    basis = np.eye(x.shape[1])
    if projection == "discriminants":
        means = {c: x[y == c].mean(axis=0) for c in np.unique(y)}
        offsets = x - np.array([means[c] for c in y])
        values, vectors = np.linalg.eigh(offsets.T @ offsets / len(x))
        values = values + 1e-6 * max(values.mean(), 1e-12)  # for directions without scatter
        basis = vectors / np.sqrt(values)
    _, _, axes = np.linalg.svd((points - center) @ basis, full_matrices=True)
    plane = basis @ axes[:2].T
    if plane.shape[1] < 2:  # one channel
        plane = np.concatenate([plane, np.zeros_like(plane)], axis=1)
    return (x - center) @ plane, (points - center) @ plane


def _write_names(axes: Axes, points: Array, names: Sequence[str]) -> None:
    """Write a name beside each point, moved up or down by as little as it overlaps no other."""
    low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
    boxes: list[tuple[float, float, float]] = []
    for index in np.argsort(points[:, 1]):
        x, y = (points[index] - low) / (high - low) + 0.015
        end = x + 0.02 * len(names[index])
        moves = sorted(np.arange(-1, 1, 0.01), key=abs)
        free = [
            move
            for move in moves
            if 0 < y + move < 0.96
            and not any(abs(y + move - v) < 0.04 and x < u and t < end for t, u, v in boxes)
        ]
        y += free[0] if free else 0.0
        boxes.append((x, end, y))
        axes.annotate(
            names[index], points[index], (x, y), textcoords="axes fraction", fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.4", "shrinkB": 4},
            path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=4,
        )  # fmt: skip


def _set_logarithmic(axes: Axes, low: float, high: float) -> None:
    """Make the horizontal axis logarithmic, from low to high, with numbers that do not overlap."""
    axes.set_xscale("log")
    wide = True
    if low < high:  # else there are too few scores for limits
        axes.set_xlim(low, high)
        wide = high > 30 * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _class_distances(anchors: Tensor) -> Array:
    """Return distances (C, C) between classes, infinite where one is unseen."""
    rows = anchors.detach().cpu().double()
    between = anchor_distances(rows.view(-1, rows.shape[-1]), rows)  # from each row to each class
    finite = torch.where(between.isnan(), torch.inf, between)
    return np.asarray(finite.view(len(rows), -1, len(rows)).amin(dim=1).numpy())


def _linkage_order(distances: Array) -> list[int]:
    """Return the leaves of average linkage, each merge turned so that its nearest ends meet."""
    groups = [[i] for i in range(len(distances))]
    while len(groups) > 1:
        pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
        i, j = min(pairs, key=lambda p: distances[np.ix_(groups[p[0]], groups[p[1]])].mean())
        second, first = groups.pop(j), groups.pop(i)
        turned = [(a, b) for a in (first, first[::-1]) for b in (second, second[::-1])]
        joined = min(turned, key=lambda ab: distances[ab[0][-1], ab[1][0]])
        groups.append([*joined[0], *joined[1]])
    return groups[0]


def _histogram(counts: Array, edges: Array) -> tuple[Array, Array]:
    """Return counts (C, 60) in coarser bins, evenly spaced in log s, and their edges (61,).

    They span all classes from the first percent of their scores to the last score; what lies
    outside is counted at the ends.
    """
    inner = counts[:, 2:-1]  # the first two bins have no lower edge above 0, the last no upper one
    shares = inner.sum(axis=0).cumsum() / max(1.0, inner.sum())
    first, last = int((shares < 0.01).sum()), int((shares < 1).sum())
    last = min(last, inner.shape[1] - 1)
    lines = np.geomspace(edges[2 + first], edges[3 + last], 61)
    centers = np.sqrt(edges[2:-2] * edges[3:-1]).clip(lines[0], lines[-1])
    merged = np.stack([np.histogram(centers, lines, weights=of_class)[0] for of_class in inner])
    merged[:, 0] += counts[:, :2].sum(axis=1)
    merged[:, -1] += counts[:, -1]
    return merged, lines


def _per_class(minimum: PerClass | None, calibrator: ScoreCalibrator) -> Array | None:
    if minimum is None:
        return None
    values = as_per_class(minimum, "minimum")
    if values.ndim > 0:
        check_per_class(values, "minimum", values, "minimum", calibrator.num_classes)
    return np.broadcast_to(values.cpu().double().numpy(), calibrator.num_classes)


def _ranks(scores: NDArray[np.float32], among: NDArray[np.bool_]) -> Array:
    """Return for each pixel the share of chosen pixels with a lower score; NaN is lowest."""
    values = np.where(np.isnan(scores), -np.inf, scores)
    chosen = np.sort(values[among])
    return np.searchsorted(chosen, values, side="left") / max(1, len(chosen) - 1)


def _cycled_colors() -> Sequence[Color]:
    return class_colors(3 * len(_OKABE_ITO))
