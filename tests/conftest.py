"""What every test may use. Models are tiny and made in memory; the real one stands behind `@pytest.mark.real`."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin are ruinous on a machine that is shared

import torch

torch.set_num_threads(1)  # tiny models lose time to threads, and a test machine has few cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", default="0", help="of the mutants that tests/hostile tries")
    parser.addoption("--mutants", type=int, default=2000, help="of each kind, in the tests marked full")


SETTINGS = ("LONGSPEC_", "XDG_", "HF_", "OMP_", "HOME", "PATH", "CC", "PYTHON", "NO_COLOR", "TERM", "LC_", "LANG")


def state() -> dict[str, object]:
    """What a test may change while it runs, and must give back."""
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGPIPE")}
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
    settings.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # the command says it for its own process
    return {"the folder": os.getcwd(), "files' mode": _umask(), **handlers, **settings}


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Threads are given back to torch, since loading a model sets them; what else is changed is an error."""
    before, threads, generator = state(), torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)
    after = state()
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert changed == [], f"the test left these changed: {', '.join(sorted(changed))}"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Path]:
    """A folder for sockets: their paths have 108 bytes at most, and pytest's own folders lie deep."""
    with tempfile.TemporaryDirectory(prefix="longspec-") as folder:
        yield Path(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folders, without settings: for processes and for `guarded` alike."""
    from support.commands import environment

    for name in list(os.environ):
        if name.startswith("LONGSPEC_"):
            monkeypatch.delenv(name)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that the command can run, which writes as long as it may."""
    from support.commands import write_tiny

    return str(write_tiny(tmp_path_factory.mktemp("tiny")))
