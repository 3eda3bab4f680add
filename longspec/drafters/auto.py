"""What `--drafter auto` stands for: the one place that says which drafters are used where nobody names one.

    recycle+ngram                      always: it needs no training, and a step takes it 0.3 ms
    recycle+suffix                     in its place, where there are texts to draft from
    ...+clover2                        over it, in bf16 on a CPU, if a head comes with longspec for the model and fits
    model+ngram, then the above        with a draft model: tried first
    the above, then skip+ngram         with 2 GiB of weights or more: smaller models have no layers to spare

Of two the control takes the one that brings more (`longspec.control.goodput`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspec.drafters.spec import Spec, parse
from longspec.heads.format import room, shipped
from longspec.model.load import Model

__all__ = ["auto", "heads_for"]

LARGE = 2 << 30
"""Bytes of weights from which layers may be left out."""


def auto(given: Mapping[str, Any], *, nbytes: int = 0, heads: Sequence[str] = ()) -> list[Spec]:
    """The drafters, the first to be tried first. given: options of drafters. nbytes: of the target's weights.

    heads: kinds of those that may be taken, of which one is. (Beside the same drafter without the head, as a choice of
    its own, it brought 1.63 times plain decoding and not 1.75 on 13 prompts: the two are too much alike.)
    """
    memory = {name: given[name] for name in ("texts", "remember") if given.get(name)}
    text = parse("+".join(("recycle+suffix" if memory else "recycle+ngram", *heads[:1])), memory)
    if given.get("draft") is not None:
        return [parse("model+ngram", {"draft": given["draft"]}), text]
    if nbytes >= LARGE:
        return [text, parse("skip+ngram", {"set": given["set"]} if given.get("set") else {})]
    return [text]


def heads_for(model: Model, tokens: int = 0, spare: int | None = None) -> list[str]:
    """Kinds of the heads that come with longspec for the model, where one was measured to win. spare: bytes that a plan
    leaves for one, with texts of so many tokens in all.

    In int8 a head's draft takes two fifths of the default model's pass, more than it brings
    (docs/benchmarks/drafters_head_int8.json); on a GPU none was measured.
    """
    decoder = model.decoder
    if model.dtype != "bf16" or decoder.device.type != "cpu" or decoder.strict:
        return []
    takes = {kind: room(folder, decoder.config) for kind, folder in shipped(model).items()}
    return [kind for kind, (once, token) in takes.items() if spare is None or once + token * tokens <= spare]
