"""The README's Python runs as written. That its links resolve is tested with those of the docs."""

from pathlib import Path

import torch

from tests.readme_blocks import python_blocks, run_blocks

README = Path(__file__).parents[1] / "README.md"


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
