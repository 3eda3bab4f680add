"""Gemma 4: what layers share and leave in a cache, products in C, codes of GGUF files, and what contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load, oracle, write
from support.ggufs import write_gguf
from support.native import SIZES
from support.passes import feed
from support.passes import write as commit
from torch import Tensor

from longspec.cache import CACHES, Shape
from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.decoder import Decoder, Rows, Skip, Span
from longspec.model.fingerprint import lineage
from longspec.model.gguf.file import read_gguf
from longspec.model.weights.read import Weights

TOKENS = torch.randint(3, 70, (150,), generator=torch.Generator().manual_seed(1)).tolist()
WIDE = SIZES | {"head_dim": 32, "global_head_dim": 320, "hidden_size_per_layer_input": 32}
"""Global heads are wider than those of other families."""


def _flatter(model: Any) -> Any:
    """Queries of a fifth of their size: random heads of 320 channels would read one position each, and not always the
    same one in bf16.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.mul_(0.2)
    return model


def _logits(decoder: Decoder, kind: str = "dense") -> Tensor:
    with torch.inference_mode():
        cache = CACHES[kind](decoder.shape)
        return torch.cat([commit(decoder, cache, TOKENS[:100]), feed(decoder, cache, TOKENS[100:])[1]])


def test_a_cache_has_the_rows_of_layers_that_own_some(tmp_path: Path) -> None:
    decoder = load(write(oracle("gemma4"), tmp_path))
    assert decoder.shape.sizes == ((2, 8), (2, 16))
    assert decoder.shape.windows == (24, None)
    assert decoder.shape.row_bytes == 2 * 4 * (2 * 8 + 2 * 16)
    keys = load(write(oracle("gemma4-keys"), tmp_path / "keys"))
    assert keys.shape.sizes == ((2, 8), (1, 16), (2, 8), (1, 16))
    assert keys.shape.places == ((0, 0), (1, 0), (0, 1), (1, 1))
    assert [group.windows for group in keys.shape.groups] == [(24, 24), (None, None)]
    cache = CACHES["dense"](keys.shape)
    with torch.inference_mode():
        commit(keys, cache, TOKENS[:64])
    assert cache.nbytes == 64 * keys.shape.row_bytes == cache.room(64).device * 2 // 3


def test_heads_of_one_size_are_one_cache(tmp_path: Path) -> None:
    model = oracle("gemma4", global_head_dim=8)
    folder = write(model, tmp_path)
    _change(folder, {"global_head_dim": 8})  # which transformers leaves out where it is the others'
    decoder = load(folder)
    assert decoder.shape.sizes == ()
    assert decoder.shape.groups == (decoder.shape,)
    assert type(CACHES["dense"](decoder.shape)).__name__ == "Dense"
    with torch.inference_mode():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    assert (_logits(decoder) - wanted).abs().max() < 1e-4


def test_a_layer_that_others_read_is_not_skipped(tmp_path: Path) -> None:
    decoder = load(write(oracle("gemma4"), tmp_path))
    cache = CACHES["dense"](decoder.shape)
    with torch.inference_mode():
        stage = cache.open()
        rows = stage.add(range(-1, 9))
        whole = Rows(
            torch.tensor(TOKENS[:10]), torch.arange(10), torch.zeros(10, dtype=torch.bool), [Span(stage, rows, rows)]
        )
        plain = decoder.forward(whole)
        assert torch.equal(decoder.forward(whole, skip=Skip(attention=frozenset({0, 1}))), plain)
        assert not torch.equal(decoder.forward(whole, skip=Skip(attention=frozenset({2, 3}))), plain)


@pytest.mark.parametrize("kind", sorted(CACHES))
@pytest.mark.parametrize("family", ["gemma4", "gemma4-keys", "gemma4_moe"])
def test_products_in_c_are_those_of_torch(tmp_path: Path, family: str, kind: str) -> None:
    """In bf16 and in codes."""
    sizes = WIDE if family == "gemma4" else {**WIDE, "hidden_size_per_layer_input": 0}
    sizes |= {"moe_intermediate_size": 64} if family == "gemma4_moe" else {}
    folder = write(_flatter(oracle(family, **sizes)), tmp_path)
    wanted = _logits(load(folder), kind)
    for coded, off in ((None, 0.065), ("Q8_0", 0.1)):  # seen: .052 in bf16, .061 with a cache of 2 bits
        decoder = load(folder, torch.bfloat16, coded=coded)
        if decoder.slow is not None:
            pytest.skip(decoder.slow)
        assert decoder.is_exact
        assert (_logits(decoder, kind) - wanted).norm() < off * wanted.norm()


def test_heads_that_the_attention_kernel_does_not_take_are_left_to_torch(tmp_path: Path) -> None:
    folder = write(_flatter(oracle("gemma4", **WIDE | {"global_head_dim": 544})), tmp_path)
    decoder = load(folder, torch.bfloat16)
    if decoder.slow is not None:
        pytest.skip(decoder.slow)
    assert not decoder.is_exact
    wanted = _logits(load(folder))
    assert (_logits(decoder) - wanted).norm() < 0.06 * wanted.norm()


