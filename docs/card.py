"""The picture and the words that a link to a page is shown with.

    python docs/card.py    # draws docs/static/card.png

As an extension of Sphinx it adds Open Graph tags to every page. Sites want the picture's address
to be absolute: build with ``-D html_baseurl=https://…/`` once the pages have an address.
"""

from html import escape
from pathlib import Path
from urllib.parse import urljoin

import torch
from docutils import nodes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sphinx.application import Sphinx

import anchorda

CARD = Path(__file__).parent / "static" / "card.png"
SIZE = (1200, 630)
COLORS = ("#0072b2", "#d55e00", "#009e73")
SUMMARY = "Class anchors, pseudo-labels and\nlosses for unsupervised domain\nadaptation in PyTorch"
LENGTH = 200  # characters of a description that sites show


def draw() -> Figure:
    """Draw three anchors with the features near them, labeled above a margin, and the name."""
    torch.manual_seed(3)
    anchors = torch.tensor([[-1.5, -0.9], [1.6, -0.8], [0.1, 1.5]])
    classes = torch.arange(450) % 3
    features = anchors[classes] + 0.75 * torch.randn(450, 2)
    labels = anchorda.AnchorPseudoLabeler(min_margin=1.0)(features, anchors).labels

    figure = Figure((SIZE[0] / 100, SIZE[1] / 100), dpi=100, facecolor="white")
    axes = figure.add_axes((0.5, 0.0, 0.5, 1.0))
    axes.set_axis_off()
    _scatter(axes, features[labels == 255], "0.8")
    for c, color in enumerate(COLORS):
        _scatter(axes, features[labels == c], color)
        x, y = anchors[c].tolist()
        axes.plot(x, y, marker="*", markersize=34, color=color, markeredgecolor="black")
    figure.text(0.06, 0.60, "anchorda", fontsize=58, weight="bold")
    figure.text(0.06, 0.30, SUMMARY, fontsize=23, linespacing=1.5)
    return figure


def _scatter(axes: Axes, points: torch.Tensor, color: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], s=26, color=color, alpha=0.8, linewidths=0)


def first_paragraph(document: nodes.document) -> str:
    """Return the first sentences of a page, shortened."""
    paragraph = next(iter(document.findall(nodes.paragraph)), None)
    text = " ".join(paragraph.astext().split()) if paragraph else ""
    return text if len(text) <= LENGTH else text[:LENGTH].rsplit(" ", 1)[0] + " …"


def add_tags(
    app: Sphinx,
    page: str,
    template: str,
    context: dict[str, object],
    document: nodes.document | None,
) -> None:
    """Add the Open Graph tags of a page to its head."""
    if document is None:  # the index and the search
        return
    base = app.config.html_baseurl
    picture = "_static/card.png"
    depth = "../" * page.count("/")
    tags = {
        "og:title": f"{context['title']} · anchorda",
        "og:type": "website",
        "og:description": first_paragraph(document),
        "og:image": urljoin(base, picture) if base else depth + picture,
        "og:image:width": str(SIZE[0]),
        "og:image:height": str(SIZE[1]),
        "og:image:alt": "Features labeled by the nearest of three anchors",
    }
    lines = [f'<meta property="{name}" content="{escape(text)}">' for name, text in tags.items()]
    lines.append('<meta name="twitter:card" content="summary_large_image">')
    lines.append(f'<meta name="description" content="{escape(tags["og:description"])}">')
    context["metatags"] = "\n".join([str(context.get("metatags", "")), *lines])


def setup(app: Sphinx) -> None:
    """Register the tags."""
    app.connect("html-page-context", add_tags)


if __name__ == "__main__":
    draw().savefig(CARD)
    print(CARD)
