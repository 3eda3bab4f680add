"""A hybrid of the shape of Qwen3.5-0.8B with random weights: passes, drafts of its own head, states and bytes.

    PYTHONPATH=tests python docs/benchmarks/hybrid.py --folder build/hybrid --output docs/benchmarks/hybrid.json

Times are of one thread's own work, which leaves other processes out. A plain pass stands beside the reading of as many
bytes from memory (weights, states, rows), in turns; `of_reading` is the median of the turns' ratios. A draft is one
token by the checkpoint's own head, over its draft vocabulary, with all that the head has to catch up on. `commit` is
making 8 staged rows text, the folding of every eighth time included; `folding` is that alone; `replay` is how much
longer a pass of 8 rows takes, on average over a block of 64, than at its beginning, where no row of the block is read
again.

`behind` is a process of its own under `--memory`, given what the plan says: the cache's bytes against the plan's, and
the most resident pages that the process had (VmHWM, from outside).
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from safetensors.torch import save_file
from streamed import alone
from support.letters import tokenizer_of

from longspec.cache import BLOCK, CACHES
from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.machine.system import processor
from longspec.memory.plan import choice, request_of
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import Model, open_model
from longspec.model.reads import rows_read

ROOM = 1 << 27  # values that are read, of which no cache holds a part worth speaking of
FIRST = 0x10000  # token i is this letter, and i
WRITTEN = 3 * BLOCK  # tokens behind a prompt: then all states are there that a text keeps
SHARE = 8  # rows of a staged pass


def config(layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
        "max_position_embeddings": 65536,
        "mtp_num_hidden_layers": 1,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    }


def shapes(raw: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes by transformers, which has no head: it is a block like the last layer, and four tensors."""
    import transformers

    with torch.device("meta"):
        held = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**raw)).state_dict()
    last, width = f"model.layers.{raw['num_hidden_layers'] - 1}.", raw["hidden_size"]
    for name, tensor in held.items():
        if name != "lm_head.weight":
            yield name, tuple(tensor.shape)
        if name.startswith(last):
            yield f"mtp.layers.0.{name.removeprefix(last)}", tuple(tensor.shape)
    yield "mtp.fc.weight", (width, 2 * width)
    yield from ((f"mtp.{name}.weight", (width,)) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"))


def written(folder: Path, raw: dict[str, Any]) -> Path:
    """The checkpoint, which is made where there is none. Norms but one are stored less 1."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    made = {}
    for name, shape in shapes(raw):
        if name.endswith("A_log"):
            made[name] = torch.empty(shape).uniform_(1, 16).log()
        elif len(shape) == 1:
            made[name] = torch.full(shape, float(name.endswith("linear_attn.norm.weight")), dtype=torch.bfloat16)
        else:
            made[name] = (torch.randn(shape) * shape[-1] ** -0.5).bfloat16()
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", **raw}))
    tokenizer_of([chr(FIRST + i) for i in range(raw["vocab_size"])]).save(str(folder / "tokenizer.json"))
    return folder


def prompt(tokens: int, vocabulary: int) -> str:
    return "".join(chr(FIRST + 257 * i % vocabulary) for i in range(tokens))


def reading(room: torch.Tensor, nbytes: int) -> float:
    """Seconds of reading so many bytes."""
    count, began = nbytes // room.element_size(), process_time()
    while count > 0:
        room[: min(count, len(room))].sum().item()
        count -= len(room)
    return process_time() - began


def run(decoder: Decoder, cache: Any, rows: int) -> tuple[float, Any]:
    """Seconds of a pass of so many rows behind a text, and their stage."""
    stage, began = cache.open(), process_time()
    tokens = [257 * i % decoder.config.vocabulary for i in range(rows)]
    chunk = Chunk(stage, stage.add(range(-1, rows - 1)), tokens, cache.length, False)
    decoder.logits(decoder.forward(Rows.of([chunk], decoder.device)))
    return process_time() - began, stage


def passes(model: Model, turns: int) -> dict[str, Any]:
    """A plain pass beside reading."""
    decoder, room = model.decoder, torch.ones(ROOM)
    made: Any = CACHES["dense"](decoder.shape)
    _, stage = run(decoder, made, BLOCK)
    made.commit(stage, range(BLOCK))
    nbytes = decoder.touched(1) + rows_read(decoder.shape, made.length)
    taken, floors = [], []
    for _ in range(turns):
        seconds, stage = run(decoder, made, 1)
        made.commit(stage, [0])
        taken.append(seconds)
        floors.append(reading(room, nbytes))
    ratios = sorted(own / floor for own, floor in zip(taken[2:], floors[2:], strict=True))
    return {
        "bytes": nbytes,
        "pass_ms": round(1e3 * median(taken[2:]), 2),
        "reading_ms": round(1e3 * median(floors[2:]), 2),
        "of_reading": round(median(ratios), 3),
        "of_reading_from_to": [round(ratios[len(ratios) // 10], 3), round(ratios[-1 - len(ratios) // 10], 3)],
    }


def drafts(model: Model, turns: int, hot: int) -> dict[str, Any]:
    """One token of the head's, beside a plain pass, in turns."""
    found: dict[str, Any] = {}
    for tokens in (0, hot):
        drafter = parse(f"mtp:hot={tokens}" if tokens else "mtp").make(model)
        engine = Engine(model, drafter=drafter, control="fixed", draft_tokens=1)
        size = model.decoder.config.vocabulary
        session = engine.open(prompt(BLOCK, size), raw=True, max_new_tokens=2 * turns, temperature=0)
        for _ in engine.prefill(session):
            pass
        engine.step([session])
        taken, ratios = [], []
        for _ in range(turns):
            began = process_time()
            drafter.propose([session], [1])
            taken.append(process_time() - began)
            seconds, _ = run(model.decoder, session.cache, 1)
            ratios.append(taken[-1] / seconds)
            engine.step([session])
        name = f"of_{tokens or size}_tokens"
        found[name] = {"draft_ms": round(1e3 * median(taken), 2), "of_a_pass": round(median(ratios), 3)}
        found[name]["head_bytes"] = drafter.nbytes
    return found


def states(model: Model, blocks: int) -> dict[str, Any]:
    """What is staged, and what it takes to make it text."""
    decoder, spec = model.decoder, model.decoder.shape.states
    assert spec is not None
    made: Any = CACHES["dense"](decoder.shape)
    by_place: dict[int, list[float]] = {at: [] for at in range(0, BLOCK, SHARE)}
    commits: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(blocks * BLOCK // SHARE):
        place = made.length % BLOCK
        seconds, stage = run(decoder, made, SHARE)
        by_place[place].append(seconds)
        began = process_time()
        made.commit(stage, range(SHARE))
        commits[place + SHARE == BLOCK].append(process_time() - began)
    began = process_time()
    for _ in range(4):
        kept = [[state.clone() for state in made.states.point.states if state is not None] for _ in range(SHARE)]
    copied = (process_time() - began) / 4
    del kept
    each = {place: median(seconds) for place, seconds in by_place.items()}
    mean, plain, full = sum(each.values()) / len(each), median(commits[False]), median(commits[True])
    share = (plain * (BLOCK // SHARE - 1) + full) / (BLOCK // SHARE)
    return {
        "state_bytes": spec.state_bytes,
        "staged_bytes_a_row": spec.row_bytes,
        "pass_of_8_ms": round(1e3 * mean, 2),
        "pass_of_8_ms_by_place": {place: round(1e3 * seconds, 2) for place, seconds in each.items()},
        "commit_of_8_ms": round(1e3 * share, 3),
        "copying_8_states_ms": round(1e3 * copied, 2),
        "folding_ms": round(1e3 * (full - plain), 2),
        "commit_of_a_pass": round(share / mean, 4),
        "folding_of_a_pass": round((full - plain) * SHARE / BLOCK / mean, 4),
        "replay_of_a_pass": round((mean - each[0]) / mean, 4),
    }


def planned(folder: Path, dtype: str, tokens: int) -> Any:
    """What the plan says of so many tokens."""
    return choice(request_of(open_model(str(folder), dtype=dtype), tokens, drafter="none"), "dense", 512).need


@torch.inference_mode()
def behind(given: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """A text of so many tokens under its plan's memory."""
    torch.set_num_threads(1)
    need = planned(given.folder, given.dtype[0], given.context)
    engine = Engine.load(
        str(given.folder), dtype=given.dtype[0], drafter="none", threads=1, memory=need.total, tokens=given.context
    )
    assert engine.plan is not None
    size = engine.model.decoder.config.vocabulary
    session = engine.open(prompt(given.context - WRITTEN, size), raw=True, max_new_tokens=WRITTEN, temperature=0)
    for _ in engine.prefill(session):
        pass
    while session.finish_reason is None:
        engine.step([session])
    made: Any = session.cache
    return {
        "tokens": made.length,
        "memory": need.total,
        "plan": str(engine.plan),
        "planned_cache_bytes": engine.plan.choice.need.cache,
        "cache_bytes": made.nbytes,
        "of_them_states": made.states.nbytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=248_320)
    parser.add_argument("--hot", type=int, default=32_000)
    parser.add_argument("--dtype", action="append", help="int8 and bf16, if left out")
    parser.add_argument("--context", type=int, default=32_000, help="0: without the long text")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.dtype = given.dtype or ["int8", "bf16"]
    torch.set_num_threads(1)
    raw = config(given.layers, given.vocabulary)
    written(given.folder, raw)
    results: dict[str, Any] = {
        "machine": {"processor": processor(), "platform": platform.platform(), "threads": 1},
        "config": raw,
    }
    if given.context:
        found = alone(behind, given, [])
        found["of_plan"] = round(found["cache_bytes"] / found["planned_cache_bytes"], 4)
        found["peak_of_memory"] = round(found["peak_bytes"] / found["memory"], 4)
        results["behind"] = found
        print(json.dumps(found, indent=1), flush=True)
    with torch.inference_mode():
        for dtype in given.dtype:
            model = open_model(str(given.folder), dtype=dtype).load()
            own = {"weights_bytes": model.decoder.nbytes, "kernels": model.decoder.slow or "used"}
            own |= {"plain": passes(model, given.turns), "states": states(model, given.blocks)}
            own |= {"drafts": drafts(model, given.turns, given.hot)}
            results[dtype] = own
            print(dtype, json.dumps(own, indent=1), flush=True)
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
