"""The recipes' pages: their Python runs with the names of a stand-in, block by block."""

import copy
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tests import oracles
from tests.oracles import Array, Labels, flat, rows
from tests.readme_blocks import python_blocks

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


def run_block(
    page: str, number: int, names: dict[str, Any], edits: Mapping[str, str] | None = None
) -> None:
    """Run one Python block of a page; what it reads and what it defines is in ``names``.

    ``edits`` are replacements that the page's text asks for, made before.
    """
    path = RECIPES / page
    block = python_blocks(path)[number]
    for old, new in (edits or {}).items():
        block = block.replace(old, new)
    exec(compile(block, str(path), "exec"), names)


def run_body(page: str, number: int, names: dict[str, Any]) -> Tensor:
    """Run a block as the body of a function, with the names as arguments, and return its result."""
    path = RECIPES / page
    function = "def body():\n" + textwrap.indent(python_blocks(path)[number].lstrip("\n"), "    ")
    exec(compile(function, str(path), "exec"), names)
    returned: Tensor = names["body"]()
    return returned


def code_lines(block: str) -> int:
    """Return lines of a block that are neither blank nor a comment."""
    lines = [line.strip() for line in block.splitlines()]
    return sum(1 for line in lines if line and not line.startswith("#"))


def nearest(labels: Tensor, size: Sequence[int]) -> Labels:
    """Return label maps (N, H, W) resized to the nearest pixel, as rows."""
    maps = [oracles.resize_nearest(image.long().numpy(), size) for image in labels]
    return np.stack(maps).reshape(-1)


def majority(labels: Tensor, size: Sequence[int], ratio: float = 0.75) -> Labels:
    """Return label maps (N, 1, H, W) resized by majority, as rows."""
    maps = [oracles.resize_majority(image.numpy(), size, ratio, 255) for image in labels.squeeze(1)]
    return np.stack(maps).reshape(-1)


def right_means(batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Array:
    """Return class means of features where logits call the label right; of both, and labels."""
    parts = []
    for features, logits, labels in batches:
        small = nearest(labels, features.shape[2:])
        parts.append((rows(features), oracles.keep_correct(small, rows(logits), 255)))
    first, logits, _ = batches[0]
    return oracles.stream_anchors(parts, logits.shape[1], first.shape[1])[0]


def assert_labels(actual: Tensor, x: Array, anchors: Array, minimum: Sequence[float]) -> Labels:
    """Compare with labels by margin, but where a margin is a minimum to rounding; return them."""
    expected, margins = oracles.margin_labels(x, anchors, minimum, False, 255)
    assert 0 < (expected != 255).sum() < expected.size
    clear = np.abs(margins[:, None] - np.asarray(minimum)).min(axis=1) > 1e-4
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(flat(actual)[clear], expected[clear])
    return expected


def evaluated(teacher: nn.Module, student: nn.Module) -> Any:  # noqa: ANN401
    """Return the teacher's parameters with the student's statistics, in evaluation mode."""
    network = copy.deepcopy(teacher)
    for name, buffer in student.named_buffers():
        network.get_buffer(name).copy_(buffer)
    return network.eval()
