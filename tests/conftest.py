"""What holds for every test: no network, no display, the same random numbers each time."""

import os

# Before torch, transformers or matplotlib are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch

torch.set_num_threads(2)  # the tests' tensors are small: on many cores they only get slower


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Noise drawn without a generator is the same whichever tests ran before."""
    torch.manual_seed(0)
