"""Index entries of each page, from the glossary, so that the search finds a page by other words."""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

GLOSSARY = Path(__file__).with_name("glossary.md")
ROW = re.compile(r"^\| \[(.+?)\]\(([\w/]+)\.md(?:#([\w-]+))?\) \| (.+?) \|$", re.MULTILINE)


def synonyms() -> dict[str, list[tuple[str, str]]]:
    """Return words and the heading where they are explained, for each page."""
    text = GLOSSARY.read_text(encoding="utf-8")
    rows = ROW.findall(text)
    if len(rows) != text.count("\n|") - 2:  # two lines are the head of the table
        raise ValueError(f"Expected rows of a link and other words in {GLOSSARY.name}.")
    pages: dict[str, list[tuple[str, str]]] = {}
    for names, page, heading, others in rows:
        words = f"{names}, {others}".replace("`", "").split(", ")
        pages.setdefault(page, []).extend((word, heading) for word in words)
    return pages


class AddSynonyms(SphinxTransform):
    """Add the index entries of a page at its beginning."""

    default_priority = 10

    def apply(self, **_: object) -> None:
        """Insert one node with all entries."""
        words = synonyms().get(self.env.docname)
        if words:
            entries = [("single", word, heading, "main", None) for word, heading in words]
            self.document.insert(0, addnodes.index(entries=entries))


def depend(app: Sphinx, document: nodes.document) -> None:
    """Read a page again when the glossary has changed."""
    app.env.note_dependency(str(GLOSSARY))


def setup(app: Sphinx) -> None:
    """Register the entries."""
    app.add_transform(AddSynonyms)
    app.connect("doctree-read", depend)
