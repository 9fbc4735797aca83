"""Likelihoods of tables: densities against scipy, units, columns of different kinds, missing values and their imputation."""

import copy
import pickle
import warnings
from functools import partial
from math import log

import pandas
import pyro
import pytest
import torch
from cases import CLASSES, KINDS, counts, positive, real, table
from pyro.infer import Trace_ELBO
from scipy import stats
from teachers import outcomes, perturb
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_genmodels import (
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    CategoricalLikelihood,
    Mixed,
    NormalLikelihood,
    compare,
    log_likelihood,
    train,
)
from pyro_genmodels.datasets import read_table
from pyro_genmodels.distributions.scaled_likelihoods import PreciseBeta, PreciseGamma
from pyro_genmodels.evaluation import diagnose_vae, impute
from pyro_genmodels.families import (
    BetaLikelihood,
    GammaLikelihood,
    LogNormalLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
    StudentTLikelihood,
    Transformer,
    ZeroInflatedLikelihood,
)
from pyro_genmodels.infer import ImportanceWeightedELBO
from pyro_genmodels.testing import check_family
from pyro_genmodels.training import checkpoints

TINY = 2.0**-20
"""A unit about a million times smaller, by which floats are multiplied exactly."""


def softplus(raw):
    return nn.functional.softplus(torch.tensor(raw, dtype=torch.float64)).item()


def one(likelihood, *params, loc=0.0, scale=1.0):
    """Return the distribution for raw parameters in float32, in units of the data if there are any."""
    if likelihood.has_scale:
        likelihood = likelihood.in_units(torch.tensor(loc), torch.tensor(scale))
    return likelihood(torch.tensor(params))


def unit(raw, least=1e-3):
    """Return the positive number that an output gives."""
    return least + softplus(raw + log(torch.e - 1))


def negative_binomial(mean, concentration):
    return stats.nbinom(concentration, concentration / (concentration + mean))


