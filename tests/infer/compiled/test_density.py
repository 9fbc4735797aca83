"""`log_density`: the potential of Pyro's NUTS as a captured function of one vector, for Pyro's own programs and others."""

import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro_examples as examples
import pytest
import torch
from marks import slow_unless
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_mean, init_to_median, init_to_sample, init_to_uniform, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.integrator import potential_grad
from torch.distributions import biject_to

from pyro_genmodels.infer.compiled.density import log_density
from pyro_genmodels.infer.compiled.modes import Captured, Compiled, Eager
from pyro_genmodels.infer.compiled.recorder import StaleGraphError

NAMES = (
    "baseball", "bayesian_regression", "capture_recapture", "cevae", "coin", "cvae", "dirichlet_process", "dmm",
    "eight_schools", "forecast", "gaussian_hmm", "gmm", "gp_regression", "gp_sparse", "guide_list", "hmm", "hmm_in_batches",
    "intro", "lda", "lkj", "minipyro", "neutra", "prod_lda", "radon", "scanvi", "sir_by_nuts", "sparse_gamma_def",
    "ss_vae_m2", "svi_flow_guide", "vae", "vae_flow_prior", "weighing",
)  # fmt: skip
KEPT = ("baseball", "coin", "eight_schools", "gmm", "lkj", "neutra", "radon", "vae")


def example(name):
    """Return the model of one of Pyro's examples, and its arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the example's own fit
        fit, args = getattr(examples, name)()
    return fit.kernel.model if isinstance(fit, MCMC) else fit.model, args


def pyro_potential(model, *args):
    """Return initial values in unconstrained coordinates and the potential of Pyro's NUTS."""
    params, potential, _, _ = initialize_model(model, args)
    return params, potential


def assert_equals_potential(density, model, *args):
    params, potential = pyro_potential(model, *args)
    assert params.keys() == set(density.names)
    for shift in (0.0, 0.1):
        moved = {name: x + shift * torch.randn_like(x) for name, x in params.items()}
        gradients, energy = potential_grad(potential, moved)
        value, gradient = density(density.flatten(moved))
        torch.testing.assert_close(-value, energy.to(value), rtol=1e-5, atol=1e-5)
        for name, found in density.unflatten(-gradient).items():
            torch.testing.assert_close(found, gradients[name], rtol=1e-3, atol=1e-4)


def normal_model(y=None, scale=1.0):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(loc, scale), obs=torch.ones(3) if y is None else y)


def positive_model():
    pyro.sample("a", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))


@pytest.mark.parametrize("name", slow_unless(KEPT, NAMES))
def test_value_and_gradient_are_those_of_pyros_potential(name):
    model, args = example(name)
    assert_equals_potential(log_density(model, *args, mode=Captured()), model, *args)


@pytest.mark.parametrize("mode", [Eager(), Captured(script=False), pytest.param(Compiled(), marks=pytest.mark.slow)])
def test_every_mode_gives_the_same(mode):
    model, args = example("radon")
    assert_equals_potential(log_density(model, *args, mode=mode), model, *args)


def test_a_program_that_cannot_be_captured_runs_eagerly_when_asked_to():
    model, args = example("stable")
    assert_equals_potential(log_density(model, *args, mode=Eager()), model, *args)


def test_a_reparametrised_model_has_the_new_variable():
    def model():
        with pyro.plate("groups", 3):
            pyro.sample("a", dist.Normal(1.0, 2.0))

    model = poutine.reparam(model, {"a": LocScaleReparam(0.0)})
    density = log_density(model, mode=Captured())
    assert density.names == ["a_decentered"]
    assert_equals_potential(density, model)


def test_known_log_density_of_a_positive_variable():
    """If log x is normal, its density in unconstrained coordinates is that of the normal."""
    density = log_density(lambda: pyro.sample("x", dist.LogNormal(1.0, 2.0)), mode=Captured())
    z = torch.tensor([0.7])
    value, gradient = density(z)
    torch.testing.assert_close(value, dist.Normal(1.0, 2.0).log_prob(z)[0])
    torch.testing.assert_close(gradient, (1.0 - z) / 4)


def test_vectors_and_named_values_are_maps_of_each_other():
    density = log_density(positive_model, mode=Eager())
    assert (density.dim, density.names) == (9, ["a", "scale", "p"])
    assert density.shapes == {"a": (2, 3), "scale": (), "p": (2,)}
    z = torch.randn(4, 5, 9)
    torch.testing.assert_close(density.flatten(density.unflatten(z)), z)
    values = density.constrain(z)
    assert {name: tuple(x.shape) for name, x in values.items()} == {"a": (4, 5, 2, 3), "scale": (4, 5), "p": (4, 5, 3)}
    assert (values["scale"] > 0).all()
    torch.testing.assert_close(values["p"].sum(-1), torch.ones(4, 5))
    torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="values of a, scale, p, but p are missing"):
        density.flatten({"a": values["a"], "scale": values["scale"]})


