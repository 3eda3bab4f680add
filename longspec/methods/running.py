"""What a run stands on: caches, memory, training, and the surveys themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longspec.methods.method import Method

__all__ = ["RUNNING"]

_CACHES = (
    Method("plain keys and values", "", "--cache dense", "every row in the model's dtype"),
    Method("KIVI, 8 bits", "2402.02750", "--cache int8", "keys by channel, values by token, newest rows as they are"),
    Method("KIVI, 4 bits", "2402.02750", "--cache int4", "the same"),
    Method("KIVI, 2 bits", "2402.02750", "--cache int2", "the same"),
    Method("QuantSpec's planes", "2502.10424", "--cache dual", "two planes of 4 bits"),
    Method("SpeCache", "2503.16163", "--cache offload", "2-bit codes, 64 exact rows a key head, fetched ahead"),
    Method("SpeCache, on disk", "2503.16163", "--cache disk", "the same one level down"),
    Method("ShadowKV", "2410.21465", "", "low-rank keys lose more than codes do behind short texts"),
    Method(
        "grouped linear attention",
        "2406.07368",
        "longspec run",
        "a target with it is drafted for like others, by trees too; making one of a Llama isn't here",
    ),
)

_MEMORY = (
    Method(
        "SpecMemo", "2506.01986", "--memory SIZE", "tree, drafters, texts side by side, then cache, by expected goodput"
    ),
    Method("ReCoVer", "2605.11215", "longspec train --workers N", "numbered micro-batches, added in their order"),
)

_SURVEYS = (
    Method("Beyond the Speculative Game", "2404.14897", "longspec doctor", "this table"),
    Method(
        "Closer Look at Efficient Inference Methods", "2411.13157", "longspec doctor", "this table, its last column"
    ),
    Method(
        "Unlocking Efficiency, with Spec-Bench",
        "2401.07851",
        "longspec bench drafters --official",
        "its six tasks and formulas",
    ),
    Method("Speculative Decoding and Beyond", "2502.19732", "longspec doctor", "this table"),
)

RUNNING: Mapping[str, Sequence[Method]] = {
    "Caches": _CACHES,
    "Memory and training": _MEMORY,
    "Surveys": _SURVEYS,
}
