"""Private names of nutpie that `CompiledNUTS` relies on: each exists, and does what is relied on."""

import inspect
import threading
from dataclasses import MISSING, fields

import numpy as np
import pytest

from pyro_genmodels.infer.compiled.nutpie_sampling import STATISTICS, import_nutpie

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
