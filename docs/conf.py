"""Settings of Sphinx: offline, from Markdown and docstrings, every warning an error.

make docs
"""

import sys
from pathlib import Path

import anchorda

sys.path.insert(0, str(Path(__file__).parent))  # card, formulas, names, synonyms

project = "anchorda"
author = "The anchorda developers"
version = release = anchorda.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "card",
    "formulas",
    "names",
    "synonyms",
]

# Markdown. Headings are link targets, as they are for whoever reads the files in the repository.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings: a name in single backticks is a link. What torch and Python document is not linked,
# as that would take the network.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|os|numpy|np|npt|dist|matplotlib)\..*"),
    (r"py:.*", r"Tensor|Self|[A-Z]\w*(Error|Warning)|NamedTuple"),
    (r"py:obj", r"anchorda\.losses"),
]

exclude_patterns = ["README.md"]  # of the folder

html_theme = "furo"
html_title = f"anchorda {version}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"scroll-cue": "rgb(0 0 0 / 35%)"},
    "dark_css_variables": {"scroll-cue": "rgb(255 255 255 / 40%)"},
}
