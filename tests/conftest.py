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


CLUSTER_WAIT = 120
"""Seconds that a cluster may take to start a worker, which imports torch."""


@pytest.fixture(scope="session")
def dask_client():
    """A cluster of two processes with two threads each."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def on_cluster(dask_client):
    """The cluster as the backend of joblib."""
    joblib = pytest.importorskip("joblib")
    dask_client.wait_for_workers(2, timeout=CLUSTER_WAIT)
    with joblib.parallel_config(backend="dask", wait_for_workers_timeout=CLUSTER_WAIT):
        yield
