"""Sphinx configuration: MyST pages, numpydoc docstrings through napoleon, the furo theme."""

import re

project = "specpert"
author = "the specpert maintainers"
copyright = "2026, the specpert maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "*.head.md"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = "specpert and lipdyn_torch"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["myst.header"]


def polish(app, what, name, obj, options, lines):
    """What napoleon makes of numpydoc that is not what was meant."""
    # bars are absolute values, not substitutions; literals, formulas and examples stay as they are
    paragraphs = re.split(r"(\n\s*\n)", "\n".join(lines))
    for i, text in enumerate(paragraphs):
        before = paragraphs[i - 2] if i > 1 else ""
        if text.lstrip().startswith((">>>", ".. math::")) or before.rstrip().endswith(".. math::"):
            continue
        pieces = re.split(r"(``.*?``|`[^`]*`)", text, flags=re.DOTALL)
        paragraphs[i] = "".join(p if p.startswith("`") else p.replace("|", r"\|") for p in pieces)
    text = "".join(paragraphs)
    # "left, right : array" are two names, and "shape (m, n)" is no link to a property called shape
    text = re.sub(r"^(:(?:ivar|vartype) \w+), (\w+:)", r"\1/\2", text, flags=re.MULTILINE)
    text = re.sub(r"^(:(?:type|vartype) .*?)\bshape\b", r"\1*shape*", text, flags=re.MULTILINE)
    # a colon in the first line of a property ends no type
    if what == "property" and (found := re.search(r"^:type: (.*)$", text, flags=re.MULTILINE)):
        text = f"{found[1]}: {text.replace(found[0], '')}"
    lines[:] = text.split("\n")


def anchor(app, doctree):
    """Pages of source link back to all names of a module as if they stood where the first of them is documented."""
    from sphinx import addnodes

    for node in doctree.findall(addnodes.desc_signature):
        package = node.get("module", "").rpartition(".")[0]
        name = f"{package}.{node.get('fullname')}"
        if package and node["ids"] and name not in doctree.ids:
            node["ids"].append(name)
            doctree.ids[name] = node


def setup(app):
    app.connect("autodoc-process-docstring", polish, priority=900)  # after napoleon
    app.connect("doctree-read", anchor)
