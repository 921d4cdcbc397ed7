"""The README's Python runs as written."""

import re
from pathlib import Path

import torch

from tests.readme_blocks import python_blocks, run_blocks

README = Path(__file__).parents[1] / "README.md"


def test_what_it_points_to_exists() -> None:
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert "docs/results.md" in targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_every_block_runs() -> None:
    assert len(python_blocks(README)) == 2
    names = run_blocks(README)
    encoder = names["encoder"]
    assert isinstance(encoder, torch.nn.Conv2d)
    assert encoder.weight.grad is not None  # the loop did reach the network
    assert encoder.weight.grad.isfinite().all()
