"""Heads in other people's layouts: tiny random EAGLE-3 and Medusa checkpoints draft, and never change a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.engines import engine, finish, prompts, tiny, with_heads
from torch import Tensor

from longspec.drafters.eagle3 import Eagle
from longspec.drafters.spec import parse
from longspec.errors import ModelError, UsageError
from longspec.model.load import Model
from longspec.model.rope import rotate

LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LAYOUTS = ["authors", "speculators", "medusa", "medusa with heads"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("target"), end_tokens=())


def write(folder: Path, layout: str, model: Model) -> Path:
    """A random head, as its publishers would write it."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)

    config, width, vocabulary = model.decoder.config, model.decoder.config.width, model.decoder.config.vocabulary
    folder.mkdir()
    if layout.startswith("medusa"):
        tensors: dict[str, Tensor] = {}
        for k in range(3):
            tensors |= {f"{k}.0.linear.weight": random(width, width), f"{k}.0.linear.bias": random(width)}
            if layout == "medusa with heads":
                tensors[f"{k}.1.weight"] = random(vocabulary, width)
        save_file(tensors, folder / "medusa_lm_head.safetensors")
        (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 1}))
        return folder
    chosen = torch.tensor([i for i in range(vocabulary) if i % 3])
    shapes = {
        "input_layernorm": (32,), "hidden_norm": (32,), "post_attention_layernorm": (32,),
        "self_attn.q_proj": (32, 64), "self_attn.k_proj": (16, 64), "self_attn.v_proj": (16, 64),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
    }  # fmt: skip
    prefix = "midlayer" if layout == "authors" else "layers.0"
    tensors = {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    tensors |= {
        "fc.weight": random(32, 3 * width),
        "norm.weight": random(32),
        "lm_head.weight": random(len(chosen), 32),
    }
    tensors |= {"embed_tokens.weight": random(vocabulary, 32), "d2t": chosen - torch.arange(len(chosen))}
    tensors["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, chosen, True)
    save_file(tensors, folder / "model.safetensors")
    layer = {**LAYER, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 5000.0}
    raw: dict[str, Any] = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(chosen)}
    raw |= {**layer, "vocab_size": vocabulary}
    if layout == "speculators":
        proposal = {"proposal_type": "greedy", "speculative_tokens": 4}
        raw = {
            "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "norm_before_residual": True,
            "draft_vocab_size": len(chosen), "transformer_layer_config": {**layer, "vocab_size": vocabulary},
            "speculators_config": {"algorithm": "eagle3", "proposal_methods": [proposal]},
            "eagle_aux_hidden_state_layer_ids": [1, config.layers // 2, config.layers],
        }  # fmt: skip
    else:
        raw["eagle_aux_hidden_state_layer_ids"] = [1, 2, config.layers]
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cache", "options", "texts"), with_heads(["dense", "int4", "offload"]))
def test_a_published_head_never_changes_a_text(
    model: Model, tmp_path: Path, layout: str, cache: str, options: Any, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspec.drafters.common.tree_growth.FLOOR", 0.0)
    folder, written = write(tmp_path / "head", layout, model), []
    for drafter in ("none", str(folder)):
        made = engine(model, drafter, cache=cache, draft_tokens=7)
        asked = enumerate(prompts(texts, 70))
        sessions = [made.open(text, raw=True, max_new_tokens=20, key=str(i), **options) for i, text in asked]
        written.append(finish(made, sessions))
    assert written[0] == written[1]
    assert sum(session.stats.drafted for session in sessions) > 40 * texts


@pytest.mark.parametrize("layout", ["authors", "speculators"])
def test_an_eagle_head_drafts_what_its_equations_say(
    model: Model, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written down once more, a whole text at once, and each drafted row appended to it."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.BREADTH", 1)
    drafter = parse(str(write(tmp_path / "head", layout, model))).make(model)
    assert isinstance(drafter, Eagle)
    made = engine(model, drafter, draft_tokens=6)
    session, features = made.open(prompts(1, 90)[0], raw=True, max_new_tokens=40), []
    read = drafter.read
    drafter.read = lambda s, rows: (features.append(torch.cat(list(rows), -1)), read(s, rows))[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    for _ in made.prefill(session):
        pass
    for _ in range(3):
        made.step([session])
    (draft,) = drafter.propose([session], [4])
    tokens, head = [*session.tokens[1:], *draft.tokens.tolist()], drafter.head
    assert head.tokens is not None
    assert head.embedding is not None
    with torch.no_grad():
        hidden, drafted = head.enter(torch.cat(features)), []
        for _ in range(4):
            out = _layer(head, hidden, F.embedding(torch.tensor(tokens[: len(hidden)]), head.embedding))
            drafted.append(int(head.tokens[head.logits(out[-1:]).argmax()]))
            hidden = torch.cat((hidden, out[-1:]))
    assert draft.tokens.tolist() == drafted


def _layer(head: Any, hidden: Tensor, embedded: Tensor) -> Tensor:
    c, w, n = head.config, head.weights, len(hidden)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), w[f"{name}.weight"], c.eps)

    x = torch.cat((norm("input_layernorm", embedded), norm("hidden_norm", hidden)), -1)
    q, k, v = ((x @ w[f"self_attn.{name}_proj.weight"].T).view(n, -1, c.head_dim) for name in "qkv")
    turn = head.rotation(torch.arange(n), torch.zeros(n, dtype=torch.bool), torch.float32)
    q, k, v = (t.transpose(0, 1)[None] for t in (rotate(q, *turn), rotate(k, *turn), v))
    read = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
    out = (norm("hidden_norm", hidden) if head.norm_first else hidden) + read @ w["self_attn.o_proj.weight"].T
    x = norm("post_attention_layernorm", out)
    gated = F.silu(x @ w["mlp.gate_proj.weight"].T) * (x @ w["mlp.up_proj.weight"].T)
    result: Tensor = out + gated @ w["mlp.down_proj.weight"].T
    return result


def test_a_published_head_of_other_sizes_is_refused(model: Model, tmp_path: Path) -> None:
    other = tiny(tmp_path / "other", hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    for layout in ("authors", "medusa"):
        folder = write(tmp_path / layout, layout, model)
        with pytest.raises(UsageError, match=r"doesn't fit tiny: its .* is \[.*expected .*trained for"):
            engine(other, str(folder))
        for file in folder.glob("*.safetensors"):
            file.unlink()
        with pytest.raises(ModelError, match="reads no pickled weights"):
            engine(model, str(folder))
    raw = json.loads((tmp_path / "authors" / "config.json").read_text())
    (tmp_path / "authors" / "config.json").write_text(json.dumps({**raw, "vocab_size": 1000}))
    with pytest.raises(UsageError, match="is for a vocabulary of 1,000 tokens; tiny has"):
        engine(model, str(tmp_path / "authors"))
