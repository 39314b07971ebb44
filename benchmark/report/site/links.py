"""Where the pages of a site are: names that any file system takes, and the way from one page to another."""

from __future__ import annotations

import re

from quanttune.digests import json_digest

_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")
_LONGEST = 80


def page_of(kind: str, name: str) -> str:
    """The path of a page within its site, such as ``methods/mse.html``.

    Args:
        kind: Name of a folder: ``methods``, ``models``, ``suites`` or ``cells``.
        name: What the page is about. What is no file name becomes one, with a digest that tells such apart.
    """
    safe = _UNSAFE.sub("-", name).strip(".-")[:_LONGEST]
    # file systems that take capital for small letters must not lose a page
    if safe != name or name != name.lower():
        safe = f"{safe}-{json_digest(name)[:8]}".lower().lstrip("-")
    return f"{kind}/{safe}.html"


def cell_page(cell_id: str, suite: str = "") -> str:
    """The path of a cell's page.

    Args:
        cell_id: The cell's.
        suite: The suite whose number of it is another than that of the suites before.
    """
    return page_of("cells", f"{cell_id[:16]}-{suite}") if suite else f"cells/{cell_id[:16]}.html"
