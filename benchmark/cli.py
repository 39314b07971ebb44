"""The command line: one group whose commands are the modules of :mod:`benchmark.commands`.

A command parses, calls and prints; :mod:`benchmark.api` and the rooms below do the work.

Exit codes: 0 all is well, 1 a cell failed, 2 the request cannot be carried out (one line says why and what to
do), 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP.
"""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import click

from benchmark import components
from benchmark.engine.stopping import exit_code, stoppable
from quanttune.errors import QuantTuneError, UnknownNameError
from quanttune.registry import ComponentWarning

EXIT_FAILED, EXIT_REFUSED = 1, 2


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
            with warnings.catch_warnings(), stoppable():
                warnings.showwarning = _show_warning
                code = super().main(args, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(EXIT_REFUSED)
        except click.ClickException as error:
            _refuse(error.format_message())
        except QuantTuneError as error:
            _refuse(str(error))
        except UnicodeEncodeError as error:
            unicode = error.encoding.startswith("utf")
            remedy = "rename what it is a part of" if unicode else "set PYTHONIOENCODING=utf-8"
            _refuse(
                f"{error.object[error.start : error.end]!r} cannot be printed in {error.encoding}; {remedy}"
            )
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # what is left in the buffer must not fail again at the end
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            _refuse(f"{error.strerror}: nothing more can be written there")
        except (click.Abort, KeyboardInterrupt) as error:
            click.echo("interrupted", err=True)
            sys.exit(exit_code(error))
        except Exception as error:
            fault = components.fault_of(error)
            if fault is None:
                raise
            _refuse(fault)
        sys.exit(code if isinstance(code, int) else 0)

    def _load(self) -> None:
        # Every module of the package is a command; a new file needs no edit here.
        if self._loaded:
            return
        self.__class__._loaded = True
        package = importlib.import_module("benchmark.commands")
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
            importlib.import_module(f"benchmark.commands.{module.name}")


def examples(*lines: str) -> str:
    """The end of a command's help: examples, each on lines of its own.

    Args:
        lines: What follows ``python -m benchmark``; of at most 58 characters, for a terminal of 80 columns.
    """
    return "\b\nExamples:\n" + "\n".join(f"  python -m benchmark {line}" for line in lines)


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "run --all",
        "run --model 'minilm*' --method quanttune",
        "table --format latex",
    ),
)
@click.version_option(package_name="quanttune-bench")
def cli() -> None:
    """Benchmark post-training quantization methods on pretrained Transformers."""


def _refuse(message: str) -> NoReturn:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(EXIT_REFUSED)


_show_any_warning = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for what is meant for a user; the rest as Python shows it."""
    if issubclass(category, ComponentWarning):
        click.echo(f"warning: {message}", err=True)
    else:
        _show_any_warning(message, category, filename, lineno, file, line)
