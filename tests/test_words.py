"""The check of words finds what it is there to find, in prose alone."""

from pathlib import Path

import pytest

from tests.words import findings


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.py", '"""Whether it rains."""\n', [1]),
        ("a.py", 'def f() -> None:\n    """Return it.\n\n    It is kept.\n    """\n', [4]),
        ("a.py", "kept = 1  # there is no room\n", [1]),
        ("a.py", '"""Return `kept`, ``held``.\n\n>>> kept\n1\n"""\nmessage = "is kept"\n', []),
        ("a.md", "Held-out images.\n\n```\nput it\n```\nPut `kept` there.\n", [6]),
    ],
)
def test_words_of_prose_are_found(tmp_path: Path, name: str, text: str, lines: list[int]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [number for number, _ in findings(path)] == lines