EXACT = {
    "Student t": (one(StudentTLikelihood(), 0.5, 0.2, -1.0), stats.t(1 + unit(2.0, 0), 0.5, unit(0.2)), [0.5, -3.0, 40.0]),
    "log-normal": (
        one(LogNormalLikelihood(), 0.5, 0.2, loc=-14.0, scale=0.7),
        stats.lognorm(0.7 * unit(0.2), scale=torch.tensor(-14 + 0.35, dtype=torch.float64).exp().item()),
        [1e-7, 1e-6, 1e-5],
    ),
    "gamma": (
        one(GammaLikelihood(), 0.0, 0.0, loc=log(290.0), scale=0.02),
        stats.gamma(2500.0, scale=290 / 2500),
        [270.0, 290.0, 301.0],
    ),
    "beta": (one(BetaLikelihood(), 0.0, log(2.0)), stats.beta(4.0, 4.0), [0.001, 0.5, 0.875]),
    "Poisson": (one(PoissonLikelihood(), 0.3), stats.poisson(torch.tensor(0.3).exp().item()), [0, 1, 7]),
    "Poisson of a million": (
        one(PoissonLikelihood(), 0.0, loc=log(1e6), scale=1e-3),
        stats.poisson(torch.tensor(log(1e6)).double().exp().item()),
        [998_500, 1_000_000, 1_001_000],
    ),
    "negative binomial": (one(NegativeBinomialLikelihood(), log(3.0), log(2.0)), negative_binomial(3.0, 2.0), [0, 3, 50]),
    "negative binomial of a million": (
        one(NegativeBinomialLikelihood(), 0.0, 0.0, loc=log(1e6), scale=0.25),
        negative_binomial(torch.tensor(log(1e6)).double().exp().item(), 16.0),
        [500_000, 1_000_000, 2_000_000],
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_densities_are_those_of_scipy(name):
    ours, theirs, x = EXACT[name]
    wanted = theirs.logpmf(x) if hasattr(theirs.dist, "logpmf") else theirs.logpdf(x)
    assert_close(ours.log_prob(torch.tensor(x).float()).double(), torch.from_numpy(wanted), rtol=2e-6, atol=2e-5)
    if name != "Student t":
        assert ours.mean.item() == pytest.approx(theirs.mean(), rel=1e-5)
        assert ours.variance.item() == pytest.approx(theirs.var(), rel=1e-4)


@pytest.mark.parametrize("base", [PoissonLikelihood(), NegativeBinomialLikelihood()], ids=repr)
def test_zero_inflation_mixes_a_point_mass_at_zero(base):
    params, gate = torch.randn(base.num_outputs), torch.tensor([0.4])
    x = torch.arange(6.0)
    inflated, plain = ZeroInflatedLikelihood(base)(torch.cat([params, gate])), base(params)
    wanted = gate.sigmoid() * (x == 0) + (1 - gate.sigmoid()) * plain.log_prob(x).exp()
    assert_close(inflated.log_prob(x).exp(), wanted)


@pytest.mark.parametrize(
    "likelihood", [LogNormalLikelihood(), GammaLikelihood(), BetaLikelihood(), NegativeBinomialLikelihood()]
)
def test_outputs_of_zero_describe_the_data(likelihood):
    """Data of any unit and spread have a mean near that for outputs of 0, and features of order 1."""
    x = 290 * (0.02 * torch.randn(500, 1)).exp()
    x = {BetaLikelihood(): x / 1000, NegativeBinomialLikelihood(): 1000 * x}.get(likelihood, x).round(decimals=9)
    x = x.round() if likelihood.support.is_discrete else x
    family = Autoregressive((1,), likelihood=likelihood)
    family.standardize(x)
    measured = family.measured
    assert measured(torch.zeros(1, likelihood.num_outputs)).mean.item() == pytest.approx(x.mean().item(), rel=0.01)
    features = measured.encode(x)
    assert features.mean().abs() < 0.01
    assert features.std().item() == pytest.approx(1, abs=0.02)


BITS = BernoulliLikelihood()


@pytest.mark.parametrize(
    ("likelihood", "standardize"), [(BITS, True), (BITS, "jointly"), (BITS, False), (Mixed([BITS] * 3), True)], ids=repr
)
def test_networks_of_zero_have_the_shares_of_ones_in_the_data(likelihood, standardize):
    x = torch.zeros(99, 3)
    x[:49, 0] = x[:1, 1] = 1
    made = Autoregressive((3,), likelihood=likelihood, order=[2, 0, 1], hidden=(4,), standardize=standardize)
    vae = VAE((3,), likelihood=likelihood, hidden=(4,), standardize=standardize, missing=likelihood.is_mixed)
    for family in (made, vae):
        for parameter in family.parameters():
            parameter.data.zero_()
        family.standardize(x)
    share = (x.sum(0) + 0.5) / 100 if standardize is True else torch.full((3,), 0.5 if not standardize else 50.5 / 298)
    wanted = torch.where(outcomes(2, 3) == 1, share, 1 - share).log().sum(1)
    assert_close(made().log_prob(outcomes(2, 3).float()), wanted)
    assert_close(vae.decode(torch.zeros(8, 8)).log_prob(outcomes(2, 3).float()), wanted)


@pytest.mark.parametrize("likelihood", [BITS, Mixed([BITS, BITS, CategoricalLikelihood(2)])], ids=repr)
def test_parameters_that_were_trained_before_logits_were_measured_keep_their_density(likelihood, tmp_path):
    x = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    made = perturb(Autoregressive((3,), likelihood=likelihood, hidden=(4,)))
    wanted = made().log_prob(x)
    older = made.state_dict()
    older._metadata[""]["version"] = 1  # as torch counts, for modules that name no version
    twin = Autoregressive((3,), likelihood=likelihood, hidden=(4,))
    twin.load_state_dict(older)
    path = checkpoints.save(tmp_path / "made", made)
    tensors, record = checkpoints.read(path)
    record["format"] = 1
    for family in (twin, checkpoints.load_state(tensors, record, path)):
        family.train().model(x)
        assert family().log_prob(x).equal(wanted)
    twin.standardize(x)
    assert twin.loc[0] > 1
    twin.load_state_dict(made.state_dict())
    for family in (twin, checkpoints.load(path)):
        family.train().model(x)
        assert family.loc[0] > 1


@pytest.mark.parametrize(
    ("likelihood", "loc", "scale", "teacher"),
    [
        (BetaLikelihood(), log(1e-9), 0.1, stats.gamma(100, scale=1e-11)),  # the limits of these have errors of 1e-8
        (BetaLikelihood(), log(1e-12), 0.1, stats.gamma(100, scale=1e-14)),
        (BetaLikelihood(), 0.0, 4e-8, stats.norm(0.5, 1e-8)),
        (GammaLikelihood(), log(1e6), 1e-8, stats.norm(1e6, 1e-2)),
    ],
    ids=["nanometres", "picometres", "all near one half", "all near a million"],
)
def test_densities_of_large_concentrations_keep_their_digits(likelihood, loc, scale, teacher):
    units = (torch.tensor(v, dtype=torch.float64) for v in (loc, scale))
    measured = likelihood.in_units(*units)(torch.zeros(2, dtype=torch.float64))
    x = teacher.ppf([0.001, 0.3, 0.5, 0.9, 0.999])
    found = measured.log_prob(torch.from_numpy(x))
    assert_close(found, torch.from_numpy(teacher.logpdf(x)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.01, 3.0), (1.0, 1.0), (9.99, 10.01), (1e4, 0.5), (300.0, 1e5)])
def test_precise_densities_are_the_usual_ones_with_their_gradients(a, b):
    x = torch.from_numpy(stats.beta(a, b).ppf([0.1, 0.5, 0.9])).clamp(1e-200, 1 - 1e-12)
    x = torch.cat([x, torch.tensor([1e-3, 0.25, 0.999])]).requires_grad_()
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
    for precise, usual in ((PreciseBeta, torch.distributions.Beta), (PreciseGamma, torch.distributions.Gamma)):
        results = []
        for kind in (precise, usual):
            log_p = kind(a, b, validate_args=False).log_prob(x)
            results.append((log_p, *torch.autograd.grad(log_p.sum(), (a, b, x))))
        for found, wanted in zip(*results, strict=True):
            assert_close(found, wanted, rtol=1e-8, atol=1e-8)


# Units.


UNITS = [NormalLikelihood(), NormalLikelihood(components=2), StudentTLikelihood(), LogNormalLikelihood(), GammaLikelihood()]


@pytest.mark.parametrize("kind", UNITS, ids=repr)
def test_densities_in_another_unit_change_by_its_logarithm(kind, float64):
    family, x = perturb(Autoregressive((2,), likelihood=Mixed([kind, kind]), hidden=(8,))), positive(2)(30) * 1000
    values = []
    for factor in (torch.tensor([1.0, 1.0]), torch.tensor([1e-6, 86400.0])):
        family.standardize(factor * x)
        values.append(family().log_prob(factor * x) + factor.log().sum())
    assert_close(values[1], values[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", UNITS[::2], ids=repr)
@pytest.mark.parametrize("build", [Autoregressive, VAE])
def test_a_fit_in_another_unit_is_the_same(build, kind):
    """A column in a unit a million times larger trains to the same parameters, and log densities change by its logarithm."""
    x = positive(2)(60) * 1000 + (5 if kind.is_located else 0)
    losses, values = [], []
    for factor in (1.0, TINY):
        pyro.set_rng_seed(1)
        family = build((2,), likelihood=Mixed([kind, CategoricalLikelihood(2)]), hidden=(8,))
        rows = torch.stack([factor * x[:, 0], (x[:, 1] > 1).float()], -1)
        fit = train(family, rows, epochs=3, batch_size=20, progress=False)
        losses.append(fit.history[-1]["train"])
        values.append(family().log_prob(rows) if build is Autoregressive else family.model(rows))
    assert losses[1] == pytest.approx(losses[0] + log(TINY), abs=2e-3)
    if build is Autoregressive:
        assert_close(values[1], values[0] - log(TINY), atol=2e-3, rtol=0)


@pytest.mark.slow
def test_large_counts_and_small_units_are_learned():
    """Counts of a million and durations of microseconds, both given a class, are learned up to their entropy."""
    y = torch.randint(2, (2000,))
    rate = torch.tensor([1.0e6, 1.01e6])[y]
    x = torch.stack([y.float(), torch.poisson(rate), 1e-6 * (y + 0.1 * torch.randn(2000)).exp()], -1)
    kinds = [BernoulliLikelihood(), PoissonLikelihood(), LogNormalLikelihood()]
    family = Autoregressive((3,), likelihood=Mixed(kinds), hidden=(16,))
    train(family, x, epochs=25, batch_size=100, optim=partial(torch.optim.Adam, lr=0.02), progress=False)
    with torch.no_grad():
        found = family.eval()().log_prob(x).mean()
    exact = -log(2) + torch.distributions.Poisson(rate.double()).log_prob(x[:, 1].double())
    exact = exact + torch.distributions.LogNormal(y + log(1e-6), 0.1).log_prob(x[:, 2])
    assert exact.mean() - 0.1 < found < exact.mean() + 0.1


# Columns of different kinds.


def test_each_column_has_the_density_of_its_own_kind():
    mixed, params = Mixed(KINDS), torch.randn(4, 5, 3)
    d, x = mixed(params), table(4)
    each = [kind(params[:, i, : kind.num_outputs]).log_prob(kind.cast(x[:, i], torch.float32)) for i, kind in enumerate(KINDS)]
    assert_close(d.log_prob(x), torch.stack(each, -1))
    assert d.to_event(1).expand((2, 4)).log_prob(x).shape == (2, 4)
    assert d.to_event(1).support.check(x).all()
    assert_close(d.mean[:, 4], params[:, 4, 0].sigmoid())


def test_mixed_conditionals_sum_to_one_in_any_order():
    """A class, a zero or one and a count with bounded tail: all outcomes have probability 1 together."""
    every = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0), torch.arange(200.0))
    kinds = [CategoricalLikelihood(3), BernoulliLikelihood(), PoissonLikelihood()]
    for order in ([0, 1, 2], [2, 0, 1]):
        family = perturb(Autoregressive((3,), likelihood=Mixed(kinds), order=order, hidden=(8,)))
        assert family().log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-4)
    family = perturb(Autoregressive((3,), likelihood=Mixed(kinds), order="any", network=Transformer(layers=1, width=16)), 0.3)
    for order in ([0, 1, 2], [2, 1, 0]):
        assert family().in_order(order).log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_a_temperature_applies_to_columns_of_classes():
    every = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0))
    family = perturb(Autoregressive((2,), likelihood=Mixed([CategoricalLikelihood(3), BernoulliLikelihood()]), hidden=(8,)))
    sharp = family().tempered(0.5, top_p=0.9)
    assert sharp.log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert sharp.log_prob(sharp.sample((50,))).isfinite().all()
    with pytest.raises(ValueError, match="temperature and top_p are for classes"):
        Autoregressive((5,), likelihood=Mixed(KINDS))().tempered(0.5)


