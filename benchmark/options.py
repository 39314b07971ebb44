"""Options that several commands share, and headings for those of a command with many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from benchmark.grid.suite import DEFAULT_SUITE
from benchmark.report.site_tables import SWEEP_ITEMS
from quanttune.errors import ConfigError

_Function = TypeVar("_Function", bound=Callable[..., Any])


class HeadedOption(click.Option):
    """An option whose help stands under a heading.

    Args:
        heading: The heading; the others stand under "Options".
    """

    def __init__(self, *arguments: Any, heading: str = "Options", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.heading = heading


class HeadedCommand(click.Command):
    """A command whose help shows options by heading, in the order of their first option."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
        headed: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                headed.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        plain = headed.pop("Options", [])
        for heading, records in [*headed.items(), ("Options", plain)]:
            with formatter.section(heading):
                formatter.write_dl(records)


def refuse_idle(why: str, *names: str) -> None:
    """Refuse options of the command under way that were given and would change nothing.

    Args:
        why: Why they have no say.
        names: The command's parameters.

    Raises:
        ConfigError: Naming those that were given.
    """
    context = click.get_current_context()
    idle = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if idle:
        raise ConfigError(f"{why}; leave out {' and '.join(idle)}")


def suite_option(function: _Function) -> _Function:
    """``--suite``, the same in every command."""
    return click.option(
        "--suite",
        default=DEFAULT_SUITE,
        metavar="NAME",
        show_default=True,
        help="A suite's name, or a path to a .toml file.",
    )(function)


def results_option(function: _Function) -> _Function:
    """``--results``, the same in every command."""
    return click.option(
        "--results",
        type=click.Path(path_type=Path),
        default=Path("results"),
        metavar="DIR",
        show_default=True,
        help="Folder of the store; `reference` is the published one.",
    )(function)


ENDINGS = {"latex": "tex", "markdown": "md", "csv": "csv", "json": "json"}
"""The ending of a table's file in each format that has one."""


def format_option(function: _Function) -> _Function:
    """``--format``, the same for every table that can also go to a paper or a program."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["latex", "markdown", "terminal", "csv", "json"]),
        default="terminal",
        show_default=True,
        help="How to print it.",
    )(function)


def sample_option(what: str) -> Callable[[_Function], _Function]:
    """``--sample``, of the commands that measure again.

    Args:
        what: Its help.
    """
    return click.option(
        "--sample", type=click.IntRange(min=1), default=5, metavar="N", show_default=True, help=what
    )


def include_option(function: _Function) -> _Function:
    """``--include``, the same in every command: the files are imported before the command begins."""
    return click.option(
        "--include",
        "includes",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="FILE",
        expose_value=False,
        is_eager=True,
        callback=_include,
        help="A Python file that registers methods, models, tasks or others; repeatable.",
    )(function)


def analysis_options(function: _Function) -> _Function:
    """Options of the commands that measure, or show, what figures need of the models themselves."""
    for option in (
        click.option(
            "--allow-partial", is_flag=True, help="Go on although cells are missing, and say how many."
        ),
        click.option(
            "--items",
            type=click.IntRange(min=1),
            default=SWEEP_ITEMS,
            metavar="N",
            show_default=True,
            help="Items of the saturation sweep.",
        ),
        click.option(
            "--device",
            default="cpu",
            metavar="NAME",
            show_default=True,
            help="cpu or cuda: where models are analysed, or were.",
        ),
    ):
        function = option(function)
    return function


def _include(context: click.Context, parameter: click.Parameter, paths: tuple[Path, ...]) -> None:
    if not paths or context.resilient_parsing:
        return
    from benchmark import components

    files = components.include(*paths)
    context.call_on_close(lambda: components.forget(files))
