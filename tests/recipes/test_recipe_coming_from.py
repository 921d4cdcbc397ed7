"""The page "Coming from X": prototypes of each layout, momentum conventions, temperatures."""

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import anchorda
from tests import oracles
from tests.oracles import flat, rows
from tests.recipes.pages import RECIPES, run_block

PAGE = "coming_from.md"
NUM_CLASSES, DIM = 4, 3
TEXT = (RECIPES / PAGE).read_text(encoding="utf-8")


def prototypes() -> Tensor:
    """Return three classes, and one that was never seen: zeros, as all of these codes begin."""
    vectors = torch.randn(NUM_CLASSES, DIM)
    vectors[2] = 0
    return vectors


def sepico_file(vectors: Tensor) -> dict[str, Tensor]:
    amount = torch.tensor([5.0, 7.0, 0.0, 3.0])  # Its counts are floats.
    return {"CoVariance": vectors.abs(), "Ave": vectors, "Amount": amount}


def given() -> dict[str, Any]:
    features = torch.randn(2, DIM, 6, 6)
    return {
        "features": features,
        "labels": torch.randint(NUM_CLASSES, (2, 6, 6)),
        "num_classes": NUM_CLASSES,
        "contrast_temp": 0.5,
        "anchorda": anchorda,
        "torch": torch,
    }


@pytest.mark.parametrize("layout", ["CAG-UDA", "CAG-UDA array", "ProDA", "DiGA", "SePiCo"])
def test_saved_prototypes(layout: str, tmp_path: Path) -> None:
    vectors = prototypes()
    path = tmp_path / "saved"
    if layout == "CAG-UDA":
        counts = np.array([9, 8, 0, 7])
        torch.save({"objective_vectors": vectors.numpy(), "objective_num": counts}, path)
    elif layout == "CAG-UDA array":
        path.write_bytes(pickle.dumps(vectors.numpy()))
    else:
        torch.save(sepico_file(vectors) if layout == "SePiCo" else vectors, path)
    names = given() | {"path": path}
    run_block(PAGE, 0, names)
    expected = vectors.clone()
    expected[2] = math.nan
    assert torch.equal(names["centroids"].nan_to_num(7), expected.nan_to_num(7))
    labels, _ = oracles.margin_labels(
        rows(names["features"]), expected.double().numpy(), [0.1] * NUM_CLASSES, True, 255
    )
    assert np.array_equal(flat(names["labels"]), labels)
    sums, counts = oracles.class_sums(rows(names["features"]), labels, NUM_CLASSES)
    moved = (1 - 0.0001) * vectors.double().numpy()[0] + 0.0001 * sums[0] / counts[0]
    np.testing.assert_allclose(names["anchors"].compute()[0].numpy(), moved, rtol=1e-6)
    assert names["anchors"].momentum == 0.0001


def test_sepico_s_statistics(tmp_path: Path) -> None:
    vectors, path = prototypes(), tmp_path / "saved"
    torch.save(sepico_file(vectors), path)
    names = given() | {"sepico_path": path}
    run_block(PAGE, 1, names)
    assert names["anchors"].counts.tolist() == [5, 7, 0, 3]
    assert names["means"].isnan().all(dim=1).tolist() == [False, False, True, False]
    assert names["variances"].isnan().all(dim=1).tolist() == [False, False, True, False]
    assert names["loss"].isfinite()
    features = torch.full((1, DIM), 2.0)
    names["anchors"].update(features, torch.tensor([0]))
    expected = (5 * vectors[0] + features[0]) / 6  # From its counts.
    torch.testing.assert_close(names["anchors"].compute()[0], expected)


def test_a_training_checkpoint(tmp_path: Path) -> None:
    vectors, path = prototypes(), tmp_path / "from_gta5_to_cityscapes.pkl"
    torch.save(
        {"ResNet101": {"model_state": {"w": torch.ones(2)}}, "objective_vectors": vectors}, path
    )
    with pytest.raises(ValueError, match="from_gta5_to_cityscapes"):
        anchorda.released.load_category_anchors(path)
    names = given() | {"checkpoint_path": path}
    run_block(PAGE, 2, names)
    assert names["centroids"].isnan().all(dim=1).tolist() == [False, False, True, False]
    torch.testing.assert_close(names["centroids"][[0, 1, 3]], vectors[[0, 1, 3]])


