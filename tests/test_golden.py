"""The numbers the released CAG-UDA code printed; its label maps use 250 for ignored."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import anchorda

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Any]:
    with np.load(golden / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def make_inputs(golden: Path) -> Any:  # noqa: ANN401 — a function found by its path has no type
    return runpy.run_path(str(golden / "inputs.py"))["make_inputs"]


@pytest.fixture(scope="module")
def frozen_outputs(make_inputs: Any) -> Inputs:  # noqa: ANN401
    anchors, features, logits, _, labels = make_inputs(1, 1, 256, 128, 224)
    return tuple(map(torch.from_numpy, (anchors, features, logits, labels)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchor_pseudo_labels(
    numbers: dict[str, Any], frozen_outputs: Inputs, dtype: torch.dtype
) -> None:
    anchors, features, _, _ = frozen_outputs
    labeler = anchorda.AnchorPseudoLabeler(min_margin=2.5, ignore_index=250)
    labels, scores = labeler(features.to(dtype), anchors.to(dtype))
    np.testing.assert_array_equal(labels, numbers["pl_anchor"])
    assert torch.equal(labels < 250, scores > 2.5)


def test_probability_pseudo_labels(numbers: dict[str, Any], frozen_outputs: Inputs) -> None:
    labels, _ = anchorda.ProbabilityPseudoLabeler(0.95, ignore_index=250)(frozen_outputs[2])
    np.testing.assert_array_equal(labels, numbers["pl_prob"])


def test_category_anchors(numbers: dict[str, Any], make_inputs: Any) -> None:  # noqa: ANN401
    anchors = anchorda.CategoryAnchors(19, 32, max_count=3000)
    for seed in range(100, 106):
        arrays = make_inputs(seed, 2, 32, 24, 40)
        _, features, logits, _, labels = map(torch.from_numpy, arrays)
        correct = anchorda.keep_correct(labels, logits)
        anchors.update(*anchorda.image_centroids(features, correct, 19, min_pixels=10))
    np.testing.assert_array_equal(anchors.counts, numbers["cac_counts"])
    seen = numbers["cac_counts"] > 0
    # Measured: 7e-8, the rounding of the image means to float32.
    np.testing.assert_allclose(
        anchors.compute()[seen], numbers["cac_vectors"][seen], rtol=0, atol=5e-7
    )
    assert anchors.compute()[~seen].isnan().all()
