"""The options of an answer: its system message, sampling, reasoning, and constraints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import typer

from longspec.cli.io.prompt_input import checked
from longspec.cli.options.conflicts import settle_writing
from longspec.cli.options.groups import group, option, values
from longspec.cli.options.parsers import number, whole
from longspec.errors import UsageError
from longspec.sampling.parameters import PARAMETERS
from longspec.text.reasoning_effort import EFFORTS
from longspec.text.reasoning_effort import checked as checked_effort

if TYPE_CHECKING:
    from longspec.engine.options import Options

__all__ = ["Constraints", "Framing", "Reasoning", "SamplingOptions", "text_options"]


@group("Prompt")
class Framing:
    """The system message and the chat template."""

    system: str | None = option(None, "The system message before the prompt.", short="-s", metavar="TEXT")
    raw: bool = option(False, "Let the model go on from the prompt as it is, without the chat template.")
    allow_special_tokens: bool = option(
        False,
        "Let the names of special tokens in messages be special tokens, so that a text can end a turn and begin "
        "another. Else they are plain text.",
        once=True,
    )


def _sampling(name: str, what: str) -> Any:
    bounds = PARAMETERS[name]
    return option(None, what, metavar="N" if bounds.kind is int else "X", parser=number(bounds))


@group("Sampling")
class SamplingOptions:
    """The parameters of `longspec.sampling.parameters.Sampling`, and the end conditions of an answer."""

    max_new_tokens: int | None = option(
        None,
        "End after N tokens; else at the end of the text, or of the model's context.",
        short="--max-tokens",
        metavar="N",
        parser=whole(1),
    )
    temperature: float | None = option(
        None,
        "0 takes the likeliest token, 1 samples as the model is, 2 is the most. The model's own defaults hold for "
        "all of these where it has them; else it is 0.",
        short="--temp",
        metavar="X",
        parser=number(PARAMETERS["temperature"]),
    )
    top_p: float | None = _sampling("top_p", "Sample from the likeliest tokens that hold this probability together.")
    top_k: int | None = _sampling("top_k", "Sample from the N likeliest tokens; 0 is all of them.")
    min_p: float | None = _sampling("min_p", "Sample from tokens at least X times as likely as the likeliest.")
    repetition_penalty: float | None = _sampling(
        "repetition_penalty", "Above 1, make tokens that the text already has less likely."
    )
    frequency_penalty: float | None = _sampling(
        "frequency_penalty", "Above 0, make a token less likely the more often the answer has it; -2 to 2."
    )
    presence_penalty: float | None = _sampling(
        "presence_penalty", "Above 0, make tokens that the answer already has less likely; -2 to 2."
    )
    seed: int | None = _sampling("seed", "The same seed gives the same sampled text; 0 if left out.")
    stop: list[str] | None = option(None, "End the answer right before this text; may be repeated.", metavar="TEXT")


def _effort(text: object) -> str:
    try:
        return checked_effort(str(text))
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


@group("Reasoning")
class Reasoning:
    """The treatment of an answer's reasoning, and of an answer that repeats itself."""

    hide_reasoning: bool = option(False, "Print what the model says, and not what it thinks before.")
    reasoning_budget: int | None = option(
        None,
        "After N tokens of reasoning the section is closed, and the answer follows. 0 leaves none.",
        metavar="N",
        parser=whole(0),
    )
    effort: str | None = option(
        None,
        f"How much to think, where the model's chat template knows of it: {', '.join(EFFORTS)}.",
        metavar="LEVEL",
        parser=_effort,
        autocompletion=lambda incomplete: [name for name in EFFORTS if name.startswith(incomplete)],
    )
    stop_loops: bool = option(False, "End a text that only repeats itself.")


@group("Output")
class Constraints:
    """The grammar that constrains the answer."""

    json_schema: str | None = option(
        None,
        "Hold the answer to a JSON schema: a file of it, or the schema itself.",
        metavar="FILE|JSON",
        once=True,
    )
    regex: str | None = option(None, "Hold the whole answer to a regular expression.", metavar="PATTERN", once=True)

    def checked(self) -> dict[str, Any]:
        """The options of the constraint, read and checked before a model is loaded."""
        if self.json_schema is None and self.regex is None:
            return {}
        from longspec.constraints.grammar import grammar_of, schema_text

        schema = None if self.json_schema is None else schema_text(self.json_schema)
        grammar_of(schema, self.regex)
        return {"json_schema": schema, "regex": self.regex}


def text_options(
    ctx: typer.Context,
    framing: Framing,
    sampling: SamplingOptions,
    reasoning: Reasoning,
    more: Mapping[str, Any] = {},
    template: Mapping[str, Any] = {},
) -> Options:
    """The options of `Engine.open`, with conflicts resolved.

    more: further options; template: options of the prompt's template, over which flags take precedence.
    """
    options = {**values(framing), **values(sampling), **values(reasoning), **more}
    del options["hide_reasoning"]
    options["system"] = checked(framing.system, "--system") if framing.system else None
    options["stop"] = [checked(text, "--stop") for text in sampling.stop or ()]
    settle_writing(ctx, options, template)
    return cast("Options", options)