@pytest.mark.parametrize("rule", ["momentum", "decay", "capped", "mean"])
def test_momentum_conventions(rule: str) -> None:
    """Each row of the table, by the rule it names."""
    settings = {
        "momentum": {"momentum": 0.0001},
        "decay": {"momentum": 1 - 0.999},
        "capped": {"max_count": 3000},
        "mean": {},
    }
    for text in ("`momentum=0.0001`", "`momentum=1 - 0.999`", "`max_count=3000`"):
        assert text in TEXT
    old, new = torch.randn(1, DIM).double(), torch.randn(1, DIM).double()
    anchors = anchorda.CategoryAnchors.from_centroids(
        old,
        torch.tensor([2999]),
        **settings[rule],  # type: ignore[arg-type]
    )
    label = torch.tensor([0])
    anchors.update(new, label)
    expected = {
        "momentum": (1 - 0.0001) * old + 0.0001 * new,
        "decay": 0.999 * old + (1 - 0.999) * new,
        "capped": (2999 * old + new) / 3000,
        "mean": (2999 * old + new) / 3000,
    }[rule]
    torch.testing.assert_close(anchors.means, expected, rtol=1e-12, atol=0)
    anchors.update(new, label)
    if rule == "capped":
        torch.testing.assert_close(anchors.means, (3000 * expected + new) / 3001)
        assert anchors.counts.item() == 3000
    if rule == "mean":
        assert anchors.counts.item() == 3001


def test_image_by_image() -> None:
    names = given()
    labels = names["labels"]
    labels[0, 0] = 250
    labels[1][labels[1] == 3] = 0
    labels[1, 0, 0] = 3  # A pixel alone.
    labels[1, 1:3] = 0
    start = torch.randn(NUM_CLASSES, DIM)
    names["anchors"] = anchorda.CategoryAnchors.from_centroids(start, momentum=0.25)
    run_block(PAGE, 3, names)
    expected = start.double().numpy().copy()
    moves = 0
    for image, small in zip(names["features"], labels, strict=True):
        sums, counts = oracles.class_sums(rows(image[None]), flat(small), NUM_CLASSES)
        for c in range(NUM_CLASSES):
            if counts[c] >= 10:
                expected[c] = 0.75 * expected[c] + 0.25 * sums[c] / counts[c]
                moves += 1
    assert 0 < moves < 2 * NUM_CLASSES
    np.testing.assert_allclose(names["anchors"].compute().numpy(), expected, rtol=1e-5)
    at_once = anchorda.CategoryAnchors.from_centroids(start, momentum=0.25)
    at_once.update(names["features"], labels)
    assert (at_once.compute() - names["anchors"].compute()).abs().max() > 1e-3


def test_proda_s_temperature_is_a_factor() -> None:
    """Of the distances in its softmax."""
    assert "`temperature=1 / proto_temperature`" in TEXT
    features, anchors = torch.randn(5, DIM), torch.randn(NUM_CLASSES, DIM)
    distances = oracles.anchor_distances(rows(features), anchors.double().numpy())
    by_hand = np.stack([oracles.softmax(-2.5 * row) for row in distances])
    got = anchorda.anchor_probabilities(features, anchors, temperature=1 / 2.5)
    np.testing.assert_allclose(got.numpy(), by_hand, rtol=1e-5)


def test_every_name_of_the_table_exists() -> None:
    table = TEXT[TEXT.index("## Names") : TEXT.index("## Momentum")]
    for row in re.findall(r"^\| .+? \| (.+) \|$", table, re.MULTILINE)[1:]:
        for name in re.findall(r"`([A-Za-z_]+)[`(.]", row):
            known = {"anchors", "centroids", "counts", "ignore_index", "pixel_weights"}
            assert hasattr(anchorda, name) or name in known, name
