"""``python -m benchmark``."""

from __future__ import annotations

from benchmark.cli import cli


def main() -> None:
    """Run the command line."""
    cli.main(prog_name="python -m benchmark")


if __name__ == "__main__":
    main()
