"""Passes on a GPU: a Llama-3-8B-shaped model with random weights against transformers and the memory's bandwidth.

    python docs/benchmarks/gpu.py --output docs/benchmarks/gpu.json
    python docs/benchmarks/gpu.py --shape tiny --device cpu --contexts 64 --new-tokens 8        # only tries itself

In turns, in one run: plain decoding by longspec and by transformers' `generate`, tokens per second behind the first.
`of_copy` is the weights' and the cache's bytes that a token needs, over the seconds that it took, as a fraction of what
a copy on the device moves. Then the seconds of one pass by rows (`--rows`, behind 2,048 tokens; recorded, and operator
by operator), and of one row by cache and context, whose rows are random. With `--model` at last the real one's answers
by each drafter, which must be the plain ones under --strict.

No hardware has run this yet. It ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor

from longspec.cache import CACHES
from longspec.engine.engine import Engine
from longspec.model.config import Config
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.load import Model
from longspec.model.weights.read import Weights
from longspec.text.tokenizer import Vocabulary

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 140_000,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096,
    },
}  # fmt: skip
CONTEXT = 2048
PROMPTS = ["What is 17 times 23, step by step?", "Write a short story about a lighthouse.", "List ten uses of a brick."]


def models(shape: str, device: torch.device) -> tuple[Model, Any]:
    """The same random weights in longspec and in transformers; each token is a character."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    weights = Weights.of_tensors(theirs.state_dict(), torch.bfloat16)
    decoder = Decoder(Config.read(config.to_dict()), weights, device)
    names = {chr(0x10000 + i): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(BPE(names, []))
    tokenizer.decoder = decoders.Fuse()
    return Model(shape, "bf16", decoder, Vocabulary(tokenizer, {}, None), (), {}, {}), theirs


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median over repeats, each waited for."""
    found = []
    for _ in range(repeats + 3):
        wait(device)
        began = perf_counter()
        work()
        wait(device)
        found.append(perf_counter() - began)
    return median(found[3:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.empty((2 << 30) if device.type == "cuda" else (64 << 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 9)


def plain(model: Model, theirs: Any, context: int, new: int, rounds: int, copied: float) -> dict[str, Any]:
    """Tokens per second of both, in turns."""
    device, size = model.decoder.device, model.decoder.config.vocabulary
    tokens = torch.randint(3, size, (context,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = "".join(chr(0x10000 + token) for token in tokens)
    engine, given = Engine(model, drafter="none"), torch.tensor([tokens], device=device)

    def ours(count: int) -> None:
        engine.generate(prompt, raw=True, max_new_tokens=count)

    def generate(count: int) -> None:
        theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip

    rates: dict[str, list[float]] = {"longspec": [], "transformers": []}
    for turn in range(rounds + 1):  # the first records passes and compiles kernels
        for name, write in (("longspec", ours), ("transformers", generate))[:: 1 if turn % 2 else -1]:
            took = []
            for count in (1, 1 + new):
                wait(device)
                began = perf_counter()
                with torch.inference_mode():
                    write(count)
                wait(device)
                took.append(perf_counter() - began)
            if turn:
                rates[name].append(new / (took[1] - took[0]))
    ratios = [a / b for a, b in zip(rates["longspec"], rates["transformers"], strict=True)]
    nbytes = model.decoder.pass_nbytes + (context + new / 2) * model.decoder.shape.row_bytes
    rate = median(rates["longspec"])
    return {
        "context": context,
        "tokens_per_second": {name: round(median(found), 2) for name, found in rates.items()},
        "spread": {name: [round(min(found), 2), round(max(found), 2)] for name, found in rates.items()},
        "ratio": round(median(ratios), 3),
        "of_copy": round(nbytes * rate / copied, 3),
    }


def filled(model: Model, kind: str, length: int) -> Any:
    """A cache of so many random rows."""
    cache = CACHES[kind](model.decoder.shape)

    def take(name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            return (torch.rand(size, device=model.decoder.device) * 0.1).to(dtype)
        return torch.randint(0, 100, size, dtype=dtype, device=model.decoder.device)

    cache.load_state(length, take)
    return cache


def passed(model: Model, cache: Any, rows: int) -> Callable[[], None]:
    """A pass of so many rows behind the cache, up to the choice."""
    decoder = model.decoder

    @torch.inference_mode()
    def run() -> None:
        stage = cache.open()
        chunk = Chunk(stage, stage.add(range(-1, rows - 1)), [5] * rows, cache.length, False)
        hidden = decoder.forward(Rows.of([chunk], decoder.device))
        decoder.logits(hidden).argmax(-1).tolist()

    return run


def by_rows(model: Model, rows: Sequence[int], context: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a pass: recorded, and operator by operator."""
    decoder, cache, found = model.decoder, filled(model, "dense", context), []
    graphs = decoder._graphs
    for count in rows:
        took = {}
        for name, held in (("recorded", graphs), ("eager", None)):
            decoder._graphs = held
            took[name] = seconds_of(passed(model, cache, count), decoder.device, repeats)
        decoder._graphs = graphs
        found.append({"rows": count, "context": context, **{f"{name}_s": each for name, each in took.items()}})
        print(json.dumps(found[-1]))
    return found


def by_cache(model: Model, caches: Sequence[str], contexts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    found = []
    for context in contexts:
        for kind in caches:
            cache = filled(model, kind, context)
            took = seconds_of(passed(model, cache, 1), model.decoder.device, repeats)
            found.append({"cache": kind, "context": context, "nbytes": cache.nbytes, "step_s": took})
            print(json.dumps(found[-1]))
            del cache
    return found


def real(name: str, device: str, new: int) -> list[dict[str, Any]]:
    """The real model's answers by each drafter, strict and not: whether they are the plain ones, and how fast."""
    found = []
    for strict in (True, False):
        answers: dict[str, list[tuple[int, ...]]] = {}
        for drafter in ("none", "ngram", "suffix", "recycle"):
            engine = Engine.load(name, device=device, dtype="bf16", drafter=drafter, strict=strict)
            made = [engine.generate(prompt, max_new_tokens=new) for prompt in PROMPTS]
            answers[drafter] = [answer.tokens for answer in made]
            same = sum(a == b for a, b in zip(answers[drafter], answers["none"], strict=True))
            rate = median(answer.timing["tokens_per_second"] for answer in made)
            found.append({"drafter": drafter, "strict": strict, "same": f"{same} of {len(PROMPTS)}", "rate": rate})
            print(json.dumps(found[-1]))
            if strict and same < len(PROMPTS):
                raise SystemExit(f"{drafter} wrote another text than plain decoding under --strict.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 32768, 131072])
    parser.add_argument("--caches", nargs="+", default=["dense", "int8", "int4"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a folder or a GGUF file whose answers are compared")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This measures a GPU, and torch finds none.")

    device = torch.device(given.device)
    copied = copy_rate(device)
    model, theirs = models(given.shape, device)
    context = min(CONTEXT, model.decoder.config.context // 2)
    report: dict[str, Any] = {"what": "passes of a model with random weights in bf16", "shape": given.shape}
    report["copy_bytes_per_second"] = copied
    report["weights_nbytes"] = model.decoder.pass_nbytes
    report["plain"] = [plain(model, theirs, each, given.new_tokens, given.rounds, copied) for each in (64, context)]
    print(json.dumps(report["plain"]))
    del theirs
    report["rows"] = by_rows(model, given.rows, context, 20)
    report["caches"] = by_cache(model, given.caches, given.contexts, 20)
    if given.model:
        del model
        report["real"] = real(given.model, given.device, given.new_tokens)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    report["hardware"] = {"gpu": gpu, "processor": platform.processor()}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if given.output:
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
