"""Engines on tiny models, and drafters made to be hard on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import add_head, load, oracle, write
from support.letters import TEMPLATE, tokenizer_of

from longspec.drafters import DRAFTERS
from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.load import Model
from longspec.text.tokenizer import Vocabulary
from longspec.types import Draft, Drafter, Writing


def vocabulary(size: int, template: str = TEMPLATE) -> Vocabulary:
    """Token i is one printable character; 0 to 2 are special, 2 ends a text."""
    names = ["<pad>", "<s>", "</s>", *(chr(48 + i) for i in range(size - 3))]
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return Vocabulary(tokenizer_of(names), special, template)


def tiny(
    folder: Path, family: str = "llama", end_tokens: tuple[int, ...] = (2,), *, strict: bool = False, **changes: Any
) -> Model:
    """A model with random weights, and an MTP head where its family may have one."""
    written = write(oracle(family, **changes), folder)
    if family != "ouro":  # no head was made for a looped model
        add_head(written, "qwen" if family == "qwen3_5" else "deepseek")
    return of_folder(written, end_tokens, strict=strict)


def of_folder(folder: Path, end_tokens: tuple[int, ...], *, strict: bool = False) -> Model:
    """What `tiny` wrote, without transformers, whose import takes a new process two seconds."""
    decoder = load(folder, strict=strict)
    return Model(
        "tiny", "fp32", decoder, vocabulary(decoder.config.vocabulary), end_tokens, {}, {},
        checkpoint=Checkpoint("tiny", folder),
    )  # fmt: skip


def engine(model: Model, drafter: str | Drafter = "none", **options: Any) -> Engine:
    if "cache" in options:
        kind, _, rows = options["cache"].partition(" ")
        options |= {"cache": kind, "all_rows": bool(rows)}
    if isinstance(drafter, str) and "model" in drafter:
        options["options"] = {"draft": model}
    options.setdefault("control", "fixed")  # always as much as it may, whether it pays or not
    return Engine(model, drafter=drafter, **options)


class RandomTrees(Drafter):
    """Long random trees in which the right continuation is often hidden; `texts` are the right ones, by session key."""

    def __init__(self, texts: dict[str, list[int]], seed: int = 0, right: float = 0.7) -> None:
        self.texts, self.right = texts, right
        self.random = random.Random(seed)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return [self._tree(session, limit) for session, limit in zip(sessions, limits, strict=True)]

    def _tree(self, session: Writing, limit: int) -> Draft:
        rest = self.texts.get(session.key, [])[len(session.tokens) :]
        tokens: list[int] = []
        parents: list[int] = []
        right = [-1]  # nodes on the right path
        for i in range(self.random.randint(0, limit)):
            if self.random.random() < self.right and len(right) <= len(rest):
                parents.append(right[-1])
                tokens.append(rest[len(right) - 1])
                right.append(i)
            else:
                parents.append(self.random.randint(-1, i - 1))
                tokens.append(self.random.randrange(3, 90))
        return Draft.tree(tokens, parents)


def every_drafter(texts: dict[str, list[int]], family: str | None = None) -> dict[str, Callable[[], str | Drafter]]:
    """All listed drafters but `none`, some over others, and three that need the answer to be known; those that fit a
    family's models, if one is named.
    """
    names = [name for name in DRAFTERS if family is None or fits(name, family)] + ["skip+ngram", "model+skip+ngram"]
    listed: dict[str, Callable[[], str | Drafter]] = {name: partial(str, name) for name in names if name != "none"}
    return {
        **listed,
        "random trees": lambda: RandomTrees(texts),
        "always right": lambda: RandomTrees(texts, right=1.0),
        "always wrong": lambda: RandomTrees({}),
    }


def fits(drafter: str, family: str) -> bool:
    """Whether a drafter can be had for a family's models: only a looped one's tokens run beside each other, and it has
    no MTP head.
    """
    return drafter != ("mtp" if family == "ouro" else "pipeline")


_WITH_HEADS = ("dense", True, 8), ("int4", True, 8), ("dense", False, 1)


def with_heads(caches: Iterable[str]) -> list[Any]:
    """Parameters cache, options and texts, for heads: the dense cache and int4 sampled with 8 texts, the dense one
    greedily with 1; the rest is left to the full matrix.
    """
    return [
        pytest.param(
            cache,
            {"temperature": 0.8, "top_p": 0.9, "seed": 3} if sampled else {},
            texts,
            id=f"{cache}-{'sampled' if sampled else 'greedy'}-{texts}",
            marks=[] if (cache, sampled, texts) in _WITH_HEADS else pytest.mark.full,
        )
        for cache, sampled, texts in product(caches, (False, True), (1, 8))
    ]


def finish(made: Engine, sessions: Sequence[Session]) -> list[list[int]]:
    """Write all sessions side by side to their ends: prompt and answer of each."""
    for session in sessions:
        for _ in made.prefill(session):
            pass
    while unfinished := [session for session in sessions if session.finish_reason is None]:
        made.step(unfinished)
        for session in unfinished:
            assert 0 <= session.cache.length < len(session.tokens)
    return [session.tokens for session in sessions]


def prompts(count: int, length: int = 150) -> list[str]:
    """Raw prompts that repeat themselves, so that n-grams find something; of different lengths."""
    generator = torch.Generator().manual_seed(11)
    texts = []
    for i in range(count):
        phrase = torch.randint(3, 60, (9 + i,), generator=generator).tolist()
        texts.append("".join(chr(45 + token) for token in (phrase * 40)[: length + 17 * i]))
    return texts
