"""Sphinx configuration of the documentation site; `bash launch/docs.sh` builds it.

The source directory is the repository's root, so that links between docs/, results/ and
the README hold on the site as they do in the repository.
"""

import os
import pathlib

import mpmc_jax

_ROOT = pathlib.Path(__file__).parent.parent

project = "mpmc_jax"
author = "The mpmc_jax authors"
version = release = mpmc_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/index"
include_patterns = ["docs/**", "results/**", "*.md"]
# Other folders, which may hold environments and data, are not even searched.
exclude_patterns = [
    path.name
    for path in _ROOT.iterdir()
    if path.is_dir() and path.name not in ("docs", "results")
]
# Pages of results/ that hold nothing but a table are reached from their folder's page.
suppress_warnings = ["toc.not_included"]

# Anchors of headings, made as GitHub makes them.
myst_heading_anchors = 4
nb_execution_mode = "force" if os.environ.get("MPMC_EXECUTE_NOTEBOOKS") else "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
nb_merge_streams = True

# Docstrings quote code in single backticks.
default_role = "code"
napoleon_use_ivar = True
autodoc_member_order = "bysource"

html_theme = "sphinx_book_theme"
html_title = "mpmc_jax"
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}
html_copy_source = False
# The root of the site leads to its front page.
html_additional_pages = {"index": "index.html"}
templates_path = ["templates"]
