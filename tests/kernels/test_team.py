"""The team of threads: shared loops lose nothing, in a child process either; any number gives a text the same bits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.checkpoints import oracle, write
from support.native import SIZES, coded, logits

from longspec.kernels import build
from longspec.kernels.team import team

COMPILER = shutil.which("cc") or shutil.which("gcc") or ""
KERNELS = Path(build.__file__).parent


@pytest.mark.skipif(not COMPILER, reason="no C compiler was found")
@pytest.mark.parametrize("flags", [("-O2",), ("-O1", "-g", "-fsanitize=thread")], ids=["plain", "sanitized"])
def test_every_index_is_met_once(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Of many loops, by one to five threads, with another thread that asks for the team meanwhile, and after a fork."""
    program, source = tmp_path / "loops", Path(__file__).with_name("loops.c")
    command = [COMPILER, "-std=gnu11", "-pthread", *flags, "-I", str(KERNELS), str(source), "-o", str(program)]
    if subprocess.run(command, capture_output=True).returncode and len(flags) > 1:
        pytest.skip("this compiler has no sanitizer of threads")
    done = subprocess.run([str(program)], capture_output=True, text=True, env={"TSAN_OPTIONS": "die_after_fork=0"})
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the sanitizer of threads can't run on this kernel")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_text_has_the_same_bits_with_any_number_of_threads(tmp_path: Path) -> None:
    made = coded(write(oracle("llama", **SIZES), tmp_path))
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert team()[1] == threads
            seen.append(logits(made, [1, 2, 64, 70]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, seen[0]) for each in seen)
