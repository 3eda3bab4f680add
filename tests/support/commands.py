"""The command as a process, and a tiny checkpoint that it can run: one printable character per token."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from support.checkpoints import oracle, write
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "longspec.cli.main"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
SECONDS = 60.0
"""More than any of these takes on a busy machine."""


def write_tiny(folder: Path, context: int = 200_000) -> Path:
    """A checkpoint without an end of text: it writes as long as it may."""
    write(oracle("llama", max_position_embeddings=context, bos_token_id=1, eos_token_id=None), folder)
    names = ["<pad>", "<s>", "ß", *(chr(32 + i) for i in range(90)), "é", "世", "😀"]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without longspec's settings, and with a user's folders of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LONGSPEC_")}
    for name in ("NO_COLOR", "PYTHONWARNINGS", "COLUMNS"):
        kept.pop(name, None)
    folders = {"XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache"), "HF_HOME": str(home)}
    return {**kept, **folders, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm", **(extra or {})}


@dataclass
class Result:
    code: int
    out: bytes
    err: str


def call(
    arguments: Sequence[str | bytes], home: Path, stdin: bytes = b"", extra: Mapping[str, str] | None = None
) -> Result:
    """Run the command to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=environment(home, extra),
        timeout=SECONDS,
    )
    return Result(done.returncode, done.stdout, done.stderr.decode())


@contextmanager
def started(
    arguments: Sequence[str], home: Path, stdin: int = subprocess.DEVNULL, stderr: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs; killed if it is left running."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, env=environment(home)
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@dataclass
class Terminal:
    """A pseudo-terminal's screen side, read until something stands there."""

    number: int
    seen: bytes = field(default=b"")

    def until(self, wanted: bytes | None) -> bytes:
        """All that was written so far, once `wanted` is in it, or the other side is closed."""
        end = monotonic() + SECONDS
        while wanted is None or wanted not in self.seen:
            assert monotonic() < end, f"{wanted!r} was never written, but {self.seen!r}"
            if select.select([self.number], [], [], 0.1)[0]:
                try:
                    data = os.read(self.number, 65536)
                except OSError:  # what Linux says when the last writer has closed
                    data = b""
                if not data:
                    assert wanted is None, f"{wanted!r} was never written, but {self.seen!r}"
                    break
                self.seen += data
        return self.seen
