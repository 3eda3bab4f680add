"""An engine for your own Ray Data pipelines: a column of prompts in, columns of answers out.

    dataset.map_batches(
        longspec.ray.Writer,
        fn_constructor_kwargs={"model": "smollm2", "max_new_tokens": 64},
        batch_size=32,
        num_cpus=4,
        compute=ray.data.ActorPoolStrategy(size=2, enable_true_multi_threading=True),
        max_concurrency=4,
    )

Several calls at a time share the engine's passes, so that none of them ends with a pass that is nearly empty. Knows no
Ray: it can be called with plain columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Unpack

from longspec.batch.records import Written
from longspec.batch.requests import Fault, Item, request
from longspec.engine.engine import Engine
from longspec.engine.options import Options, check_options
from longspec.errors import UsageError
from longspec.ray.shared import Shared

__all__ = ["Writer"]


class Writer:
    """Loads a model, and writes an answer to every row that it is called with.

    model: as for `Engine.load`, whose further keywords are `engine`. column: that of the prompts, each a text or a list
    of messages. ids: that of the ids by which the sampling noise is keyed; where there is none it is keyed by the
    prompt, so that a text depends neither on its place nor on who wrote it. width: texts in a pass. options: of all
    answers.

    The columns `text`, `reasoning`, `finish_reason`, `prompt_tokens`, `completion_tokens` and `error` are added; a row
    that can't be answered has its reason in `error`, and None in the others.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        column: str = "prompt",
        ids: str = "id",
        width: int | None = None,
        engine: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        check_options(options)
        self.column = column
        self.ids = ids
        self._shared = Shared(Engine.load(model, **(engine or {})), options, width)
        self._numbers = count()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """The batch's columns with those of the answers. UsageError: it has no column of prompts."""
        if self.column not in batch:
            raise UsageError(f"There is no column {self.column!r}; there are: {', '.join(batch)}. Name it by `column`.")
        names = batch.get(self.ids)
        records = [
            self._record(prompt, None if names is None else names[i]) for i, prompt in enumerate(batch[self.column])
        ]
        answers = [_columns(result) for result in self._shared.write(records)]
        return {**batch, **{name: [answer.get(name) for answer in answers] for name in _COLUMNS}}

    def _record(self, prompt: Any, name: Any) -> Item | Fault:
        prompt, name = (value.tolist() if hasattr(value, "tolist") else value for value in (prompt, name))
        if name is None:
            name = hashlib.blake2b(json.dumps(prompt, default=repr).encode(), digest_size=16).hexdigest()
        kind = "prompt" if isinstance(prompt, str) else "messages"
        return request(next(self._numbers), 0, {"id": name, kind: prompt})


_COLUMNS = ("text", "reasoning", "finish_reason", "prompt_tokens", "completion_tokens", "error")


def _columns(result: Written | Fault) -> dict[str, Any]:
    if isinstance(result, Fault):
        return {"error": result.reason}
    answer = result.answer
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.usage["prompt_tokens"],
        "completion_tokens": answer.usage["completion_tokens"],
    }
