"""Private names of nutpie that `CompiledNUTS` relies on: each exists, and does what is relied on."""

import ctypes
import inspect
import re
import threading
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_genmodels.infer.compiled.nutpie_sampling import STATISTICS, NutsSettings, import_nutpie, sample_chain

nutpie = pytest.importorskip("nutpie")


def test_a_model_of_native_code_has_these_fields():
    model = import_nutpie().compile_pymc.CompiledPyMCModel
    wanted = {
        "dims", "_coords", "compiled_logp_func", "compiled_expand_func", "initial_point_func", "shared_data", "user_data",
        "n_expanded", "shape_info", "logp_func", "expand_func", "_n_dim", "_shapes",
    }  # fmt: skip
    found = {field.name: field for field in fields(model)}
    assert wanted <= found.keys()
    assert all(found[name].default is not MISSING for name in found.keys() - wanted)  # the others may be left out


def test_the_first_point_is_asked_for_in_the_thread_of_the_density_and_tables_have_the_statistics():
    threads = {"start": set(), "density": set()}

    def start(seed):
        threads["start"].add(threading.get_ident())
        return np.ones(2)

    def density(z):
        threads["density"].add(threading.get_ident())
        return -0.5 * float(z @ z), -z

    model = import_nutpie().compiled_pyfunc.from_pyfunc(
        ndim=2,
        make_logp_fn=lambda: density,
        make_expand_fn=lambda *seeds_and_chain: lambda z: {"z": z},
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(2,)],
        expanded_names=["z"],
        make_initial_point_fn=start,
    )
    options = {"draws": 3, "tune": 2, "chains": 1, "cores": 1, "seed": 1, "progress_bar": False, "maxdepth": 3}
    sampler = nutpie.sample(model, **options, target_accept=0.8, low_rank_modified_mass_matrix=False, blocking=False,
                            return_raw_trace=True)  # fmt: skip
    (draws,), (statistics,) = sampler.wait().get_arrow_trace()
    assert len(draws.column("z")) == 5
    assert all(len(statistics.column(name)) == 5 for name in STATISTICS)
    assert len(threads["start"]) == 1
    assert threads["start"] == threads["density"]
    assert hasattr(sampler, "cancel")
    assert "blocking" in inspect.signature(nutpie.sample).parameters


@pytest.fixture
def threads():
    """Three threads of torch, for the time of a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_the_thread_of_a_chain_has_as_many_threads_as_torch(threads):
    """OpenMP keeps this number for each thread, and torch asks for it late. Matrix products may ask before."""
    maps = Path("/proc/self/maps")
    paths = (
        [line.split()[-1] for line in maps.read_text().splitlines() if re.search("torch.*libgomp", line)]
        if maps.exists()
        else []
    )
    if not paths:
        pytest.skip("torch brings no OpenMP of GNU with it here")
    openmp, seen = ctypes.CDLL(paths[0]), []

    def density(z):
        seen.append(openmp.omp_get_max_threads())
        return -0.5 * z @ z, -z

    sample_chain(density, torch.ones(2, dtype=torch.float64), NutsSettings(2, 2, 0.8, 3, False), 1, lambda draws: None)
    assert set(seen) == {threads}
