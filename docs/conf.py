"""Sphinx configuration of the documentation site: ``sphinx-build -W docs site``."""

import os
from importlib.metadata import version as installed_version

os.environ["HF_HUB_OFFLINE"] = "1"

project = "TrackNet"
author = "The TrackNet authors"
copyright = f"2026, {author}"
release = installed_version("tracknet")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns: list[str] = []

# Pages are Markdown that also reads well in a repository browser: links name files, headings have GitHub's anchors.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "TrackNet"
html_static_path: list[str] = []
html_theme_options = {"navigation_with_keys": True}
