"""What a person who asks for help sees, in a narrow terminal and in a wide one."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from benchmark.cli import cli

CONTEXT = click.Context(cli)
COMMANDS = ["", *cli.list_commands(CONTEXT)]


def shown(command: str, width: int) -> str:
    done = CliRunner().invoke(
        cli, [*command.split(), "--help"], terminal_width=width, prog_name="python -m benchmark"
    )
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_helps_fit_and_examples_stand_on_their_own_lines(command: str, width: int) -> None:
    lines = shown(command, width).splitlines()
    assert [line for line in lines if len(line) > width] == []
    assert not any("\\b" in line or "\b" in line for line in lines)
    assert lines.count("  Examples:") == 1
    examples = lines[lines.index("  Examples:") + 1 :]
    assert examples
    for line in examples:
        assert line.startswith("    python -m benchmark ")
        assert line.count("python -m benchmark") == 1


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_examples_are_commands_that_exist_with_options_that_exist(command: str) -> None:
    lines = shown(command, 80).splitlines()
    for line in lines[lines.index("  Examples:") + 1 :]:
        words = line.split()[3:]
        assert words[0] == command
        parameters = cli.get_command(CONTEXT, command).params  # type: ignore[union-attr]
        known = {option for parameter in parameters for option in parameter.opts}
        assert {word for word in words[1:] if word.startswith("-")} <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_for(command: str) -> None:
    found = cli if not command else cli.get_command(CONTEXT, command)
    assert found is not None
    options = [parameter for parameter in found.params if isinstance(parameter, click.Option)]
    assert options
    assert [option.name for option in options if not option.help] == []


def test_the_overview_cuts_no_sentence() -> None:
    text = shown("", 80)
    assert "..." not in text.replace("[ARGS]...", "")


def test_many_options_stand_under_headings() -> None:
    lines = shown("run", 80).splitlines()
    assert [line for line in lines if line.endswith(":") and not line.startswith(" ")] == [
        "Which cells:",
        "How to run:",
        "Options:",
    ]
