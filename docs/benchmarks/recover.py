"""Measure what kills cost a training on several workers, against going back to the checkpoint (recover.json).

    python docs/benchmarks/recover.py --prompts prompts.jsonl --work build/recover --out docs/benchmarks/recover.json

Each run is `longspec train` by its command, from one folder of features:

    alone       one process
    undisturbed so many workers
    kills       one worker, drawn at random, is killed at each of so many moments, and another one joins
    restarts    all workers are killed at the same moments, and the command is given anew, from the checkpoint
    late        one worker, which another one joins later

A run's goodput is the undisturbed run's time over its own: the steps are the same, and so must be the bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep, time

from longspec.training.gathering import Gathering

FILES = ("model.safetensors", "config.json", "work/checkpoint.safetensors")


class Run:
    """Workers of one training, started as the command starts them."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.gathering = Gathering()
        self.killed = 0

    def start(self) -> None:
        place = f"{self.gathering.host}:{self.gathering.port}"
        self.gathering.start([*self.command, "--threads", "1", "--join", place, "--quiet"])

    def until(self, end: float) -> bool:
        """Wait; False if the training has ended before."""
        while monotonic() < end:
            self.gathering.look()
            if not self.gathering.running:
                return False
            sleep(0.02)
        return True

    def kill(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.gathering.children[number].kill()
            self.gathering.children[number].wait()
            self.killed += 1

    @property
    def alive(self) -> list[int]:
        return [i for i, child in enumerate(self.gathering.children) if child.poll() is None]


def trained(command: Sequence[str], workers: int, moments: Sequence[float], drawn: random.Random, way: str) -> float:
    """Seconds until the training's end."""
    began, run = monotonic(), Run(command)
    for _ in range(1 if way == "late" else workers):
        run.start()
    for moment in moments:
        if not run.until(began + moment):
            break
        if way == "kills":
            run.kill([drawn.choice(run.alive)])
            run.start()
        elif way == "late":
            run.start()
        else:  # a new store too, as when the command itself is given anew
            run.kill(run.alive)
            run = Run(command)
            for _ in range(workers):
                run.start()
    run.until(began + 3600)
    codes = [child.returncode for child in run.gathering.children]
    assert codes.count(0) == len(codes) - (run.killed if way == "kills" else 0), codes
    return monotonic() - began


def call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603  our own command


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in FILES)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kind", default="clover2")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    longspec = [sys.executable, "-m", "longspec.cli.main", "train"]
    features, drawn = asked.work / "features", random.Random(asked.seed)
    model = ["-m", asked.model]
    written = ["features", *model, "--prompts", str(asked.prompts), "-o", str(features), "--tokens", str(asked.tokens)]
    call([*longspec, *written])
    recipe = ["--features", str(features), "--steps", str(asked.steps), "--texts", str(asked.texts)]

    def command(way: str) -> list[str]:
        return [*longspec, asked.kind, *model, *recipe, "-o", str(asked.work / way)]

    began = monotonic()
    call([*command("alone"), "--threads", "2", "--quiet"])
    took = {"alone": monotonic() - began}
    took["undisturbed"] = trained(command("undisturbed"), asked.workers, [], drawn, "undisturbed")
    moments = sorted(drawn.uniform(0.1, 0.9) * took["undisturbed"] for _ in range(asked.kills))
    for way in ("kills", "restarts"):
        took[way] = trained(command(way), asked.workers, moments, drawn, way)
    took["late"] = trained(command("late"), asked.workers, [0.3 * took["undisturbed"]], drawn, "late")
    said = {
        "model": asked.model,
        "recipe": {
            key: getattr(asked, key) for key in ("kind", "steps", "texts", "tokens", "workers", "kills", "seed")
        },
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "time": int(time()),
        "moments": [round(moment, 2) for moment in moments],
        "seconds": {way: round(seconds, 2) for way, seconds in took.items()},
        "goodput": {way: round(took["undisturbed"] / seconds, 3) for way, seconds in took.items()},
        "same_bits": {way: digest(asked.work / way) == digest(asked.work / "alone") for way in took},
    }
    asked.out.write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
