"""Coverage-guided fuzzing of what reads texts and files from elsewhere, by atheris: `make guided` installs it.

`python tests/hostile/guided.py KIND [libFuzzer's options] CORPUS`. An empty folder gets whole ones to begin from. Bytes
are read as one of the kind; what isn't longspec's own error ends the run, and leaves the bytes in a file.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[at]) for at in (1, 2)]  # tests, and longspec

atheris: Any = importlib.import_module("atheris")  # which only `make guided` installs
with atheris.instrument_imports(include=["longspec"]):
    from longspec.cache.snapshot import Snapshot
    from longspec.constraints.json_schema import prepared
    from longspec.errors import LongspecError
    from longspec.heads.format import read_about
    from longspec.machine.files import read_json
    from longspec.model.config import Config
    from longspec.model.gguf.file import read_gguf
    from longspec.model.weights.safetensors import Shard
    from longspec.requests.fields import parse_object
    from longspec.requests.openai import read_request
    from longspec.server.dialects import DIALECTS
    from longspec.text import limits
    from longspec.text.chat_template import ChatTemplate

MOST_NBYTES = 16 << 20


def gguf(path: Path) -> None:
    file = read_gguf(path)
    Config.read(file.config())
    file.tokenizer_config()
    file.tokenizer()


def request(path: Path) -> None:
    body = parse_object(path.read_bytes(), "The body")
    for dialect in DIALECTS.values():
        with suppress(LongspecError):
            read_request(dialect.read(body), chat=dialect.chat)


def template(path: Path) -> None:
    message = {"role": "user", "content": " Hi "}
    ChatTemplate(path.read_text(errors="replace"), {"bos_token": "<s>"}).render([message])


KINDS: dict[str, Callable[[Path], object]] = {
    "gguf": gguf,
    "safetensors": Shard,
    "snapshot": Snapshot,
    "head": lambda path: read_about(path.parent),
    "config": lambda path: Config.read(read_json(path, MOST_NBYTES, "The config")),
    "request": request,
    "template": template,
    "schema": lambda path: prepared(read_json(path, MOST_NBYTES, "The schema")),
}


def whole(kind: str, folder: Path) -> Iterator[bytes]:
    """A few of a kind that are as they should be."""
    import json

    from hostile.targets import folder_of
    from hostile.test_templates import SEEDS
    from server.test_mutants import GOOD
    from support.checkpoints import oracle
    from support.engines import engine, tiny
    from support.ggufs import write_gguf
    from support.native import SIZES
    from support.published import LAYOUTS, write

    match kind:
        case "gguf":
            path = folder / "a.gguf"
            yield write_gguf(oracle("llama", **SIZES, num_hidden_layers=1), path).read_bytes()
        case "safetensors" | "config":
            for name in ("llama", "qwen2", "gemma2"):
                files = folder_of(folder, name)
                yield files["config.json"] if kind == "config" else next(iter(files.values()))
        case "snapshot":
            model = tiny(folder / "model", end_tokens=())
            engine(model).generate("abc" * 40, raw=True, max_new_tokens=2, prompt_cache=folder / "a")
            yield (folder / "a").read_bytes()
        case "head":
            model = tiny(folder / "model", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
            for layout in LAYOUTS:
                yield (write(folder / layout.replace(" ", "-"), layout, model) / "config.json").read_bytes()
        case "request":
            yield from (json.dumps(body).encode() for _, body in GOOD)
        case "template":
            yield from (each.encode() for each in SEEDS)
        case "schema":
            yield b'{"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]}'
            yield b'{"anyOf": [{"enum": [1, "a", null]}, {"type": "array", "items": {"type": "integer"}}]}'


def main() -> None:
    """Run libFuzzer over one kind."""
    kind, corpus = sys.argv.pop(1), Path(sys.argv[-1])
    limits.MOST_SECONDS = 1.0
    with tempfile.TemporaryDirectory() as folder:
        if not any(corpus.iterdir()):
            for number, data in enumerate(whole(kind, Path(folder))):
                (corpus / f"whole-{number}").write_bytes(data)
        path = Path(folder, "mutant", "config.json")
        path.parent.mkdir()

        def one(data: bytes) -> None:
            path.write_bytes(data)
            with suppress(LongspecError):
                KINDS[kind](path)

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
