"""One engine in a process of its own, for `longspec bench engines`, with a protocol of JSON lines.

    python worker.py KIND SETTINGS

KIND is a key of WRITERS, SETTINGS an object of its options. The first output line describes the engine, or is its
error; then each line on standard input is a case to decode, and each line on standard output its timing. A waiting
process blocks on a pipe and uses no processor time; its peak memory is its own.

A rate is tokens over the seconds of the passes that gave them: where the pass that ends the prompt gives tokens
already, neither these nor its time count. Imports nothing of this package until its own engine is asked for: the
interpreter that has llama.cpp may lack the other dependencies.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from time import perf_counter
from typing import Any

__all__ = ["WRITERS", "main"]

Case = dict[str, Any]
"""prompts: each with text, raw and tokens; new: tokens of each answer at most; width: texts at a time; ends: tokens
that end an answer."""
Took = dict[str, Any]
"""tokens and seconds of decoding; first: seconds to the first token, None where texts were written side by side. Of a
single text transformers' has all of the answer's tokens, and how many each pass gave: answer, lengths."""
Write = Callable[[Case], Took]
Told = dict[str, Any]

_LLAMA_ROWS = 512  # token positions of a pass, llama.cpp's default


def longspec(settings: dict[str, Any]) -> tuple[Write, Told]:
    """Longspec itself. settings: model, drafter, cache, dtype, threads, draft_model."""
    from dataclasses import replace

    import torch

    from longspec import __version__
    from longspec.bench.side_by_side import write_all
    from longspec.engine.engine import Engine
    from longspec.model.load import open_model

    found = open_model(settings["model"], dtype=settings["dtype"], device="cpu")
    found.set_threads(settings["threads"])
    model = found.load()
    smaller = settings["draft_model"] and open_model(settings["draft_model"], dtype=model.dtype, device="cpu").load()
    options = {"draft": smaller} if smaller else {}
    engine = Engine(model, drafter=settings["drafter"], cache=settings["cache"], options=options)

    def opened(case: Case) -> list[Any]:
        engine.model = replace(model, end_tokens=tuple(case["ends"]))
        return [
            engine.open(prompt["text"], raw=prompt["raw"], max_new_tokens=case["new"], temperature=0,
                        repetition_penalty=1.0, key=str(i))
            for i, prompt in enumerate(case["prompts"])
        ]  # fmt: skip

    def write(case: Case) -> Took:
        began = perf_counter()
        sessions = opened(case)
        if case["width"] == 1:
            (session,) = sessions
            for _ in engine.write(session):
                pass
            seconds = session.last_token - (session.prefilled or began)
            return {"tokens": len(session.answer), "seconds": seconds, "first": session.first_token - began}
        seconds = write_all(engine, sessions, case["width"])
        return {"tokens": sum(len(session.answer) for session in sessions), "seconds": seconds, "first": None}

    versions = {"longspec": __version__, "torch": torch.__version__}
    told = {"dtype": model.dtype, "drafter": engine.drafter_name, "cache": engine.cache_name}
    return write, {**told, "drafters": list(engine.speculator.drafters), "versions": versions}


def taken(rows: list[list[int]], ends: list[int], size: int, seen: list[tuple[float, int]], began: float) -> Took:
    """The timing of answers. seen: of each pass its time, and the length of a prompt of `size` tokens with what was
    written then. Of one answer its tokens are told too, and how many of them each pass gave.
    """
    (first, length), (last, _) = seen[0], seen[-1]
    counts = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    tokens = sum(max(0, count - (length - size)) for count in counts)
    took = {"tokens": tokens, "seconds": last - first, "first": first - began, "steps": len(seen)}
    if len(rows) > 1:
        return took
    done = [min(end - size, counts[0]) for _, end in seen]  # a draft may go on behind the end of text
    lengths = [end - start for start, end in pairwise([0, *done])]
    return {**took, "answer": rows[0][: counts[0]], "lengths": lengths}


def transformers(settings: dict[str, Any]) -> tuple[Write, Told]:
    """Transformers' generate with a dynamic cache. settings: folder, dtype, threads; lookup, a number of tokens, or
    assistant, a folder.
    """
    import torch
    from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

    library: Any = import_module("transformers")  # without complete type annotations
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings["dtype"]]

    def read(folder: str) -> Any:
        model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model.generation_config = library.GenerationConfig()  # greedy, without the checkpoint's penalties
        return model

    model, extra = read(settings["folder"]), {}
    if settings["lookup"]:
        extra = {"prompt_lookup_num_tokens": settings["lookup"]}
    elif settings["assistant"]:
        extra = {"assistant_model": read(settings["assistant"])}

    class Clock(StoppingCriteria):
        """The time at which each pass gave its tokens, and the sequence's length then, prompt included."""

        def __init__(self) -> None:
            self.seen: list[tuple[float, int]] = []

        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            self.seen.append((perf_counter(), input_ids.shape[1]))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def side_by_side(case: Case, prompts: list[Any]) -> Took:
        """Decode all prompts in one batch, padded to the longest."""
        began, clock, ends = perf_counter(), Clock(), case["ends"]
        size = max(len(prompt["tokens"]) for prompt in prompts)
        given = torch.tensor([[0] * (size - len(one["tokens"])) + one["tokens"] for one in prompts])
        mask = torch.tensor([[0] * (size - len(one["tokens"])) + [1] * len(one["tokens"]) for one in prompts])
        out = model.generate(
            given, attention_mask=mask, max_new_tokens=case["new"], do_sample=False, eos_token_id=ends or None,
            pad_token_id=(ends or [0])[0], stopping_criteria=StoppingCriteriaList([clock]),
            **({} if len(prompts) > 1 else extra),
        )  # fmt: skip
        return taken(out[:, size:].tolist(), ends, size, clock.seen, began)

    def write(case: Case) -> Took:
        if case["width"] == 1:
            return side_by_side(case, case["prompts"])
        starts = range(0, len(case["prompts"]), case["width"])
        took = [side_by_side(case, case["prompts"][start : start + case["width"]]) for start in starts]
        return {**{name: sum(one[name] for one in took) for name in ("tokens", "seconds")}, "first": None}

    versions = {"transformers": library.__version__, "torch": torch.__version__}
    return write, {"dtype": settings["dtype"], "attention": model.config._attn_implementation, "versions": versions}


