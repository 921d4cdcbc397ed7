"""The promises of the toy: better labels stage by stage, a better network, and a picture."""

from pathlib import Path

import pytest
import torch
import toy_2d
from PIL import Image


@pytest.mark.parametrize("seed", [0, 1])
def test_stages_make_the_network_better_on_the_target(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "toy.png"
    arguments = ["--output", str(picture), "--stages", "2", "--seed", str(seed)]
    results = toy_2d.main(arguments)
    assert list(results) == ["source only", "stage 1", "stage 2"]
    assert results["stage 2"] > results["source only"] + 0.05

    printed = capsys.readouterr().out.splitlines()
    assert f"source only: {results['source only']:.1%}" in printed[0]
    assert f"accuracy afterwards: {results['stage 2']:.1%}" in printed[2]
    right = [float(line.split("labeled, ")[1].split("%")[0]) for line in printed[1:3]]
    assert right[0] < right[1]  # the second stage's labels are more often right

    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(2**24) or []) > 100  # something is drawn


def test_target_is_the_source_turned() -> None:
    def draw(degrees: float) -> torch.Tensor:
        domain = toy_2d.draw_domain(9, degrees, torch.Generator().manual_seed(0))
        assert domain.labels.tolist() == [0, 1, 2] * 3
        points: torch.Tensor = domain.points
        return points

    x, y = draw(0.0).T
    torch.testing.assert_close(draw(90.0), torch.stack([-y, x], dim=1))


def test_a_stage_labels_half_of_the_target() -> None:
    """Of the target it is given the points alone."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    source, target = (toy_2d.draw_domain(60, turn, generator) for turn in (0.0, 50.0))
    network = toy_2d.Network()
    toy_2d.train(network, source, target.points, None, iterations=50)
    stage = toy_2d.begin_stage(network, source, target.points)
    labels = stage(target.points).labels
    assert set(labels.unique().tolist()) <= {0, 1, 2, 255}
    assert 0.4 < (labels != 255).double().mean() < 0.7  # half of each class, and its ties
