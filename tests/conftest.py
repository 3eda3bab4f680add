"""What every test may use. Models are tiny and made in memory; the real one stands behind `@pytest.mark.real`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin are ruinous on a machine that is shared

import torch

torch.set_num_threads(1)  # tiny models lose time to threads, and a test machine has few cores
