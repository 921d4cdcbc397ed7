"""The recipes' pages: their Python runs with the names of a stand-in, block by block."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

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
