"""Names and shapes in pages and docstrings: links and code, without markup for Sphinx in either."""

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

import anchorda

_SIZE = r"(?:[A-Z](?: \+ \d)?|\d|\*)"
_SHAPE = re.compile(rf"(?<![\w(])\({_SIZE}(?:,(?: {_SIZE})?)+\)")


class LinkNames(SphinxTransform):
    """Make a public name in code a link to its reference, and keep a shape on one line."""

    default_priority = 5

    def apply(self, **_: object) -> None:
        """Look at all literals, but for those in headings and links."""
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            name = text.removeprefix("anchorda.").removesuffix("()")
            if text.startswith("(") and len(text) < 20:
                literal[0] = nodes.Text(text.replace(" ", "\N{NO-BREAK SPACE}"))
            elif isinstance(literal.parent, (nodes.title, nodes.reference, pending_xref)):
                continue
            elif is_public(name):
                link = pending_xref(
                    refdomain="py", reftype="obj", reftarget=f"anchorda.{name}", refexplicit=True
                )
                literal.replace_self(link)
                link += literal


def is_public(name: str) -> bool:
    """Return True for ``CategoryAnchors``, ``CategoryAnchors.update``, ``released.…`` etc."""
    first, _, member = name.partition(".")
    if first == "released":
        return hasattr(anchorda.released, member)
    return first in anchorda.__all__ and (not member or hasattr(getattr(anchorda, first), member))


def mark_shapes(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Set shapes such as (N, D, *) in code, which docstrings leave plain where they lead a line."""
    for number, line in enumerate(lines):
        line = re.sub(r": ([A-Z])\.$", r": ``\1``.", line)  # "C." would begin a numbered list
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")
            parts[::2] = [_SHAPE.sub(r"``\g<0>``", part) for part in parts[::2]]
            lines[number] = "``".join(parts)
    if what in ("attribute", "property"):
        lines.insert(0, "\\ ")  # renders as nothing; else napoleon takes "(C, D)" for the type


def find_in_package(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Look for what a module's docstring names where its users find it: in the package."""
    if node["refdomain"] != "py":
        return None
    name = f"anchorda.{node['reftarget']}"
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", name, node, content
    )


def setup(app: Sphinx) -> None:
    """Register the above."""
    app.add_transform(LinkNames)
    app.connect("autodoc-process-docstring", mark_shapes, priority=1)  # before napoleon
    app.connect("missing-reference", find_in_package)
