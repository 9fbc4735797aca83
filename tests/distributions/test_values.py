"""Values of any type of numbers, `torch.inference_mode`, and quantities without a closed form."""

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import AffineTransform, constraints
from torch.testing import assert_close

from pyro_genmodels import (
    GAN,
    MAF,
    VAE,
    Autoregressive,
    DenseEnergy,
    DenseField,
    Diffusion,
    EnergyModel,
    Flow,
    FlowDensity,
    Labels,
    ODEFlow,
)
from pyro_genmodels.distributions import Energy
from pyro_genmodels.distributions.discretized import DiscretizedLogisticMixture
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.families import NAF, RK4

FAMILIES = {
    "flow": lambda **options: Flow((2,), transform=MAF(1, (8,)), **options),
    "naf": lambda **options: Flow((2,), transform=NAF(1, (8,)), **options),
    "ode_flow": lambda **options: ODEFlow((2,), network=DenseField(8, 1), solver=RK4(2), **options),
    "diffusion": lambda **options: Diffusion((2,), network=DenseField(8, 1), likelihood=FlowDensity(RK4(2)), **options),
    "energy": lambda **options: EnergyModel((2,), energy=DenseEnergy((8,)), **options),
    "autoregressive": lambda **options: Autoregressive((2,), hidden=(8,), **options),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def made(name, **options):
    return FAMILIES[name](**options).eval()


@every_family
def test_values_of_any_type_have_the_density_of_the_same_numbers(name):
    d, x = made(name)(), torch.tensor([[0.5, -0.25], [2.0, 1.0]])
    with torch.no_grad():
        right = d.unnormalized_log_prob(x)
        values = {
            "float64": x.double(),
            "float16": x.half(),
            "bfloat16": x.bfloat16(),
            "numpy": x.numpy(),
            "numpy float64": x.double().numpy(),
            "pandas": pd.DataFrame(x.numpy()),
            "list": x.tolist(),
        }
        for kind, value in values.items():
            found = d.unnormalized_log_prob(value)
            assert_close(found.float(), right, rtol=1e-6, atol=1e-6, msg=kind)
            if name != "energy":
                assert_close(d.log_prob(value).float(), right, rtol=1e-6, atol=1e-6, msg=kind)


@every_family
def test_a_family_in_doubles_takes_single_precision(name, float64):
    d, x = made(name)(), torch.tensor([[0.5, -0.25], [2.0, 1.0]])
    assert d.unnormalized_log_prob(x.float()).dtype == torch.float64
    assert_close(d.unnormalized_log_prob(x.float()), d.unnormalized_log_prob(x), rtol=1e-12, atol=0.0)


@every_family
def test_a_large_offset_is_subtracted_before_it_is_rounded(name):
    """Right values: those of the same data without the offset of 1.7e9, near which float32 has steps of 128."""
    x = torch.randn(50, 2, dtype=torch.float64) * 1000
    families = [made(name), made(name)]
    families[1].load_state_dict(families[0].state_dict())
    for family, offset in zip(families, (0.0, 1.7e9), strict=True):
        with torch.no_grad():
            family.loc.fill_(offset), family.scale.fill_(1000.0)
    right, found = (f().unnormalized_log_prob(x + o) for f, o in zip(families, (0.0, 1.7e9), strict=True))
    assert_close(found, right, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_list_with_a_large_offset_is_rounded_after_the_offset_is_subtracted():
    family = made("flow")
    with torch.no_grad():
        family.loc.fill_(1.7e9)
    d, x = family(), (torch.randn(20, 2, dtype=torch.float64) + 1.7e9)
    assert d.log_prob(x.tolist()).equal(d.log_prob(x))
    assert Energy(lambda y: y @ torch.eye(2) @ torch.ones(2), (2,)).unnormalized_log_prob([0.5, 1.0]).dtype == torch.float32


def test_lists_lists_of_tensors_and_frames_of_several_types_are_put_on_the_device_of_a_distribution():
    d = made("flow")()
    x = torch.tensor([[0.5, -1.0], [2.0, 3.0]])
    frame = pd.DataFrame({"a": [0.5, 2.0], "b": pd.array([-1, 3], dtype="Int64")})
    for value in (x.tolist(), list(x), frame):
        assert d.log_prob(value).equal(d.log_prob(x))
    assert made("flow").to("meta")()._as_value([[0.5, 1.0]]).device.type == "meta"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([[1, 2]], ValueError, r"real numbers, but the value holds torch.int64.*float"),
        (np.array([["a", "b"]]), TypeError, "ndarray of <U1"),
        (pd.DataFrame({"x": ["a"], "y": ["b"]}), TypeError, "the column 'x' holds str"),
        ("x", TypeError, "found str"),
        (None, TypeError, "found NoneType"),
        ([[0.5, float("nan")]], ValueError, "1 NaN or infinite"),
        ([[0.5, 1.0, 2.0]], ValueError, "event"),
    ],
)
def test_what_is_no_value_is_refused_in_words(value, error, message):
    d = made("flow")()
    for method in (d.log_prob, d.score):
        with pytest.raises(error, match=message):
            method(value)


