"""Draw the gallery: run the blocks of pictures.md and save the figure of each.

    python docs/gallery.py

A block's figure is saved where the picture below it is expected, so that what a reader copies is
what drew the picture.
"""

import re
from pathlib import Path

PAGE = Path(__file__).with_name("pictures.md")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n!\[[^\]]*\]\((images/\w+\.png)\))?", re.M | re.S)


def blocks() -> list[tuple[str, str]]:
    """Return the code of each block, and the picture that follows it, if any."""
    return [(code, picture) for code, picture in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def main() -> None:
    """Run all blocks in one namespace, as a reader would."""
    names: dict[str, object] = {}
    for code, picture in blocks():
        exec(compile(code, str(PAGE), "exec"), names)
        if picture:
            figure = names["figure"]
            figure.savefig(PAGE.parent / picture)  # type: ignore[attr-defined]
            print(picture)


if __name__ == "__main__":
    main()
