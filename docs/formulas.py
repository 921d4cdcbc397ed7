"""Formulas as MathML, which browsers draw by themselves, in the font that ships with the pages.

docutils converts the LaTeX. What it does not know is a warning with its place: the build fails.
"""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

_TEXT = re.compile(r"\\text\{[^}]*\}")
# An accented letter with an index, which docutils writes under the letter.
_ACCENTED = re.compile(
    r"<munderover>\s*(<mi>\w</mi>)\s*((?:(?!<munderover>).)*?)\s*"
    r'(<mo stretchy="false">[ˆˉ]</mo>)\s*</munderover>',
    re.DOTALL,
)
# docutils leaves no space around the names of functions, and writes a bar as a low line.
_BEFORE_LOG = re.compile(r"(</m(?:i|sub|sup|subsup)>)\s*(?=<mi>log</mi>)")
_AFTER_NAME = re.compile(r"(<mi>(?:log|exp|arg)</mi>\s*<mo>&ApplyFunction;</mo>)(?!\s*<mo[^>]*>\()")
_SPACE = r'\1<mspace width="0.17em"></mspace>'
_BAR = re.compile(r'<mo accent="true">_</mo>')


def mathml(formula: str, node: nodes.Element, *, as_block: bool = False) -> str:
    """Convert LaTeX that stands at a node."""
    # Within a text docutils takes the backslash for a sign.
    formula = _TEXT.sub(lambda text: text[0].replace(r"\_", "_"), formula)
    formula = re.sub(r"\\log (?=\\)", r"\\log\, ", formula)  # it leaves no space
    try:
        converted = tex2mathml(formula, as_block=as_block)
    except MathError as error:
        getLogger(__name__).warning("%s in %r", error, formula, location=node)
        return formula
    converted = _AFTER_NAME.sub(_SPACE, _BEFORE_LOG.sub(_SPACE, converted))
    converted = _BAR.sub('<mo stretchy="true" accent="true">‾</mo>', converted)
    converted = _ACCENTED.sub(r'<msub><mover accent="true">\1\3</mover>\2</msub>', converted)
    # The bar with an index would be as tall as that alone, the other one as all between them.
    return converted.replace(">‖</mo>", ' stretchy="false">‖</mo>')


def parts_of(formula: str) -> list[str]:
    r"""Split a formula at its ``\qquad``, unless one is inside of braces or an environment."""
    parts = formula.split(r"\qquad")
    whole = all(
        part.count("{") == part.count("}") and part.count(r"\begin") == part.count(r"\end")
        for part in parts
    )
    return parts if whole else [formula]


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line of text."""
    translator.body.append(mathml(node.astext(), node))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula, in boxes that wrap, and scroll where one is too wide."""
    boxes = "".join(
        f'<div class="math-part">{mathml(part, node, as_block=True)}</div>'
        for part in parts_of(node.astext())
    )
    translator.body.append(f'<div class="math-block">{boxes}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
