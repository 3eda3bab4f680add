"""Heads for multi-token prediction: drafts by the equations, their bytes, and what is said where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.checkpoints import add_head, load, oracle, write
from support.commands import write_tiny
from support.engines import engine, finish, of_folder, prompts, tiny, vocabulary, with_heads
from support.ggufs import write_gguf
from support.native import SIZES, coded
from support.planted import planted_head
from torch import Tensor

from longspec.drafters.heads.mtp import Multitoken
from longspec.drafters.spec import parse
from longspec.engine.engine import Engine
from longspec.errors import ModelError, UsageError
from longspec.heads.published.mtp import load_mtp, room
from longspec.memory.plan import choice, request_of
from longspec.model.config import Config
from longspec.model.decoder import Decoder
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.load import Model, open_model

LAYOUTS = {"qwen3_5": "qwen", "llama": "deepseek"}
GGUF_NAMES = {
    "fc": "nextn.eh_proj", "pre_fc_norm_embedding": "nextn.enorm", "pre_fc_norm_hidden": "nextn.hnorm",
    "norm": "nextn.shared_head_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"}, "self_attn.o_proj": "attn_output",
    **{f"self_attn.{name}_norm": f"attn_{name}_norm" for name in "qk"},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}  # fmt: skip


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspec.drafters.common.tree_growth.FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.BREADTH", 1)


class Naive:
    """The head's equations, a whole text at once, on the tensors as the file has them."""

    def __init__(self, folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        held = load_file(folder / "model.safetensors")
        qwen = "mtp.fc.weight" in held
        at = "mtp." if qwen else f"model.layers.{raw['num_hidden_layers']}."
        self.block = f"{at}layers.0." if qwen else at
        names = ["eh_proj", "enorm", "hnorm", "shared_head.norm"]
        if qwen:
            names = ["fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"]
        self.names = [at + name for name in names]
        self.held, self.raw, self.qwen = held, raw, qwen

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.held[f"{name}.weight"] + (1 if self.qwen else 0)
        scale: Tensor = (x.square().mean(-1, keepdim=True) + self.raw["rms_norm_eps"]).rsqrt()
        return x * scale * weight

    def rotated(self, x: Tensor) -> Tensor:
        """[n, heads, D]."""
        rope = self.raw["rope_parameters"]
        dims = int(x.shape[-1] * rope.get("partial_rotary_factor", 1.0))
        angles = torch.arange(len(x))[:, None] / rope["rope_theta"] ** (torch.arange(0, dims, 2) / dims)
        cos, sin = (torch.cat((f(angles), f(angles)), -1)[:, None] for f in (torch.cos, torch.sin))
        first, rest = x[..., :dims], x[..., dims:]
        turned = torch.cat((-first[..., dims // 2 :], first[..., : dims // 2]), -1)
        return torch.cat((first * cos + turned * sin, rest), -1)

    def layer(self, x: Tensor) -> Tensor:
        w = {name.removeprefix(self.block): tensor for name, tensor in self.held.items() if name.startswith(self.block)}
        n, heads = len(x), self.raw["num_attention_heads"]
        normed = self.norm(f"{self.block}input_layernorm", x)
        q, k, v = (normed @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        gate = None
        if self.qwen:
            q, gate = q.view(n, heads, -1).chunk(2, -1)
        dim = self.raw.get("head_dim") or self.raw["hidden_size"] // heads
        q, k, v = (each.reshape(n, -1, dim) for each in (q, k, v))
        if self.qwen:
            q, k = self.norm(f"{self.block}self_attn.q_norm", q), self.norm(f"{self.block}self_attn.k_norm", k)
        each = heads // k.shape[1]
        k, v = self.rotated(k).repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        scores = torch.einsum("ihd,jhd->hij", self.rotated(q), k) * dim**-0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
        read = torch.einsum("hij,jhd->ihd", scores, v)
        read = (read if gate is None else read * gate.sigmoid()).flatten(1)
        x = x + read @ w["self_attn.o_proj.weight"].T
        normed = self.norm(f"{self.block}post_attention_layernorm", x)
        gated = F.silu(normed @ w["mlp.gate_proj.weight"].T) * (normed @ w["mlp.up_proj.weight"].T)
        return x + gated @ w["mlp.down_proj.weight"].T

    def __call__(self, states: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """The state behind the last token, and its logits."""
        fc, token_norm, state_norm, norm = self.names
        embedded = self.held["model.embed_tokens.weight"][torch.tensor(tokens)]
        both = torch.cat((self.norm(token_norm, embedded), self.norm(state_norm, states)), -1)
        state = self.norm(norm, self.layer(both @ self.held[f"{fc}.weight"].T)[-1:])
        return state, state @ self.held["lm_head.weight"].T


@pytest.mark.parametrize(("family", "named"), [*((family, "mtp") for family in LAYOUTS), ("qwen3_5", "mtp:hot=64")])
def test_a_head_drafts_what_its_equations_say(family: str, named: str, tmp_path: Path, chains: None) -> None:
    """From transformers' states of the text, token by token, each one's state fed back; within 1e-4. A draft vocabulary
    leaves the logits of its tokens as they are.
    """
    reference = oracle(family)
    folder = add_head(write(reference, tmp_path), LAYOUTS[family])
    model = of_folder(folder, ())
    drafter = parse(named).make(model)
    assert isinstance(drafter, Multitoken)
    hot = torch.arange(96) if drafter.head.tokens is None else drafter.head.tokens
    assert len(hot) == (64 if "hot" in named else 96)
    made, seen = engine(model, drafter, draft_tokens=6), []
    session = made.open(prompts(1, 90)[0], raw=True, max_new_tokens=40)
    for _ in made.prefill(session):
        pass
    for _ in range(3):
        made.step([session])
    logits = drafter.logits
    drafter.logits = lambda hidden: (seen.append(logits(hidden)), seen[-1])[1]  # type: ignore[method-assign, func-returns-value]
    (draft,) = drafter.propose([session], [4])
    tokens, naive = list(session.tokens), Naive(folder)
    with torch.no_grad():
        states = reference(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states[-1][0]
        for drafted, own in zip(draft.tokens.tolist(), seen, strict=True):
            state, wanted = naive(states, tokens[1:])
            torch.testing.assert_close(own, wanted[:, hot], rtol=0, atol=1e-4)
            assert drafted == int(hot[wanted[0, hot].argmax()])
            states, tokens = torch.cat((states, state)), [*tokens, drafted]


def test_a_head_that_knows_the_model_is_kept(tmp_path: Path) -> None:
    """Whole drafts of it, and of hot tokens as far as they go: here those of the text that will be written."""
    model = planted_head(tmp_path / "model")
    written, each = {}, {}
    (tmp_path / "seen.txt").write_text(engine(model).generate(prompts(1, 40)[0], raw=True, max_new_tokens=40).text)
    for drafter in ("none", "mtp", "mtp:hot=64", f"mtp:hot=64,text={tmp_path / 'seen.txt'}"):
        made = engine(model, drafter, draft_tokens=4)
        session = made.open(prompts(1, 40)[0], raw=True, max_new_tokens=40)
        written[drafter] = finish(made, [session])
        each[drafter] = session.stats.tokens_per_step
    assert all(texts == written["none"] for texts in written.values())
    plain, whole, _, counted = each.values()
    assert (plain, whole > 3, counted) == (1.0, True, whole)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("hybrid"), "qwen3_5", end_tokens=())


@pytest.mark.parametrize(("cache", "options", "texts"), with_heads(["dense", "int4", "offload"]))
def test_a_head_never_changes_a_text(
    hybrid: Model, cache: str, options: Any, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees of whatever it drafts, likely or not."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.FLOOR", 0.0)
    written = []
    for named in ("none", "mtp"):
        made = engine(hybrid, named, cache=cache, draft_tokens=7)
        asked = enumerate(prompts(texts, 70))
        sessions = [made.open(text, raw=True, max_new_tokens=20, key=str(i), **options) for i, text in asked]
        written.append(finish(made, sessions))
    assert written[0] == written[1]
    assert sum(session.stats.drafted for session in sessions) > 40 * texts


@pytest.mark.parametrize("family", ["qwen3_5", "llama"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_kernels_draft_as_torch_does(family: str, dtype: str, tmp_path: Path, chains: None) -> None:
    """In bf16 and in codes, with the whole vocabulary and a part of it; where a position's bits don't depend on
    others, the text is that of plain decoding.
    """
    heads = {"linear_num_key_heads": 16, "linear_num_value_heads": 16} if family == "qwen3_5" else {}
    folder = add_head(write(oracle(family, **SIZES, **heads), tmp_path), LAYOUTS[family])
    decoder = coded(folder) if dtype == "int8" else load(folder, torch.bfloat16)
    if decoder.slow is not None:
        pytest.skip(decoder.slow)
    made = of_folder(folder, ())
    model = replace(made, dtype=dtype, decoder=decoder)
    written = []
    for named in ("none", "mtp", "mtp:hot=64"):
        drafter = parse(named).make(model)
        running = engine(model, drafter, draft_tokens=4)
        written.append(finish(running, [running.open(prompts(1, 90)[0], raw=True, max_new_tokens=20)]))
        if isinstance(drafter, Multitoken):
            assert drafter.head.decoder.kernel is not None
            x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
            by_kernel = drafter.head.decoder.logits(x).float()
            by_torch = drafter.head.decoder._head(drafter.head.decoder.normed(x)).float()
            assert (by_kernel - by_torch).abs().max() < 0.02 * by_torch.abs().max()
    assert written[0] == written[1] == written[2] or not decoder.is_exact


def test_a_head_of_a_gguf_file_is_the_same(tmp_path: Path) -> None:
    """Its tensors under llama.cpp's names, with the norms' 1 added."""
    model = oracle("qwen3_5-wide")
    folder = add_head(write(model, tmp_path / "folder"), "qwen")

    def with_head(writer: gguf.GGUFWriter) -> None:
        writer.add_nextn_predict_layers(1)
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name.startswith("mtp."):
                stem = name.removeprefix("mtp.layers.0.").removeprefix("mtp.").removesuffix(".weight")
                is_norm = "norm" in stem
                writer.add_tensor(f"blk.4.{GGUF_NAMES[stem]}.weight", (tensor + is_norm).numpy())

    path = write_gguf(model, tmp_path / "a.gguf", with_head, blocks=5)
    heads = []
    for checkpoint in (Checkpoint("folder", folder), Checkpoint("file", gguf=path)):
        config = Config.read(checkpoint.config())
        decoder = Decoder(config, checkpoint.weights(torch.float32), torch.device("cpu"))
        loaded = Model("tiny", "fp32", decoder, vocabulary(96), (), {}, {}, checkpoint=checkpoint)
        head = load_mtp(loaded)
        own = [head.projection.weight, head.token_norm.weight, head.state_norm.weight, *head.decoder.tensors()]
        heads.append(own)
        once, row = room(checkpoint, config, "fp32", torch.device("cpu"))
        assert head.nbytes <= once <= 1.5 * head.nbytes
        assert row == 2 * 2 * 32 * 4
    for one, other in zip(*heads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_head_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, its rows of the output matrix and its cache; `auto` takes it, or says that it isn't there."""
    folder = write_tiny(tmp_path / "model", 500)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_nextn_predict_layers": 1}))

    def planned(drafter: str) -> int:
        return choice(
            request_of(open_model(str(folder), dtype="fp32"), 400, drafter=drafter, texts=2), "dense", 64
        ).need.drafter

    without, made = planned("auto"), Engine.load(str(folder), dtype="fp32")
    assert made.open("a", max_new_tokens=1).notes == [
        f"The config.json of {folder} names an MTP head (num_nextn_predict_layers), and the files hold no tensors of "
        "one; it is drafted for without one"
    ]
    assert made.open("a", max_new_tokens=1).notes == []
    with pytest.raises(ModelError, match="take a repository that kept them"):
        planned("mtp")
    with monkeypatch.context() as patch:
        patch.delattr("longspec.model.load.Opened.load")  # before weights are read
        with pytest.raises(ModelError, match="take a repository that kept them"):
            Engine.load(str(folder), dtype="fp32", drafter="mtp")
    add_head(folder)
    assert planned("auto") == without + planned("mtp")
    made = Engine.load(str(folder), dtype="fp32")
    assert [*made.speculator.drafters] == ["mtp", "recycle+ngram"]
    for named in ("mtp", "mtp:hot=64"):
        made = Engine.load(str(folder), dtype="fp32", drafter=named)
        row = 2 * 2 * 8 * 4
        assert made.speculator.nbytes <= planned(named) - 2 * 400 * row <= 1.5 * made.speculator.nbytes


def test_a_model_without_a_head_says_so(tmp_path: Path) -> None:
    """The tensors decide: what its config names is looked for, and not believed."""
    folder = write(oracle("llama"), tmp_path)
    with pytest.raises(UsageError, match="tiny has no MTP head"):
        engine(of_folder(folder, ()), "mtp")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_nextn_predict_layers": 1}))
    with pytest.raises(
        ModelError, match=r"names an MTP head \(num_nextn_predict_layers\), and the files hold no"
    ) as error:
        engine(of_folder(folder, ()), "mtp")
    assert error.value.exit_code == 3
    held = load_file(add_head(folder) / "model.safetensors")
    del held["model.layers.4.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.4\.mlp\.up_proj\.weight is missing"):
        engine(of_folder(folder, ()), "mtp")
    made = engine(of_folder(folder, ()), "auto")
    assert [*made.speculator.drafters] == ["recycle+ngram"]
    (note,) = made.open("a", raw=True, max_new_tokens=1).notes
    assert "layers.4.mlp.up_proj.weight is missing" in note
