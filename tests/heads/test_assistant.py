"""Gemma 4's assistant: its drafts are those of transformers' model, and never change a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import oracle
from support.engines import engine, finish, prompts, tiny, with_heads

from longspec.drafters.heads.assistant import Assisting
from longspec.drafters.spec import parse
from longspec.errors import LongspecError
from longspec.model.load import Model


def assistant(*, ordered: bool) -> Any:
    """The model of transformers, with random weights."""
    import transformers

    text_config: Any = transformers.Gemma4TextConfig
    text = text_config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=3,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
    )
    config = transformers.Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=48,
        use_ordered_embeddings=ordered,
        num_centroids=12,
        centroid_intermediate_top_k=4,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    made: Any = transformers.Gemma4AssistantForCausalLM
    model = made(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
        if ordered:
            model.masked_embedding.token_ordering.copy_(torch.randperm(96))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("target"), "gemma4", end_tokens=())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("cache", "options", "texts"), with_heads(["dense", "int4", "offload"]))
def test_it_never_changes_a_text(
    model: Model, tmp_path: Path, ordered: bool, cache: str, options: Any, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspec.drafters.common.tree_growth.FLOOR", 0.0)
    assistant(ordered=ordered).save_pretrained(tmp_path)
    written = []
    for drafter in ("none", str(tmp_path)):
        made = engine(model, drafter, cache=cache, draft_tokens=7)
        asked = enumerate(prompts(texts, 70))
        sessions = [made.open(text, raw=True, max_new_tokens=20, key=str(i), **options) for i, text in asked]
        written.append(finish(made, sessions))
    assert written[0] == written[1]
    assert sum(session.stats.drafted for session in sessions) > 40 * texts


@pytest.mark.parametrize("ordered", [False, True])
def test_it_drafts_what_transformers_does(
    model: Model, tmp_path: Path, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, of the target's own keys and values, in a text that is shorter than the window."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.BREADTH", 1)
    theirs, target = assistant(ordered=ordered), oracle("gemma4")
    theirs.save_pretrained(tmp_path)
    drafter = parse(str(tmp_path)).make(model)
    assert isinstance(drafter, Assisting)
    made = engine(model, drafter, draft_tokens=5)
    session = made.open("abcdefghijklmno", raw=True, max_new_tokens=40)
    for _ in made.prefill(session):
        pass
    made.step([session])  # the first step knows no state yet
    seen: list[torch.Tensor] = []
    logits = drafter.logits

    def recording(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(logits(hidden))
        return seen[-1]

    drafter.logits = recording  # type: ignore[method-assign]
    [draft] = drafter.propose([session], [5])
    with torch.inference_mode():
        tokens = torch.tensor([session.tokens])
        out = target.model(tokens[:, :-1], return_shared_kv_states=True)
        state, last, wanted = out.last_hidden_state[:, -1:], tokens[:, -1:], []
        for _ in range(5):
            embedded = target.model.embed_tokens(last)
            each = theirs(
                inputs_embeds=torch.cat((embedded, state), -1),
                position_ids=torch.tensor([[len(session.tokens) - 1]]),
                shared_kv_states=dict(out.shared_kv_states),
            )
            wanted.append(each.logits[0, -1])
            last, state = each.logits[:, -1:].argmax(-1), each.last_hidden_state
    assert len(draft) == 5
    assert (torch.cat(seen) - torch.stack(wanted)).abs().max() < 1e-4
    assert draft.tokens.tolist() == [int(each.argmax()) for each in wanted]


@pytest.mark.parametrize(
    ("changes", "removed", "said"),
    [
        ({}, "layers.1.mlp.up_proj", r"layers\.1\.mlp\.up_proj\.weight is missing"),
        ({"num_centroids": 5}, "", r"centroids\.weight is \[12, 32\]"),
        ({"num_centroids": "x"}, "", "num_centroids"),
        ({"text_config": None}, "", "no text_config"),
    ],
)
def test_what_does_not_fit_is_said(
    model: Model, tmp_path: Path, changes: dict[str, Any], removed: str, said: str
) -> None:
    assistant(ordered=True).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    if removed:
        held = load_file(tmp_path / "model.safetensors")
        save_file({name: held[name] for name in held if removed not in name}, tmp_path / "model.safetensors")
    with pytest.raises(LongspecError, match=said):
        parse(str(tmp_path)).make(model)


def test_another_family_has_no_cache_for_it(tmp_path: Path) -> None:
    assistant(ordered=False).save_pretrained(tmp_path / "head")
    with pytest.raises(LongspecError, match="reads a Gemma 4's cache"):
        parse(str(tmp_path / "head")).make(tiny(tmp_path / "target"))
