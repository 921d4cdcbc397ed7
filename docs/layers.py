"""Draw the layers of the package from the imports in its sources.

    python docs/layers.py

A row is a layer: its modules import from the rows below alone. In small letters stands what a
module imports from the package.
"""

import functools
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from tests.test_package import SOURCES, imports_within, name_of

PICTURE = Path(__file__).parent / "images" / "layers.png"


@functools.cache
def imports() -> dict[str, set[str]]:
    """Return the modules that each module imports; the operators are one."""
    found: dict[str, set[str]] = {}
    for source in SOURCES:
        module = name_of(source).partition(".")[0]
        below = {name.partition(".")[0] for name in imports_within(source)}
        found[module] = found.get(module, set()) | below - {module}
    return found


@functools.cache
def layer(module: str) -> int:
    """Return the number of layers below a module."""
    return max((1 + layer(below) for below in imports()[module]), default=0)


def draw() -> Figure:
    """Return the picture, the lowest layer at the bottom."""
    layers = [sorted(m for m in imports() if layer(m) == i) for i in range(1 + layer(""))]
    figure = Figure((9, 0.68 * len(layers)), dpi=140, layout="constrained")
    axes = figure.subplots()
    for y, modules in enumerate(layers):
        width = 1 / len(modules)
        for i, module in enumerate(modules):
            color = "#eeeeee" if module.startswith("_") else "#dae8fc"
            box = FancyBboxPatch(
                (i * width + 0.008, y + 0.08),
                *(width - 0.016, 0.84),
                boxstyle="round,pad=0,rounding_size=0.012",
                facecolor=color,
                edgecolor="#666666",
                mutation_aspect=7,
            )
            axes.add_patch(box)
            x = (i + 0.5) * width
            below = ", ".join(sorted(imports()[module])) if module else "all that is public"
            lines = textwrap.fill(below or "nothing", int(100 * width))
            axes.text(x, y + 0.7, module or "anchorda", ha="center", va="center", weight="bold")
            axes.text(x, y + 0.35, lines, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, len(layers)))
    axes.axis("off")
    return figure


if __name__ == "__main__":
    draw().savefig(PICTURE)
    print(PICTURE)
