"""Files to be mutated: GGUF, safetensors folders, draft heads, prompt caches. Each mutant is read as the engine reads.

Seeds are tiny models whose shapes the C kernels take.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import oracle, write
from support.engines import engine, tiny
from support.ggufs import write_gguf
from support.hostile import Attempt
from support.mutants import of_bytes, of_json
from support.native import SIZES
from support.packed import write_packed
from support.published import LAYOUTS
from support.published import write as write_head

from longspec.cache import snapshot
from longspec.engine.engine import Engine
from longspec.model.load import CODED, DTYPES, open_model
from longspec.model.weights.footprint import footprint

WIDE = SIZES | {"head_dim": 64}
STATES = WIDE | {"linear_num_key_heads": 4, "linear_num_value_heads": 16}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_5": STATES,
    "qwen3_5_moe": STATES | EXPERTS,
    "qwen3_moe": WIDE | EXPERTS | {"num_hidden_layers": 2, "mlp_only_layers": []},
    "gpt_oss": SIZES | {"head_dim": 32, "intermediate_size": 96, "num_hidden_layers": 2},
    "gemma4": WIDE | {"global_head_dim": 128, "hidden_size_per_layer_input": 32},
}
"""Hybrids, mixtures, and layers that differ, as files of both kinds."""
ONLY_FOLDERS: dict[str, dict[str, Any]] = {
    "lfm2_moe": WIDE | EXPERTS,
    "ouro": SIZES | {"num_hidden_layers": 2, "total_ut_steps": 2},
    "linear_llama-some": WIDE,
}
PACKED = ("gptq of 32", "awq of 128", "compressed by rows", "fp8 of blocks")

ENDS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}


def run(path: Path, dtype: str) -> None:
    """Open, plan, load, and write three tokens."""
    opened = open_model(str(path), dtype=dtype, device="cpu")
    footprint(opened.checkpoint, opened.config, DTYPES[opened.dtype], CODED.get(opened.dtype))
    made = Engine(opened.load(), drafter="none", control="fixed")
    made.generate("the cat " * 14, raw=True, max_new_tokens=3)  # beyond a block, so that states are folded


def ggufs(folder: Path) -> Attempt:
    """Architectures of every kind, in fp32 and in codes."""
    seeds = []
    for name, kind in (("llama-llama3", "Q8_0"), ("gemma3", None), ("phi3-longrope", None), ("llama", "Q4_0")):
        sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, **({"head_dim": 32} if name == "gemma3" else {})}
        if name == "gemma3":
            sizes["layer_types"] = ["sliding_attention", "full_attention"]
        if name == "phi3-longrope":
            sizes = {"num_hidden_layers": 2}
        form = None if kind is None else gguf.GGMLQuantizationType[kind]
        seeds.append(write_gguf(oracle(name, **sizes), folder / f"{name}-{kind}.gguf", matrices=form).read_bytes())
    coded = gguf.GGMLQuantizationType.Q8_0
    for name, sizes in OTHERS.items():
        others = {} if name.startswith("gemma") else {"attn_": coded, "ffn_": coded}
        seeds.append(write_gguf(oracle(name, **sizes), folder / f"{name}.gguf", others=others).read_bytes())
    path = folder / "mutant.gguf"
    path.write_bytes(seeds[0])
    run(path, "int8")  # now, lest the first mutant pay for compiling the kernels

    def attempt(random: Random) -> None:
        data = random.choice(seeds)
        path.write_bytes(of_bytes(data, random, head=data.index(b"token_embd") + 600))
        run(path, random.choice(("auto", "fp32", "bf16", "int8")))

    return attempt


def folder_of(folder: Path, name: str, **changes: Any) -> dict[str, bytes]:
    """The files of a tiny model, tokenizer and texts too."""
    place = write(oracle(name, **{**SIZES, "num_hidden_layers": 2, **changes}), folder / name)
    return with_texts(place, folder, parts=2 if name == "qwen2" else 1)


def with_texts(place: Path, folder: Path, parts: int = 1) -> dict[str, bytes]:
    """The files of a model's folder with those of a tokenizer, its weights in so many shards."""
    source = write_gguf(oracle("llama", **SIZES, num_hidden_layers=1), folder / "source.gguf")
    from longspec.model.gguf.file import read_gguf

    read_gguf(source).tokenizer().save(str(place / "tokenizer.json"))
    added = {"96": {"content": "<|extra|>", "special": True}}
    texts: dict[str, Any] = {
        "tokenizer_config.json": {**ENDS, "chat_template": "{{ messages[0].content }}", "added_tokens_decoder": added},
        "generation_config.json": {
            "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1,
            "eos_token_id": [2],
        },
    }  # fmt: skip
    for file, text in texts.items():
        (place / file).write_text(json.dumps(text))
    tensors = place / "model.safetensors"
    if parts > 1:
        held = load_file(tensors)
        shards = {f"model-{i}.safetensors": dict(list(held.items())[i::parts]) for i in range(parts)}
        for file, part in shards.items():
            save_file(part, place / file)
        index = {"weight_map": {tensor: file for file, part in shards.items() for tensor in part}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        tensors.unlink()
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def folders(folder: Path) -> Attempt:
    """Every file of a folder: JSON by its values, others by their bytes, and each by what stands in its place."""
    seeds = [folder_of(folder, "llama-yarn"), folder_of(folder, "qwen2"), folder_of(folder, "gemma2", head_dim=32)]
    for name, sizes in (OTHERS | ONLY_FOLDERS).items():
        seeds.append(folder_of(folder, name, **{"num_hidden_layers": 4, **sizes}))
    for kind in PACKED:
        made, _ = write_packed(kind, folder / kind.replace(" ", "-"), num_hidden_layers=2)
        seeds.append(with_texts(made, folder))
    place = folder / "mutant"
    run(folder / "llama-yarn", "int8")

    def attempt(random: Random) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        files = dict(random.choice(seeds))
        name = random.choice([*files, "config.json", "config.json", "generation_config.json"])
        for other, data in files.items():
            (place / other).write_bytes(data)
        change(place / name, files[name], random)
        run(place, random.choice(("auto", "fp32", "bf16", "int8")))

    return attempt


def change(path: Path, data: bytes, random: Random) -> None:
    """Write a mutant of a file in its place."""
    if random.random() < 0.04:
        path.unlink()
        match random.randrange(4):
            case 0:
                os.mkfifo(path)
            case 1:
                path.mkdir()
            case 2:
                path.symlink_to("/dev/zero")
            case 3:
                path.write_bytes(b"")
    elif path.suffix == ".json" and random.random() < 0.85:
        path.write_text(json.dumps(of_json(json.loads(data), random)))
    elif path.suffix == ".safetensors" and random.random() < 0.5:
        path.write_bytes(with_header(data, random))
    else:
        path.write_bytes(of_bytes(data, random, head=3000))


def with_header(data: bytes, random: Random) -> bytes:
    """A safetensors file whose header is another, of the right length."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if random.random() < 0.4:  # sizes that fit, in another shape or dtype
        entry = header[random.choice([name for name in header if name != "__metadata__"])]
        rows = entry["shape"]
        shapes = [rows[::-1], [1, *rows], [*rows, 1], [rows[0] * (rows[1] if len(rows) > 1 else 1)], [*rows, 0]]
        entry["shape"] = random.choice(shapes)
        entry["dtype"] = random.choice((entry["dtype"], "I32", "U8", "F8_E4M3", "BOOL", "F16"))
        sizes = {"I32": 4, "U8": 1, "F8_E4M3": 1, "BOOL": 1, "F16": 2, "BF16": 2}
        entry["shape"][-1] *= 4 // sizes.get(entry["dtype"], 4)
        if 0 in entry["shape"]:
            entry["data_offsets"][1] = entry["data_offsets"][0]
    else:
        header = of_json(header, random)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def heads(folder: Path) -> Attempt:
    """Draft heads as others publish them, and longspec's own of every kind."""
    from support.heads import shaken

    from longspec.heads import KINDS
    from longspec.heads.format import save_head

    model = tiny(folder / "model", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    places = [write_head(folder / layout.replace(" ", "-"), layout, model) for layout in LAYOUTS]
    for kind in KINDS:
        save_head(folder / kind, shaken(kind, model), model, int8=kind == "clover2")
        places.append(folder / kind)
    seeds = [{path.name: path.read_bytes() for path in place.iterdir()} for place in places]
    place = folder / "mutant"

    def attempt(random: Random) -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        files = random.choice(seeds)
        for other, data in files.items():
            (place / other).write_bytes(data)
        name = random.choice([*files, "config.json"])
        change(place / name, files[name], random)
        made = Engine(model, drafter=str(place), control="fixed")
        made.generate("abcabc", raw=True, max_new_tokens=6, temperature=0)

    return attempt


def snapshots(folder: Path) -> Attempt:
    """Prompt caches of three kinds: their bytes, and an index that lies under checksums that fit."""
    model = tiny(folder / "model", end_tokens=())
    prompt = "abcdefgh" * 40
    made = {name: engine(model, cache=name) for name in ("dense", "int4", "dual")}
    for name, each in made.items():
        each.generate(prompt, raw=True, max_new_tokens=2, prompt_cache=folder / name)
    seeds = {name: (folder / name).read_bytes() for name in made}
    path = folder / "mutant"

    def attempt(random: Random) -> None:
        name = random.choice(list(seeds))
        data = seeds[name]
        path.write_bytes(of_bytes(data, random, head=40) if random.random() < 0.3 else _with_index(data, random))
        made[name].generate(prompt, raw=True, max_new_tokens=2, prompt_cache=path)

    return attempt


def _with_index(data: bytes, random: Random) -> bytes:
    _, version, begin, length, _ = snapshot._HEADER.unpack_from(data)
    index = json.loads(data[begin : begin + length])
    text = json.dumps(of_json(index, random)).encode()
    header = snapshot._HEADER.pack(b"longspec", version, begin, len(text), zlib.crc32(text))
    body = data[snapshot._BEGIN : begin]
    return header + snapshot._CHECK.pack(zlib.crc32(header)) + body + text


torch.set_num_threads(1)