def test_doubles_go_through_a_model_of_floats():
    density = log_density(normal_model, mode=Captured())
    assert density.dtype == torch.float32
    narrow, wide = density(torch.tensor([0.3])), density(torch.tensor([0.3], dtype=torch.float64))
    assert {x.dtype for x in wide} == {torch.float64}
    torch.testing.assert_close([x.float() for x in wide], list(narrow))
    assert density.constrain(torch.zeros(1, dtype=torch.float64))["loc"].dtype == torch.float32


def test_a_model_of_doubles_and_floats_has_coordinates_in_doubles():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    density = log_density(model, mode=Captured())
    assert density.dtype == torch.float64
    z = torch.randn(3, dtype=torch.float64)
    value, gradient = density(z)
    torch.testing.assert_close(value, dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, -z, rtol=1e-6, atol=1e-6)
    assert {name: x.dtype for name, x in density.constrain(z).items()} == {"a": torch.float64, "b": torch.float32}


def test_pyros_nuts_makes_the_same_transitions():
    model, args = example("eight_schools")
    density = log_density(model, *args, mode=Captured())
    start = density.initial_points()[0]
    draws = []
    for options in ({"model": model}, {"potential_fn": density.potential_fn, "transforms": density.transforms}):
        kernel = NUTS(**options, step_size=0.2, adapt_step_size=False, adapt_mass_matrix=False)
        kernel.initial_params = density.unflatten(start)
        kernel.setup(0, *(args if "model" in options else ()))
        pyro.set_rng_seed(3)
        params = kernel.initial_params
        draws.append([params := kernel.sample(params) for _ in range(3)])
    for ours, theirs in zip(*draws, strict=True):
        torch.testing.assert_close(density.flatten(ours), density.flatten(theirs), rtol=1e-3, atol=1e-3)
    assert not torch.equal(density.flatten(draws[0][0]), start)


def test_changes_of_data_and_parameters_are_seen():
    y, settings = torch.ones(3), {"scale": 1.0}

    def model():
        shift = pyro.param("shift", torch.zeros(()))
        normal_model(y - shift, settings["scale"])

    density, z = log_density(model, mode=Captured()), torch.tensor([0.3])
    seen = [density(z)[0].item()]

    def assert_is_new():
        seen.append(density(z)[0].item())
        assert seen[-1] == pytest.approx(density.evaluate(z)[0].item())
        assert seen[-1] != pytest.approx(seen[-2])

    y += 1.0
    assert_is_new()
    y = torch.zeros(3)  # another tensor in the closure
    assert_is_new()
    settings["scale"] = 2.0
    assert_is_new()
    with torch.no_grad():
        pyro.param("shift").add_(1.0)
    assert_is_new()
    pyro.get_param_store()["shift"] = torch.tensor(3.0)
    assert_is_new()


@pytest.mark.parametrize(
    "init",
    [
        init_to_median,
        init_to_mean(),
        init_to_sample,
        init_to_value(values={"scale": torch.tensor(3.0)}),
        {"scale": 3.0, "p": [0.2, 0.3, 0.5]},
    ],
)
def test_initial_points_follow_a_strategy(init):
    density = log_density(positive_model, mode=Captured())
    points = density.initial_points(3, init=init)
    assert points.shape == (3, 9)
    if not callable(init) or init is not init_to_sample:
        assert all(part.isfinite().all() for z in points for part in density(z))
    if isinstance(init, dict):
        torch.testing.assert_close(density.constrain(points)["scale"], torch.full((3,), 3.0))
        torch.testing.assert_close(density.constrain(points)["p"], torch.tensor([[0.2, 0.3, 0.5]]).expand(3, 3))


def test_initial_points_come_from_a_fit():
    fit, args = examples.radon()  # an SVI
    density = log_density(fit.model, *args, mode=Captured())
    pyro.set_rng_seed(1)
    points = density.initial_points(50, init=fit)
    assert points.var(0).min() > 0
    with torch.no_grad():
        scale = fit.guide.median()["sigma"]
    torch.testing.assert_close(density.constrain(points)["sigma"].median(), scale, rtol=0.1, atol=0.0)
    draws = {"loc": torch.arange(20.0)}
    run = type("Run", (), {"get_samples": lambda self: draws})()
    starts = log_density(normal_model, mode=Eager()).initial_points(10, init=run)
    assert set(starts.flatten().tolist()) <= set(range(20))
    assert len(set(starts.flatten().tolist())) > 3
    with pytest.raises(TypeError, match=r"\.model and \.guide"):
        density.initial_points(init=3)


