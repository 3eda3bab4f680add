"""The drafters of `--drafter auto`, the default.

    recycle+ngram                      always: it needs no training
    recycle+suffix                     instead, if there are texts to draft from
    ...+clover2                        merged with it, in bf16 on a CPU, if a head for the model ships and fits
    model+ngram, then the above        with a draft model: tried first
    mtp, then the above                without one, where the checkpoint has an MTP head
    the first, then skip+ngram         without either, with 2 GiB of weights or more: smaller ones have none to spare

If there are two, the control (`longspec.control.goodput`) uses the one with more tokens per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspec.drafters.spec import Spec, parse
from longspec.heads.format import room, shipped
from longspec.model.load import Model

__all__ = ["auto", "heads_for"]

LARGE = 2 << 30
"""Least bytes of target weights for which `auto` includes layer skipping."""


def auto(given: Mapping[str, Any], *, nbytes: int = 0, heads: Sequence[str] = (), mtp: bool = False) -> list[Spec]:
    """The drafters in the order in which they are tried.

    given: drafter options. nbytes: bytes of the target's weights. heads: kinds of the available heads; the first is
    merged into the text drafter. It isn't offered as a second choice beside that drafter: the two are too much alike,
    and offering both was slower. mtp: the checkpoint has an MTP head.
    """
    memory = {name: given[name] for name in ("texts", "remember") if given.get(name)}
    text = parse("+".join(("recycle+suffix" if memory else "recycle+ngram", *heads[:1])), memory)
    if given.get("draft") is not None:
        return [parse("model+ngram", {"draft": given["draft"]}), text]
    if mtp:
        return [parse("mtp"), text]
    if nbytes >= LARGE:
        return [text, parse("skip+ngram", {"set": given["set"]} if given.get("set") else {})]
    return [text]


def heads_for(model: Model, tokens: int = 0, spare: int | None = None) -> list[str]:
    """Kinds of the heads that ship with longspec for the model and that pay off: in bf16 on a CPU only.

    spare: bytes that the memory plan leaves for a head; None is no limit. tokens: of all sequences, for the head's
    KV cache. In int8 recycle+ngram was slower with the default model's head than without it: 1.07 against 1.13 times
    plain decoding (docs/benchmarks/drafters_head_int8.json). On a GPU no head was measured.
    """
    decoder = model.decoder
    if model.dtype != "bf16" or decoder.device.type != "cpu" or decoder.strict:
        return []
    takes = {kind: room(folder, decoder.config) for kind, folder in shipped(model).items()}
    return [kind for kind, (once, token) in takes.items() if spare is None or once + token * tokens <= spare]
