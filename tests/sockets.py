"""Who listens on the network."""

from __future__ import annotations

import os
from pathlib import Path

LOOPBACK = ("0100007F:", "00000000000000000000000001000000:")
"""How addresses of 127.0.0.1 and ::1 begin in /proc."""


def listening() -> list[str]:
    """The TCP addresses, as /proc has them, on which processes listen that this one started, and theirs."""
    links = [link for process in _descendants(os.getpid()) for link in _handles(process)]
    sockets = set()
    for link in links:
        try:
            sockets.add(str(link.readlink()))
        except OSError:
            # Closed meanwhile.
            continue
    tables = [Path(f"/proc/self/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def _handles(process: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        # Ended meanwhile.
        return []


def _descendants(process: int) -> list[int]:
    found = []
    try:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    except OSError:
        pass
    return found
