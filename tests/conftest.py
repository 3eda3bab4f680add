"""What every test may use. Models are tiny and made in memory; the real one stands behind `@pytest.mark.real`."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin are ruinous on a machine that is shared

import torch

torch.set_num_threads(1)  # tiny models lose time to threads, and a test machine has few cores


@pytest.fixture(scope="module")
def runtime() -> Iterator[Path]:
    """A folder for sockets: their paths have 108 bytes at most, and pytest's own folders lie deep."""
    with tempfile.TemporaryDirectory(prefix="longspec-") as folder:
        yield Path(folder)
