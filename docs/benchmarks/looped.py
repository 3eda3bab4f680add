"""What a looped model's own early loops draft: trains a tiny one, and writes with and without `--drafter pipeline`.

    PYTHONPATH=tests python docs/benchmarks/looped.py --model build/looped --output docs/benchmarks/looped.json

The model is the tests' naive form of Ouro, two layers of 256 columns that run four times, trained by one thread on the
text of Python's own language reference (pydoc's topics), letter by letter, with a loss on every loop's readout; the
last twentieth is held out. Where the folder holds a model of that width already it is taken as it is.

Loops per token are passes over the layers, divided by the answer's tokens; a pass that all lanes share is one.
Milliseconds per token are of the process's own time, which leaves other processes out, and of the wall clock; drafters
write each text in turns, and the median of the texts' ratios is told.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from support.letters import tokenizer_of
from support.looped import Looped

from longspec.drafters.common.lanes import Lanes, Schedule
from longspec.engine.engine import Engine
from longspec.model.decoder import Decoder

LETTERS = "\n" + "".join(map(chr, range(32, 127)))
NAMES = ["<pad>", "<s>", "</s>", *LETTERS, *(f"<{i}>" for i in range(128 - 3 - len(LETTERS)))]
WIDTHS = {256: 480, 512: 1200}  # seconds of training
ROWS, BATCH, RATE = 128, 8, 0.512  # the rate by the width
DRAFTERS = ["none", "pipeline", "pipeline:second=2", "pipeline:loops=2", "exit", "recycle+ngram"]
WAYS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "T 0.8": {"temperature": 0.8, "seed": 1}}
PROMPT, TOKENS = 100, 200
DRAFTED = 40


def texts() -> tuple[list[int], str]:
    """Tokens to train on, and the letters that are held out."""
    letters = "".join(letter for name in sorted(topics) for letter in topics[name] if letter in LETTERS)
    cut = len(letters) * 19 // 20
    return [NAMES.index(letter) for letter in letters[:cut]], letters[cut:]


def config(width: int) -> dict[str, Any]:
    return {
        "model_type": "ouro",
        "vocab_size": len(NAMES),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "total_ut_steps": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def train(folder: Path, width: int, seconds: float) -> dict[str, Any]:
    """Write the model; what its training was."""
    torch.manual_seed(0)
    model = Looped(config(width))
    for name, weight in model.named_parameters():
        wide = weight.dim() == 2
        torch.nn.init.normal_(weight, 0.0, 0.05) if wide else torch.nn.init.constant_(weight, float("norm" in name))
    text, began, step, losses = torch.tensor(texts()[0]), time.process_time(), 0, [0.0]
    decayed = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    while (share := (time.process_time() - began) / seconds) < 1:
        rate = RATE / width * min(1.0, (step + 1) / 50) * max(0.02, 1 - share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(text) - ROWS - 1, (BATCH,))
        tokens = text[starts[:, None] + torch.arange(ROWS + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            readouts = model.readouts(tokens[:, :-1])
        each = [F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) for logits in readouts]
        optimizer.zero_grad()
        torch.stack(each).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, losses = step + 1, [round(loss.item(), 3) for loss in each]
        if step % 50 == 0:
            print(f"step {step}, {100 * share:.0f} %: nats after each loop {losses}", flush=True)
    model.save_pretrained(folder)
    tokenizer_of(NAMES).save(str(folder / "tokenizer.json"))
    count = sum(weight.numel() for weight in model.parameters())
    said = {"parameters": count, "steps": step, "letters": step * ROWS * BATCH, "cpu_seconds": round(seconds)}
    said["nats_after_each_loop"] = losses
    (folder / "training.json").write_text(json.dumps(said))
    return said


class Counted:
    """Passes over the layers, and the most rows of one, since `begin`."""

    def __init__(self) -> None:
        self.passes, self.most = 0, 0
        forward, counted = Decoder.forward, self

        def counting(
            decoder: Decoder, rows: Any, hidden: Any = None, first: int = 0, last: Any = None, **more: Any
        ) -> Any:
            c = decoder.config
            counted.passes += ((c.layers if last is None else last) - first) / c.group
            counted.most = max(counted.most, len(rows.tokens))
            return forward(decoder, rows, hidden, first, last, **more)

        Decoder.forward = counting  # type: ignore[method-assign]

    def begin(self) -> None:
        self.passes, self.most = 0, 0


def write(engine: Engine, prompt: str, way: dict[str, Any], counted: Counted) -> dict[str, Any]:
    session = engine.open(prompt, raw=True, max_new_tokens=TOKENS, **way)
    for _ in engine.prefill(session):
        pass
    counted.begin()
    cpu, wall = time.process_time(), time.perf_counter()
    while session.finish_reason is None:
        engine.step([session])
    tokens = len(session.answer)
    return {
        "tokens": session.answer,
        "ms": 1e3 * (time.perf_counter() - wall) / tokens,
        "cpu_ms": 1e3 * (time.process_time() - cpu) / tokens,
        "loops": counted.passes / tokens,
        "lanes": counted.most,
        "tokens_per_step": session.stats.tokens_per_step,
    }


def measure(folder: Path, dtype: str, held_out: str, count: int) -> Iterator[dict[str, Any]]:
    """Each drafter's results beside plain decoding's, over so many prompts from the held-out text."""
    counted = Counted()
    engines = {
        name: Engine.load(
            str(folder), dtype=dtype, drafter=name, threads=1, control="fixed", num_speculative_tokens=DRAFTED
        )
        for name in DRAFTERS
    }
    prompts = [held_out[at : at + PROMPT] for at in range(0, len(held_out) - PROMPT, len(held_out) // (count + 1))]
    for way, options in WAYS.items():
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in DRAFTERS}
        for engine in engines.values():
            write(engine, prompts[count], options, counted)  # warm
        for prompt in prompts[:count]:
            for name, engine in engines.items():
                seen[name].append(write(engine, prompt, options, counted))
        for name, runs in seen.items():
            plain = seen["none"]
            ratios = sorted(one["cpu_ms"] / own["cpu_ms"] for one, own in zip(plain, runs, strict=True))
            yield {
                "dtype": dtype,
                "way": way,
                "drafter": name,
                "equal_texts": sum(one["tokens"] == own["tokens"] for one, own in zip(plain, runs, strict=True)),
                "texts": len(runs),
                "loops_per_token": round(median(run["loops"] for run in runs), 3),
                "most_rows_in_a_pass": max(run["lanes"] for run in runs),
                "tokens_per_step": round(median(run["tokens_per_step"] for run in runs), 2),
                "cpu_ms_per_token": round(median(run["cpu_ms"] for run in runs), 3),
                "wall_ms_per_token": round(median(run["ms"] for run in runs), 3),
                "ratio": round(median(ratios), 2),
                "ratio_from_to": [round(ratios[len(ratios) // 10], 2), round(ratios[-1 - len(ratios) // 10], 2)],
            }


def schedules() -> Iterator[dict[str, Any]]:
    """LoopSpec's schedule by its rules alone: cycles for 40 tokens, and lanes, by which guesses are right."""
    for loops, stride, second in [(4, 1, None), (4, 1, 2), (4, 1, 3), (4, 2, None), (32, 2, None), (32, 2, 4)]:
        schedule = Schedule(loops, stride, second)
        row: dict[str, Any] = {"S": loops, "K": stride, "X": second, "births": schedule.births, "bound": schedule.most}
        for name, right in {"first right": 0, "second right": 1, "none right": 2}.items():
            lanes, cycles, most = Lanes(schedule, 0, 40), 0, 0
            while lanes.live:
                most, cycles, readers = max(most, len(lanes.live)), cycles + 1, lanes.advance()
                tokens = [0 if right <= len(lane.guesses) else 1 + len(lane.guesses) for lane in readers]
                lanes.take(readers, [0 if lane.done == loops else t for lane, t in zip(readers, tokens, strict=True)])
            row[name] = {"loops_per_token": cycles * stride / 40, "most_lanes": most}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--width", type=int, action="append", choices=WIDTHS, help="of the model; 256, if left out")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    models, results = [], []
    for width in given.width or [256]:
        folder = given.model / str(width)
        kept = folder / "training.json"
        training = json.loads(kept.read_text()) if kept.exists() else train(folder, width, WIDTHS[width])
        models.append({"width": width, "config": config(width), "training": training})
        with torch.inference_mode():
            for dtype in ("bf16", "fp32"):
                results += [{"width": width, **row} for row in measure(folder, dtype, texts()[1], given.texts)]
    result = {
        "what": f"a looped model with the readouts of its early loops as drafter: {TOKENS} letters behind {PROMPT}",
        "models": models,
        "drafted": DRAFTED,
        "results": results,
        "schedules": list(schedules()),
        "hardware": {"machine": platform.machine(), "threads": 1},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in results:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
