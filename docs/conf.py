"""Configuration of the documentation site: `sphinx-build docs build/docs`."""

import sys
from importlib import metadata
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

project = "jfe_jax"
author = "The jfe_jax authors"
release = metadata.version("jfe-jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_reference"]
# Tables that `jfe compare` writes; pages under results/ include them.
exclude_patterns = ["emoji/*"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# Docstrings write code in single backticks.
default_role = "code"
# "positive" and "…" are values of keys.
smartquotes = False

html_theme = "sphinx_book_theme"
html_title = "jfe_jax"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
html_copy_source = False