def test_codes_of_a_gguf_file_are_read_as_they_are(tmp_path: Path) -> None:
    """The table of per-layer embeddings too."""
    kinds = {"per_layer_token_embd": gguf.GGMLQuantizationType.Q4_0, "ffn": gguf.GGMLQuantizationType.Q4_0}
    model = _flatter(oracle("gemma4", **WIDE))
    file = read_gguf(write_gguf(model, tmp_path / "a.gguf", others=kinds, matrices=gguf.GGMLQuantizationType.Q8_0))
    config = Config.read(file.config())
    decoder = Decoder(config, Weights.of_gguf(file, torch.bfloat16), torch.device("cpu"), coded="Q8_0")
    if decoder.slow is not None:
        pytest.skip(decoder.slow)
    assert {"Q4_0", "Q8_0"} <= decoder.formats.keys()
    assert decoder.nbytes - decoder.touched(1) > decoder._inputs.table.pieces[0].tiles.nbytes - 1  # type: ignore[union-attr]
    state = {name: file.take(name) for name in file.names}
    exact = Decoder(config, Weights.of_tensors(state, torch.float32), torch.device("cpu"))
    wanted = _logits(exact)
    assert (_logits(decoder) - wanted).norm() < 0.1 * wanted.norm()


def test_a_mixtures_gguf_file_is_the_same_model(tmp_path: Path) -> None:
    model = oracle("gemma4_moe")
    file = read_gguf(write_gguf(model, tmp_path / "a.gguf"))
    decoder = Decoder(Config.read(file.config()), Weights.of_gguf(file, torch.float32), torch.device("cpu"))
    with torch.inference_mode():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    assert (_logits(decoder) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gemma4", "gemma4-keys", "gemma4_moe"])
def test_strict_bits_are_a_rows_own(tmp_path: Path, family: str) -> None:
    decoder = load(write(oracle(family), tmp_path), strict=True)
    assert decoder.is_exact
    with torch.inference_mode():
        whole = feed(decoder, CACHES["dense"](decoder.shape), TOKENS[:40])[1]
        cache = CACHES["dense"](decoder.shape)
        assert torch.equal(torch.cat([commit(decoder, cache, [token]) for token in TOKENS[:40]]), whole)


def test_what_is_shared_is_in_the_fingerprint(tmp_path: Path) -> None:
    folder = write(oracle("gemma4-keys", layer_types=_THREE, num_hidden_layers=3), tmp_path)
    before = lineage(load(folder))
    _change(folder, {"num_kv_shared_layers": 1})
    assert lineage(load(folder)) != before


_THREE = ["sliding_attention", "full_attention", "full_attention"]


def _change(folder: Path, changes: dict[str, Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize(
    ("changes", "removed", "said"),
    [
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
            "",
            r"layers\.0\.router\.proj\.weight is missing",
        ),
        ({"num_kv_shared_layers": 4}, "", "4 of 4 layers have no keys"),
        ({"num_kv_shared_layers": 3}, "", r"Layer 1 \(full_attention\) shares"),
        ({"layer_types": ["chunked_attention"] * 4}, "", "of the type 'chunked_attention'"),
        ({"per_layer_config": {"1": {"head_dim": "wide"}}}, "", "for layer 1's key heads"),
        ({"hidden_size_per_layer_input": 8}, "", r"per_layer_input_gate\.weight: the checkpoint has \[16, 48\]"),
        ({}, "layers.2.per_layer_projection", r"layers\.2\.per_layer_projection\.weight is missing"),
        ({}, "layers.0.layer_scalar", r"layers\.0\.layer_scalar is missing"),
        ({}, "layers.1.self_attn.v_proj", r"layers\.1\.self_attn\.v_proj\.weight is missing"),
        ({"use_bidirectional_attention": "all"}, "", "attends in both directions"),
    ],
)
def test_what_contradicts_itself_is_said(tmp_path: Path, changes: dict[str, Any], removed: str, said: str) -> None:
    folder = write(oracle("gemma4"), tmp_path)
    _change(folder, changes)
    if removed:
        held = load_file(folder / "model.safetensors")
        save_file({name: held[name] for name in held if removed not in name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said) as refused:
        load(folder)
    assert refused.value.exit_code == 3


def test_a_vision_models_attention_is_one_way_for_text(tmp_path: Path) -> None:
    folder = write(oracle("gemma4"), tmp_path)
    _change(folder, {"use_bidirectional_attention": "vision"})
    assert load(folder).config.family == "gemma4_text"


def test_groups_are_in_the_order_of_their_sizes() -> None:
    shape = Shape(2, 8, (None, 4, None), torch.float32, torch.device("cpu"), sizes=((2, 8), (1, 16), (2, 8)))
    assert [(group.key_heads, group.head_dim, group.windows) for group in shape.groups] == [
        (2, 8, (None, None)),
        (1, 16, (4,)),
    ]
    assert shape.places == ((0, 0), (1, 0), (0, 1))
