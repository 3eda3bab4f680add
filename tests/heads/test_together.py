"""A training on several workers ends with the bits of one process alone, whoever dies, freezes or joins meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
import torch
from heads.test_training import PROMPTS, RECIPE, SAMPLED, silent
from support import forked
from support.commands import SECONDS, call, inside, write_tiny
from support.engines import of_folder, tiny

from longspec.errors import UsageError
from longspec.training import loss
from longspec.training.course import Course, start
from longspec.training.gathering import Gathering
from longspec.training.lanes import Lanes
from longspec.training.together import CHILD, Company
from longspec.training.train import Recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = 36
SHARED = replace(RECIPE, steps=STEPS, texts=4, validations=3, patience=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("target")
    tiny(made, end_tokens=(2, 5), num_hidden_layers=2)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    assert course(folder, out, SHARED).run(silent) is not None
    return out


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def course(folder: Path, out: Path, recipe: Recipe) -> Course:
    return start(of_folder(folder, (2, 5)), recipe, out, PROMPTS, SAMPLED)


class Run:
    """Workers, each of which writes its process id and its steps to a file."""

    def __init__(self, folder: Path, out: Path, steps: int = STEPS, frozen: float = 15.0) -> None:
        self.gathering, self.out = Gathering(frozen=frozen), out
        out.mkdir(exist_ok=True)
        self._arguments = [str(folder), str(out), str(self.gathering.port), str(steps)]

    def start(self) -> None:
        self.gathering.start([*forked.command("heads.test_together"), *self._arguments])

    def members(self) -> list[int]:
        """By their numbers among the children."""
        return [int(self.gathering.workers[number].child) for number in self.gathering.members]

    def pid(self, number: int) -> int:
        return int(self._lines(number)[0])

    def step(self, number: int) -> int:
        """The last one that a worker has begun, -1 before the first."""
        return int(self._lines(number)[-1]) if len(self._lines(number)) > 1 else -1

    def _lines(self, number: int) -> list[str]:
        path = self.out / f"worker{number}"
        return path.read_text().split() if path.exists() else []

    def until(self, what: Callable[[], bool]) -> None:
        end = monotonic() + SECONDS
        while not what():
            self.gathering.look()
            assert monotonic() < end
            assert self.gathering.running or what == self.ended
            sleep(0.002)

    def pause(self, seconds: float) -> None:
        end = monotonic() + seconds
        self.until(lambda: monotonic() > end)

    def ended(self) -> bool:
        return not self.gathering.running


def same(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "config.json", "report.json", "work/checkpoint.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_who_dies_and_who_joins_changes_no_bit(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = Run(folder, tmp_path / "out")
    for _ in range(3):
        run.start()
    run.until(lambda: len(run.members()) == 3 and all(run.step(number) >= 2 for number in range(3)))
    leading = run.members()[0]
    os.kill(run.pid(leading), signal.SIGKILL)
    run.start()
    run.until(lambda: len(run.members()) == 3 and leading not in run.members())
    other = run.members()[1]
    os.kill(run.pid(other), signal.SIGKILL)
    run.until(run.ended)
    died = {number for number, child in enumerate(run.gathering.children) if child.returncode}
    assert died == {leading, other}
    same(undisturbed, tmp_path / "out")


def test_who_freezes_is_given_up(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = Run(folder, tmp_path / "out", frozen=2.0)
    for _ in range(2):
        run.start()
    run.until(lambda: len(run.members()) == 2 and run.step(run.members()[1]) >= 2)
    frozen = run.members()[0]
    os.kill(run.pid(frozen), signal.SIGSTOP)
    run.until(run.ended)
    assert [child.returncode for child in run.gathering.children][frozen] == -signal.SIGKILL
    same(undisturbed, tmp_path / "out")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_five_kills_at_random_change_no_bit(folder: Path, tmp_path: Path, seed: int) -> None:
    """Of random workers at random moments, from writing the texts on; each time another one joins."""
    drawn, steps = Random(seed), 150
    whole = course(folder, tmp_path / "alone", replace(SHARED, steps=steps)).run(silent)
    assert whole is not None
    run = Run(folder, tmp_path / "out", steps)
    for _ in range(2 + seed % 3):
        run.start()
    for _ in range(5):
        run.pause(drawn.uniform(0.1, 1.2))
        alive = [number for number, child in enumerate(run.gathering.children) if child.poll() is None]
        victim = drawn.choice(alive)
        run.until((run.out / f"worker{victim}").exists)
        assert run.gathering.children[victim].poll() is None  # the training hasn't ended yet
        os.kill(run.pid(victim), signal.SIGKILL)
        run.start()
    run.until(run.ended)
    codes = [child.returncode for child in run.gathering.children]
    assert codes.count(-signal.SIGKILL) == 5
    assert codes.count(0) == len(codes) - 5
    same(tmp_path / "alone", tmp_path / "out")


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_threads_change_no_bit(
    folder: Path, undisturbed: Path, tmp_path: Path, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least squares over the same rows differ between torch's products by one thread and by three; and autocast's cache
    is one for all threads, each of which empties it.
    """
    wanted, before = undisturbed, torch.get_num_threads()
    if half:
        wanted = tmp_path / "one"
        monkeypatch.setattr(loss, "halves", lambda model: True)
        assert course(folder, wanted, SHARED).run(silent) is not None
    torch.set_num_threads(3)
    try:
        assert course(folder, tmp_path / "three", SHARED).run(silent) is not None
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    same(wanted, tmp_path / "three")


@pytest.mark.full
def test_the_command_starts_workers(tmp_path: Path) -> None:
    """One report on stdout, and the bits of one process with another number of threads; two ways to be many at once are
    refused.
    """
    folder = write_tiny(tmp_path / "model", context=256)
    (tmp_path / "prompts").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    train = ["train", "clover", "-m", str(folder), "--prompts", str(tmp_path / "prompts"), "--tokens", "400", "--json"]
    train += ["--steps", "6", "--draft-vocab", "64", "--texts", "4"]
    two = call([*train, "-o", str(tmp_path / "two"), "--workers", "2"], tmp_path, whole=True)
    assert two.code == 0, two.err
    one = call([*train, "-o", str(tmp_path / "one"), "--threads", "3"], tmp_path, whole=True)
    assert one.code == 0, one.err
    same(tmp_path / "one", tmp_path / "two")
    assert json.loads(two.out)["draft_vocabulary"] == 64
    assert "2 workers; another one joins by the same command with --join 127.0.0.1:" in two.err
    refused = inside([*train, "-o", str(tmp_path / "x"), "--workers", "2", "--join", "127.0.0.1:1"], tmp_path)
    assert (refused.code, "One worker joins with --join" in refused.err) == (2, True)


def test_nobody_there_is_said(tmp_path: Path) -> None:
    gathering = Gathering()
    with pytest.raises(UsageError, match=r"Workers can't be gathered at 127.0.0.1"):
        Gathering(port=gathering.port)
    del gathering
    with pytest.raises(UsageError, match=r"No training answers at 127.0.0.1:1"):
        Company("127.0.0.1", 1, Lanes())


def main() -> None:
    torch.set_num_threads(1)
    folder, out, port, steps = sys.argv[1:]
    with (Path(out) / f"worker{os.environ[CHILD]}").open("w", buffering=1) as file:
        print(os.getpid(), file=file)

        def report(stage: str, done: int, total: int) -> None:
            if stage == "training":
                print(done, file=file)
                sleep(0.15)  # so that others come in time

        course(Path(folder), Path(out), replace(SHARED, steps=int(steps))).run(report, join=("127.0.0.1", int(port)))
