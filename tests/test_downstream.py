"""A user's code with every public name passes a strict type checker, where the package is found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_public_api import public_names

SOURCE = Path(__file__).parent / "downstream" / "typed_use.py"
WRONG_USE = """\
import anchorda
anchorda.CategoryAnchors("19", 256)
anchorda.AnchorDistanceLoss("manhattan")
anchorda.CategoryAnchors(19, 256).compute().missing
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return mypy's errors for right and wrong use, without our configuration and source.

    Both at once, as it reads all of torch each time.
    """
    pytest.importorskip("mypy", reason="mypy is not installed")
    folder = tmp_path_factory.mktemp("downstream")
    (folder / "wrong_use.py").write_text(WRONG_USE)
    (folder / "typed_use.py").write_text(SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "."]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    assert "checked 2 source files" in output, output
    return [line for line in output.splitlines() if ": error: " in line]


def test_it_uses_every_public_name() -> None:
    text = SOURCE.read_text(encoding="utf-8")
    names = {name.rpartition(".")[2] for name in public_names()}
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


def test_it_is_typed(errors: list[str]) -> None:
    assert [error for error in errors if error.startswith("typed_use.py")] == []


def test_wrong_use_is_seen(errors: list[str]) -> None:
    """Without the package's py.typed, all of it would be Any and nothing would be wrong."""
    lines = [error.split(":")[1] for error in errors if error.startswith("wrong_use.py")]
    assert lines == ["2", "3", "4"]
