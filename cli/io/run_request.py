"""One call of `longspec run`: the prompt, the options of its answer, and the destination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longspec.cli.commands import prompts
from longspec.cli.io.prompt_input import checked
from longspec.errors import UsageError

if TYPE_CHECKING:
    from longspec.cli.io.log import Entry
    from longspec.cli.io.output_file import OutputFile
    from longspec.cli.io.page import Page
    from longspec.cli.io.progress import Progress
    from longspec.cli.io.stdout import Output
    from longspec.cli.io.stream_answer import Policy
    from longspec.engine.options import Options
    from longspec.text.prompt_template import Template

__all__ = ["Call", "Form", "make_form"]


@dataclass(frozen=True, slots=True)
class Form:
    """The rendering of a prompt: the text itself, or a template filled with it."""

    template: Template | None
    values: dict[str, str]

    @property
    def name(self) -> str:
        return "" if self.template is None else self.template.name

    @property
    def defaults(self) -> dict[str, Any]:
        """The template's options for the answer."""
        return {} if self.template is None else self.template.options(self.values)

    @property
    def takes_input(self) -> bool:
        return self.template is None or self.template.takes_input

    def fill(self, text: str) -> str:
        return text if self.template is None else self.template.render(text, self.values)


@dataclass(frozen=True, slots=True)
class Call:
    """The call's options, with conflicts resolved."""

    argument: str | None
    files: Sequence[str]
    no_stdin: bool
    form: Form
    model: str
    loading: dict[str, Any]  # keywords of `Engine.load`
    writing: Options
    output: Output | OutputFile | Page
    progress: Progress
    policy: Policy
    as_json: bool
    stats: bool
    no_server: bool
    trace: OutputFile | None  # the profile's file
    log: bool = False  # keep prompt and answer
    earlier: Sequence[Entry] = ()  # the conversation that this goes on with


def make_form(name: str | None, parameters: Sequence[tuple[str, str]]) -> Form:
    """The template of this name, with its parameters.

    Raises:
        UsageError: it isn't valid, or a parameter is unknown or missing.
    """
    if name is None:
        if parameters:
            raise UsageError("--param gives a template a value, and there is no --template; add one, or leave it out.")
        return Form(None, {})
    template = prompts.load(name)
    values = {name: checked(value, f"--param {name}") for name, value in parameters}
    return Form(template, template.values(values))  # report missing parameters before reading anything
