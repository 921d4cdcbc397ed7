"""Pictures hold what was given: positions, order, values, transparency; and what is left out."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

import anchorda
from anchorda import plots

NAN = math.nan


def new_axes() -> Axes:
    return Figure().subplots()


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def offsets(axes: Axes) -> list[NDArray[np.float64]]:
    """Return positions (n, 2) of each group of markers."""
    groups = [part for part in axes.collections if isinstance(part, PathCollection)]
    return [np.asarray(group.get_offsets()) for group in groups]


def test_plane_of_the_anchors_shows_their_distances() -> None:
    anchors = torch.randn(4, 6)
    anchors[1] = NAN  # three are left, which lie in a plane
    features = torch.randn(2, 6, 5)
    labels = torch.tensor([[0, 1, 2, 3, 255], [3, 3, -1, 9, 0]])
    axes = plots.plot_features(new_axes(), features, labels, anchors, class_names=list("abcd"))
    *of_classes, first, second, third = offsets(axes)
    assert [len(group) for group in of_classes] == [2, 1, 1, 3]
    drawn = torch.tensor(np.concatenate([first, second, third]))
    shown = torch.pdist(drawn)
    torch.testing.assert_close(shown, torch.pdist(anchors[[0, 2, 3]].double()))
    assert texts(axes) in ([*order] for order in ("acd", "adc", "cad", "cda", "dac", "dca"))
    # A feature that lies in the plane is drawn where it is.
    inside = (anchors[0] + anchors[2])[None] / 2
    axes = plots.plot_features(new_axes(), inside, torch.tensor([0]), anchors)
    between = (offsets(axes)[-3] + offsets(axes)[-2]) / 2
    np.testing.assert_allclose(offsets(axes)[0], between, atol=1e-6)


def test_discriminants_find_the_small_direction_that_tells_classes_apart() -> None:
    labels = torch.arange(200) % 2
    features = torch.randn(200, 3) * torch.tensor([50.0, 40.0, 0.1])
    features[:, 2] += labels
    anchors = torch.stack([features[labels == c].mean(dim=0) for c in range(2)])
    axes = plots.plot_features(new_axes(), features, labels, anchors, projection="discriminants")
    first, second = (group[:, 0] for group in offsets(axes)[:2])
    assert first.max() < second.min() or second.max() < first.min()


def test_many_features_several_anchors_and_one_channel() -> None:
    anchors = torch.tensor([[[0.0], [1.0]], [[5.0], [NAN]]])
    features = torch.randn(9000, 1)
    axes = plots.plot_features(new_axes(), features, torch.arange(9000) % 2, anchors)
    *of_classes, _, _, last = offsets(axes)
    assert 2000 < sum(map(len, of_classes)) <= 4000
    assert len(last) == 1
    assert sorted(texts(axes)) == ["0", "0", "1"]


def test_neighbor_embedding() -> None:
    pytest.importorskip("sklearn", reason="t-SNE comes from scikit-learn")
    features, labels = torch.randn(30, 4), torch.arange(30) % 3
    axes = plots.plot_features(new_axes(), features, labels, torch.randn(3, 4), projection="tsne")
    assert all(np.isfinite(group).all() for group in offsets(axes))


@pytest.mark.parametrize("labels", [[255, 255], [0, 7]])
def test_nothing_to_draw_is_an_error(labels: list[int]) -> None:
    anchors = torch.tensor([[0.0, 0.0], [NAN, NAN]])
    with pytest.raises(
        ValueError, match=r"labeled features and at least two anchors, but got [01]"
    ):
        plots.plot_features(new_axes(), torch.randn(2, 2), torch.tensor(labels), anchors)


def test_heat_map_puts_near_classes_beside_each_other() -> None:
    places = torch.tensor([0.0, 100.0, 1.0, NAN, 101.0, 2.5])
    names = ["a", "x", "b", "unseen", "y", "c"]
    axes = plots.plot_anchor_distances(new_axes(), places[:, None], class_names=names)
    order = "".join(label.get_text() for label in axes.get_xticklabels())
    assert order in ("abcxy", "abcyx", "cbaxy", "cbayx", "xycba", "yxcba", "xyabc", "yxabc")
    shown = np.asarray(axes.get_images()[0].get_array())
    at = {name: places[names.index(name)].item() for name in order}
    expected = [[abs(at[i] - at[j]) if i != j else NAN for j in order] for i in order]
    np.testing.assert_allclose(np.ma.filled(shown, NAN), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at least two seen classes, but got 1"):
        plots.plot_anchor_distances(new_axes(), torch.tensor([[1.0], [NAN]]))


def test_distance_of_several_anchors_is_the_nearest_pair() -> None:
    anchors = torch.tensor([[[0.0], [4.0]], [[9.0], [6.0]]])
    axes = plots.plot_anchor_distances(new_axes(), anchors)
    assert texts(axes) == ["2", "2"]


def calibrated(scores: torch.Tensor, num_classes: int = 2) -> anchorda.ScoreCalibrator:
    calibrator = anchorda.ScoreCalibrator(num_classes)
    labels = torch.zeros(len(scores), dtype=torch.int64)
    calibrator.update(labels, scores, truth=torch.arange(len(scores)) % 2)
    return calibrator


def test_histogram_counts_every_score_and_says_what_is_labeled() -> None:
    scores = torch.cat([torch.linspace(1, 2, 400), torch.tensor([0.0, -3.0, math.inf])])
    calibrator = calibrated(scores, num_classes=3)
    calibrator.update(torch.tensor([2]), torch.tensor([1.5]))
    half = calibrator.min_score_for_coverage(0.5)[0].item()
    minimum = torch.tensor([half, 0.0, math.inf])
    axes = plots.plot_scores(new_axes(), calibrator, minimum, class_names=["a", "b", "c"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a"]  # b is never called
    assert texts(axes) == ["0 %", "51 %"]
    (line,) = axes.get_lines()  # an infinite minimum has none
    assert np.asarray(line.get_xdata())[0] == half
    with pytest.raises(ValueError, match=r"of shape \(C,\) = \(3,\), but got \(2,\)"):
        plots.plot_scores(new_axes(), calibrator, torch.zeros(2))
    with pytest.raises(ValueError, match="with scores, but got none"):
        plots.plot_scores(new_axes(), anchorda.ScoreCalibrator(2))


def test_coverage_and_precision_are_those_of_the_curve() -> None:
    calibrator = calibrated(torch.rand(50))
    axes = plots.plot_coverage_and_precision(new_axes(), {"source": calibrator}, 0, 0.5)
    coverage, precision, vertical = axes.get_lines()
    curve = calibrator.curve()
    for line, expected in ((coverage, curve.coverage), (precision, curve.precision)):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), 100 * expected[0])
    assert np.asarray(vertical.get_xdata())[0] == 0.5
    with pytest.raises(
        ValueError, match=r"`label` in \[0, 2\), the classes of 'source', but got 2"
    ):
        plots.plot_coverage_and_precision(new_axes(), {"source": calibrator}, 2)


def test_label_map_is_opaque_by_rank_and_empty_where_unlabeled() -> None:
    labels, scores = torch.tensor([[0, 1, 1, 255]]), torch.tensor([[5.0, 1.0, 3.0, 9.0]])
    colors = plots.class_colors(2)
    axes = plots.plot_labels(new_axes(), labels, scores, colors=colors)
    (drawn,) = axes.get_images()
    pixels = np.asarray(drawn.get_array())
    np.testing.assert_allclose(pixels[0, :3, :3], np.array(colors)[[0, 1, 1]])
    np.testing.assert_allclose(pixels[0, :, 3], [1.0, 0.15, 0.575, 0.0])
    image = torch.rand(3, 20, 80)
    axes = plots.plot_labels(new_axes(), labels, image=image, colors=colors)
    below, above = axes.get_images()
    assert list(below.get_extent()) == list(above.get_extent())
    np.testing.assert_allclose(np.asarray(above.get_array())[0, :, 3], [0.75, 0.75, 0.75, 0.0])
    with pytest.raises(ValueError, match=r"of shape \(H, W\), one map, but got \(1, 1, 4\)"):
        plots.plot_labels(new_axes(), labels[None], colors=colors)


def test_colors_are_distinct() -> None:
    assert len(set(plots.class_colors(19))) == 19


def test_without_matplotlib_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['matplotlib.axes'] = None\n"
        "try:\n    import anchorda.plots\nexcept ImportError as error:\n    print(error)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 'pip install "anchorda[plots]"' in output.stdout
