"""Several anchors of each class from passes over a stream."""

import copy
import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anchorda
from anchorda import AnchorClusters
from tests import oracles
from tests.oracles import FLOATS, LAYOUTS, draw, flat, lay_out, rows

Batch = tuple[Tensor, Tensor]


def stream(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Batch]:
    """Return batches without class 4; one feature of class 1 is not finite."""
    batches = []
    for _ in range(4):
        drawn = draw((2, 4, 5), num_classes=5, dtype=dtype)
        batches.append((drawn.features, drawn.labels.masked_fill(drawn.labels == 4, 255)))
    batches[0][0][0, 1, 0, 0] = math.nan
    batches[0][1][0, 0, 0] = 1
    return [(lay_out(x, layout), lay_out(y, layout)) for x, y in batches]


def passes(batches: Sequence[Batch], number: int, per_class: int = 3) -> AnchorClusters:
    clusters = AnchorClusters(5, 3, per_class)
    for _ in range(number):
        for features, labels in batches:
            clusters.update(features, labels)
        clusters.step()
    return clusters


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_is_a_step_of_k_means(dtype: torch.dtype, layout: str) -> None:
    batches = stream(dtype, layout)
    clusters = passes(batches, 1)
    before = clusters.anchors.clone()
    x = np.concatenate([rows(features) for features, _ in batches])
    y = np.concatenate([flat(labels) for _, labels in batches])
    # The first anchors are features of their class, all different.
    for c in range(4):
        own = {tuple(feature) for feature in x[y == c].astype(np.float32).tolist()}
        seeds = {tuple(seed) for seed in before[c].float().tolist()}
        assert len(seeds) == 3
        assert seeds <= own
    assert before[4].isnan().all()
    for features, labels in batches:
        clusters.update(features, labels)
    move = clusters.step()
    expected, largest = oracles.k_means_step(x, y, before.numpy())
    np.testing.assert_allclose(clusters.anchors, expected, rtol=0, atol=1e-12)
    assert move.item() == pytest.approx(largest, abs=1e-12)
    assert clusters.compute().dtype == torch.float32


def test_passes_converge_and_serve_as_anchors() -> None:
    centers = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [30.0, 30.0]])
    own = torch.randint(4, (500,))
    features, labels = centers[own] + torch.randn(500, 2) / 9, own // 2
    clusters = AnchorClusters(2, 2, 2)
    clusters.update(features, labels)
    assert clusters.step().item() == math.inf
    moves = []
    for _ in range(4):
        clusters.update(features, labels)
        moves.append(clusters.step().item())
    assert moves[-1] == 0
    means = torch.stack([features[own == k].mean(dim=0) for k in range(4)]).view(2, 2, 2)
    found = clusters.compute()
    distances = (found[:, :, None] - means[:, None]).norm(dim=3)
    assert (distances.amin(dim=1) < 1e-5).all()
    pseudo = anchorda.AnchorPseudoLabeler()(features, found)
    assert torch.equal(pseudo.labels, labels)


def test_a_class_with_fewer_distinct_features_has_rows_of_nan() -> None:
    features = torch.tensor([[1.0], [1.0], [1.0], [5.0], [7.0]])
    clusters = AnchorClusters(3, 1, 3)
    for _ in range(2):
        clusters.update(features, torch.tensor([0, 0, 0, 0, 1]))
        clusters.step()
    found = clusters.compute().squeeze(2).sort(dim=1).values
    assert found[:2].nan_to_num(-1).tolist() == [[1, 5, -1], [7, -1, -1]]
    assert found[2].isnan().all()


def test_one_seed_is_one_result_however_the_stream_is_divided() -> None:
    batches = stream()
    whole = passes(batches, 3)
    images = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(2)]
    torch.testing.assert_close(
        passes(images, 3).anchors, whole.anchors, rtol=0, atol=1e-12, equal_nan=True
    )
    torch.manual_seed(1)
    again = passes(batches, 3)
    torch.testing.assert_close(again.anchors, whole.anchors, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("number", [0, 1])
def test_merging_is_one_pass_over_both(number: int) -> None:
    batches = stream()
    first = passes(batches, number)
    second, whole = copy.deepcopy(first), copy.deepcopy(first)
    for features, labels in batches[:2]:
        first.update(features, labels)
    for features, labels in batches[2:]:
        second.update(features, labels)
    for features, labels in batches:
        whole.update(features, labels)
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)
    torch.testing.assert_close(first.sums, whole.sums, rtol=0, atol=1e-12)
    # Fewer features than candidates: all are in both samples.
    assert first.priorities.lt(2**40).sum() == whole.priorities.lt(2**40).sum()
    with pytest.raises(ValueError, match="in the same pass"):
        first.merge(passes(batches, 1 - number))
    with pytest.raises(ValueError, match="Merge equal settings"):
        first.merge(AnchorClusters(5, 3, 2))


@pytest.mark.parametrize("number", [0, 2])
def test_state_survives_casts_files_and_copies(number: int) -> None:
    batches = stream()
    clusters = passes(batches, number)
    clusters.update(*batches[0])
    nn.ModuleList([clusters]).half()
    restored = AnchorClusters(5, 3, 3)
    restored.load_state_dict(clusters.state_dict())
    for other in (restored, copy.deepcopy(clusters), pickle.loads(pickle.dumps(clusters))):
        assert repr(other) == repr(clusters)
        for (name, buffer), expected in zip(
            other.state_dict().items(), clusters.state_dict().values(), strict=True
        ):
            assert buffer.dtype == expected.dtype, name
            torch.testing.assert_close(buffer, expected, rtol=0, atol=0, equal_nan=True)
    expected = clusters.step()
    torch.testing.assert_close(restored.step(), expected, rtol=0, atol=0)
    restored.reset()
    for batch in batches:
        restored.update(*batch)
    restored.step()
    torch.testing.assert_close(
        restored.anchors, passes(batches, 1).anchors, rtol=0, atol=0, equal_nan=True
    )


def test_nothing_and_wrong_sizes() -> None:
    clusters = AnchorClusters(2, 3, 2)
    nothing = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    for _ in range(2):
        clusters.update(*nothing)
        clusters.update(torch.ones(4, 3), torch.full((4,), 255))
        clusters.step()
    assert clusters.compute().isnan().all()
    with pytest.raises(ValueError, match=r"with D = 3, but got .* Set feature_dim=2\."):
        clusters.update(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
