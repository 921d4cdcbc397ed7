"""Digits: a gain over two references, a table of all seeds, every method, no digit in both."""

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn, of the examples extra, is not installed")

import digits


def test_anchors_beat_source_only_and_control(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "cag_uda", "t3a", "--seeds", "2", "--iterations", "200"]
    table = digits.main(flags)
    assert list(table) == ["source only", "control", "cag_uda", "t3a"]
    for seed in range(2):
        reference = max(table["source only"][seed], table["control"][seed])
        assert table["cag_uda"][seed] > reference

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "accuracy on the target (%)"
    for line, (row, values) in zip(lines[1:], table.items(), strict=True):
        percent = 100 * torch.tensor(values)
        assert line.startswith(row)
        assert line.split("   ")[-1].strip() == f"{percent.mean():.1f} ± {percent.std():.1f}"


def test_every_method_runs_on_features_without_a_map() -> None:
    few = ["--seeds", "1", "--iterations", "8", "--stages", "1"]
    table = digits.main([*few, "--method", *digits.METHODS, "t3a"])
    assert list(table) == ["source only", *digits.METHODS, "t3a"]
    papers = ["cag_uda", "proda", "cpsl", "sepico", "diga", "shot", "t3a"]
    assert list(digits.main(few)) == ["source only", "control", *papers]


def test_domains_share_no_digit() -> None:
    source, target = digits.load_domains(0.0, seed=3)
    assert abs(len(source.labels) - len(target.labels)) <= 1
    assert len(source.labels) + len(target.labels) == 1797
    again, _ = digits.load_domains(35.0, seed=3)
    assert torch.equal(source.images, again.images)  # the source is not turned
    other, _ = digits.load_domains(0.0, seed=4)
    assert not torch.equal(source.labels, other.labels)


def test_a_quarter_turn() -> None:
    images = torch.rand(2, 1, 8, 8)
    turned = digits.turned(images, 90.0)
    rotations = [images.rot90(times, (2, 3)) for times in (1, 3)]
    assert any(torch.allclose(turned, rotated, atol=1e-5) for rotated in rotations)


def test_a_stage_labels_half_of_the_target() -> None:
    """Of the target, training and labeling are given the images alone."""
    source, target = digits.load_domains(35.0, seed=0)
    torch.manual_seed(0)
    network = digits.Network()
    objective = digits.control(network, source, target.images)
    digits.train(network, objective, source, target.images, 20)
    labels = digits.label_half(network, source, target.images)(target.images).labels
    assert 0.4 < (labels != 255).double().mean() < 0.6
