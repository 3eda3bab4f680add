"""What trees would gain in a mixture that chose nodes by the experts that they add to a pass's union.

    PYTHONPATH=tests python docs/benchmarks/union.py --folder build/mixture --output docs/benchmarks/union.json

Trains a small mixture (transformers' Qwen3Moe: 4 layers, 256 wide, 32 experts, 4 to a row) on the text of
`hybrid_head.py`, letter by letter. Behind each of some hundred places of held-out text it lays out a tree of up to 24
nodes by the model's own chances, each times a rate for a drafter that is so often right, runs it in one pass, and keeps
which experts every row went through in every layer. A pass that verifies some of the nodes then brings 1 + (the sum of
their chances) tokens, and takes

    always + expert * (union, the mean of the layers) + row * (rows),    1 for one row

with the shares of Qwen3-30B-A3B in 4 bits. Each policy takes the nodes that are worth their time at its own rate (the
fixed point of Dinkelbach's iteration): `mean` knows what one more row costs on average, as control does; `predicted`
expects a node's experts to be those that its token chose the last time; `oracle` knows them, so that no prediction can
gain more.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hybrid_head import begin, fit
from looped import NAMES, texts
from support.letters import tokenizer_of

from longspec.cache import CACHES
from longspec.model.decoder import Chunk, Decoder, Rows
from longspec.model.layers.moe import Moe
from longspec.model.load import load_model

CONFIG: dict[str, Any] = {
    "vocab_size": len(NAMES),
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": 0.01,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = 0.58  # of what a pass of one row reads: 48 layers of 8 experts, beside attention, routers and the head
ROW = 0.02  # of a further row's products, in passes of one row
BREADTH, LEVELS, WIDEST = 4, 4, 8  # children of a node, depth, and nodes of a depth
CONTEXT = 128
RATES = (0.5, 0.7, 0.9)


def train(folder: Path, seconds: float) -> dict[str, Any]:
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**CONFIG))
    begin(model)

    def losses(tokens: torch.Tensor) -> list[torch.Tensor]:
        return [model(input_ids=tokens, labels=tokens, output_router_logits=True).loss]

    said = fit([*model.parameters()], losses, seconds)
    model.save_pretrained(folder)
    tokenizer_of(NAMES).save(str(folder / "tokenizer.json"))
    (folder / "training.json").write_text(json.dumps(said))
    return said


class Noted:
    """What routers chose, pass by pass."""

    def __init__(self) -> None:
        self.chosen: list[np.ndarray] = []
        route, noted = Moe.route, self

        def noting(moe: Moe, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            chosen, weights = route(moe, x)
            noted.chosen.append(chosen.numpy().copy())
            return chosen, weights

        Moe.route = noting  # type: ignore[method-assign]

    def take(self) -> np.ndarray:
        """[rows, layers, chosen] of the last pass."""
        made = np.stack(self.chosen, 1)
        self.chosen.clear()
        return made


@dataclass(frozen=True)
class Tree:
    """Node i continues node parents[i], or the text's last token; with chances of single steps."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    chances: np.ndarray  # of a path, by the model
    experts: np.ndarray  # [1 + nodes, layers, chosen], the text's last token first
    before: np.ndarray  # [1 + nodes, layers, chosen]: the same of each token's last place in the text


def trees(decoder: Decoder, text: list[int], count: int, noted: Noted) -> Iterator[Tree]:
    last: dict[int, np.ndarray] = {}
    for start in range(0, count * CONTEXT, CONTEXT):
        cache: Any = CACHES["dense"](decoder.shape)
        stage, _ = _run(decoder, cache.open(), text[start : start + CONTEXT], range(-1, CONTEXT - 1), 0)
        cache.commit(stage, range(CONTEXT))
        last |= dict(zip(text[start : start + CONTEXT], noted.take(), strict=True))
        yield _grown(decoder, cache, text[start + CONTEXT], noted, last)


def _run(decoder: Decoder, stage: Any, tokens: Any, parents: Any, length: int) -> tuple[Any, torch.Tensor]:
    chunk = Chunk(stage, stage.add(parents), [*tokens], length, False)
    logits = decoder.logits(decoder.forward(Rows.of([chunk], decoder.device)))
    return stage, logits.float().softmax(-1)


