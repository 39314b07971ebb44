"""``python -m benchmark``."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line."""
    # OpenMP reads this when PyTorch loads it, so it is set before any other import. Its threads must sleep
    # while they wait, not spin: beside other busy processes spinning made the same work eight times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from benchmark.cli import cli

    cli.main(prog_name="python -m benchmark")


if __name__ == "__main__":
    main()
