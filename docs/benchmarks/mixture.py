"""Draft lengths on a mixture of experts: always so many tokens against what `--control goodput` chooses, by acceptance.

    python docs/benchmarks/mixture.py --output docs/benchmarks/mixture.json
    python docs/benchmarks/mixture.py --model build/mixture.gguf --output docs/benchmarks/mixture_coded.json

The mixture has random weights in bf16: by default 4 layers of 64 experts, 4 to a row, 400 million parameters (800 MB);
or it is a file's, such as `random_weights.py` writes. A drafter that knows the answer drafts chains whose next token is
right with the probability that is asked for. All ways write the same text, in turns, in one process; a rate is the
median of the rounds, by the process's own time, which leaves other processes out. `union` is how many experts passes of
so many rows of that text go through, beside rows that choose at random; `bytes` is what they read, and
`seconds_of_one_row` what they take, both over those of one row. `of_reading` is a pass's time over that of reading as
many bytes from memory, in the same turn by the same thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import string
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from longspec.cache import CACHES
from longspec.control.goodput import Goodput
from longspec.control.policy import Control, Fixed
from longspec.engine.engine import Engine
from longspec.machine.system import processor
from longspec.model.config import Config
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import Model, load_model
from longspec.model.reads import Growth
from longspec.model.weights.read import Weights
from longspec.text.tokenizer import Vocabulary
from longspec.types import Draft, Drafter, Writing

RATES = (0.0, 0.3, 0.6, 0.9)
LENGTHS = (0, 1, 2, 4, 8, 15)
ROWS = (1, 2, 4, 8, 16)
PROMPT = 64
ROOM = 1 << 27  # values that are read, of which no cache holds a part worth speaking of


def config(experts: int, chosen: int, layers: int, width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "vocab_size": 4096,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 256),
        "head_dim": 64,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def tensors(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights, called as Qwen3's mixtures call them."""
    generator, width = torch.Generator().manual_seed(0), raw["hidden_size"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    heads, keys = (raw[f"num_{name}_heads"] * raw["head_dim"] for name in ("attention", "key_value"))
    made = {"model.embed_tokens.weight": matrix(raw["vocab_size"], width), "model.norm.weight": torch.ones(width)}
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        made |= {f"{at}.{name}_layernorm.weight": torch.ones(width) for name in ("input", "post_attention")}
        made |= {f"{at}.self_attn.{name}_norm.weight": torch.ones(raw["head_dim"]) for name in "qk"}
        sizes = {"q": heads, "k": keys, "v": keys}
        made |= {f"{at}.self_attn.{name}_proj.weight": matrix(size, width) for name, size in sizes.items()}
        made |= {
            f"{at}.self_attn.o_proj.weight": matrix(width, heads),
            f"{at}.mlp.gate.weight": matrix(raw["num_experts"], width),
        }
        for expert in range(raw["num_experts"]):
            own, channels = f"{at}.mlp.experts.{expert}", raw["moe_intermediate_size"]
            made |= {f"{own}.{name}_proj.weight": matrix(channels, width) for name in ("gate", "up")}
            made |= {f"{own}.down_proj.weight": matrix(width, channels)}
    return made


def model_of(raw: dict[str, Any]) -> Model:
    weights = Weights.of_tensors(tensors(raw), torch.bfloat16)
    decoder = Decoder(Config.read(raw), weights, torch.device("cpu"))
    tokenizer = Tokenizer(BPE({chr(0x10000 + i): i for i in range(raw["vocab_size"])}, []))
    tokenizer.decoder = decoders.Fuse()
    return Model("mixture", "bf16", decoder, Vocabulary(tokenizer, {}, None), (), {}, {})


class Foretold(Drafter):
    """Knows the answer: each token of its chains is right with the same probability, if the one before it was."""

    def __init__(self, text: Sequence[int], rate: float, vocabulary: int) -> None:
        self.text, self.rate, self.vocabulary, self.chance = text, rate, vocabulary, random.Random(7)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return [self._chain(session, limit) for session, limit in zip(sessions, limits, strict=True)]

    def _chain(self, session: Writing, limit: int) -> Draft:
        rest = [*self.text[len(session.tokens) :][:limit]]
        right = 0
        while right < len(rest) and self.chance.random() < self.rate:
            right += 1
        wrong = [(token + self.chance.randrange(1, self.vocabulary)) % self.vocabulary for token in rest[right:]]
        return Draft.chain([*rest[:right], *wrong])


def reading(room: torch.Tensor, at: int, nbytes: float) -> float:
    """Seconds of reading so many bytes of the room, from about the value `at` on."""
    count, began = int(nbytes) // room.element_size(), process_time()
    first = at % (len(room) - count)
    room[first : first + count].sum().item()
    return process_time() - began


def passes(model: Model, text: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Passes of so many rows that follow each other in a text."""
    decoder, growth, found = model.decoder, Growth(model.decoder), []
    cache: Any = CACHES["dense"](decoder.shape)
    room = torch.ones(ROOM)
    for rows in ROWS:
        seconds, read, floors = [], [], []
        for repeat in range(repeats):
            at = (repeat * 37) % (len(text) - rows)
            stage = cache.open()
            chunk = Chunk(stage, stage.add(range(-1, rows - 1)), text[at : at + rows], 0, False)
            began = process_time()
            decoder.logits(decoder.forward(Rows.of([chunk], decoder.device)))
            seconds.append(process_time() - began)
            read.append((growth.observe(), sum(own.union for own in growth.layers) / len(growth.layers)))
            floors.append(seconds[-1] / reading(room, repeat * ROOM // 7, read[-1][0] * decoder.pass_nbytes))
        union = median(each for _, each in read)
        assert decoder.config.mixture is not None
        found.append(
            {
                "rows": rows,
                "seconds": median(seconds),
                "bytes": round(median(each for each, _ in read), 3),
                "union": round(union, 2),
                "union_at_random": round(decoder.config.mixture.union(rows), 2),
                "of_reading": round(median(floors), 3),
            }
        )
    for each in found:
        each["seconds_of_one_row"] = round(each["seconds"] / found[0]["seconds"], 3)
        each["seconds_over_bytes"] = round(each["seconds"] / found[0]["seconds"] / each["bytes"], 3)
    return found


def rates(model: Model, prompt: str, given: dict[str, Any], rate: float, rounds: int) -> dict[str, Any]:
    """Tokens per second of each way to choose lengths."""
    plain = Engine(model, drafter="none")
    text = [*plain.open(prompt, **given).tokens, *plain.generate(prompt, **given).tokens]
    size = model.decoder.config.vocabulary
    ways: dict[str, tuple[Control, int]] = {str(length): (Fixed("foretold"), length) for length in LENGTHS if length}
    ways["goodput"] = (Goodput(["foretold"], max(LENGTHS)), max(LENGTHS))
    engines = {"0": plain}
    for name, (control, most) in ways.items():
        engines[name] = Engine(model, drafter=Foretold(text, rate, size), control=control, draft_tokens=most)
    seen: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            session = engine.open(prompt, **given)
            for _ in engine.prefill(session):
                pass
            began = process_time()
            while session.finish_reason is None:
                engine.step([session])
            seconds = process_time() - began
            assert session.tokens == text, f"{name} wrote another text"
            if turn:
                seen[name].append(len(session.answer) / seconds)
    found = {name: round(median(each), 2) for name, each in seen.items()}
    best = max((name for name in found if name != "goodput"), key=lambda name: found[name])

    def over(name: str) -> float:  # in the median of the rounds
        return round(median(ours / theirs for ours, theirs in zip(seen["goodput"], seen[name], strict=True)), 3)

    return {
        "acceptance": rate,
        "tokens_per_second": found,
        "best": best,
        "goodput_over_best": over(best),
        "goodput_over_plain": over("0"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a mixture's file, in place of one that is made")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    raw = config(asked.experts, asked.chosen, asked.layers, asked.width)
    with torch.inference_mode():
        model = model_of(raw) if asked.model is None else load_model(asked.model)
        chance = random.Random(1)
        letters = string.ascii_letters if asked.model else [chr(0x10000 + i) for i in range(raw["vocab_size"])]
        prompt = "".join(chance.choice(letters) for _ in range(PROMPT))
        given = {"raw": True, "max_new_tokens": asked.tokens, "temperature": 1.0, "seed": 1}
        text = Engine(model, drafter="none").generate(prompt, **given).tokens
        results = {
            "machine": {"processor": processor(), "platform": platform.platform(), "threads": torch.get_num_threads()},
            "config": raw if asked.model is None else Path(asked.model).name,
            "weights_bytes": model.decoder.nbytes,
            "bytes_of_one_row": model.decoder.pass_nbytes,
            "kernels": model.decoder.slow or "used",
            "passes": passes(model, text, 15),
            "drafts": [rates(model, prompt, given, rate, asked.rounds) for rate in RATES],
        }
    said = json.dumps(results, indent=1)
    print(said)
    if asked.output is not None:
        asked.output.write_text(said + "\n")


if __name__ == "__main__":
    main()
