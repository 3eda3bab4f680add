"""Mixtures of experts: bits that are a row's own, what a pass reads, and files that contradict their config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load, oracle, write
from support.native import SIZES, TOKENS, coded
from support.passes import feed

from longspec.cache import CACHES
from longspec.errors import ModelError
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.fingerprint import lineage
from longspec.model.mixtures import Mixture
from longspec.model.weights.footprint import footprint, parameters

WIDE = SIZES | {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 8}


def made(folder: Path, how: str) -> Decoder:
    if how == "strict":
        return load(folder, torch.float32, strict=True)
    decoder = coded(folder) if how == "codes" else load(folder, torch.bfloat16)
    if decoder.slow is not None:
        pytest.skip(decoder.slow)
    return decoder


@pytest.mark.parametrize("how", ["bf16", "codes", "strict"])
@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "qwen3_moe"])
def test_a_rows_bits_do_not_depend_on_its_companions(tmp_path: Path, family: str, how: str) -> None:
    """Rows one by one, in passes of many sizes, and among strangers that go to other experts."""
    plain = SIZES | {"num_experts": 8, "intermediate_size": 64}
    sizes = {"olmoe": plain, "qwen3_moe": WIDE, "gpt_oss": plain | {"head_dim": 32}}[family]
    decoder = made(write(oracle(family, **sizes), tmp_path), how)
    assert decoder.is_exact
    with torch.inference_mode():
        for layer in (each for each in decoder._layers if hasattr(each.mlp, "route")):
            rows = torch.randn(150, decoder.config.width, generator=torch.Generator().manual_seed(3)).to(decoder.dtype)
            alone = torch.cat([layer.mlp(row[None]) for row in rows])
            for size in (2, 3, 16, 17, 70, 150):
                assert torch.equal(torch.cat([layer.mlp(part) for part in torch.split(rows, size)]), alone)
            assert torch.equal(layer.mlp(rows.flip(0)).flip(0), alone)
        cache = CACHES["dense"](decoder.shape)
        text = torch.cat([_committed(decoder, cache, [token]) for token in TOKENS[:24]])
        whole = feed(decoder, CACHES["dense"](decoder.shape), TOKENS[:24])[1]
        assert torch.equal(whole, text)


def _committed(decoder: Decoder, cache: Any, tokens: list[int]) -> torch.Tensor:
    stage, logits = feed(decoder, cache, tokens)
    cache.commit(stage, range(len(tokens)))
    return logits


@pytest.mark.parametrize("how", ["bf16", "codes"])
def test_the_kernels_experts_are_those_of_torch(tmp_path: Path, how: str) -> None:
    decoder = made(write(oracle("qwen3_moe", **WIDE), tmp_path), how)
    layer = decoder._layers[0].mlp
    rows = torch.randn(90, decoder.config.width, generator=torch.Generator().manual_seed(3)).bfloat16()
    counts = [0, 70, 1, 0, 5, 4, 10, 0]
    ours, at = layer.multiply(rows, counts), 0
    for expert, count in zip(layer.experts, counts, strict=True):
        if count:
            theirs = expert(rows[at : at + count])
            assert (ours[at : at + count].float() - theirs.float()).norm() < 0.02 * theirs.float().norm()
        at += count


@pytest.mark.parametrize("coded", [None, "Q8_0"])
def test_experts_are_read_where_one_tensor_holds_them_all(tmp_path: Path, coded: str | None) -> None:
    """As Qwen3.5's own checkpoints have them: [experts, 2 channels, width]."""
    folder = write(oracle("qwen3_moe", **WIDE), tmp_path)
    dtype = torch.bfloat16 if coded else torch.float32
    apart, held = load(folder, dtype, coded=coded), load_file(folder / "model.safetensors")
    for i in (0, 2, 3):
        stem = f"model.layers.{i}.mlp.experts."
        each = [
            [held.pop(f"{stem}{j}.{name}_proj.weight") for name in ("gate", "up", "down")]
            for j in range(WIDE["num_experts"])
        ]
        held[f"{stem}gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in each])
        held[f"{stem}down_proj"] = torch.stack([down for _, _, down in each])
    save_file(held, folder / "model.safetensors")
    stacked = load(folder, dtype, coded=coded)
    with torch.inference_mode():
        made = [feed(each, CACHES["dense"](each.shape), TOKENS[:40])[1] for each in (apart, stacked)]
    assert torch.equal(*made)
    assert stacked.nbytes == apart.nbytes
    held["model.layers.0.mlp.experts.down_proj"] = held["model.layers.0.mlp.experts.down_proj"][:5].clone()
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"experts\.5\.down_proj\.weight is missing"):
        load(folder, dtype, coded=coded)


