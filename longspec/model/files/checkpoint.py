"""A checkpoint: the files of one model, and their contents.

Takes a folder in Hugging Face's layout, a GGUF file, or both (a pulled model: config and tokenizer in the folder,
weights converted from the file once per dtype). Gives its config, templates, tokenizer and weights; doesn't know
where they came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspec.errors import ModelError
from longspec.machine.files import read_json, read_text
from longspec.machine.schema import FLAG, Kind, check, number, whole
from longspec.model.config_values import TOKENS
from longspec.model.files.store import Report, quiet

if TYPE_CHECKING:  # `longspec models` lists checkpoints without torch
    import torch
    from tokenizers import Tokenizer

    from longspec.model.gguf.file import GgufFile
    from longspec.model.weights.read import Weights
    from longspec.model.weights.scheme import Scheme

__all__ = ["Checkpoint"]


_MOST_NBYTES = 16 << 20  # of a config file; tokenizer_config.json lists added tokens, a few thousand at most
_MOST_TEMPLATE_NBYTES = 1 << 20  # the longest of known models has 20 KB

_NUMBER = number(-1e9, 1e9)  # what is in range, the request says
_WRITING: dict[str, Kind] = {
    "eos_token_id": TOKENS,
    "do_sample": FLAG,
    "temperature": _NUMBER,
    "top_k": whole(-(1 << 31), 1 << 31),
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
}
_QUANTIZED = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where older tools say how weights are quantized, and what tool it then was."""


@dataclass(frozen=True)
class Checkpoint:
    """One model's files. At least one of `folder` and `gguf` is set; every method raises ModelError on an invalid
    file.
    """

    name: str  # as the user gave it
    folder: Path | None = None
    gguf: Path | None = None
    advised: Mapping[str, Any] = field(default_factory=dict, compare=False)  # sampling that the file doesn't name

    def config(self) -> dict[str, Any]:
        """The content of config.json, with the `quantization_config` of a file of its own."""
        if self.folder is None:
            return self._file.config()
        made = _json(self.folder / "config.json")
        for name, method in _QUANTIZED.items():
            if "quantization_config" not in made and (said := self._optional(name)):
                made["quantization_config"] = {"quant_method": method} | said
        return made

    def scheme(self) -> Scheme | None:
        """How a folder's matrices are quantized; None where they are plain, or a GGUF file holds them. ModelError names
        what isn't supported.
        """
        if self.folder is None or self.gguf is not None:
            return None
        from longspec.model.weights.scheme import scheme_of

        return scheme_of(self.config())

    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json, whose values have their types, over the sampling that is advised; {}
        where there is neither.
        """
        found = self._file.generation_config() if self.folder is None else self._optional("generation_config.json")
        check("The model's generation_config.json", found, _WRITING, ModelError)
        return {**({"do_sample": True} if self.advised else {}), **self.advised, **found}

    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json; {} where there is none."""
        return self._file.tokenizer_config() if self.folder is None else self._optional("tokenizer_config.json")

    def chat_template(self) -> str | None:
        """The Jinja template from messages to a prompt: chat_template.jinja, else the one in the tokenizer's config."""
        if self.folder is not None and (path := self.folder / "chat_template.jinja").is_file():
            return read_text(path, _MOST_TEMPLATE_NBYTES, "The model's chat template", error=ModelError)
        template = self.tokenizer_config().get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[-1].get("template") if named else None
        return template if isinstance(template, str) else None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its file, with truncation and padding switched off."""
        if self.folder is None:
            return self._file.tokenizer()
        from longspec.model.files.tokenizer_files import read_tokenizer

        return read_tokenizer(self.folder, self.tokenizer_config())

    @property
    def coded(self) -> bool:
        """Whether the weights are codes that can be used as they are (`longspec.model.weights.quantized`)."""
        if self.gguf is not None:
            return self._file.coded
        scheme = self.scheme()
        return scheme is not None and scheme.coded

    @property
    def recoded(self) -> list[str]:
        """What the file holds matrices in and no kernel reads: those are quantized anew."""
        if self.gguf is not None:
            return self._file.recoded
        scheme = self.scheme()
        return [] if scheme is None or scheme.coded else ["FP8"]

    @property
    def largest(self) -> Path | None:
        """The largest file of weights; None where there is none."""
        files = (
            [self.gguf] if self.gguf is not None else [] if self.folder is None else self.folder.glob("*.safetensors")
        )
        return max(files, key=lambda file: file.stat().st_size, default=None)

    @property
    def format(self) -> str:
        """What the files hold weights as, and bits per weight. Imports no torch."""
        if self.gguf is not None:
            from longspec.model.gguf.header import read_header

            header = read_header(self.gguf)
            return f"{next(iter(header.formats))}, {header.bits:.1f} bits a weight"
        config = self.config()
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        scheme = self.scheme()
        return f"{dtype}, {32 if dtype == 'float32' else 16} bits a weight" if scheme is None else str(scheme)

    def weights(self, dtype: torch.dtype, report: Report = quiet, *, coded: bool = False) -> Weights:
        """The weights in `dtype`, or the file's codes. A pulled model is converted on the first use of its values;
        `report` is called with the progress.
        """
        from longspec.model.weights.read import Weights

        if self.gguf is not None and (coded or self.folder is None):
            return Weights.of_gguf(self._file, dtype)
        assert self.folder is not None
        if self.gguf is None:
            return Weights.of_folder(self.folder, dtype, self.scheme())
        from longspec.model.files.convert import converted

        return Weights.of_folder(converted(self.folder, dtype, report), dtype)

    @cached_property
    def _file(self) -> GgufFile:
        from longspec.model.gguf.file import read_gguf

        assert self.gguf is not None
        return read_gguf(self.gguf)

    def _optional(self, name: str) -> dict[str, Any]:
        assert self.folder is not None
        path = self.folder / name
        return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, _MOST_NBYTES, "The model's file", error=ModelError)
