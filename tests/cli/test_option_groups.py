"""Options in groups: what typer is told of a dataclass's fields, and what a command gets back."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from longspec.cli.app import program as tree
from longspec.cli.options.groups import COMMAND_LINE_ONLY, Only, Without, argument, expanded, group, option, values
from longspec.cli.options.loading import Loading
from longspec.cli.options.parsers import whole
from longspec.cli.options.typer_classes import Command, Group
from longspec.cli.options.writing import SamplingOptions
from longspec.sampling.parameters import PARAMETERS


@group("First")
class Sizes:
    name: str = argument("none", "A name.", metavar="NAME")
    most_rows: int | None = option(None, "How many.", metavar="N", parser=whole(1, 9), short="-n")
    no_wait: bool = option(False, "At once.")
    loud: bool = option(False, "Aloud.", panel="Second", once=True, flag="--loudly/--quietly")


@pytest.fixture
def program() -> tuple[typer.Typer, list[Any]]:
    seen: list[Any] = []
    made = typer.Typer(cls=Group, add_completion=False, rich_markup_mode=None)
    made.callback()(lambda: None)

    @made.command(cls=Command)
    @expanded
    def say(ctx: typer.Context, sizes: Sizes, times: Annotated[int, typer.Option("--times")] = 1) -> None:
        """Say it."""
        seen.append((ctx.info_name, sizes, times))

    return made, seen


def test_fields_become_parameters_and_come_back_as_a_group(program: tuple[typer.Typer, list[Any]]) -> None:
    made, seen = program
    result = CliRunner().invoke(made, ["say", "Ann", "-n", "4", "--no-wait", "--loudly", "--times", "3"])
    assert result.exit_code == 0, result.output
    assert seen[0][1:] == (Sizes(name="Ann", most_rows=4, no_wait=True, loud=True), 3)
    assert CliRunner().invoke(made, ["say", "--wait", "--quietly"]).exit_code == 0
    assert values(seen[1][1]) == {"name": "none", "most_rows": None, "no_wait": False, "loud": False}
    assert CliRunner().invoke(made, ["say", "--most-rows", "10"]).exit_code == 2


def test_the_help_has_flags_and_headings(program: tuple[typer.Typer, list[Any]]) -> None:
    shown = CliRunner().invoke(program[0], ["say", "--help"]).output
    assert [line for line in shown.splitlines() if line.endswith(":")] == ["First:", "Second:", "Other:"]
    assert "-n, --most-rows N" in shown
    assert "--no-wait " in shown


def test_a_part_of_a_group_leaves_the_rest_at_its_default() -> None:
    def names(part: Only) -> set[str]:
        def command(sizes: Sizes) -> None: ...

        command.__annotations__["sizes"] = Annotated[Sizes, part]
        return set(expanded(command).__annotations__)

    assert names(Only("name", "loud")) == {"name", "loud"}
    assert names(Without("name", "loud")) == {"most_rows", "no_wait"}


def test_what_belongs_to_one_call_is_no_setting() -> None:
    assert "loudly" in COMMAND_LINE_ONLY  # by the flag's name, as settings are named
    assert {"file", "output", "param", "profile", "dry_run", "json_schema"} <= COMMAND_LINE_ONLY
    assert not COMMAND_LINE_ONLY & {"model", "seed", "quiet", "api_key"}


def test_every_sampling_parameter_is_an_option() -> None:
    fields = {field.name: field for field in dataclasses.fields(SamplingOptions)}
    assert fields.keys() - PARAMETERS.keys() == {"max_new_tokens", "stop"}
    assert PARAMETERS.keys() <= fields.keys()


MANY = {"remember", "draft_from"}


@pytest.mark.parametrize(
    ("name", "lacking"), [("run", set()), ("serve", {"remember"}), ("chat", MANY), ("batch", MANY)]
)
def test_a_load_option_is_in_every_command_that_writes(name: str, lacking: set[str]) -> None:
    command: Any = tree()
    taken = {parameter.name for parameter in command.commands[name].params}
    assert {field.name for field in dataclasses.fields(Loading)} - taken == lacking
