"""Values of a config that no model has are refused where they are read, with the documented exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.targets import folder_of
from support.commands import inside

from longspec.cache.stage import Shape
from longspec.errors import ModelError
from longspec.kernels.boundary import turned
from longspec.model.config import Config

PLAIN = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}


@pytest.mark.parametrize(
    "values",
    [
        {"partial_rotary_factor": 3},
        {"partial_rotary_factor": 0.01},
        {"partial_rotary_factor": 1e30},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 3.0}},
        {"head_dim": 15},
        {"head_dim": 1 << 40},
        {"model_type": "mistral", "sliding_window": 0},
        {"model_type": "mistral", "sliding_window": -5},
        {"model_type": "mistral", "sliding_window": 4.5},
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": True},
        {"hidden_size": "64"},
        {"hidden_size": 1e30},
        {"hidden_size": math.inf},
        {"hidden_size": [64]},
        {"vocab_size": None},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        {"max_position_embeddings": 10**30},
        {"max_position_embeddings": math.nan},
        {"rms_norm_eps": math.inf},
        {"rms_norm_eps": 1e30},
        {"rms_norm_eps": "small"},
        {"rope_theta": 0},
        {"rope_theta": 1},
        {"rope_theta": math.inf},
        {"rope_theta": [10000]},
        {"rope_scaling": "yarn"},
        {"rope_scaling": 4},
        {"rope_scaling": ["yarn"]},
        {"rope_scaling": {"rope_type": ["yarn"]}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": "linear", "factor": math.inf}},
        {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1e30}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 5e-324}},
        {"model_type": "qwen3_5_text", "linear_key_head_dim": 1 << 16},
        {"model_type": "qwen3_5_text", "linear_value_head_dim": 1024},
        {"model_type": "linear_llama", "head_dim": 1 << 16},
        {"model_type": "qwen3_moe", "num_experts": 1 << 20},
        {"quantization_config": {"quant_method": "gptq", "bits": math.inf, "group_size": 128}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1 << 40, 128]}},
        {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"rope_scaling": {**LONG, "long_factor": [1.0] * 7}},
        {"rope_scaling": {**LONG, "long_factor": [0.0] * 8}},
        {"rope_scaling": {**LONG, "long_factor": 2.0}},
        {"rope_scaling": {"rope_type": "longrope"}},
        {"rope_parameters": {"full_attention": "a", "sliding_attention": {}}},
        {"eos_token_id": -1},
        {"eos_token_id": math.nan},
        {"eos_token_id": "2"},
        {"eos_token_id": [[2]]},
        {"eos_token_id": 1 << 40},
        {"tie_word_embeddings": "no"},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": 3},
        {"model_type": "smollm3", "no_rope_layers": [1]},
        {"model_type": "gemma2", "attn_logit_softcapping": 0.0},
        {"model_type": "gemma2", "query_pre_attn_scalar": -1},
        {"model_type": ["llama"]},
        {"model_type": "gemma3", "text_config": {"hidden_size": -1}},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as refused:
        Config.read({**PLAIN, **values})
    assert refused.value.exit_code == 3
    assert "Error" not in str(refused.value), "a sentence, and no exception's name"


def test_a_value_that_the_family_does_not_use_is_let_be() -> None:
    assert Config.read({**PLAIN, "sliding_window": 0}).windows == (None, None)
    assert Config.read({**PLAIN, "model_type": "qwen2", "sliding_window": -1}).windows == (None, None)


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        (
            {  # as Qwen3's card says
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {  # a file that says the lengthened one, as DeepSeek's do
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": LONG}, 131072),
        ({"max_position_embeddings": 4096}, 4096),
    ],
)
def test_scaling_lengthens_the_context(values: dict[str, Any], context: int) -> None:
    assert Config.read({**PLAIN, **values}).context == context


def test_scaling_leaves_the_rotation_as_transformers_has_it() -> None:
    scaled = {**PLAIN, "rope_scaling": {"type": "linear", "factor": 4.0}}
    rope = Config.read(scaled).ropes[0]
    assert rope is not None
    assert rope.context == 512


def test_gemma3_as_published_has_transformers_defaults() -> None:
    import transformers

    text: dict[str, Any] = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    made = Config.read({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text})
    whole = transformers.Gemma3TextConfig(**text)
    wanted = Config.read(json.loads(whole.to_json_string(use_diff=False)))
    assert made.end_tokens == (1, 106)
    for name in (name for name in Config.__slots__ if name not in ("end_tokens", "ropes")):
        assert getattr(made, name) == getattr(wanted, name), name
    full, local = made.ropes[5], made.ropes[0]
    assert full is not None
    assert local is not None
    assert (full.kind, full.theta, full.get("factor"), made.context) == ("linear", 1e6, 8.0, 131072)
    assert (local.kind, local.theta) == ("default", 1e4)


def test_the_boundary_to_c_refuses_what_a_config_should_have() -> None:
    assert turned(32, 64) == 32
    for dims in (66, 33, -2):
        with pytest.raises(ValueError, match="turns an even number"):
            turned(dims, 64)
    for window in (0, -1):
        with pytest.raises(ValueError, match="a row reads at least itself"):
            Shape(2, 32, (None, window), torch.bfloat16, torch.device("cpu"))


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return folder_of(tmp_path_factory.mktemp("seed"), "llama")


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("generation_config.json", {"temperature": "hot", "do_sample": True}, "'hot' as temperature"),
        ("generation_config.json", {"top_k": [5], "do_sample": True}, "as top_k"),
        ("generation_config.json", {"do_sample": "yes"}, "as do_sample"),
        ("generation_config.json", {"repetition_penalty": {}}, "as repetition_penalty"),
        ("generation_config.json", {"eos_token_id": [None]}, "as eos_token_id"),
        ("generation_config.json", {"eos_token_id": math.nan}, "as eos_token_id"),
        ("config.json", {"rope_scaling": "yarn"}, "'yarn' as rope_scaling"),
        ("config.json", {"partial_rotary_factor": 3}, "3 as partial_rotary_factor"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["a"]}, "as added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"96": {"content": 5}}}, "names no content"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"120": {"content": "<x>"}}}, "no place for"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5"),
    ],
)
def test_the_command_says_it_in_a_sentence_and_exits_with_3(
    seed: dict[str, bytes], file: str, values: dict[str, Any], said: str, home: Path, tmp_path: Path
) -> None:
    for name, data in seed.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / file).write_text(json.dumps({**json.loads(seed[file]), **values}))
    done = inside(["run", "--model", str(tmp_path), "--raw", "--drafter", "none", "--max-tokens", "2", "ab"], home)
    assert done.code == 3, done.err
    assert said in done.err
    assert "bug" not in done.err
