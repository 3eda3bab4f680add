"""Coverage-guided fuzzing of what parses files from elsewhere, by atheris: `make fuzz` installs it.

`python tests/hostile/guided.py NAME [libFuzzer's options, a corpus]`. Bytes are read as a file of one kind; what isn't
longspec's own error ends the run, and leaves the bytes in a file.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # which only `make fuzz` installs
with atheris.instrument_imports(include=["longspec"]):
    from longspec.cache.snapshot import Snapshot
    from longspec.errors import LongspecError
    from longspec.heads.format import read_about
    from longspec.machine.files import parse_json
    from longspec.model.config import Config
    from longspec.model.gguf.file import read_gguf
    from longspec.model.weights.safetensors import Shard


def main() -> None:
    """Run libFuzzer over one parser."""
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")

        def gguf() -> None:
            file = read_gguf(path)
            Config.read(file.config())
            file.tokenizer_config()
            file.tokenizer()

        parsers: dict[str, Callable[[], object]] = {
            "gguf": gguf,
            "safetensors": lambda: Shard(path),
            "snapshot": lambda: Snapshot(path),
            "head": lambda: read_about(folder),
            "config": lambda: Config.read(parse_json(path.read_bytes())),
        }

        def one(data: bytes) -> None:
            path.write_bytes(data)
            try:
                parsers[name]()
            except LongspecError:
                pass
            except (ValueError, AttributeError):
                if name != "config" or _is_object(data):
                    raise

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


if __name__ == "__main__":
    main()
