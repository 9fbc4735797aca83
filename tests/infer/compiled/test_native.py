"""Log densities as native code: the same values and chains as through Python, and what cannot be native."""

import gc

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_genmodels._pyro.inductor import DirectCall
from pyro_genmodels.infer.compiled import native
from pyro_genmodels.infer.compiled.density import log_density
from pyro_genmodels.infer.compiled.modes import Captured
from pyro_genmodels.infer.compiled.native import native_density
from pyro_genmodels.infer.compiled.nutpie_sampling import NutsSettings, sample_chain

PRECISION = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
MINUS_TWO = torch.tensor(-2.0, dtype=torch.float64)
SETTINGS = NutsSettings(50, 50, 0.8, 8, False)


def gaussian(tensors):
    """Compiled code as Inductor writes it, here without kernels: minus z' P z and its gradient, minus 2 P z."""
    z, precision, factor = tensors
    tensors.clear()
    product = torch.mm(precision, z.view(2, 1))
    return torch.neg(torch.mm(z.view(1, 2), product)).view(()), torch.mul(product, factor).view(2)


def z_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def made(code=gaussian, precision=PRECISION):
    return native_density(DirectCall(code), z_of(1.0, 2.0), [precision, MINUS_TWO])


def assert_chains_agree(function, other, start):
    reports, other_reports = [], []
    chain = sample_chain(function, start, SETTINGS, 3, reports.append)
    same = sample_chain(other, start, SETTINGS, 3, other_reports.append)
    np.testing.assert_array_equal(chain.z, same.z)
    for name, values in chain.statistics.items():
        np.testing.assert_array_equal(values, same.statistics[name])
    assert sum(reports) == sum(other_reports) == 100


def test_native_code_reads_live_tensors():
    precision = PRECISION.clone()
    function = made(precision=precision)
    for z in (z_of(1.0, 2.0), z_of(-3.0, 0.1)):
        for _ in range(2):
            value, gradient = function(z)
            torch.testing.assert_close(value, -z @ precision @ z)
            torch.testing.assert_close(gradient, -2 * precision @ z)
            precision.add_(torch.eye(2))


def test_a_chain_is_that_through_python():
    code = DirectCall(gaussian)
    assert_chains_agree(made(), lambda z: code(z, PRECISION, MINUS_TWO), z_of(1.0, 2.0))


def with_random_numbers(tensors):
    value, gradient = gaussian(tensors)
    return torch.mul(value, torch.rand((), dtype=torch.float64)), gradient


def with_a_value_in_python(tensors):
    value, gradient = gaussian(tensors)
    return torch.full((), value.item(), dtype=torch.float64), gradient


def with_a_list_of_tensors(tensors):
    value, gradient = gaussian(tensors)
    return value, torch.cat([gradient[:1], gradient[1:]])


def in_floats(tensors):
    return tuple(x.float() for x in gaussian(tensors))


@pytest.mark.parametrize("code", [with_random_numbers, with_a_value_in_python, with_a_list_of_tensors, in_floats])
def test_what_cannot_be_native_is_not(code):
    assert made(code) is None


def test_other_results_than_those_of_the_code_are_not_taken():
    class Counting(DirectCall):
        """Code with another result at each call, as no code of Inductor has."""

        __slots__ = ()

        def __call__(self, *tensors):
            value, gradient = super().__call__(*tensors)
            return value + 1, gradient

    assert native_density(Counting(gaussian), z_of(1.0, 2.0), [PRECISION, MINUS_TWO]) is None


def decomposed(tensors):
    """Return a density only where the matrix diag(z) has a Cholesky factor."""
    z, identity, factor = tensors
    tensors.clear()
    (lower, info) = torch.ops.aten.linalg_cholesky_ex.default(torch.mul(identity, z))
    torch.ops.aten._linalg_check_errors.default(info, "linalg.cholesky", is_matrix=True)
    return torch.mm(z.view(1, 2), torch.mm(lower, z.view(2, 1))).view(()), torch.mul(z, factor)


def test_a_point_without_a_decomposition_is_rejected():
    identity = torch.eye(2, dtype=torch.float64)
    function = native_density(DirectCall(decomposed), z_of(1.0, 4.0), [identity, MINUS_TWO])
    assert [x.isnan().all().item() for x in function(z_of(1.0, -4.0))] == [True, True]
    value, gradient = function(z_of(1.0, 4.0))
    assert value == 1 + 2 * 16
    assert gradient.tolist() == [-2.0, -8.0]
    chain = sample_chain(function, z_of(1.0, 4.0), SETTINGS, 0, lambda count: None)
    assert (chain.z > 0).all()
    assert chain.statistics["diverging"].any()


def asserting(tensors):
    z, precision, factor = tensors
    results = gaussian([z, precision, factor])
    torch.ops.aten._assert_async.default(precision[0, 0])
    return results


def test_an_error_of_an_operation_ends_the_chain():
    precision = PRECISION.clone()
    function = made(asserting, precision)
    assert function(z_of(1.0, 2.0))[0] < 0
    precision[0, 0] = 0
    with pytest.raises(RuntimeError, match="failed outside of Python"):
        function(z_of(1.0, 2.0))
    with pytest.raises(RuntimeError, match="nutpie failed"):
        sample_chain(function, z_of(1.0, 2.0), SETTINGS, 0, lambda count: None)


def test_a_failure_of_the_compiler_is_said(monkeypatch):
    monkeypatch.setattr(native, "SOURCE", "no code {calls} {rejected}")
    with pytest.warns(RuntimeWarning, match="The compiler failed, so that the sampler calls the log density through Python: "):
        assert made() is None


def test_memory_is_given_back():
    precision = PRECISION.clone()

    def count():
        gc.collect()
        return torch._C._storage_Use_Count(precision.untyped_storage()._cdata)

    before = count()
    function = made(precision=precision)
    assert count() > before
    del function
    assert count() == before


def schools(y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, 2.0), obs=y)


def process(y):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    x = torch.linspace(0, 5, 3)
    covariance = torch.exp(-(((x[:, None] - x) / rho) ** 2) / 2) + 0.1 * torch.eye(3)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), covariance), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("model", [schools, process])
def test_compiled_programs_are_native(model):
    density = log_density(model, torch.tensor([1.0, -2.0, 3.0]))
    start = density.initial_points(1)[0].double()
    captured = density.capture(start)
    function = captured.native(start)
    assert function is not None
    assert_chains_agree(function, captured, start)


def test_other_modes_are_not_native():
    density = log_density(schools, torch.zeros(3), mode=Captured())
    start = density.initial_points(1)[0].double()
    assert density.capture(start).native(start) is None
