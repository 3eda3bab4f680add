"""Heads in other people's layouts: tiny random EAGLE-3 and Medusa checkpoints draft, and never change a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.engines import engine, finish, prompts, tiny, with_heads
from support.published import BLOCKS, LAYOUTS, write
from torch import Tensor

from longspec.drafters.heads.blocks import Blockwise
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


@pytest.mark.parametrize("layout", BLOCKS)
def test_a_block_drafter_drafts_what_its_equations_say(
    model: Model, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file's tensors, a whole text and the block at once, with one mask for each layer."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_BREADTH", 1)
    folder = write(tmp_path / "head", layout, model)
    drafter = parse(str(folder)).make(model)
    assert isinstance(drafter, Blockwise)
    made = engine(model, drafter, draft_tokens=6)
    session, features = made.open(prompts(1, 90)[0], raw=True, max_new_tokens=40), []
    read = drafter.read
    drafter.read = lambda s, rows: (features.append(torch.cat(list(rows), -1)), read(s, rows))[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    for _ in made.prefill(session):
        pass
    for _ in range(3):
        made.step([session])
    (draft,) = drafter.propose([session], [4])
    with torch.no_grad():
        naive = _Block(folder, model, session.tokens[-1], torch.cat(features))
    assert draft.tokens.tolist() == naive.chain(session.tokens[-1], 4)
    assert drafter.head.depth == (6 if layout.startswith("dspark") else 5)


class _Block:
    """A block drafter's equations."""

    def __init__(self, folder: Path, model: Model, last: int, features: Tensor) -> None:
        self.w, raw = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        layer, size, n = raw["transformer_layer_config"], raw["block_size"], len(features)
        context = self.norm("hidden_norm", features @ self.w["fc.weight"].T)
        x = model.decoder.embed(torch.tensor([last, *[raw["mask_token_id"]] * (size - 1)]))
        rows, columns = torch.arange(n, n + size)[:, None], torch.arange(n + size)[None]
        for i, kind in enumerate(layer.get("layer_types", ["full_attention"] * 2)):
            at, normed = f"layers.{i}", self.norm(f"layers.{i}.input_layernorm", x)
            both = torch.cat((context, normed))
            q, k, v = (each @ self.w[f"{at}.self_attn.{name}_proj.weight"].T for name, each in
                       (("q", normed), ("k", both), ("v", both)))  # fmt: skip
            q = self.turned(self.norm(f"{at}.self_attn.q_norm", q.view(size, -1, 8)), n)
            k = self.turned(self.norm(f"{at}.self_attn.k_norm", k.view(n + size, -1, 8)), 0).repeat_interleave(2, 1)
            scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
            if kind == "sliding_attention":  # as far back for all places of the block, and up to the own one
                scores = scores.masked_fill((columns < n - layer["sliding_window"]) | (columns > rows), -torch.inf)
            seen = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.view(n + size, -1, 8).repeat_interleave(2, 1))
            x = x + seen.flatten(1) @ self.w[f"{at}.self_attn.o_proj.weight"].T
            normed = self.norm(f"{at}.post_attention_layernorm", x)
            gate, up = (normed @ self.w[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ self.w[f"{at}.mlp.down_proj.weight"].T
        self.outputs = self.norm("norm", x)[0 if raw["sample_from_anchor"] else 1 :]
        self.logits = self.outputs @ self.w.get("lm_head.weight", model.decoder.head).T
        self.rank = raw.get("markov_rank", 0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * scale * self.w[f"{name}.weight"]

    def turned(self, x: Tensor, first: int) -> Tensor:
        angles = torch.arange(first, first + len(x))[:, None] / 5000.0 ** (torch.arange(0, 8, 2) / 8)
        cos, sin = (torch.cat((f(angles), f(angles)), -1)[:, None] for f in (torch.cos, torch.sin))
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    def chain(self, last: int, count: int) -> list[int]:
        state, made = torch.zeros(self.rank), [last]
        for output, logits in zip(self.outputs[:count], self.logits, strict=False):
            if self.rank:
                bias, state = self.bias(self.w["markov_head.markov_w1.weight"][made[-1]], output, state)
                logits = logits + bias
            best = int(logits.argmax())
            made.append(best + int(self.w["d2t"][best]) if "d2t" in self.w else best)
        return made[1:]

    def bias(self, before: Tensor, output: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if (joint := self.w.get("markov_head.joint_proj.weight")) is not None:
            out = torch.cat((state, before, output)) @ joint.T + self.w["markov_head.joint_proj.bias"]
            gate = out[: self.rank].sigmoid()
            state = gate * state + (1 - gate) * out[self.rank : 2 * self.rank].tanh()
            before = out[2 * self.rank :].tanh()
        elif (gated := self.w.get("markov_head.gate_proj.weight")) is not None:
            bias = self.w["markov_head.gate_proj.bias"]
            before = (torch.cat((output, before)) @ gated.T + bias).sigmoid() * before
        return before @ self.w["markov_head.markov_w2.weight"].T, state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_size": 1}, "says a block_size of 1 and a mask_token_id of 5; 2 to 65"),
        ({"mask_token_id": None}, "says a block_size of 6 and a mask_token_id of None"),
        ({"aux_hidden_state_layer_ids": []}, "reads the layers"),
        ({"aux_hidden_state_layer_ids": [1, 9, 2]}, "reads the layers"),
        ({"aux_hidden_state_layer_ids": [1, 2]}, r"doesn't fit tiny: its fc\.weight is"),
    ],
)
def test_a_block_drafter_that_doesnt_fit_is_refused(
    model: Model, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = write(tmp_path / "head", "dflash", model)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises((ModelError, UsageError), match=said):
        engine(model, str(folder))


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
