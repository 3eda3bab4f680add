"""Heads that are fed with their own output: they draft what training unrolls, and lie in other engines' layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import oracle
from support.commands import inside, write_tiny
from support.engines import engine, prompts, tiny
from support.ggufs import write_gguf as write_target
from support.heads import shaken, some

from longspec.drafters import drafter_of
from longspec.drafters.heads.fed import PublishedMtp, TrainedMtp
from longspec.drafters.spec import parse
from longspec.errors import UsageError
from longspec.heads.format import Trained, new_head, save_head
from longspec.heads.head import Batch
from longspec.heads.published.draft_gguf import write_gguf
from longspec.heads.published.eagle3 import eagle3_of, load_eagle3
from longspec.heads.published.speculators import write_speculators
from longspec.heads.seen import batch_of, see
from longspec.model.gguf.header import read_header
from longspec.model.load import Model, open_model

KINDS = ["eagle3", "fastmtp"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("target"), end_tokens=())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [512, 40])
def test_drafting_equals_the_unrolled_training(
    model: Model, kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a text of several steps: the first chain's outputs, from the head's cache and all at once."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_BREADTH", 1)
    head = shaken(kind, model, depth=4, window=window)
    drafter: Any = drafter_of(model, head)
    outs: list[torch.Tensor] = []
    features: list[list[torch.Tensor]] = []
    made = engine(model, drafter, draft_tokens=6)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=40)
    read, forward = drafter.read, drafter.forward
    drafter.read = lambda s, rows: (features.extend([list(rows)]), read(s, rows))[-1]  # type: ignore[func-returns-value]
    for _ in made.prefill(session):
        pass
    for _ in range(4):
        made.step([session])
    drafter.forward = lambda rows: outs.append(forward(rows)) or outs[-1]  # type: ignore[func-returns-value]
    (draft,) = drafter.propose([session], [4])
    assert draft.parents.tolist() == [-1, 0, 1, 2]
    text = torch.tensor([[*session.tokens, *draft.tokens.tolist()]])
    states = {
        layer: F.pad(torch.cat([each[i] for each in features]), (0, 0, 0, 5))[None]
        for i, layer in enumerate(drafter.needs.layers)
    }
    with torch.no_grad():
        unrolled = list(head.module.outputs(Batch(states, model.decoder.embed(text))))
    want = torch.stack([out.hidden[0, len(session.tokens) - 2] for out in unrolled])
    torch.testing.assert_close(torch.cat(outs)[:4], want, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """With three layers to read, and its folder."""
    folder = tmp_path_factory.mktemp("deep")
    return tiny(folder, end_tokens=(), num_hidden_layers=8), folder


@pytest.mark.parametrize("trimmed", [True, False])
def test_an_eagle_head_comes_back_from_speculators_layout(
    deep: tuple[Model, Path], tmp_path: Path, trimmed: bool
) -> None:
    model, _ = deep
    head = shaken("eagle3", model, depth=4, window=40, tokens=some(model) if trimmed else None)
    head.module.scale.copy_(torch.tensor([2.0, 0.5, 4.0]))  # type: ignore[operator]
    write_speculators(tmp_path, head, model, "tiny")
    raw = json.loads((tmp_path / "config.json").read_text())
    back, ours = load_eagle3(tmp_path, raw, model), eagle3_of(model, head)
    assert back.weights.keys() == ours.weights.keys()
    for name, value in ours.weights.items():
        assert torch.equal(value, back.weights[name]), name
    assert (back.layers, back.depth, back.config.context) == (ours.layers, 4, 40)
    assert (
        back.tokens is None
        if ours.tokens is None
        else (back.tokens is not None and torch.equal(back.tokens, ours.tokens))
    )
    assert raw["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]


def test_an_mtp_head_comes_back_from_speculators_layout(model: Model, tmp_path: Path) -> None:
    head = shaken("fastmtp", model, depth=4, window=40)
    write_speculators(tmp_path, head, model, "tiny")
    drafter, ours = parse(str(tmp_path)).make(model), drafter_of(model, head)
    assert isinstance(drafter, PublishedMtp)
    assert isinstance(ours, TrainedMtp)
    assert drafter.head.decoder.shape == ours.head.decoder.shape
    for one, other in zip(drafter.head.decoder.tensors(), ours.head.decoder.tensors(), strict=True):
        assert torch.equal(one, other)
    written = []
    for each in (drafter, ours):
        made = engine(model, each, draft_tokens=4)
        session = made.open(prompts(1)[0], raw=True, max_new_tokens=30)
        for _ in made.prefill(session):
            pass
        while session.finish_reason is None:
            made.step([session])
        written.append((session.tokens, session.stats.steps))
    assert written[0] == written[1]
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["transformer_layer_config"]["hidden_size"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=r"The head in .* wide, for 96 tokens; tiny is"):
        parse(str(tmp_path)).make(model)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_speculators_gives_the_same_logits(deep: tuple[Model, Path], tmp_path: Path) -> None:
    """Their loader takes the folder; all depths of an EAGLE-3 head with the true tokens, and an MTP head's chains."""
    speculators = pytest.importorskip("speculators")
    model, folder = deep
    tokens = [5 + (7 * i) % 60 for i in range(30)]
    for kind in KINDS:
        head = shaken(kind, model, depth=3, tokens=some(model) if kind == "eagle3" else None)
        write_speculators(tmp_path / kind, head, model, str(folder))
        config: Any = speculators.SpeculatorModelConfig.from_pretrained(str(tmp_path / kind))
        config.transformer_layer_config._attn_implementation = "eager"  # the other one wants blocks of 128 rows
        theirs: Any = speculators.SpeculatorModel.from_pretrained(str(tmp_path / kind), config=config).eval()
        seen = see(model, tokens, 4, head.reads(model))
        batch, _ = batch_of(model, [seen], head.reads(model))
        with torch.no_grad():
            outs = list(head.module.outputs(batch))
            ours = [head.module.norm(out.hidden) @ head.rows(model).T for out in outs]
            compare = _eagle_logits if kind == "eagle3" else _mtp_logits
            for want, got in zip(ours, compare(theirs, model, head, batch), strict=True):
                torch.testing.assert_close(got[:, : want.shape[1]], want[:, : got.shape[1]], atol=2e-4, rtol=1e-4)


