"""Whether codes and long texts cost accuracy: perplexity, greedy tokens, and logits far into a text.

    python docs/benchmarks/accuracy.py perplexity smollm2 FILE.gguf --output docs/benchmarks/accuracy.json
    python docs/benchmarks/accuracy.py quantizers smollm2 --output docs/benchmarks/accuracy.json
    python docs/benchmarks/accuracy.py tokens FILE.gguf --output docs/benchmarks/accuracy.json
    python docs/benchmarks/accuracy.py logits FILE.gguf --output docs/benchmarks/accuracy.json

    perplexity  of this repository's pages, by each dtype, over that of fp32 (the file's own values)
    quantizers  perplexity of the layers' matrices quantized by us and by the gguf package, computed in fp32
    tokens      written greedily in fp32, against transformers on the same file: how many answers agree, and how far
    logits      in fp32 at some positions of one text, against transformers

Results are added to those in the output file. Nothing here is a timing. --layerwise has the values of one layer in
memory at a time, ours and transformers' (`layerwise.py`), for models that don't fit in fp32: transformers then reads
our answers and says what it would have written behind each token, which is the same where all are equal.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import layerwise
import torch
from torch import Tensor

from longspec.cache import Dense
from longspec.engine.engine import Engine
from longspec.machine.files import replaced
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import Model, Opened, end_tokens, open_model
from longspec.model.weights.quantized import Piece
from longspec.model.weights.read import Weights
from longspec.text.prompt import encode

PAGES = Path(__file__).resolve().parents[1]
SUITE = Path(__file__).with_name("prompts.jsonl")
CHUNK = 500  # tokens of a pass
Say = Callable[[dict[str, Any]], None]


def loaded(name: str, dtype: str, *, by_layer: bool = False) -> Model:
    opened: Opened = open_model(name, dtype=dtype, device="cpu")
    opened.set_threads()
    if by_layer and dtype == "fp32":
        decoder, ends = layerwise.decoder(opened), end_tokens(opened.config, {}, opened.vocabulary)
        return Model(name, "fp32", decoder, opened.vocabulary, ends, {}, {})
    return opened.load()


def text(count: int, model: Model) -> list[int]:
    """The first tokens of this repository's pages, design.md first."""
    pages = [PAGES / "design.md", *sorted(path for path in PAGES.rglob("*.md") if path.name != "design.md")]
    tokens: list[int] = []
    for page in pages:
        tokens += model.vocabulary.encode(page.read_text(encoding="utf-8"), add_special=False)
        if len(tokens) >= count:
            return tokens[:count]
    raise SystemExit(f"The pages have {len(tokens):,} tokens, fewer than {count:,}.")


@torch.inference_mode()
def passes(decoder: Decoder, tokens: Sequence[int]) -> Iterator[Tensor]:
    """The logits of the tokens, a chunk's [n, V] at a time."""
    cache = Dense(decoder.shape)
    for start in range(0, len(tokens), CHUNK):
        chunk, stage = tokens[start : start + CHUNK], cache.open()
        rows = Rows.of([Chunk(stage, stage.add(range(-1, len(chunk) - 1)), chunk, start, False)], decoder.device)
        yield decoder.logits(decoder.forward(rows)).float()
        cache.commit(stage, range(len(chunk)))


def perplexity_of(model: Model, count: int) -> float:
    tokens, total, start = text(count, model), 0.0, 1
    for logits in passes(model.decoder, tokens):
        following = torch.tensor(tokens[start : start + len(logits)])
        chosen = logits[: len(following)].log_softmax(-1).gather(1, following[:, None])
        total, start = total - float(chosen.double().sum()), start + len(logits)
    return math.exp(total / (count - 1))


def perplexity(name: str, dtypes: Sequence[str], count: int, say: Say, *, by_layer: bool) -> None:
    whole = 0.0
    for dtype in ("fp32", *dtypes):
        model = loaded(name, dtype, by_layer=by_layer)
        seen = perplexity_of(model, count)
        whole = whole or seen
        row = {"perplexity": round(seen, 4), "over_fp32": round(seen / whole - 1, 5), "tokens": count}
        say({"what": "perplexity", "dtype": model.dtype, "formats": model.decoder.formats, **row})


def quantizers(name: str, count: int, say: Say) -> None:
    opened = open_model(name, dtype="fp32", device="cpu")
    weights = opened.checkpoint.weights(torch.float32)
    whole = 0.0
    for kind, by in (("", ""), ("Q8_0", "longspec"), ("Q4_0", "longspec"), ("Q4_0", "gguf")):
        tensors = {each: weights[each] for each in weights}
        for each in (each for each in tensors if kind and each.endswith("_proj.weight")):
            if by == "gguf":
                blocks = gguf.quantize(tensors[each].numpy(), gguf.GGMLQuantizationType[kind])
                tensors[each] = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
            else:
                tensors[each] = Piece.of_values(tensors[each], kind).values()
        decoder = Decoder(opened.config, Weights.of_tensors(tensors, torch.float32), opened.device)
        model = Model(name, "fp32", decoder, opened.vocabulary, (), {}, {})
        seen = perplexity_of(model, count)
        whole = whole or seen
        row = {"perplexity": round(seen, 4), "over_fp32": round(seen / whole - 1, 5), "tokens": count}
        say({"what": f"perplexity, quantized by {by}" if by else "perplexity", "dtype": kind or "fp32", **row})


