"""A model object of transformers, and what its folder would give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import oracle
from support.letters import TEMPLATE, tokenizer_of

from longspec.engine.engine import Engine
from longspec.errors import UsageError


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_object_writes_what_transformers_writes(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    names = ["<pad>", "<s>", "</s>", *(chr(48 + i) for i in range(87))]
    model = oracle(family, vocab_size=90)
    spelling = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(names), eos_token="</s>", chat_template=TEMPLATE
    )
    engine = Engine.load(model, tokenizer=spelling, dtype="fp32", drafter="ngram")
    prompt = engine.model.vocabulary.encode("ABCABC" * 9, add_special=True)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    answer = engine.generate("ABCABC" * 9, raw=True, max_new_tokens=20, temperature=0)
    assert list(answer.tokens) == theirs
    assert engine.generate("A", max_new_tokens=3).tokens
    with pytest.raises(UsageError, match="needs tokenizer="):
        Engine.load(model)
    with pytest.raises(UsageError, match="not Linear"):
        Engine.load(torch.nn.Linear(1, 1))


def test_its_plan_is_made_as_for_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = ["<pad>", "<s>", "</s>", *(chr(48 + i) for i in range(87))]
    spelling = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(names), eos_token="</s>")
    engine = Engine.load(oracle("llama", vocab_size=90), tokenizer=spelling, dtype="fp32", memory="8GiB", tokens=200)
    assert engine.plan is not None