def test_memory_counts_all_experts_and_a_pass_those_that_are_read(tmp_path: Path) -> None:
    folder = write(oracle("qwen3_5_moe"), tmp_path)
    decoder, config = load(folder), Config.read(json.loads((folder / "config.json").read_text()))
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    # The convolutions are held in fp32 too, and norms with their offset.
    assert decoder.nbytes == pytest.approx(stored, rel=0.01)
    assert footprint(Checkpoint("a", folder), config, torch.float32).weights == decoder.nbytes
    assert parameters(config, tied=False) * 4 == pytest.approx(stored, rel=0.15)
    expert = 3 * 48 * 32 * 4
    one, many = decoder.touched(1), decoder.touched(1000)
    assert many - one == pytest.approx(4 * 3 * expert, abs=8)  # 3 of 6 experts, in each of 4 layers
    assert decoder.nbytes - many == 96 * 48 * 4  # the table
    assert decoder.pass_nbytes == one


def test_the_union_grows_with_the_rows_to_all_experts() -> None:
    mixture = Mixture(128, 8, 768, (True,))
    assert [round(mixture.union(rows)) for rows in (1, 2, 8, 1000)] == [8, 16, 52, 128]  # 15.5, 51.6


def test_two_models_that_choose_otherwise_have_two_fingerprints(tmp_path: Path) -> None:
    folder = write(oracle("olmoe"), tmp_path)
    before = lineage(load(folder))
    _change(folder, {"num_experts_per_tok": 2})
    assert lineage(load(folder)) != before


def _change(folder: Path, changes: dict[str, Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize(
    ("family", "changes", "removed", "said"),
    [
        ("olmoe", {"num_experts": 5}, "", r"experts\.5\.down_proj\.weight, and its config\.json says 5 experts"),
        ("olmoe", {"num_experts": 7}, "", r"has \[6, 48\], its config\.json \[7, 48\]"),
        ("olmoe", {}, "experts.3.up_proj", r"layers\.0\.mlp\.experts\.3\.up_proj\.weight is missing"),
        ("olmoe", {"num_experts_per_tok": 9}, "", "goes through 9 of 6 experts"),
        ("olmoe", {"clip_qkv": 8.0}, "", "clip_qkv"),
        ("olmoe", {"num_experts": "six"}, "", "num_experts"),
        ("olmoe", {"intermediate_size": 48}, "", r"its config\.json"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "", "clamps its MLPs otherwise"),
        ("mixtral", {}, "experts.2.w2", r"block_sparse_moe\.experts\.2\.w2\.weight is missing"),
        ("lfm2_moe", {}, "expert_bias", r"feed_forward\.expert_bias is missing"),
        ("qwen3_5_moe", {"num_experts": 4}, "", r"experts\.4\.down_proj\.weight, and its config\.json says 4 experts"),
        ("qwen3_5_moe", {}, "shared_expert_gate", r"shared_expert_gate\.weight is missing"),
        ("qwen3_5_moe", {}, "experts.0.gate_proj", r"experts\.0\.gate_proj\.weight is missing"),
    ],
)
def test_what_contradicts_the_config_is_said(
    tmp_path: Path, family: str, changes: dict[str, Any], removed: str, said: str
) -> None:
    folder = write(oracle(family, num_hidden_layers=2, layer_types=_TYPES.get(family)), tmp_path)
    _change(folder, changes)
    if removed:
        held = load_file(folder / "model.safetensors")
        save_file({name: held[name] for name in held if removed not in name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said) as refused:
        load(folder)
    assert refused.value.exit_code == 3


_TYPES = {"lfm2_moe": ["conv", "full_attention"], "qwen3_5_moe": ["linear_attention", "full_attention"]}