def test_initial_points_that_do_not_exist_are_explained():
    def outside():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(x, x + 1.0), obs=torch.tensor(99.0))

    with pytest.raises(ValueError, match=r"of 100 only 0 have .*to be within the support"):
        log_density(outside, mode=Eager()).initial_points()

    def zero():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("never", x - torch.inf)

    with pytest.raises(ValueError, match="density of never is not finite"):
        log_density(zero, mode=Eager()).initial_points()


def subsampled():
    with pyro.plate("rows", 5, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(torch.zeros(5)[rows], 1.0))


def count():
    pyro.sample("n", dist.Poisson(3.0))


def dependent_support():
    x = pyro.sample("x", dist.Uniform(0.0, 1.0))
    pyro.sample("y", dist.Uniform(0.0, x))


def under_enumeration():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("z", dist.Normal(k.float(), 1.0))


def varying():
    k = pyro.sample("k", dist.Normal(0.0, 1.0))
    pyro.sample(f"z_{float(k)}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (subsampled, "plate 'rows' subsamples 2 of 5 rows"),
        (count, "'n' is discrete and cannot be enumerated"),
        (dependent_support, "support of 'y' depends on other variables"),
        (under_enumeration, "distribution of 'z' depends on a discrete variable"),
        (varying, "'z_.*' is not in every run"),
    ],
)
def test_models_without_a_log_density_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        log_density(model)


@pytest.mark.parametrize("z", [torch.zeros(2), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), [0.0]])
def test_wrong_coordinates_are_refused(z):
    with pytest.raises(ValueError, match=r"1 coordinates wants a tensor of floats, \(1,\)"):
        log_density(normal_model, mode=Eager())(z)


@pytest.mark.parametrize("mode", [Eager(), Captured(script=False), Captured()])
def test_a_failed_decomposition_is_nan(mode):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        covariance = torch.eye(2) + x * (1 - torch.eye(2))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.ones(2))

    density = log_density(model, mode=mode)
    assert density(torch.tensor([3.0]))[0].isnan()
    assert density(torch.tensor([0.5]))[0].isfinite()


def test_a_pickled_log_density_is_captured_anew():
    density, z = log_density(normal_model, mode=Captured()), torch.tensor([0.3])
    value, _ = density(z)
    copy = pickle.loads(pickle.dumps(density))
    assert copy(z)[0] == value


def test_keywords_of_model_and_function_are_kept_apart():
    def model(mode=1.0):
        pyro.sample("x", dist.Normal(0.0, mode))

    density = log_density(model, mode=Eager(), model_kwargs={"mode": 2.0})
    assert density(torch.zeros(1))[0] == dist.Normal(0.0, 2.0).log_prob(torch.zeros(()))
    with pytest.raises(ValueError, match="mode= is a keyword of log_density and of the model"):
        log_density(model, mode=Eager())


def test_handlers_outside_see_nothing():
    with poutine.trace() as outer:
        density = log_density(normal_model, mode=Captured())
        density(density.initial_points()[0])
    assert not outer.trace.nodes.keys() - {"_INPUT", "_RETURN"}


@pytest.mark.parametrize("mode", [Eager(), Captured(script=False)])
def test_handlers_outside_have_no_effect(mode):
    """As around Pyro's `MCMC`."""
    alone, z = log_density(normal_model, mode=mode), torch.tensor([0.3])
    wanted, _ = alone.evaluate(z)
    with poutine.scale(scale=10.0), poutine.condition(data={"loc": torch.zeros(())}):
        inside = log_density(normal_model, mode=mode)
        assert inside.names == alone.names
        assert inside(z)[0] == alone(z)[0] == alone.evaluate(z)[0] == wanted
    assert inside(z)[0] == wanted


@pytest.mark.parametrize("mode", [Eager(), Captured(script=False)])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_also_where_they_are_switched_off(mode, context):
    z = torch.tensor([0.3])
    with context():
        density = log_density(normal_model, mode=mode)
        inside, again = density(z), density(z.clone())
    for found in (inside, again, density(z)):
        for a, b in zip(found, density.evaluate(z), strict=True):
            torch.testing.assert_close(a, b)


def test_a_number_that_python_has_computed_is_the_one_of_the_capture():
    """As the documentation says, and `audit` tells."""
    array = np.ones(3)

    def model():
        pyro.sample("x", dist.Normal(float(array[0]), 1.0))

    density, z = log_density(model, mode=Captured(script=False)), torch.zeros(1)
    density.audit(density, z[None])
    before = density(z)[0]
    array[0] = 3.0
    assert density(z)[0] == before != density.evaluate(z)[0]
    with pytest.raises(StaleGraphError, match="changed since the capture"):
        density.audit(density, z[None])


