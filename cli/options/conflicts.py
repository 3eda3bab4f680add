"""Precedence between conflicting options: the flag, then the template, then the settings.

Takes options by name with their sources; removes conflicts. Two conflicting flags are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from longspec.cli.options.typer_classes import given
from longspec.errors import UsageError
from longspec.sampling.parameters import is_greedy, without_idle

__all__ = ["settle_loading", "settle_reporting", "settle_writing"]


def settle_writing(ctx: typer.Context, options: dict[str, Any], template: Mapping[str, Any]) -> None:
    """Resolve the options of an answer; `template` holds the template's options."""
    chosen = {name: value for name, value in template.items() if not given(ctx, name)}
    if given(ctx, "json_schema"):
        chosen.pop("regex", None)
    if "system" in chosen and not given(ctx, "raw"):
        options["raw"] = False
    options.update(chosen)
    if options["raw"] and options["system"] is not None:
        if _yields(ctx, "system", to="raw"):
            options["system"] = None
        elif _yields(ctx, "raw", to="system"):
            options["raw"] = False
        else:
            raise UsageError("--raw sends the prompt without roles, so there is no place for --system; leave one out.")
    for idle in ("effort", "reasoning_budget"):
        if options["raw"] and options.get(idle) is not None:
            if _yields(ctx, idle, to="raw"):
                options[idle] = None
            elif _yields(ctx, "raw", to=idle):
                options["raw"] = False
            else:
                flag = f"--{idle.replace('_', '-')}"
                raise UsageError(f"--raw leaves the chat template out, which {flag} needs; leave one out.")
    if is_greedy(options["temperature"]) and (given(ctx, "temperature") or "temperature" in chosen):
        # Greedy: settings of sampling are dropped, and the template's too where a flag says greedy.
        kept = chosen if "temperature" in chosen else {}
        effective = without_idle(options, keep={*kept, *(name for name in options if given(ctx, name))})
        options.update(dict.fromkeys(options.keys() - effective.keys()))


def settle_loading(ctx: typer.Context, options: dict[str, Any]) -> None:
    """Resolve the options of an engine: a drafter or cache drops the settings that only others use."""
    drafter = options["drafter"]
    for name, user in (("remember", "suffix"), ("draft_from", "suffix"), ("draft_model", "model")):
        if options.get(name) and drafter != "auto" and user not in drafter.split("+"):
            if _yields(ctx, name, to="drafter"):
                options[name] = () if name == "draft_from" else None if name == "draft_model" else False
            elif _yields(ctx, "drafter", to=name):
                options["drafter"] = "auto"
    if options["skip_set"] is not None and drafter != "auto" and "skip" not in drafter.split("+"):
        if not given(ctx, "skip_set"):
            options["skip_set"] = None
        elif _yields(ctx, "drafter", to="skip_set"):
            options["drafter"] = "skip"
        else:
            raise UsageError(f"--skip-set has no effect with --drafter {drafter}; use skip, or leave it out.")
    if options["all_rows"] and options["cache"] not in ("offload", "disk") and _yields(ctx, "all_rows", to="cache"):
        options["all_rows"] = False
    if options["num_speculative_tokens"] is not None and options["drafter"] == "none":
        if not _yields(ctx, "num_speculative_tokens", to="drafter"):
            raise UsageError("--num-speculative-tokens has no effect with --drafter none; leave one out.")
        options["num_speculative_tokens"] = None
    if options["num_speculative_tokens"] is None:  # the engine has its own default
        del options["num_speculative_tokens"]


def settle_reporting(ctx: typer.Context, quiet: bool, **said: bool) -> dict[str, bool]:
    """Resolve --quiet and flags that have more said on stderr."""
    for name in [name for name, wanted in said.items() if wanted and quiet]:
        if _yields(ctx, name, to="quiet"):
            said[name] = False
        elif _yields(ctx, "quiet", to=name):
            quiet = False
        else:
            raise UsageError(f"--quiet keeps stderr empty and --{name} writes there; leave one out.")
    return {"quiet": quiet, **said}


def _yields(ctx: typer.Context, name: str, *, to: str) -> bool:
    """Whether a setting is dropped for the conflicting flag `to`; two conflicting flags are refused."""
    return given(ctx, to) and not given(ctx, name)
