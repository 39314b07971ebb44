"""Writing a site: every page whole, and none left of what is no longer there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmark.keep.atomic import write_text_atomically
from quanttune.files import remove_abandoned

FOLDERS = ("cells", "methods", "models", "suites")


@dataclass(frozen=True)
class LaterPage:
    """A page that is made only where the one that is there was made from something else.

    Attributes:
        made_from: Digest of everything that the page is made from.
        make: Makes its text.
    """

    made_from: str
    make: Callable[[], str]

    @property
    def mark(self) -> str:
        """What the page ends with."""
        return f"<!-- made from {self.made_from} -->\n"

    @property
    def text(self) -> str:
        """The page."""
        return f"{self.make()}\n{self.mark}"


def write_site(folder: Path, pages: Iterable[tuple[str, str | LaterPage]]) -> Path:
    """Write the pages of a site, and remove those of an earlier one that have no successor.

    Args:
        folder: The site's own; made if need be.
        pages: Path within the folder, and text.

    Returns:
        The page to open.

    Raises:
        StoreError: If something cannot be written.
    """
    written = set()
    for name, page in pages:
        path = folder / name
        # a page that is as it was keeps its date
        if not _is_there(path, page):
            text = page if isinstance(page, str) else page.text
            write_text_atomically(path, text, lasting=False)
        written.add(path)
    remove_abandoned(folder)
    for name in FOLDERS:
        remove_abandoned(folder / name)
        for path in sorted((folder / name).glob("*.html")):
            if path not in written:
                path.unlink()
    return folder / "index.html"


def _is_there(path: Path, page: str | LaterPage) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    content = path.read_bytes()
    return content == page.encode() if isinstance(page, str) else content.endswith(page.mark.encode())