def test_hooks_of_parameters_are_not_asked():
    def model():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.ones(())), 1.0))

    model()
    pyro.param("loc").unconstrained().register_hook(lambda gradient: gradient)
    value, _ = log_density(model, mode=Captured(script=False))(torch.ones(1))
    torch.testing.assert_close(value, dist.Normal(0.0, 1.0).log_prob(torch.zeros(())))


@pytest.mark.parametrize("mode", [Eager(), Captured(script=False)])
def test_plates_outside_are_refused(mode):
    alone, z = log_density(normal_model, mode=mode), torch.tensor([0.3])
    with pyro.plate("outer", 2), pytest.raises(ValueError, match="plate 'outer' is around the call"):
        alone(z)
    with pyro.plate("outer", 2), pytest.raises(ValueError, match="plate 'outer' is around the call"):
        log_density(normal_model, mode=mode)
    with pyro.plate("outer", 2), pytest.raises(ValueError, match="plate 'outer' is around the call"):
        alone.initial_points()


class NeedsOrder(Captured):
    """A mode whose code takes the order in memory of its inputs for granted, as compiled code does."""

    def build(self, graph, inputs):
        run = super().build(graph, inputs)

        def call(z, *read):
            assert z.stride() == inputs[0].stride()
            return run(z, *read)

        return call


@pytest.mark.parametrize("mode", [NeedsOrder(script=False), pytest.param(Compiled(), marks=pytest.mark.slow)])
def test_coordinates_with_a_stride_have_their_own_density(mode):
    def model():
        pyro.sample("a", dist.Normal(torch.tensor([0.0, 10.0, 20.0]), 1.0).to_event(1))

    density, z = log_density(model, mode=mode), torch.randn(3, 4)[:, 1]
    for found, wanted in zip(density(z), density.evaluate(z), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("support", "shape"), [(dist.constraints.real, (2,)), (dist.constraints.positive, ()), (dist.constraints.simplex, (3,))]
)
@pytest.mark.parametrize("init", [init_to_uniform, init_to_median, {}])
def test_variables_without_draws_have_a_density(support, shape, init):
    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.ImproperUniform(support, (), shape))
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0))

    density = log_density(model, mode=Captured(script=False))
    u = density.initial_points(init=init)[0]
    z = density.constrain(u)["z"]
    assert z.shape == (2, *shape)
    jacobian = biject_to(support).log_abs_det_jacobian(density.unflatten(u)["z"], z).sum()
    torch.testing.assert_close(density(u)[0], jacobian + dist.Normal(z.sum(), 1.0).log_prob(torch.tensor(1.0)))


def test_a_model_without_latent_variables_has_no_coordinates():
    density = log_density(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)), mode=Captured())
    value, gradient = density(torch.zeros(0))
    torch.testing.assert_close(value, dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)))
    assert gradient.shape == (0,)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"zz": 0.0}, "init has no variable 'zz': the model has z, scale"),
        ({"y": 0.0}, "init has no variable 'y'"),
        ({"z": torch.zeros(2)}, r"value of 'z' of shape \(\), but found \(2,\)"),
        ({"scale": -1.0}, "value of 'scale' outside of the variable's support"),
    ],
)
def test_wrong_initial_values_are_refused(init, message):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.Exponential(1.0))
        pyro.deterministic("sum", z + scale)
        pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(1.0))

    density = log_density(model, mode=Eager())
    with pytest.raises(ValueError, match=message):
        density.initial_points(init=init)
    assert density.initial_points(init={"z": 2.0, "sum": 3.0})[0, 0] == 2.0


@pytest.mark.parametrize("validate", [True, False])
def test_data_that_are_nan_are_named_at_once(validate):
    runs = []

    def model():
        runs.append(1)
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor([0.0, np.nan]))

    density = log_density(model, mode=Eager())
    runs.clear()
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match="data of site 'y' hold NaN"):
        density.initial_points()
    assert len(runs) <= 2


def test_an_array_counts_as_a_tensor():
    density = log_density(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), mode=Eager())
    value, gradient = density(np.array([2.0]))
    assert value.dtype == torch.float64
    assert gradient.tolist() == [-2.0]
    assert repr(density) == "LogDensity of 1 coordinates: z ()"


def test_a_class_is_no_mode():
    with pytest.raises(TypeError, match=r"log_density wants .* but found the class Captured"):
        log_density(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), mode=Captured)