def _eagle_logits(theirs: Any, model: Model, head: Trained, batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    theirs.lm_head.register_forward_hook(lambda module, given, made: found.append(made))
    features, tokens = batch.read(head.module.reads)[:, :-1], _tokens(model, batch)[:, 1:]
    theirs(features, tokens, torch.zeros_like(tokens), ttt_steps=head.depth)
    return [made[:, : made.shape[1] - i] for i, made in enumerate(found)]


def _mtp_logits(theirs: Any, model: Model, head: Trained, batch: Batch) -> list[torch.Tensor]:
    """Of each depth, at the places of its chains: their layer over the text up to a place and the chain behind it."""
    layer, tokens, made = theirs.mtp_layers[0], _tokens(model, batch), []
    length = tokens.shape[1] - 1
    entered = model.decoder.normed(batch.states[model.decoder.config.layers])[:, :-1]
    for depth in range(head.depth):
        rows = []
        for place in range(length - depth):
            states, after = entered[:, : place + 1], tokens[:, 1 : place + 2 + depth]
            for _ in range(depth + 1):
                n = states.shape[1]
                mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
                turn = theirs.rotary_emb(states, torch.arange(n)[None])
                out = layer(states, theirs.embed_tokens(after[:, :n]), attention_mask=mask, position_embeddings=turn)
                states = torch.cat((states, out[:, -1:]), 1)
            rows.append(theirs.lm_head(out[:, -1]))
        made.append(torch.stack(rows, 1))
    return made


def _tokens(model: Model, batch: Batch) -> torch.Tensor:
    """The tokens whose embeddings a batch has."""
    table = model.decoder.embed(torch.arange(model.decoder.config.vocabulary))
    return (batch.embedded[0] @ table.T - table.square().sum(-1) / 2).argmax(-1)[None]


def test_an_eagle_head_lies_in_llama_cpp_s_layout(tmp_path: Path) -> None:
    import gguf

    write_target(oracle("llama", num_hidden_layers=8), tmp_path / "target.gguf")
    model = open_model(str(tmp_path / "target.gguf"), dtype="fp32", device="cpu").load()
    head = shaken("eagle3", model, tokens=some(model))
    write_gguf(tmp_path / "draft.gguf", head, model)
    fields = read_header(tmp_path / "draft.gguf").fields
    assert fields["eagle3.target_layers"] == list(head.reads(model))
    assert fields["tokenizer.ggml.tokens"] == read_header(tmp_path / "target.gguf").fields["tokenizer.ggml.tokens"]
    held = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "draft.gguf").tensors}
    ours = eagle3_of(model, head)
    assert torch.equal(held["fc.weight"], ours.weights["fc.weight"])
    assert torch.equal(held["d2t"], some(model))
    queries = held["blk.0.attn_q.weight"].view(ours.config.heads, -1, 2, 2 * ours.config.width)
    own = ours.weights["self_attn.q_proj.weight"]
    assert torch.equal(queries.transpose(1, 2).reshape(own.shape), own)
    with pytest.raises(UsageError, match=r"llama.cpp has no draft of a head of the kind fastmtp"):
        write_gguf(tmp_path / "x.gguf", new_head("fastmtp", model), model)


def test_the_command_exports(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", context=256)
    model = open_model(str(folder), dtype="fp32", device="cpu").load()
    for kind in ("eagle3", "clover2"):
        save_head(tmp_path / kind, new_head(kind, model, depth=3), model)
    wanted = ["-m", str(folder), "-o", str(tmp_path / "out"), "--dtype", "fp32"]
    made = inside(["export", str(tmp_path / "eagle3"), "--to", "speculators", *wanted], tmp_path)
    assert (made.code, made.out) == (0, f"Kept in {tmp_path / 'out'}\n".encode()), made.err
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["speculators_config"]["verifier"]["name_or_path"] == str(folder)
    for to, kind, word in (
        ("speculators", "clover2", "`speculators` has no type for a head of the kind clover2"),
        ("gguf", "eagle3", "lies in no GGUF file"),
        ("vllm", "clover2", "gives a proposer of one's own (custom_class) the tokens and no hidden states"),
        ("vllm", "eagle3", "take --to speculators"),
        ("onnx", "eagle3", "There is no layout 'onnx'"),
    ):
        refused = inside(["export", str(tmp_path / kind), "--to", to, *wanted], tmp_path)
        assert refused.code == 2, (to, refused.err)
        assert word in refused.err
