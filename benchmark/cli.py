"""The command line: one group whose commands are the modules of :mod:`benchmark.commands`.

Exit codes: 0 all is well, 1 a cell failed, 2 the request cannot be carried out (one line says why and what to
do), 130 interrupted.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from benchmark.grid.suite import DEFAULT_SUITE
from quanttune.errors import QuantTuneError, UnknownNameError

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130

_Function = TypeVar("_Function", bound=Callable[..., Any])


class CommandGroup(click.Group):
    """Finds commands in :mod:`benchmark.commands` and turns every user-facing error into one line."""

    _loaded = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name.

        Raises:
            UnknownNameError: If there is none.
        """
        self._load()
        command = super().get_command(ctx, cmd_name)
        if command is None and not cmd_name.startswith("-"):
            raise UnknownNameError("command", cmd_name, self.commands)
        return command

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run and exit; errors meant for the user become one line on standard error."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(EXIT_REFUSED)
        except click.ClickException as error:
            _refuse(error.format_message())
        except QuantTuneError as error:
            _refuse(str(error))
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            sys.exit(EXIT_INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)

    def _load(self) -> None:
        # Every module of the package is a command; a new file needs no edit here.
        if self._loaded:
            return
        self.__class__._loaded = True
        package = importlib.import_module("benchmark.commands")
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
            importlib.import_module(f"benchmark.commands.{module.name}")


@click.group(
    cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="quanttune-bench")
def cli() -> None:
    r"""Benchmark post-training quantization methods on pretrained Transformers.

    \b
    Examples:
      python -m benchmark run --all                     the laptop suite, every cell
      python -m benchmark run --model 'minilm*' --method quanttune --precision W6A6
      python -m benchmark table --format latex
    """


def suite_option(function: _Function) -> _Function:
    """``--suite``, the same in every command."""
    return click.option(
        "--suite", default=DEFAULT_SUITE, show_default=True, help="A suite's name, or a path to a .toml file."
    )(function)


def results_option(function: _Function) -> _Function:
    """``--results``, the same in every command."""
    return click.option(
        "--results",
        type=click.Path(path_type=Path),
        default=Path("results"),
        show_default=True,
        help="Folder of the store.",
    )(function)


def _refuse(message: str) -> NoReturn:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(EXIT_REFUSED)