def test_draws_of_each_column_have_its_distribution():
    """Means of 20,000 draws lie within 4.5 standard errors of those of the distributions: false alarms 7e-6 per column."""
    x = table(300)
    family = Autoregressive((5,), likelihood=Mixed(KINDS), order=[4, 2, 0, 1, 3], hidden=(8,)).eval()
    family.standardize(x)
    for parameter in family.conditionals.parameters():
        nn.init.zeros_(parameter)
    draws, n = family().sample((20_000,)), 20_000
    d = family.measured(torch.zeros(5, family.likelihood.num_outputs))
    mean, deviation = torch.tensor([0.0, d.mean[1], d.mean[2], 1.0, 0.5]), torch.tensor([1.0, 0, 0, (2 / 3) ** 0.5, 0.5])
    deviation[1:3] = d.variance[1:3].sqrt()
    mean[0], deviation[0] = family.loc[0], family.scale[0] * (1 + 1e-3)
    assert ((draws.mean(0) - mean).abs() < 4.5 * deviation / n**0.5).all()
    assert draws[:, 3].unique().tolist() == [0, 1, 2]
    assert draws[:, 4].unique().tolist() == [0, 1]


def test_the_order_of_the_columns_is_no_matter_of_their_kinds():
    """A completion by a network of any order keeps known values, and draws others in the support of their columns."""
    family = Autoregressive((5,), likelihood=Mixed(KINDS), order="any", network=Transformer(layers=1, width=16)).eval()
    x = table(50)
    family.standardize(x)
    known = torch.rand(x.shape) < 0.5
    completed = family().complete(x, known)
    assert completed[known].equal(x[known])
    assert family.support.check(completed).all()


