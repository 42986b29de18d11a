"""Sphinx configuration: MyST pages, numpydoc docstrings through napoleon, the furo theme."""

import re

project = "specpert"
author = "the specpert maintainers"
copyright = "2026, the specpert maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "specpert and lipdyn_torch"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["myst.header"]


def escape_bars(app, what, name, obj, options, lines):
    """Bars in docstrings are absolute values, not substitutions: escape them outside literals, formulas, examples."""
    paragraphs = re.split(r"(\n\s*\n)", "\n".join(lines))
    for i, text in enumerate(paragraphs):
        before = paragraphs[i - 2] if i > 1 else ""
        if text.lstrip().startswith((">>>", ".. math::")) or before.rstrip().endswith(".. math::"):
            continue
        pieces = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.DOTALL)
        paragraphs[i] = "".join(p if p.startswith("`") else p.replace("|", r"\|") for p in pieces)
    lines[:] = "".join(paragraphs).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars, priority=900)
