"""The README's Python runs as written, and what its pages point to exists."""

import re
from pathlib import Path

import pytest
import torch

from tests.readme_blocks import python_blocks, run_blocks

README = Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "docs" / "results.md"


@pytest.mark.parametrize(
    ("page", "target"),
    [(README, "docs/results.md"), (RESULTS, "images/demo_margins.png")],
    ids=["README", "results"],
)
def test_what_it_points_to_exists(page: Path, target: str) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert target in targets
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_every_block_runs() -> None:
    assert len(python_blocks(README)) == 3
    names = run_blocks(README)
    encoder = names["encoder"]
    assert isinstance(encoder, torch.nn.Conv2d)
    assert encoder.weight.grad is not None  # the loop did reach the network
    assert encoder.weight.grad.isfinite().all()
    labels = names["pseudo_labels"]
    assert isinstance(labels, torch.Tensor)
    assert 0.3 < (labels < 19).double().mean().item() < 0.7