def _grown(decoder: Decoder, cache: Any, root: int, noted: Noted, last: dict[int, np.ndarray]) -> Tree:
    stage, length = cache.open(), cache.length
    _, chances = _run(decoder, stage, [root], [-1], length)
    experts, paths, level = [noted.take()], [1.0], [0]
    tokens, parents, depths = [root], [-1], [0]
    for depth in range(1, LEVELS + 1):
        found = []
        for node, row in zip(level, chances, strict=True):
            best = row.topk(BREADTH)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            found += [(paths[node] * chance, node, token) for chance, token in pairs]
        found = sorted(found, reverse=True)[:WIDEST]
        level = [*range(len(tokens), len(tokens) + len(found))]
        tokens += [token for _, _, token in found]
        parents += [node for _, node, _ in found]
        paths += [chance for chance, _, _ in found]
        depths += [depth] * len(found)
        _, chances = _run(decoder, stage, [t for _, _, t in found], [node for _, node, _ in found], length)
        experts.append(noted.take())
    known = np.concatenate(experts)
    before = np.stack([last.get(token, known[0]) for token in tokens])
    before[0] = known[0]  # what the text's last token chooses is its own price in any case
    return Tree(tokens, parents, depths, np.array(paths), known, before)


def unions(experts: np.ndarray, chosen: list[int]) -> float:
    """Experts that these rows go through, on average over the layers."""
    return float(np.mean([len(np.unique(experts[chosen, layer])) for layer in range(experts.shape[1])]))


def seconds(union: float, rows: int, always: float, each: float) -> float:
    return always + each * union + ROW * (rows - 1)


def taken(tree: Tree, worth: np.ndarray, price: float, policy: str, mean: np.ndarray, each: float) -> list[int]:
    """Rows that are verified, the text's last token first: the best one more, as long as it is worth its time."""
    chosen, known = [0], tree.before if policy == "predicted" else tree.experts
    union = unions(known, chosen)
    while True:
        best, at, grown = 0.0, -1, 0.0
        for node in range(1, len(tree.tokens)):
            if node in chosen or tree.parents[node] not in chosen:
                continue
            if policy == "mean":
                new = mean[len(chosen) + 1] - mean[len(chosen)]
            else:
                new = unions(known, [*chosen, node]) - union
            if (value := float(worth[node]) - price * (each * new + ROW)) > best:
                best, at, grown = value, node, new
        if at < 0:
            return chosen
        chosen.append(at)
        union += grown


def rate(found: list[Tree], right: float, policy: str, mean: np.ndarray) -> dict[str, float]:
    """Tokens per pass of one row, at the policy's own fixed point."""
    chosen_experts = CONFIG["num_experts_per_tok"]
    each, always, price, told = EXPERTS / chosen_experts, 1 - EXPERTS, 1.0, {}
    for _ in range(4):
        tokens = spent = rows = 0.0
        for tree in found:
            worth = tree.chances * right ** np.array(tree.depths)
            own = taken(tree, worth, price, policy, mean, each)
            tokens += float(worth[own].sum())  # the last token's is 1: the one that any pass brings
            spent += seconds(unions(tree.experts, own), len(own), always, each)
            rows += len(own)
        price = tokens / spent
        told = {"rate": round(price, 4), "tokens": round(tokens / len(found), 3), "rows": round(rows / len(found), 2)}
    return told


def explained(found: list[Tree]) -> dict[str, float]:
    """What a node adds to the union of those before it: its spread, and how well it is foretold."""
    pairs = [
        [unions(known, [*range(node + 1)]) - unions(known, [*range(node)]) for known in (tree.experts, tree.before)]
        for tree in found
        for node in range(1, min(9, len(tree.tokens)))
    ]
    true, told = np.array(pairs).T
    return {
        "new_experts_of_a_row": round(float(true.mean()), 3),
        "deviation": round(float(true.std()), 3),
        "correlation_with_predicted": round(float(np.corrcoef(true, told)[0, 1]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="of training, of the process's own time")
    parser.add_argument("--places", type=int, default=120)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = given.folder / "training.json"
    training = json.loads(kept.read_text()) if kept.exists() else train(given.folder, given.seconds)
    noted, text = Noted(), [NAMES.index(letter) for letter in texts()[1]]
    with torch.inference_mode():
        decoder = load_model(str(given.folder), dtype="bf16").decoder
        found = [*trees(decoder, text, min(given.places, (len(text) - 1) // CONTEXT), noted)]
    most = 2 + max(len(tree.tokens) for tree in found)
    mean = np.array(
        [
            0.0,
            *(
                np.mean([unions(tree.experts, [*range(min(n, len(tree.tokens)))]) for tree in found])
                for n in range(1, most)
            ),
        ]
    )
    results = []
    for right in RATES:
        each = {policy: rate(found, right, policy, mean) for policy in ("mean", "predicted", "oracle")}
        over = {
            f"{name}_over_mean": round(each[name]["rate"] / each["mean"]["rate"], 4) for name in ("predicted", "oracle")
        }
        results.append({"right": right, **each, **over})
        print(json.dumps(results[-1]), flush=True)
    told = {
        "config": CONFIG,
        "training": training,
        "places": len(found),
        "union_by_rows": [round(float(each), 2) for each in mean[1:17]],
        "rows": explained(found),
        "results": results,
        "hardware": {"machine": platform.machine(), "threads": 1},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    print(json.dumps(told["rows"]))
    if given.output:
        given.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
