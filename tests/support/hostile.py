"""What mutants do: each is tried, here or in a process of its own, and only longspec's own errors are let pass.

A target is a function of a folder. It writes its seeds there, and gives a function that makes one mutant of them by a
generator of random numbers, and has it read. `python -m support.hostile MODULE:TARGET FOLDER SEED FIRST COUNT` tries
mutants in this process and says of each what became of it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic

from longspec.errors import LongspecError

Attempt = Callable[[Random], object]
Target = Callable[[Path], Attempt]

MOST_SECONDS, MOST_NBYTES = 10, 2 << 30
TESTS = Path(__file__).parents[1]


@dataclass
class Survey:
    """What became of all mutants. failures: the number of each that ended otherwise than it should, and how."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    slowest: float = 0.0
    nbytes: int = 0  # the most resident memory of a process

    def __str__(self) -> str:
        said = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
        return f"{said}; slowest {self.slowest:.2f} s, {self.nbytes >> 20} MiB; {self.failures or 'no failures'}"

    def add(self, number: int, outcome: str, seconds: float, nbytes: int) -> None:
        self.slowest, self.nbytes = max(self.slowest, seconds), max(self.nbytes, nbytes)
        if outcome.startswith("failed"):
            self.failures[number] = outcome
        elif seconds > MOST_SECONDS or nbytes > MOST_NBYTES:
            self.failures[number] = f"{outcome} after {seconds:.1f} s with {nbytes >> 20} MiB"
        else:
            self.outcomes[outcome] += 1


def tried(attempt: Attempt, seed: str, number: int) -> tuple[str, float]:
    """What became of one mutant, and the seconds that it took."""
    began = monotonic()
    try:
        attempt(Random(f"{seed}:{number}"))
        outcome = "read"
    except LongspecError as error:
        outcome = f"refused with {error.exit_code}" if error.exit_code > 1 else f"failed: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"failed: {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
    return outcome, monotonic() - began


def survey_here(target: Target, folder: Path, numbers: Iterable[int], seed: str = "0") -> Survey:
    """Try these mutants in this process: a crash ends it."""
    made, attempt = Survey(), target(folder)
    for number in numbers:
        outcome, seconds = tried(attempt, seed, number)
        made.add(number, outcome, seconds, 0)
    return made


def survey(target: str, folder: Path, count: int, seed: str = "0", environment: dict[str, str] | None = None) -> Survey:
    """Try mutants 0 to count in processes of their own: one that crashes or hangs is noted, and another goes on."""
    made, number = Survey(), 0
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), str(TESTS.parent / "docs")])
    while number < count:
        command = [sys.executable, "-m", "support.hostile", target, str(folder), seed, str(number), str(count - number)]
        given = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=given, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("[") and line.endswith("]\n"):
                number, *said = json.loads(line)
                made.add(number, *said)
                number += 1
        words = process.stderr.read()
        process.stderr.close()
        process.stdout.close()
        if code := process.wait():
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            at = words.find("runtime error:")  # of the sanitizer of undefined behaviour
            said = words[max(0, at - 80) :]
            made.failures[number] = f"failed: {how}: {said[:1500]}"
            assert code < 0 or "Sanitizer" in words or at >= 0, words  # else the harness itself is broken
            number += 1
    return made


def main(name: str, folder: str, seed: str, first: str, count: str) -> None:
    """Try mutants in this process; one that takes too long ends it by SIGALRM."""
    warnings.simplefilter("error")
    module, _, target = name.partition(":")
    attempt = getattr(importlib.import_module(module), target)(Path(folder))
    for number in range(int(first), int(first) + int(count)):
        signal.alarm(MOST_SECONDS)
        outcome, seconds = tried(attempt, seed, number)
        signal.alarm(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps([number, outcome, seconds, peak]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