def test_gradients_stay_finite_at_outputs_of_any_size():
    mixed = Mixed(KINDS).in_units(torch.tensor([1e5, -20.0, 14.0, 0.0, 0.0]), torch.tensor([1e3, 3.0, 1e-3, 1.0, 1.0]))
    params = 8 * torch.randn(20, 5, 3)
    unused = torch.tensor([[kind.num_outputs <= i for i in range(3)] for kind in KINDS])
    params[:, unused] = torch.inf
    params.requires_grad_()
    mixed(params).log_prob(table(20)).sum().backward()
    assert params.grad.isfinite().all()
    assert (params.grad[:, unused] == 0).all()


def test_mixed_without_integers_has_reparametrised_draws_and_maps_to_the_reals():
    family = Autoregressive((2,), likelihood=Mixed([NormalLikelihood(), BetaLikelihood()]), hidden=(8,))
    assert family().rsample((3,)).requires_grad
    to_support = torch.distributions.biject_to(family().support)
    x = to_support(torch.randn(4, 2))
    assert family().support.check(x).all()
    assert to_support.log_abs_det_jacobian(to_support.inv(x), x).shape == (4,)


def test_mixed_families_are_copied_pickled_and_saved(tmp_path):
    family, x = perturb(VAE((5,), likelihood=Mixed(KINDS, names="abcde"), missing=True, hidden=(8,))), table(30)
    family.standardize(x)
    checkpoints.save(tmp_path / "a.safetensors", family)
    restored = checkpoints.load(tmp_path / "a.safetensors")
    assert restored.likelihood == family.likelihood
    for other in (restored, copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        assert_close(other.posterior(x).mean, family.posterior(x).mean)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("visits", -1.0, "in column 'visits', was given data outside its support"),
        ("visits", 0.5, "in column 'visits', was given data outside its support"),
        (
            "ward",
            float(CLASSES),
            rf"in column 'ward', was given data outside.*: the value {CLASSES} in 1 places. Classes are numb",
        ),
        ("smokes", 2.0, "in column 'smokes', was given data outside its support"),
        ("cost", 0.0, r"in column 'cost', was given 1 values at an end of its support.*have no density\. If 0 means"),
        ("cost", -1.0, r"in column 'cost', was given data outside its support.*both signs want NormalLikelihood"),
        ("age", torch.nan, r"in column 'age', was given data with NaN.*row 2.*build the family with missing=True"),
        ("age", torch.inf, "in column 'age', was given data with infinite values"),
    ],
)
def test_wrong_values_are_refused_by_the_name_of_their_column(column, value, message):
    names = ["age", "cost", "visits", "ward", "smokes"]
    x = table(4)
    x[2, names.index(column)] = value
    with pytest.raises(ValueError, match=message):
        VAE((5,), likelihood=Mixed(KINDS, names=names)).model(x)
    with pytest.raises(ValueError, match=f"column {names.index(column)}"):
        Autoregressive((5,), likelihood=Mixed(KINDS)).model(x)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"Mixed wants a likelihood such as NormalLikelihood\(\) for each column, but found 3"):
        Mixed([NormalLikelihood(), 3])
    with pytest.raises(TypeError, match="but found Mixed"):
        Mixed([Mixed(KINDS)])
    with pytest.raises(ValueError, match="2 different names"):
        Mixed(KINDS[:2], names=["a", "a"])
    with pytest.raises(ValueError, match="at least one column"):
        Mixed([])
    with pytest.raises(ValueError, match=r"5 likelihoods.*event_shape=\(4,\)"):
        VAE((4,), likelihood=Mixed(KINDS))
    with pytest.raises(ValueError, match="support for each column"):
        VAE((5,), likelihood=Mixed(KINDS), support=constraints.positive)
    with pytest.raises(ValueError, match="columns of Mixed are of different kinds"):
        VAE((5,), likelihood=Mixed(KINDS), standardize="jointly")
    with pytest.raises(TypeError, match="ZeroInflatedLikelihood wants a base"):
        ZeroInflatedLikelihood(NormalLikelihood())
    with pytest.raises(ValueError, match="missing=True wants a support of single coordinates"):
        VAE((3,), support=pyro.distributions.constraints.ordered_vector, missing=True)
    with pytest.raises(ValueError, match="StudentTLikelihood wants df"):
        StudentTLikelihood(df=-1.0)


