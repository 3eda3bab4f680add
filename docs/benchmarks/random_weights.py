"""A GGUF file with random weights in 4 bits (Q4_0), for what only sizes matter to.

    PYTHONPATH=tests python docs/benchmarks/random_weights.py build/mixture.gguf --layers 6 --vocabulary 19008
    PYTHONPATH=tests python docs/benchmarks/random_weights.py build/dense.gguf --shape dense --layers 32

`30b-a3b` has layers like those of Qwen3-30B-A3B: 128 experts of 768 channels, 8 to a row, 48 layers and 151,936 tokens
where nothing else is asked for. `dense` has a Llama's, 3,072 wide. Codes are uniform, and steps such that a row of unit
length keeps its length; one tensor is in memory at a time. Its tokenizer is the tests': letters, and names for the
rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from support.ggufs import add_tokenizer

_GROUP, _NBYTES = 32, 18  # values of a block, and its bytes: a step in fp16, and 4 bits of each
_DEVIATION = 4.61  # of codes from -8 to 7
_CHUNK = 1 << 20  # blocks that are drawn at once


@dataclass(frozen=True)
class Shape:
    kind: str  # GGUF's architecture
    width: int
    heads: int
    key_heads: int
    dim: int
    channels: int  # of an MLP, or of an expert
    layers: int
    vocabulary: int
    experts: int = 0
    chosen: int = 0


SHAPES = {
    "30b-a3b": Shape("qwen3moe", 2048, 32, 4, 128, 768, 48, 151_936, 128, 8),
    "dense": Shape("llama", 3072, 24, 8, 128, 8192, 28, 32_768),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes; those that end in "norm" are of ones."""
    width, heads, keys = shape.width, shape.heads * shape.dim, shape.key_heads * shape.dim
    yield from (("token_embd", (shape.vocabulary, width)), ("output", (shape.vocabulary, width)))
    yield "output_norm", (width,)
    for layer in range(shape.layers):
        own: dict[str, tuple[int, ...]] = {"attn_norm": (width,), "ffn_norm": (width,)}
        own |= {"attn_q": (heads, width), "attn_k": (keys, width), "attn_v": (keys, width)}
        own["attn_output"] = (width, heads)
        first: tuple[int, ...] = (shape.experts,) if shape.experts else ()
        name = "_exps" if shape.experts else ""
        own |= {f"ffn_{which}{name}": (*first, shape.channels, width) for which in ("gate", "up")}
        own[f"ffn_down{name}"] = (*first, width, shape.channels)
        if shape.experts:
            own |= {"ffn_gate_inp": (shape.experts, width)}
            own |= {f"attn_{which}_norm": (shape.dim,) for which in "qk"}
        yield from ((f"blk.{layer}.{name}", size) for name, size in own.items())


def is_coded(name: str) -> bool:
    return not name.endswith(("norm", "ffn_gate_inp"))


def drawn(name: str, size: tuple[int, ...], chance: np.random.Generator) -> np.ndarray:
    """A tensor's values, or its blocks [..., bytes of a row]."""
    if name.endswith("norm"):
        return np.ones(size, np.float32)
    if not is_coded(name):
        return chance.standard_normal(size, np.float32) * size[-1] ** -0.5
    blocks = int(np.prod(size)) // _GROUP
    made = np.empty((blocks, _NBYTES), np.uint8)
    for start in range(0, blocks, _CHUNK):
        part = made[start : start + _CHUNK]
        part[:] = np.frombuffer(chance.bytes(part.nbytes), np.uint8).reshape(part.shape)
    made[:, :2] = np.array([size[-1] ** -0.5 / _DEVIATION], np.float16).view(np.uint8)
    return made.reshape(*size[:-1], -1)


def write(path: Path, shape: Shape) -> None:
    writer = gguf.GGUFWriter(path, shape.kind)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.channels)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.chosen)
        writer.add_expert_feed_forward_length(shape.channels)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(shape.dim)
    writer.add_value_length(shape.dim)
    writer.add_rope_dimension_count(shape.dim)
    writer.add_rope_freq_base(1e6)
    add_tokenizer(writer, shape.vocabulary)
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, size in tensors(shape):
        if is_coded(name):
            held = (*size[:-1], size[-1] // _GROUP * _NBYTES)
            writer.add_tensor_info(f"{name}.weight", held, np.dtype(np.uint8), int(np.prod(held)), kind)
        else:
            writer.add_tensor_info(f"{name}.weight", size, np.dtype(np.float32), 4 * int(np.prod(size)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    chance = np.random.default_rng(0)
    for name, size in tensors(shape):
        writer.write_tensor_data(drawn(name, size, chance))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    given = parser.parse_args()
    shape, changes = SHAPES[given.shape], {"layers": given.layers, "vocabulary": given.vocabulary}
    given.file.parent.mkdir(parents=True, exist_ok=True)
    write(given.file, Shape(**(vars(shape) | {name: value for name, value in changes.items() if value})))
    print(f"{given.file}: {given.file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
