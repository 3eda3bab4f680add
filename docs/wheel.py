"""A wheel for one kind of processor with its kernels built in, for every set of instructions that they know.

    python docs/wheel.py x86_64 aarch64 --output dist

Takes the files that git tracks here; gives a wheel for each machine, whose name says that it runs where glibc is 2.17
or newer (manylinux). Zig's clang compiles for both machines and for that glibc, whatever this one has. A wheel without
libraries (`python -m build`) compiles its kernels when they are first used.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longspec.kernels.build import FLAGS, built_name
from longspec.kernels.isa import variants

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "longspec" / "kernels"
GLIBC = "2.17"
ZIG_FLAGS = {"-march=armv8.2-a+dotprod": "-mcpu=generic+dotprod"}
"""What Zig spells in another way."""


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:6]))} ... failed:\n{done.stdout}{done.stderr}")


def compile_for(machine: str, source: Path, flags: tuple[str, ...], folder: Path) -> None:
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{GLIBC}", "-s", "-shared"]
    spelt = [ZIG_FLAGS.get(flag, flag) for flag in (*FLAGS, *flags)]
    run(*zig, *spelt, "-I", source.parent, source, "-o", folder / built_name(source, flags), "-lm")


def make(machine: str, output: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        tree, made = Path(folder, "tree"), Path(folder, "made")
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
        for name in filter(None, listed.stdout.split("\0")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
        built = tree / "longspec" / "kernels" / "built"
        built.mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(compile_for, machine, source, flags, built)
                for source in sorted(KERNELS.glob("*.c"))
                for flags in variants(machine)
            ]
            for job in jobs:
                job.result()
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made, tree)
        (plain,) = made.glob("*.whl")
        tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
        run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, plain)
        (wheel,) = made.glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", nargs="+", choices=["x86_64", "aarch64"])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    given = parser.parse_args()
    for machine in given.machine:
        wheel = make(machine, given.output)
        print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
