"""Writing a site: every page whole, and none left of what is no longer there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmark.keep.atomic import write_text_atomically
from quanttune.files import remove_abandoned

FOLDERS = ("cells", "methods", "models", "suites")


def write_site(folder: Path, pages: Iterable[tuple[str, str]]) -> Path:
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
    for name, text in pages:
        path = folder / name
        # a page that is as it was keeps its date
        if not (path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode()):
            write_text_atomically(path, text)
        written.add(path)
    remove_abandoned(folder)
    for name in FOLDERS:
        remove_abandoned(folder / name)
        for path in sorted((folder / name).glob("*.html")):
            if path not in written:
                path.unlink()
    return folder / "index.html"
