"""Heads in other people's layouts: tiny random EAGLE-3 and Medusa checkpoints draft, and never change a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.engines import engine, finish, prompts, tiny, with_heads
from support.published import LAYOUTS, write
from torch import Tensor

from longspec.drafters.heads.eagle3 import Eagle
from longspec.drafters.spec import parse
from longspec.errors import ModelError, UsageError
from longspec.model.load import Model
from longspec.model.rope import rotate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("target"), end_tokens=())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cache", "options", "texts"), with_heads(["dense", "int4", "offload"]))
def test_a_published_head_never_changes_a_text(
    model: Model, tmp_path: Path, layout: str, cache: str, options: Any, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
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
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_BREADTH", 1)
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
