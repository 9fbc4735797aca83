"""Every test starts from the same seed with an empty param store, and must leave torch's and Pyro's global flags as found."""

import matplotlib as mpl
import pyro
import pytest
import torch

mpl.use("Agg")


def _flags():
    return {
        "default dtype": torch.get_default_dtype(),
        "grad enabled": torch.is_grad_enabled(),
        "argument validation": torch.distributions.Distribution._validate_args,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "pyro settings": pyro.settings.get(),
    }


@pytest.fixture(autouse=True)
def clean_slate():
    torch.set_num_threads(1)  # small networks, and one process per core
    pyro.enable_validation(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = _flags()
    yield
    after = _flags()
    torch.set_default_dtype(before["default dtype"])
    assert after == before, "the test changed global flags"


@pytest.fixture
def float64():
    """Double precision, for tests against exact answers."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
