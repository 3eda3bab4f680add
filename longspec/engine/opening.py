"""What opening a text takes of a model's vocabulary and limits: tokens, sampling, grammar.

Takes a prompt and options; gives a `Prepared`. It holds no lock and knows no cache and no drafter, so that a long
prompt or a large grammar is read in one thread while another runs passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

from longspec.engine.options import Options, asked, check_options, check_tokens, guidance, most_tokens, tokens_of
from longspec.model.load import Model
from longspec.sampling.sampler import Sampling
from longspec.text.detokenizer import Transcript
from longspec.text.prompt import Prompt

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt and its options, checked and read: all that `Engine.begin` needs for one session."""

    tokens: list[int]
    options: Options
    sampling: Sampling
    limit: int  # prompt and answer together, in tokens
    transcript: Transcript
    end_tokens: list[int]
    guidance: dict[str, Any]  # the session's constraint, reasoning section and loop detector
    began: float  # on `perf_counter`'s clock


def prepare(model: Model, prompt: Prompt, options: Options, planned: int | None) -> Prepared:
    """Read a prompt. planned: the tokens of the memory plan, if there is one. The errors are those of `Engine.open`."""
    began = perf_counter()
    check_options(options)
    options = cast("Options", {name: value for name, value in options.items() if value is not None})
    config = model.decoder.config
    room = config.context if planned is None else min(planned, config.context)
    tokens = tokens_of(model.vocabulary, prompt, options, room)
    check_tokens(tokens, config.vocabulary)
    sampling = Sampling.over(model.defaults, asked(options))
    limit = most_tokens(len(tokens), options.get("max_new_tokens"), config.context, planned)
    stops = [stop] if isinstance(stop := options.get("stop", ()), str) else list(stop)
    transcript = Transcript(model.vocabulary, stops)
    ends = [*model.end_tokens, *model.vocabulary.special_ids(stops)]
    return Prepared(tokens, options, sampling, limit, transcript, ends, guidance(model, tokens, options), began)