@every_family
def test_score_and_density_under_inference_mode_are_those_outside(name):
    family, x = made(name, context=1), torch.tensor([[0.5, -0.25], [2.0, 1.0]])
    context = torch.tensor([[1.0], [-1.0]])
    with torch.no_grad():
        right, log_p = family(context).score(x), family(context).unnormalized_log_prob(x)
    with torch.inference_mode():
        d = family(context * 1.0)  # a context that was computed inside
        found = d.score(x * 1.0)
        assert not found.requires_grad
        assert_close(found, right)
        if name != "energy":
            assert_close(d.log_prob(x * 1.0), log_p)


NOTHING = {
    "mean": lambda d: d.mean,
    "variance": lambda d: d.variance,
    "stddev": lambda d: d.stddev,
    "mode": lambda d: d.mode,
    "entropy": lambda d: d.entropy(),
    "perplexity": lambda d: d.perplexity(),
    "cdf": lambda d: d.cdf(torch.zeros(2)),
    "icdf": lambda d: d.icdf(torch.tensor(0.5)),
    "enumerate_support": lambda d: d.enumerate_support(),
}


@pytest.mark.parametrize("quantity", NOTHING)
def test_what_has_no_closed_form_says_how_it_is_estimated(quantity):
    with pytest.raises(NotImplementedError, match=r"NormalizingFlow (has no|cannot).*dist\.sample\(\(10_000,\)\)"):
        NOTHING[quantity](made("flow")())


@pytest.mark.parametrize("quantity", ["mode", "entropy"])
def test_an_unknown_density_has_no_estimates_that_need_one(quantity):
    with pytest.raises(
        NotImplementedError, match=r"Energy has no closed-form .* needs a density, which is not known.*log_partition"
    ):
        NOTHING[quantity](made("energy")())


@pytest.mark.parametrize("family", [VAE, GAN])
def test_errors_name_the_family_that_the_user_has(family):
    d = family((2,)).eval()()
    for quantity in (lambda: d.log_prob(torch.zeros(2)), lambda: d.score(torch.zeros(2)), d.entropy, lambda: d.mean):
        with pytest.raises(NotImplementedError, match=rf"^{family.__name__} has "):
            quantity()


# Integers.


def mixture(levels, **options):
    return DiscretizedLogisticMixture(
        torch.tensor([0.3, -0.5]), torch.tensor([0.2, 0.7]) * levels, torch.tensor([0.5, 2.0]), levels, **options
    )


def test_a_discretised_mixture_has_the_cdf_entropy_and_mode_of_its_masses(float64):
    """Right values: sums over all levels."""
    d = mixture(9)
    p = d.log_prob(d.enumerate_support()).exp()
    assert_close(d.cdf(torch.arange(9)), p.cumsum(0))
    assert_close(d.cdf(torch.tensor([-0.5, 3.7, 100.0])), torch.stack([torch.tensor(0.0), p[:4].sum(), torch.tensor(1.0)]))
    assert_close(d.entropy(), -(p * p.log()).sum())
    assert d.mode == p.argmax()
    q = torch.linspace(0.001, 0.999, 57)
    assert_close(d.log_prob(np.array([2, 5])), p.log()[[2, 5]])
    assert (d.icdf(q) == (p.cumsum(0).unsqueeze(-1) < q).sum(0)).all()


def test_levels_that_the_type_does_not_tell_apart_are_refused():
    with pytest.raises(ValueError, match=r"16777216 levels apart in torch.float32, but found 16777217. Use double"):
        mixture(2**24 + 1)
    d = mixture(2**24)
    assert_close(d.log_prob(torch.tensor(2**24 - 1)).exp(), 1 - d.cdf(torch.tensor(2**24 - 2)), atol=1e-6, rtol=0.0)


# Contexts, and distributions of plain functions.


def test_labels_as_context_give_each_value_its_row():
    d = made("flow", context=Labels(3))(torch.arange(3))
    x = torch.randn(3, 2)
    assert_close(d.log_prob(x.double()).float(), d.log_prob(x))


def test_a_distribution_of_plain_functions_leaves_the_type_of_values():
    double = AffineTransform(0.0, 2.0, event_dim=1)
    flow = NormalizingFlow(lambda context: double, dist.Normal(0.0, 1.0), (2,))
    assert flow.log_prob(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
    energy = Energy(lambda x: x.square().sum(-1), (2,), support=constraints.positive)
    assert_close(
        energy.unnormalized_log_prob(torch.ones(2, dtype=torch.float64)).float(), energy.unnormalized_log_prob(torch.ones(2))
    )
