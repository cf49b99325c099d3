"""The metadata is in pyproject.toml. A package index shows the README outside of the repository: here its links become absolute."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def for_the_index(readme: str) -> str:
    """The README, its relative links and pictures led to the repository, as it was at this version."""
    source = re.search(r'^Source = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    version = re.search(r'"(.*)"', (ROOT / "autowu" / "version.py").read_text(encoding="utf-8"))[1]
    links = re.compile(r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)")
    return links.sub(lambda link: f"{link[0]}{source}/{'raw' if link[1] else 'blob'}/v{version}/", readme)


setup(
    long_description=for_the_index((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
