"""What a hybrid's own head drafts: trains a small one with its head, and writes with `--drafter mtp` and without.

    PYTHONPATH=tests python docs/benchmarks/hybrid_head.py --folder build/head --output docs/benchmarks/hybrid_head.json

Transformers' Qwen3.5 of four layers (three gated delta nets, one attention), 256 wide, and a head in the checkpoint's
layout (Qwen3.5's `mtp`), both trained at once by one thread on the text of Python's own language reference (pydoc's
topics), letter by letter; the last twentieth is held out. The head learns two depths, the second one behind its own
output. Where the folder holds a model it is taken as it is.

Each prompt is held-out text; `tokens_per_step` is over all of them. `chain` drafts two tokens, `tree` six nodes of the
same depth; the texts are plain decoding's.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from looped import NAMES, PROMPT, TOKENS, WAYS, texts
from safetensors.torch import load_file, save_file
from support.letters import tokenizer_of
from torch import Tensor, nn

from longspec.drafters.common.tree_growth import grow
from longspec.drafters.heads.mtp import Multitoken
from longspec.engine.engine import Engine
from longspec.heads.published.mtp import load_mtp
from longspec.model.load import open_model
from longspec.types import Draft, Writing

ROWS, BATCH, RATE = 128, 8, 2e-3
DEPTH = 2
HEAD = 0.3  # weight of the head's losses beside the model's
CONFIG: dict[str, Any] = {
    "vocab_size": len(NAMES),
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "max_position_embeddings": 2048,
    "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Head(nn.Module):
    """The block behind the layers, of transformers' own parts, with the checkpoint's names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.qwen3_5 import modeling_qwen3_5 as parts

        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            parts.Qwen3_5RMSNorm(width, eps=eps) for _ in range(3)
        )
        self.layers = nn.ModuleList([parts.Qwen3_5DecoderLayer(config, config.layer_types.index("full_attention"))])
        self.rotary = [parts.Qwen3_5TextRotaryEmbedding(config)]  # no part of the checkpoint

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Normed outputs [b, r, width], of normed states and the embeddings of the tokens behind them."""
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(states)), -1))
        at = torch.arange(x.shape[1]).view(1, 1, -1).expand(3, x.shape[0], -1)
        turned = self.rotary[0](x, at)
        made: Tensor = self.norm(self.layers[0](x, position_embeddings=turned, attention_mask=None))
        return made


def losses(model: Any, head: Head, tokens: Tensor) -> list[Tensor]:
    """Nats of the next token, and a share of those at each depth of the head, the second one fed with the first's
    output.
    """
    table, size = model.model.embed_tokens, tokens.shape[1] - 1
    state = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    made = []
    for depth in range(DEPTH + 1):
        logits = model.lm_head(state[:, : size - depth]).float()
        own = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 + depth :].flatten())
        made.append(own if depth == 0 else HEAD * own)
        if depth < DEPTH:
            state = head(state[:, : size - depth - 1], table(tokens[:, 1 + depth : -1]))
    return made


def fit(weights: Sequence[Tensor], losses: Callable[[Tensor], list[Tensor]], seconds: float) -> dict[str, Any]:
    """Train for so many seconds of the process's own time on the sum of these losses of tokens [b, r + 1]; says what
    the training was.
    """
    text, began, step, seen = torch.tensor(texts()[0]), time.process_time(), 0, [0.0]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.02)
    while (share := (time.process_time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * max(0.02, 1 - share)
        starts = torch.randint(0, len(text) - ROWS - 1, (BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            each = losses(text[starts[:, None] + torch.arange(ROWS + 1)])
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step, seen = step + 1, [round(loss.item(), 3) for loss in each]
        if step % 50 == 0:
            print(f"step {step}, {100 * share:.0f} %: {seen}", flush=True)
    count = sum(weight.numel() for weight in weights)
    return {
        "parameters": count,
        "steps": step,
        "letters": step * ROWS * BATCH,
        "cpu_seconds": round(seconds),
        "last_losses": seen,
    }


def begin(model: nn.Module) -> None:
    """Weights to begin with."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "conv1d" not in name:
            nn.init.normal_(weight, 0.0, 0.05)


def train(folder: Path, seconds: float) -> dict[str, Any]:
    """Write the model and its head; what their training was."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**CONFIG)
    model = transformers.Qwen3_5ForCausalLM(config)
    head = Head(config)
    begin(model)
    begin(head)
    said = fit([*model.parameters(), *head.parameters()], lambda tokens: losses(model, head, tokens), seconds)
    model.save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    own = {f"mtp.{name}": tensor.clone() for name, tensor in head.state_dict().items()}
    save_file({**held, **own}, folder / "model.safetensors", {"format": "pt"})
    tokenizer_of(NAMES).save(str(folder / "tokenizer.json"))
    (folder / "training.json").write_text(json.dumps(said))
    return said


class Chain(Multitoken):
    """Drafts the best token of each depth, and no other."""

    @torch.inference_mode()
    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return grow(self, sessions, self._follow.rooms(sessions, limits), ahead, depth=self._depth, breadth=1)


def write(engine: Engine, prompts: list[str], way: dict[str, Any]) -> dict[str, Any]:
    written, steps, cpu = [], 0, 0.0
    for prompt in prompts:
        session = engine.open(prompt, raw=True, max_new_tokens=TOKENS, **way)
        for _ in engine.prefill(session):
            pass
        began = time.process_time()
        while session.finish_reason is None:
            engine.step([session])
        cpu += time.process_time() - began
        written.append([*session.answer])
        steps += session.stats.steps
    tokens = sum(map(len, written))
    return {"written": written, "tokens_per_step": round(tokens / steps, 3), "cpu_ms": round(1e3 * cpu / tokens, 3)}


def measure(folder: Path, dtype: str, count: int) -> list[dict[str, Any]]:
    """Each way to draft beside plain decoding, over so many prompts from the held-out text."""
    model, held_out = open_model(str(folder), dtype=dtype).load(), texts()[1]
    head, found = load_mtp(model), []
    ways: dict[str, tuple[Any, int]] = {
        "none": ("none", 1),
        "chain": (Chain(model, head, DEPTH), DEPTH),
        "tree": (Multitoken(model, head, DEPTH), 6),
    }
    prompts = [held_out[at : at + PROMPT] for at in range(0, len(held_out) - PROMPT, len(held_out) // count)][:count]
    for way, options in WAYS.items():
        plain: list[list[int]] = []
        for name, (drafter, most) in ways.items():
            engine = Engine(model, drafter=drafter, control="fixed", draft_tokens=most)
            made = write(engine, prompts, options)
            written = made.pop("written")
            plain = plain or written
            equal = sum(one == other for one, other in zip(plain, written, strict=True))
            found.append({"dtype": dtype, "way": way, "drafts": name, "equal_texts": equal, "texts": count, **made})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="of training, of the process's own time")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = given.folder / "training.json"
    training = json.loads(kept.read_text()) if kept.exists() else train(given.folder, given.seconds)
    with torch.inference_mode():
        results = [row for dtype in ("bf16", "fp32") for row in measure(given.folder, dtype, given.texts)]
    told = {
        "what": f"a small hybrid with its own head as drafter: {TOKENS} letters behind {PROMPT} of held-out text",
        "config": CONFIG,
        "training": training,
        "results": results,
        "hardware": {"machine": platform.machine(), "threads": 1},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if given.output:
        given.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
