"""What every test may use. Models are tiny and made in memory; the real one stands behind `@pytest.mark.real`."""

import torch

torch.set_num_threads(1)  # tiny models lose time to threads, and a test machine has few cores
