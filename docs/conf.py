"""Sphinx: the pages of this folder as a site. `pip install .[docs] && python -m sphinx -W docs docs/_build`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from autowu.version import __version__

SOURCE = re.findall(r'^Source = "(.*)"$', (Path(__file__).parent.parent / "pyproject.toml").read_text(), re.MULTILINE)[0]

project, author, release = "autowu", "The autowu developers", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md"]  # which index.rst includes
html_theme = "furo"
html_title = f"autowu {release}"
html_theme_options = {"source_repository": SOURCE, "source_branch": "main", "source_directory": "docs/"}

myst_heading_anchors = 4  # as the forge makes them
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.header"]  # the README, included, begins below the site's title
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True


def _lead_out(text: str) -> str:
    """Links to what is no page of the site lead to the repository."""
    text = re.sub(r"\]\(\.\./README\.md(#[\w-]+)?\)", "](index.rst)", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()\.\./", rf"\1{SOURCE}/blob/main/", text)


def _read(app: Any, docname: str, content: list[str]) -> None:
    content[0] = _lead_out(content[0])


def _include(app: Any, path: Any, docname: str, content: list[str]) -> None:
    content[0] = _lead_out(content[0])


def setup(app: Any) -> None:
    app.connect("source-read", _read)
    app.connect("include-read", _include)
