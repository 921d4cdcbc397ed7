"""Run the Python blocks of a Markdown file, one after the other, in one namespace.

python tests/readme_blocks.py README.md
"""

import re
import sys
from pathlib import Path


def python_blocks(path: Path) -> list[str]:
    """Return the Python blocks of a file, padded so that tracebacks point into the file."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def run_blocks(path: Path) -> dict[str, object]:
    """Run them and return the names they defined."""
    names: dict[str, object] = {}
    for block in python_blocks(path):
        exec(compile(block, str(path), "exec"), names)
    return names


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run_blocks(Path(name))
        print(f"{name}: {len(python_blocks(Path(name)))} blocks ran")
