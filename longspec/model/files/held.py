"""A checkpoint in memory: a model object of transformers, and its tokenizer.

Takes what a program has loaded or trained; gives what a folder of it would give. Where transformers saves weights under
other names than it holds them, the tensors that are missing are named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longspec.errors import ModelError, UsageError
from longspec.model.files.checkpoint import Checkpoint
from longspec.model.files.store import Report, quiet

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from longspec.model.weights.read import Weights
    from longspec.model.weights.scheme import Scheme

__all__ = ["Held"]


@dataclass(frozen=True)
class Held(Checkpoint):
    """A PreTrainedModel and its PreTrainedTokenizerFast. Weights of the wanted dtype are used where they are."""

    model: Any = None
    spelling: Any = None  # the tokenizer

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Held:
        """Raises UsageError where they aren't such objects."""
        if not hasattr(model, "state_dict") or not hasattr(getattr(model, "config", None), "to_json_string"):
            raise UsageError(f"A model is a name or a model object of transformers, and not {type(model).__name__}.")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UsageError("A model object needs tokenizer=, a fast tokenizer of transformers (AutoTokenizer's).")
        return cls(getattr(model.config, "name_or_path", "") or type(model).__name__, model=model, spelling=tokenizer)

    def config(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        return made

    def scheme(self) -> Scheme | None:
        if getattr(self.model.config, "quantization_config", None):
            raise ModelError(f"{self.name} is quantized in memory; load its files by their name.")
        return None

    def generation_config(self) -> dict[str, Any]:
        found = getattr(self.model, "generation_config", None)
        made: dict[str, Any] = {} if found is None else json.loads(found.to_json_string())
        return {name: value for name, value in made.items() if value is not None}

    def tokenizer_config(self) -> dict[str, Any]:
        return dict(self.spelling.special_tokens_map)

    def chat_template(self) -> str | None:
        template = self.spelling.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        return template if isinstance(template, str) else None

    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.spelling.backend_tokenizer.to_str())  # the program's own stays as it is
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def coded(self) -> bool:
        return False

    @property
    def recoded(self) -> list[str]:
        return []

    @property
    def format(self) -> str:
        return f"{str(self.model.dtype).removeprefix('torch.')}, {self.model.dtype.itemsize * 8} bits a weight"

    def weights(self, dtype: torch.dtype, report: Report = quiet, *, coded: bool = False) -> Weights:
        from longspec.model.weights.read import Weights

        self.scheme()
        return Weights.of_tensors({name: each.detach() for name, each in self.model.state_dict().items()}, dtype)
