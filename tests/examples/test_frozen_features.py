"""A classifier in one pass, on small folders of own images."""

from pathlib import Path

import pytest

pytest.importorskip("kornia", reason="the examples extra is not installed")

import frozen_features

from tests.examples.test_segmentation import CLASSES, write


def test_the_discriminant_is_printed_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(10):
        write(tmp_path / "source", f"s{index}", size=(60, 80))
        write(tmp_path / "target", f"t{index}", size=(60, 80), labeled=index > 6)
    (tmp_path / "classes.txt").write_text(CLASSES)
    scores = frozen_features.main(
        *(tmp_path / "source", tmp_path / "target", tmp_path / "classes.txt"),
        size=(96, 128),
        probes=(0, 1),
        device="cpu",
    )
    printed = capsys.readouterr().out
    anchors = ["Euclidean", "cosine", "discriminant, equal priors", "discriminant"]
    assert list(scores) == [*anchors, "linear probe 0", "linear probe 1"]
    assert all(name in printed for name in scores)
    # Blocks of one color to a class: a linear classifier finds most of them.
    held_out, target = scores["discriminant"]
    assert held_out > 50
    assert target > 50
