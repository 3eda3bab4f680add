"""What least squares alone make of each kind of head, before a step of training: a row for each kind.

Takes a folder that `longspec train features` wrote; counts on its held-out answers, as a training validates itself,
beside the heads that come along for the model.

    python docs/benchmarks/starts.py --features DIR --output docs/benchmarks/starts.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

import torch

from longspec import __version__
from longspec.heads import KINDS
from longspec.heads.accuracy import accuracies, judged, worth
from longspec.heads.format import Trained, load_head, new_head, shipped
from longspec.machine.system import processor
from longspec.model.load import Model, load_model
from longspec.training.features import Features
from longspec.training.lanes import Lanes
from longspec.training.ridge import begin
from longspec.training.train import Recipe, frequent


def row(name: str, model: Model, head: Trained, features: Features, seconds: float | None) -> dict[str, Any]:
    """seconds: that the start took; None for a head that was trained."""
    held = features.held(head.reads(model))
    began = process_time()
    told = judged(model, head, held)
    head.module.calibrate(told)
    return {
        "head": name,
        "parameters": sum(value.numel() for value in head.module.parameters()),
        "reads": list(head.reads(model)),
        "draft_vocabulary": len(head.rows(model)),
        "tokens_per_step": round(worth(head.module, told), 3),
        "accuracy": accuracies(told),
        "accuracy_among_3": accuracies(told, 3),
        "start_s": seconds,
        "judging_s": round(process_time() - began, 1),
    }


def rows(model: Model, folder: Path) -> Iterator[dict[str, Any]]:
    recipe = Recipe(draft_vocab=8192)
    for name, place in shipped(model).items():
        yield row(
            f"{name}, as it comes along", model, load_head(place, model), Features.open(folder, model, name), None
        )
    for kind in KINDS:
        features, size = Features.open(folder, model, kind), model.decoder.config.vocabulary
        tokens = frequent(features.texts(), recipe.draft_vocab, size, model.end_tokens)
        head = new_head(kind, model, depth=recipe.depth, window=recipe.window, tokens=tokens)
        began = process_time()
        with Lanes() as lanes:
            begin(model, head, features, lanes)
        yield row(kind, model, head, features, round(process_time() - began, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, found = load_model(given.model, dtype="fp32"), list[dict[str, Any]]()
    features = Features.open(given.features, model, "clover2")
    about = {
        "what": "heads as least squares begin them, on answers to held-out prompts; seconds of the process",
        "model": model.name,
        "features": {**features.about, "texts": len(features), "rows": features.rows, "held": len(features.held(()))},
        "processor": processor(),
        "versions": {"longspec": __version__, "torch": torch.__version__},
    }
    for each in rows(model, given.features):
        found.append(each)
        print(json.dumps(each), flush=True)
        given.output.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