def theirs(name: str) -> Any:
    """The same file in transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    path = open_model(name).checkpoint.gguf
    assert path is not None, f"{name} is no GGUF file"
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def tokens(name: str, count: int, new: int, say: Say, *, by_layer: bool) -> None:
    model = loaded(name, "fp32", by_layer=by_layer)
    turns = [json.loads(line)["turns"][0] for line in SUITE.read_text(encoding="utf-8").splitlines()][:count]
    asked = [encode(model.vocabulary, turn) for turn in turns]
    engine = Engine(model, drafter="none")
    options: Any = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": new}
    answers: dict[int, Any] = dict(engine.generate_many(turns, width=count, **options))
    written = [[*answers[i].tokens] for i in range(count)]
    ends = list(model.end_tokens)
    del engine, model
    same = []
    for ours, answer in zip(written, _answers(name, asked, written, new, ends, by_layer=by_layer), strict=True):
        agreed = next((i for i, pair in enumerate(zip(ours, answer, strict=False)) if pair[0] != pair[1]), len(ours))
        same.append({"tokens": len(ours), "agreed": agreed})
    equal = sum(each["agreed"] == each["tokens"] for each in same)
    say({"what": "greedy tokens in fp32, against transformers", "prompts": count, "equal": equal, "answers": same})


def _answers(
    name: str, asked: list[list[int]], written: list[list[int]], new: int, ends: list[int], *, by_layer: bool
) -> Iterator[list[int]]:
    """What transformers writes; of a model by layers, what it would write behind each of our tokens."""
    if by_layer:
        path = open_model(name).checkpoint.gguf
        assert path is not None, f"{name} is no GGUF file"
        texts = [[*prompt, *ours[:-1]] for prompt, ours in zip(asked, written, strict=True)]
        chosen = layerwise.choices(path, texts)
        yield from (each[len(prompt) - 1 :] for each, prompt in zip(chosen, asked, strict=True))
        return
    other = theirs(name)
    options = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": ends, "pad_token_id": ends[0]}
    for prompt in asked:
        with torch.inference_mode():
            made = other.generate(torch.tensor([prompt]), max_new_tokens=new, **options)
        yield made[0, len(prompt) :].tolist()


@torch.inference_mode()
def logits(name: str, places: Sequence[int], say: Say) -> None:
    from transformers import DynamicCache

    model = loaded(name, "fp32")
    read, at, wanted = text(max(places) + 1, model), 0, {}
    for made in passes(model.decoder, read):
        wanted |= {place: made[place - at].clone() for place in places if at <= place < at + len(made)}
        at += len(made)
        print(at, flush=True)
    del model
    other, cache = theirs(name), DynamicCache()
    for at in range(0, len(read), CHUNK):
        chunk = torch.tensor([read[at : at + CHUNK]])
        made = other(chunk, past_key_values=cache, use_cache=True).logits[0].float()
        for place in (place for place in places if at <= place < at + len(made)):
            ours, oracle = wanted[place], made[place - at]
            row = {"position": place, "largest_difference": round(float((ours - oracle).abs().max()), 6)}
            row |= {
                "largest_logit": round(float(oracle.abs().max()), 3),
                "first": bool(ours.argmax() == oracle.argmax()),
            }
            say({"what": "logits in fp32, against transformers", **row})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("perplexity", "quantizers", "tokens", "logits"))
    parser.add_argument("model", nargs="+")
    parser.add_argument("--dtype", nargs="+", default=["auto"], help="of perplexity, beside fp32")
    parser.add_argument("--count", type=int, default=3000, help="tokens that perplexity is of")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--position", nargs="+", type=int, default=[8000, 16000, 30000])
    parser.add_argument("--layerwise", action="store_true", help="one layer's values in memory at a time")
    parser.add_argument("--output", required=True, type=Path)
    given = parser.parse_args()

    for name in given.model:

        def say(row: dict[str, Any], model: str = Path(name).name) -> None:
            added = {"model": model, **row}
            print(json.dumps(added), flush=True)
            kept = json.loads(given.output.read_text(encoding="utf-8"))["results"] if given.output.exists() else []
            key = ("model", "what", "dtype", "position")
            kept = [one for one in kept if any(one.get(part) != added.get(part) for part in key)]
            report = {"torch": torch.__version__, "results": [*kept, added]}
            replaced(given.output, lambda path: path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))

        if given.what == "perplexity":
            perplexity(name, given.dtype, given.count, say, by_layer=given.layerwise)
        elif given.what == "quantizers":
            quantizers(name, given.count, say)
        elif given.what == "tokens":
            tokens(name, given.prompts, given.new_tokens, say, by_layer=given.layerwise)
        else:
            logits(name, given.position, say)


if __name__ == "__main__":
    main()