def test_kinds_of_columns_are_read_from_a_table():
    frame = pandas.DataFrame(
        {
            "age": 40 + 10 * torch.randn(200).numpy(),
            "cost": torch.randn(200).mul(2).exp().numpy(),
            "visits": torch.poisson(20 * torch.rand(200)).mul(3).numpy(),
            "ward": [0, 1, 2, 3] * 50,
            "smokes": [True, False] * 100,
            "year": [1999 + i % 25 for i in range(200)],
            "share": torch.rand(200).clamp(0.001, 0.999).numpy(),
        }
    )
    frame.loc[3, ["cost", "visits"]] = None
    found = Mixed.of(frame, kinds={"ward": NormalLikelihood(scale=0.5)})
    assert found.names == tuple(frame.columns)
    assert found.likelihoods == (
        NormalLikelihood(),
        LogNormalLikelihood(),
        NegativeBinomialLikelihood(),
        NormalLikelihood(scale=0.5),
        BernoulliLikelihood(),
        NormalLikelihood(),
        BetaLikelihood(),
    )
    assert Mixed.of(torch.tensor([[0.0], [0.5], [0.7]])).likelihoods == (NormalLikelihood(),)  # a beta has no density at 0
    assert Mixed.of(frame[["ward"]].to_numpy()).likelihoods == (CategoricalLikelihood(4),)
    with pytest.raises(ValueError, match=r"unknown column 'costs'.*Did you mean cost"):
        Mixed.of(frame, kinds={"costs": GammaLikelihood()})
    with pytest.raises(ValueError, match=r"shape \(rows, columns\), but found \(3,\)"):
        Mixed.of([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no value in the column 0"):
        Mixed.of(torch.full((4, 1), torch.nan))


def test_a_table_with_gaps_is_read_and_modelled(tmp_path):
    path = tmp_path / "ward.csv"
    path.write_text("age,ward,visits\n40.5,0,12\n,1,0\n51.25,2,\n33.0,,470\n61.5,1,28\n")
    with pytest.raises(ValueError, match="3 of 5 rows hold missing or infinite values, first row 2, column age"):
        read_table(path)
    table = read_table(path, missing=True)
    kinds = Mixed.of(table.x, names=table.columns)
    assert kinds.likelihoods == (NormalLikelihood(), CategoricalLikelihood(3), NegativeBinomialLikelihood())
    family = VAE((3,), likelihood=kinds, missing=True, hidden=(8,))
    family.standardize(table.x)
    assert log_likelihood(family, table.x, num_samples=20).values.isfinite().all()
    path.write_text("age\n1.5\n\ninf\n")
    with pytest.raises(ValueError, match="1 of 2 rows hold infinite values, first row 2"):
        read_table(path, missing=True)


# Missing values.


def gaps(n):
    x = table(n)
    x[torch.arange(n), torch.arange(n) % 5] = torch.nan
    return x


MIWAE = partial(ImportanceWeightedELBO, 2, max_plate_nesting=1)


@pytest.mark.parametrize("objective", [Trace_ELBO, pytest.param(MIWAE, marks=pytest.mark.slow)], ids=["ELBO", "MIWAE"])
def test_families_with_missing_values_keep_the_contract(objective):
    def build():
        return VAE((5,), likelihood=Mixed(KINDS), missing=True, hidden=(8,), latent_dim=2)

    skip = ["errors"]  # values that are NaN are refused otherwise
    check_family(build, gaps, objective=objective, skip=skip)


@pytest.mark.parametrize("support", [constraints.real, constraints.positive])
def test_missing_values_have_no_part_in_the_likelihood(support):
    """The density of the known coordinates is that without the others, and the encoder does not see what is missing."""
    family = perturb(VAE((3,), missing=True, support=support, hidden=(8,)))
    x = 5 + real(3)(20).abs()
    family.standardize(x)
    z = torch.zeros(20, 8)
    full = family.decode(z)
    one_missing = x.clone()
    one_missing[:, 1] = torch.nan
    alone = x.clone()
    alone[:, [0, 2]] = torch.nan
    assert_close(full.log_prob(one_missing) + full.log_prob(alone), full.log_prob(x))
    assert (full.log_prob(torch.full((20, 3), torch.nan)) == 0).all()
    complete = VAE((3,), support=support, hidden=(8,))
    complete.standardize(x)
    complete.decoder = family.decoder
    assert_close(complete.decode(z).log_prob(x), full.log_prob(x))
    assert family.posterior(one_missing).mean.isfinite().all()
    with pytest.raises(ValueError, match=r"with infinite values.*: replace these values by NaN\.$"):
        family.model(x.where(x < x.max(), torch.inf))


def test_units_are_those_of_the_known_values():
    x = table(500)
    some = x.where(torch.rand(x.shape) < 0.5, torch.nan)
    family = VAE((5,), likelihood=Mixed(KINDS), missing=True)
    family.standardize(some)
    assert family.loc[0].item() == pytest.approx(some[:, 0].nanmean().item(), rel=1e-5)
    assert family.loc[1].item() == pytest.approx(some[:, 1].log().nanmean().item(), rel=1e-5)


class _Linear(nn.Module):
    """A decoder of one latent variable: two real columns with means linear in z, and a class with logits linear in z."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([[1.5, 0, 0], [-1.0, 0, 0], [2.0, 0.0, -2.0]]))
        self.bias = nn.Parameter(torch.tensor([[0.5, 0, 0], [1.0, 0, 0], [0.0, 0.5, 0.0]]))

    def forward(self, z):
        return self.bias + self.slope * z.unsqueeze(-1)


class _Prior(nn.Module):
    """An encoder that returns the prior, whatever the data."""

    def forward(self, x):
        return x.new_zeros(len(x), 1), x.new_ones(len(x), 1)


NOISE = 0.7


def linear_vae():
    kinds = [NormalLikelihood(scale=NOISE), NormalLikelihood(scale=NOISE), CategoricalLikelihood(3)]
    return VAE(
        (3,), latent_dim=1, likelihood=Mixed(kinds), missing=True, standardize=False, encoder=_Prior(), decoder=_Linear()
    )


def exact_posterior(row):
    """Return log p(seen), and mean and variance of the missing columns (of one-hot classes for the last), by a sum over z."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        params = _Linear().double()(z)
    log_p = torch.distributions.Normal(0, 1).log_prob(z[:, 0]) + log(16 / 4000)
    logits = params[:, 2].log_softmax(-1)
    for i in range(2):
        if not row[i].isnan():
            log_p = log_p + torch.distributions.Normal(params[:, i, 0], NOISE).log_prob(row[i].double())
    if not row[2].isnan():
        log_p = log_p + logits[:, int(row[2])]
    weights = log_p.softmax(0)
    mean = weights @ params[:, :2, 0]
    variance = NOISE**2 + weights @ (params[:, :2, 0] - mean).square()
    return log_p.logsumexp(0).item(), mean, variance, weights @ logits.exp()


NAN = torch.nan


@pytest.mark.parametrize("row", [[1.2, NAN, NAN], [NAN, 2.0, 2.0], [2.0, NAN, 1.0]])
def test_imputed_values_have_the_exact_distribution(row):
    """Means and shares of 1000 independent imputations lie within 4.5 standard errors: false alarms 7e-6 for each of three."""
    family, x, n = linear_vae(), torch.tensor(row), 1000
    _, mean, variance, classes = exact_posterior(x)
    if row[1:] == [NAN, NAN] or (torch.tensor(row[1:]).isnan().all()):  # closed form: a bivariate normal distribution
        slope = -1.5 / (1.5**2 + NOISE**2)
        assert mean[1].item() == pytest.approx(1 + slope * (row[0] - 0.5), abs=1e-6)
        assert variance[1].item() == pytest.approx(1 + NOISE**2 - 1.5**2 / (1.5**2 + NOISE**2), abs=1e-6)
    drawn = impute(family, x.expand(n, 3), num_samples=1, num_particles=400)[0]
    seen = ~x.isnan()
    assert (drawn[:, seen] == x[seen]).all()
    for i in range(2):
        if not seen[i]:
            assert abs(drawn[:, i].mean() - mean[i]) < 4.5 * (variance[i] / n).sqrt()
            spread = (drawn[:, i] - mean[i]).square()
            assert abs(spread.mean() - variance[i]) < 4.5 * (spread.var() / n).sqrt()
    if not seen[2]:
        share = (drawn[:, 2] == 2).double().mean()
        assert abs(share - classes[2]) < 4.5 * (classes[2] * (1 - classes[2]) / n).sqrt()


def test_the_bound_is_one_of_the_density_of_what_is_known():
    """It is within 4.5 standard errors of the exact value, and rises with the number of draws."""
    family, x = linear_vae(), torch.tensor([[1.2, NAN, NAN], [NAN, 2.0, 2.0], [NAN, NAN, NAN], [0.5, 1.0, 1.0]])
    exact = torch.tensor([exact_posterior(row)[0] for row in x])
    found = log_likelihood(family, x, num_samples=5000)
    assert ((found.values - exact).abs() < 4.5 * found.std_error + 1e-5).all()
    rows = x.repeat(500, 1)
    bounds = [-ImportanceWeightedELBO(k).loss(family.model, family.guide, rows) / 500 for k in (1, 5, 50)]
    assert bounds[0] < bounds[1] < bounds[2] < exact.sum().item() + 0.1
    assert bounds[2] > exact.sum().item() - 0.5


@pytest.mark.slow
def test_a_fit_of_incomplete_rows_finds_what_links_the_columns():
    """A class determines a count; a third of the cells is missing. Imputed counts differ by class as the complete ones do."""
    y = torch.randint(2, (1000,))
    x = torch.stack([y.float(), torch.poisson(torch.tensor([3.0, 30.0])[y])], -1)
    holes = x.where(torch.rand(x.shape) > 1 / 3, NAN)
    kinds = [CategoricalLikelihood(2), PoissonLikelihood()]
    family = VAE((2,), likelihood=Mixed(kinds), missing=True, latent_dim=1, hidden=(32,))
    optim = partial(torch.optim.Adam, lr=5e-3)
    train(family, holes, objective=ImportanceWeightedELBO(5), epochs=100, optim=optim, batch_size=100, progress=False)
    known = torch.tensor([[0.0, NAN], [1.0, NAN], [NAN, 3.0], [NAN, 30.0]])
    drawn = impute(family, known, num_samples=200, num_particles=500)
    assert 2 < drawn[:, 0, 1].mean() < 5
    assert 24 < drawn[:, 1, 1].mean() < 36
    assert drawn[:, 2, 0].mean() < 0.1
    assert drawn[:, 3, 0].mean() > 0.9


def test_imputation_is_refused_without_a_likelihood_that_allows_it():
    with pytest.raises(ValueError, match=r"impute wants a fit with one observed site.*missing=True"):
        impute(VAE((2,)), torch.zeros(3, 2))


def test_heavy_weights_of_an_imputation_are_warned_of():
    family = linear_vae()
    with pytest.warns(RuntimeWarning, match="impute: Pareto k-hat is above 0.7 in 1 of 1 rows"):
        impute(family, torch.tensor([[60.0, NAN, NAN]]), num_particles=200)


def test_counts_keep_their_digits():
    """Counts beyond a million have the log density of doubles, up to the rounding of float32."""
    family = Autoregressive((1,), likelihood=PoissonLikelihood(), hidden=(8,))
    x = torch.poisson(torch.full((400, 1), 1e6, dtype=torch.float64))
    family.standardize(x)
    found = family().log_prob(x)
    rate = family.measured(family.conditionals(torch.zeros(1, 1, 1), None)[0]).mean.double()
    assert_close(found.double(), torch.distributions.Poisson(rate).log_prob(x)[:, 0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [BetaLikelihood(), NormalLikelihood()], ids=repr)
@pytest.mark.parametrize(
    "build", [partial(Autoregressive, hidden=(8,)), VAE, partial(VAE, missing=True)], ids=["made", "vae", "with gaps"]
)
def test_proportions_keep_their_digits(build, kind):
    """A family in float32 reads what float32 cannot hold: proportions near 1, or near one half, that hardly differ."""
    x = torch.stack([1 - 1e-9 * torch.rand(200).double(), 0.5 + 1e-9 * torch.randn(200).double()], 1)
    x = x if isinstance(kind, BetaLikelihood) else x + torch.tensor([0.0, 7.0])
    family = perturb(build((2,), likelihood=Mixed([BetaLikelihood(), kind])))
    with warnings.catch_warnings(action="ignore"):  # near 7.5 the mean of a column is rounded
        family.standardize(x)
    wide = copy.deepcopy(family.eval()).double()
    if isinstance(family, VAE):
        found, wanted = (each.decode(torch.zeros(1, 8, dtype=each.loc.dtype)).log_prob(x) for each in (family, wide))
        assert_close(family.posterior(x).mean.double(), wide.posterior(x).mean, atol=1e-4, rtol=1e-4)
    else:
        found, wanted = family().log_prob(x), wide().log_prob(x)
    assert found.dtype == torch.float32
    assert_close(found.double(), wanted, atol=1e-3, rtol=1e-4)


def test_counts_have_features_of_order_one():
    for x in (counts(1)(500), torch.poisson(torch.full((500, 1), 1e6)), torch.bernoulli(torch.full((500, 1), 0.02))):
        family = Autoregressive((1,), likelihood=NegativeBinomialLikelihood())
        family.standardize(x)
        assert family.measured.encode(x).abs().mean() < 3


@pytest.mark.parametrize("likelihood", [None, Mixed([NormalLikelihood(), PoissonLikelihood()], names=["a", "b"])])
def test_a_column_that_is_missing_everywhere_is_refused(likelihood):
    x = torch.stack([torch.ones(5).cumsum(0), torch.full((5,), torch.nan)], 1)
    with pytest.raises(ValueError, match="without any known value"):
        VAE((2,), likelihood=likelihood, missing=True).prepare(x)


NAMES = ["cost", "visits", "age"]


def by_name():
    kinds = Mixed([LogNormalLikelihood(), PoissonLikelihood(), NormalLikelihood()], names=NAMES)
    x = torch.stack([torch.randn(60).exp(), torch.poisson(torch.full((60,), 3.0)), 40 + 10 * torch.randn(60)], 1).double()
    return kinds, pandas.DataFrame(x.numpy(), columns=NAMES), x


def test_columns_of_a_frame_are_matched_by_name():
    kinds, frame, x = by_name()
    other = frame[["age", "cost", "visits"]]
    made = perturb(Autoregressive((3,), likelihood=kinds, hidden=(8,)))
    made.standardize(other)
    assert_close(made.loc.double(), torch.stack([x[:, 0].log().mean(), made.loc[1].double(), x[:, 2].mean()]))
    expected = made().log_prob(x)
    assert_close(made().log_prob(other), expected)
    assert_close(log_likelihood(made, other).values, expected)
    found = compare({"made": made}, other)
    assert_close(found.log_likelihoods["made"].values, expected)
    assert made().complete(other, torch.ones(3, dtype=torch.bool)).equal(x)
    vae = VAE((3,), latent_dim=1, likelihood=kinds, hidden=(8,), missing=True)
    losses = []
    for data in (x, other):
        pyro.set_rng_seed(0)
        twin = copy.deepcopy(vae)
        losses.append(train(twin, data, valid=data, epochs=1, progress=False).history[0]["valid"])
    assert losses[0] == losses[1]
    assert impute(vae, other, num_samples=2).equal(x.expand(2, 60, 3))
    assert diagnose_vae(vae, other, num_samples=2).data.equal(x[:8])
    assert vae.model(other).equal(x)
    assert vae.posterior(other).mean.equal(vae.posterior(x).mean)


def test_frames_of_other_columns_are_refused_and_numbered_ones_go_by_place():
    kinds, frame, x = by_name()
    made = Autoregressive((3,), likelihood=kinds, hidden=(8,))
    for wrong in (frame.rename(columns={"age": "years"}), frame[["cost", "visits"]], frame.assign(name=1.0)):
        for use in (made.standardize, made().log_prob, partial(train, made), partial(log_likelihood, made)):
            with pytest.raises(ValueError, match="wants a data frame with the columns cost, visits, age, but found cost"):
                use(wrong)
    made.validate(pandas.DataFrame(x.numpy()))
    swapped = frame.set_axis([1, 0, 2], axis=1)
    made = perturb(Autoregressive((3,), likelihood=Mixed.of(swapped), hidden=(8,))).eval()
    assert Mixed.of(swapped, kinds={0: StudentTLikelihood()}).likelihoods[1] == StudentTLikelihood()
    assert_close(made().log_prob(swapped[[0, 1, 2]]), made().log_prob(swapped))
    assert Mixed.of(frame, names=["age", "visits", "cost"]).names == ("age", "visits", "cost")
    assert Mixed.of(frame, names=["age", "visits", "cost"]).likelihoods[0] == NormalLikelihood()
    assert Mixed.of(frame, names=["a", "b", "c"]).likelihoods[2] == NormalLikelihood()


@pytest.mark.parametrize("likelihood", [NormalLikelihood(), Mixed([NormalLikelihood(), PoissonLikelihood()])])
def test_a_column_far_from_zero_with_a_missing_value_is_not_constant(likelihood):
    """A missing value counted as 0, so that the column seemed to range from 0 to 1e9, and was rounded to a constant."""
    x = torch.stack([1e9 + 10 * torch.randn(300).double(), torch.poisson(torch.full((300,), 5.0)).double()], 1)
    expected = x[1:].mean(0)
    x[0] = torch.nan
    family = VAE((2,), latent_dim=1, likelihood=likelihood, hidden=(8,), missing=True)
    with pytest.warns(UserWarning, match=r"are far from 0 for their spread: near 1e\+09"):
        train(family, x, epochs=1, progress=False)
    assert family.loc[0].double().item() == pytest.approx(expected[0].item(), abs=64)  # float32 has steps of 64 there
    assert family.scale[0].item() == pytest.approx(x[1:, 0].std().item(), rel=1e-4)


RARE = torch.cat([torch.zeros(900), torch.arange(1.0, 101.0) % 7])


@pytest.mark.parametrize("likelihood", [PoissonLikelihood(), NegativeBinomialLikelihood(), ZeroInflatedLikelihood()], ids=repr)
@pytest.mark.parametrize("usual", [torch.arange(1000.0) % 30, RARE], ids=["counts", "rare counts"])
def test_robust_units_of_counts_do_not_depend_on_the_size_of_far_ones(likelihood, usual):
    """A million or a billion in ten of 1,010 rows make no difference, and robust units are near those of usual counts."""

    def units(x, standardize):
        family = Autoregressive((1,), likelihood=likelihood, standardize=standardize, hidden=(8,))
        family.standardize(x[:, None])
        return torch.cat([family.loc, family.scale])

    far = [torch.cat([usual, torch.full((10,), size)]) for size in (1e6, 1e9)]
    robust, plain = ([units(x, standardize) for x in far] for standardize in ("robust", True))
    assert_close(robust[0], robust[1])
    assert (plain[0] - plain[1]).abs().max() > 0.05
    usual_units = units(usual, True)
    assert_close(robust[0], usual_units, atol=0.7, rtol=0)
    assert_close(units(usual, "robust"), usual_units, atol=0.3, rtol=0)


def test_robust_units_leave_out_missing_counts():
    x = torch.stack([torch.arange(1000.0) % 30, torch.ones(1000)], 1)
    some = torch.cat([x, torch.tensor([[torch.nan, 1.0]])])
    found = []
    for missing, rows in ((False, x), (True, some)):
        family = VAE((2,), likelihood=PoissonLikelihood(), standardize="robust", missing=missing, hidden=(8,))
        family.standardize(rows)
        found.append(family)
    assert_close(found[0].loc, found[1].loc)
    assert_close(found[0].scale, found[1].scale)