def llama(settings: dict[str, Any]) -> tuple[Write, Told]:
    """llama.cpp. settings: file, threads, context; instructions: what it must be built for, by its own names; repacked:
    allow repacking the weights. It is called through the C functions that llama-cpp-python wraps, whose own `generate`
    adds some time to each step.
    """
    numpy: Any = import_module("numpy")
    c: Any = import_module("llama_cpp.llama_cpp")
    c.llama_backend_init()
    said = c.llama_print_system_info().decode(errors="replace").strip()
    if lacks := [name for name in settings["instructions"] if f" {name} = 1" not in said]:
        raise RuntimeError(
            f"it was built without {', '.join(lacks)}, which this processor has, and would be measured below its best; "
            "build it for this machine: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary :all: llama-cpp-python"
        )
    wanted = c.llama_model_default_params()
    wanted.n_gpu_layers = 0
    if not settings["repacked"]:
        wanted.use_extra_bufts = False
    model = c.llama_model_load_from_file(os.fsencode(settings["file"]), wanted)
    shape = c.llama_context_default_params()
    shape.n_ctx, shape.n_batch = settings["context"], _LLAMA_ROWS
    shape.n_threads = shape.n_threads_batch = settings["threads"]
    context = model and c.llama_init_from_model(model, shape)
    if not context:
        raise RuntimeError(f"{settings['file']} can't be loaded")
    columns = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def after(tokens: list[int]) -> int:
        """Decode these tokens; the most probable next token."""
        for start in range(0, len(tokens), _LLAMA_ROWS):
            some = tokens[start : start + _LLAMA_ROWS]
            held = (c.llama_token * len(some))(*some)  # the batch keeps a pointer to it
            if c.llama_decode(context, c.llama_batch_get_one(held, len(some))):
                raise RuntimeError("a pass failed")
        return int(numpy.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (columns,)).argmax())

    def write(case: Case) -> Took:
        (prompt,) = case["prompts"]
        began, times = perf_counter(), []
        c.llama_memory_clear(c.llama_get_memory(context), True)
        token = after(prompt["tokens"])
        while True:
            times.append(perf_counter())
            if len(times) == case["new"] or token in case["ends"]:
                return {"tokens": len(times) - 1, "seconds": times[-1] - times[0], "first": times[0] - began}
            token = after([token])

    write({"prompts": [{"tokens": [0] * 8}], "new": 2, "ends": []})  # warm-up: crash here rather than later
    return write, {"system": said, "versions": {"llama-cpp-python": import_module("llama_cpp").__version__}}


WRITERS: dict[str, Callable[[dict[str, Any]], tuple[Write, Told]]] = {
    "longspec": longspec,
    "transformers": transformers,
    "llama.cpp": llama,
}


def peak() -> int:
    """Peak resident memory in bytes. Not getrusage's value: a new process inherits its parent's."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep libraries' prints out of the protocol

    def say(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    with suppress(ValueError):  # run as a file: its folder must not be on sys.path
        sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    try:
        write, told = WRITERS[sys.argv[1]](json.loads(sys.argv[2]))
        say(told)
        for line in sys.stdin:
            say({**write(json.loads(line)), "peak_bytes": peak()})
    except Exception as error:  # noqa: BLE001 - any library error is reported to the parent
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
