"""Guides by flows: of all latent variables at once, `AutoFlow`, and amortised over rows of data, `AmortizedGuide`."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam, ClippedAdam
from torch import nn
from torch.distributions import biject_to

from pyro_genmodels import MAF, CompiledSVI, RealNVP, to_arviz
from pyro_genmodels._pyro.params import pyro_name
from pyro_genmodels._pyro.subsampling import fixed_rows
from pyro_genmodels.infer.compiled.density import LogDensity
from pyro_genmodels.infer.compiled.modes import Captured
from pyro_genmodels.posteriors import AmortizedGuide, AutoFlow, compare_posteriors, diagnose_posterior
from pyro_genmodels.utils.pareto import smooth_log_weights

AFFINE = MAF(transforms=1, hidden=())
SMALL = RealNVP(transforms=2, hidden=(8,))
Y = torch.tensor([0.3, -1.2, 2.0, 0.8, -0.1])


def supports(y):
    """Sample variables with all kinds of supports, two of them in plates."""
    one = y.new_ones(())
    scale = pyro.sample("scale", dist.LogNormal(0 * one, one))
    pyro.sample("share", dist.Dirichlet(y.new_ones(3)))
    pyro.sample("fraction", dist.Beta(2 * one, 2 * one))
    loc = pyro.sample("loc", dist.Uniform(-one, 3 * one))
    pyro.sample("factor", dist.LKJCholesky(3, 2 * one))
    ordered = dist.TransformedDistribution(dist.Normal(y.new_zeros(4), 1.0).to_event(1), [transforms.OrderedTransform()])
    pyro.sample("cuts", ordered)
    with pyro.plate("inner", 2, dim=-1):
        pyro.sample("w", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("outer", 4, dim=-2):
            pyro.sample("v", dist.Dirichlet(y.new_ones(3)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def jacobian(guide, trace):
    """Return the log of the change of volume from unconstrained coordinates to the values in a trace."""
    total = 0.0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        transform, value = biject_to(site["fn"].support), trace.nodes[name]["value"]
        u = transform.inv(value)
        total = total + transform.log_abs_det_jacobian(u, transform(u)).sum()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_density_of_a_draw_is_that_of_its_coordinates_less_the_change_of_volume(dtype):
    y = Y.to(dtype)
    guide = AutoFlow(supports, y, transform=SMALL)
    trace = poutine.trace(guide).get_trace(y)
    latent = next(site["value"] for name, site in trace.nodes.items() if name.endswith("_latent"))
    assert latent.dtype == dtype
    assert latent.shape == (34,)
    expected = guide.get_posterior().log_prob(latent) - jacobian(guide, trace)
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-4, atol=1e-3)
    assert all(trace.nodes[name]["value"].dtype == dtype for name in ("v", "factor", "cuts"))


def test_the_methods_of_an_autoguide():
    guide = AutoFlow(supports, Y, transform=SMALL)
    shapes = {name: site["value"].shape for name, site in guide.prototype_trace.iter_stochastic_nodes()}
    for found, number in ((guide.sample_posterior(3, Y), 3), (guide.quantiles([0.1, 0.9], Y), 2)):
        assert {name: x.shape for name, x in found.items()} == {name: (number, *shape) for name, shape in shapes.items()}
    median = guide.median(Y)
    assert {name: x.shape for name, x in median.items()} == shapes
    assert bool((median["cuts"].diff() > 0).all())
    assert Predictive(supports, guide=guide, num_samples=4, parallel=True)(Y)["v"].shape == (4, 4, 2, 3)
    torch.testing.assert_close(guide.sample_posterior(5, Y)["share"].sum(-1), torch.ones(5))


@pytest.mark.parametrize("make", [lambda: AutoFlow(supports, Y, transform=SMALL), lambda: AmortizedGuide(rows_of, GROUPS)])
def test_copies_have_names_and_parameters_of_their_own(make):
    guide = make()
    data = GROUPS if isinstance(guide, AmortizedGuide) else Y
    model = guide.model
    copies = [copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), make()]
    assert guide.model is model is copies[0].model
    copies[2].load_state_dict(guide.state_dict())
    draws = []
    for each in (guide, *copies):
        pyro.set_rng_seed(0)
        draws.append(each(data))
    for other in draws[1:]:
        assert all(torch.equal(x, other[name]) for name, x in draws[0].items())
    before = [p.clone() for p in guide.parameters()]
    SVI(model, copies[0], Adam({"lr": 0.1}), Trace_ELBO()).step(data)
    assert all(map(torch.equal, before, guide.parameters()))
    assert not all(map(torch.equal, before, copies[0].parameters()))
    assert len({pyro_name(each) for each in (guide, *copies)}) == 4


def test_neural_transport_by_pyro():
    guide = AutoFlow(supports, Y, transform=SMALL)
    neutra = NeuTraReparam(guide)
    trace = poutine.trace(poutine.reparam(supports, config=lambda site: neutra)).get_trace(Y)
    z = next(site["value"] for name, site in trace.nodes.items() if name.endswith("_shared_latent"))
    transform = guide.get_transform()
    u = transform(z)
    density = LogDensity(supports, (Y,))
    assert density.names == list(guide._unconstrained_shapes)  # so that the coordinates are the same
    expected = density.value(u) + transform.log_abs_det_jacobian(z, u)
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-4, atol=1e-2)
    base = guide.get_base_dist()
    log_q = base.log_prob(z) - transform.log_abs_det_jacobian(z, u)
    torch.testing.assert_close(guide.get_posterior().log_prob(u), log_q, rtol=1e-4, atol=1e-3)


def mixture(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(loc + kind, 1.0), obs=y)


def test_enumerated_variables_are_left_out_and_others_refused():
    with pytest.raises(ValueError, match=r"'kind' is discrete.*config_enumerate.*TraceEnum_ELBO"):
        AutoFlow(mixture, Y)
    guide = AutoFlow(config_enumerate(mixture), Y)
    assert set(guide(Y)) == {"loc"}
    SVI(config_enumerate(mixture), guide, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1)).step(Y)


def nested_uniform():
    top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
    pyro.sample("part", dist.Uniform(0.0, top))


def of_varying_shape():
    top = pyro.sample("top", dist.LogNormal(0.0, 0.1))
    pyro.sample("part", dist.Normal(torch.zeros(2 if top.log() > 0.15 else 1), 1.0).to_event(1))


def covariance():
    pyro.sample("covariance", dist.Wishart(torch.tensor(5.0), torch.eye(2)))


@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nested_uniform, "support of 'part' depends on other variables"),
        (of_varying_shape, r"same latent variables in every run, but 'part', of shape \(1,\), has the shape \(2,\)"),
        (covariance, "no such map for 'covariance'.*LKJCholesky"),
    ],
)
def test_what_has_no_one_map_from_the_reals_is_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        AutoFlow(model)


# Rows.

PRIOR, SPREAD, NOISE = 2.0, 0.7, 1.0
GROUPS = 1.3 + 1.2 * torch.randn(200, generator=torch.Generator().manual_seed(0))


def rows_of(y, batch=None):
    """A model of two levels whose posterior is normal."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), PRIOR))
    with pyro.plate("groups", len(y), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(mean, SPREAD))
        pyro.sample("y", dist.Normal(z, NOISE), obs=y[rows])


def exact(y):
    """Return mean and deviation of the posterior of "mean" and of each "z", and the log evidence, in closed form."""
    y = y.double()
    total = SPREAD**2 + NOISE**2
    variance = 1 / (PRIOR**-2 + len(y) / total)
    mean, share, variance = variance * y.sum() / total, SPREAD**2 / total, torch.tensor(variance, dtype=y.dtype)
    covariance = torch.eye(len(y), dtype=y.dtype) * total + PRIOR**2
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    deviation = (SPREAD**2 * NOISE**2 / total + (1 - share) ** 2 * variance) ** 0.5
    return mean, variance**0.5, share * y + (1 - share) * mean, deviation, float(evidence)


def exact_guide(y, batch=None):
    """Return a guide whose parameters are set so that it is the posterior: all of it is normal, and linear in the data."""
    guide = AmortizedGuide(rows_of, y, batch, encoder=nn.Identity(), transform=AFFINE, local_transform=AFFINE)
    mean, deviation, _, _, _ = exact(y)
    share = SPREAD**2 / (SPREAD**2 + NOISE**2)
    with torch.no_grad():
        for p in guide.parameters():
            p.zero_()
        shared, local = guide.block_0, guide.block_1
        shared.loc.fill_(mean)
        shared.log_scale.fill_(deviation.log())
        local.head.linear.weight[0] = torch.stack([share * local.features.scale[0], (1 - share) * deviation])
        log_scale = torch.tensor(SPREAD * NOISE / (SPREAD**2 + NOISE**2) ** 0.5).log()
        local.head_bias.copy_(
            torch.stack([share * local.features.loc[0] + (1 - share) * mean, 10 * torch.atanh(log_scale / 10)])
        )
    return guide


def log_weight(model, guide, *args):
    trace = poutine.trace(guide).get_trace(*args)
    return poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args).log_prob_sum() - trace.log_prob_sum()


def test_of_a_linear_model_the_guide_can_be_the_posterior():
    """Each draw has the evidence as its weight, and draws have the exact means and deviations."""
    y = GROUPS.double()
    guide, (mean, _, z, deviation, evidence) = exact_guide(y), exact(y)
    for _ in range(3):
        assert log_weight(rows_of, guide, y).item() == pytest.approx(evidence, abs=1e-4)
    draws = guide.sample_posterior(2000, y)
    assert draws["z"].shape == (2000, 200)
    error = deviation / 2000**0.5
    assert ((draws["z"].mean(0) - z) / error).abs().max() < 6  # false alarm: 200 * 2e-9
    assert (draws["z"].std(0) / deviation - 1).abs().max() < 6 / 4000**0.5
    assert abs(guide.median(y)["mean"] - mean) < 0.05
    assert guide.local_pareto_k(y, num_samples=200)["groups"].max() < 0.7


def test_a_subsampled_plate_has_rows_of_its_own():
    """Each row has its posterior in any order and among any others, and the mean of log weights is the log evidence."""
    y = GROUPS.double()
    guide = exact_guide(y, 50)
    shared = next(name for name in poutine.trace(guide).get_trace(y, 50).nodes if name.endswith("_shared_0"))

    def density(rows):
        with fixed_rows({"groups": rows}):
            given = poutine.condition(guide, {shared: torch.ones(1, dtype=y.dtype)})
            trace = poutine.trace(given).get_trace(y, 50)
        site = next(site for name, site in trace.nodes.items() if name.endswith("_groups_1"))
        return site["fn"].log_prob(torch.ones(50, 1, dtype=y.dtype))

    rows = torch.arange(60, 110)
    torch.testing.assert_close(density(rows).flip(0), density(rows.flip(0)))
    torch.testing.assert_close(density(rows)[20:], density(rows + 20)[:-20])
    assert not torch.allclose(density(rows), density(rows + 20))
    weights = torch.stack([log_weight(rows_of, guide, y, 50) for _ in range(100)])
    assert abs(weights.mean() - exact(y)[-1]) < 6 * weights.std() / 10  # false alarm: 2e-9
    k = guide.local_pareto_k(y, 50, num_samples=100)["groups"]
    assert k.shape == (200,)
    assert not k.isnan().any()


def narrowed(guide):
    """Return a guide whose local variables have 0.1 times their deviation: the tail index of their weights is 1 - 0.1^2."""
    bias = guide.block_1.head_bias
    with torch.no_grad():
        bias[1] = 10 * torch.atanh(torch.tanh(bias[1] / 10) + torch.tensor(0.1).log() / 10)
    return guide


@pytest.mark.parametrize("batch", [None, 50])
def test_each_row_has_its_k_hat_in_arviz_and_in_words(batch):
    y = GROUPS.double()
    exact, narrow = exact_guide(y, batch), narrowed(exact_guide(y, batch))
    data = [
        to_arviz((rows_of, guide), y, batch, num_samples=200, groups=["posterior", "sample_stats"], progress=False)
        for guide in (exact, narrow)
    ]
    good, bad = (each.sample_stats["pareto_k_groups"] for each in data)
    assert good.dims == bad.dims == ("chain", "groups")
    assert good.shape == (1, 200)
    assert float(good.max()) < 0.7
    assert 0.7 < float(bad.mean()) < 1.1  # the tails of 200 draws have 40, so that k-hat is rough, and drawn to 0.5
    assert diagnose_posterior(data[0]).local_pareto_k["groups"].shape == (200,)
    assert "rows" not in diagnose_posterior(data[0]).verdict
    number, worst = int((bad > 0.7).sum()), int(bad.to_numpy().argmax())
    told = f"k-hat above 0.7 for {number} of the 200 rows of 'groups', the largest, {float(bad.max()):.2f}, for row {worst}"
    assert told in diagnose_posterior(data[1]).verdict
    assert number > 100


def test_two_levels_have_k_hat_in_arviz_and_an_arviz_of_chains_joins_them():
    y, x = torch.randn(6, 5), torch.randn(6, 2)
    fits = [(pupils, AmortizedGuide(pupils, y, x)) for _ in range(2)]
    data = to_arviz(fits, y, x, num_samples=30, groups=["posterior", "sample_stats"], progress=False)
    stats = data.sample_stats
    assert stats["pareto_k_schools"].shape == (2, 6)
    assert stats["pareto_k_schools.pupils"].dims == ("chain", "schools", "pupils")
    found = diagnose_posterior(data).local_pareto_k
    assert {name: k.shape for name, k in found.items()} == {"schools": (6,), "schools.pupils": (6, 5)}
    weights = torch.as_tensor(stats["smoothed_log_weight"].to_numpy())
    expected, k = smooth_log_weights(torch.as_tensor(stats["log_weight"].to_numpy()).flatten())
    torch.testing.assert_close(weights.flatten(), expected.log_softmax(0))
    assert stats["log_weight"].attrs["pareto_k"] == pytest.approx(float(k))


def test_a_comparison_runs_each_draw_and_block_of_rows_of_a_model_once(monkeypatch):
    """A model that does not take draws together, under a subsampled plate, in a comparison with k-hat of each row."""
    runs = []

    def one_by_one(y):
        runs.append(len(y))
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", len(y), subsample_size=4) as rows:
            level = pyro.sample("level", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(level[:, None], 0.5).expand([len(rows), 2]).to_event(1), obs=y[rows])

    y = torch.randn(12, 2)
    guide = AmortizedGuide(one_by_one, y, transform=SMALL, local_transform=SMALL)
    svi = SVI(one_by_one, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    runs.clear()
    found = compare_posteriors({"svi": svi}, y, num_samples=40, distances=False)
    assert found.diagnoses["svi"].local_pareto_k["rows"].shape == (12,)
    assert 3 * 40 <= len(runs) < 3 * 40 + 20
    monkeypatch.setattr("pyro_genmodels.inference_data.groups.MANY_RUNS", 30)
    with pytest.warns(UserWarning, match="runs the model 30 times, once for each draw and each of 3 blocks of rows"):
        compare_posteriors({"svi": svi}, y, num_samples=10)


def with_options(y, features, encoder=1.0, num_samples=2):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(encoder * features.mean(-1), 1.0))
        pyro.sample("y", dist.Normal(z, num_samples), obs=y)


def test_keywords_of_the_model_and_of_the_guide_are_kept_apart():
    y, x = torch.randn(5), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"features= is a keyword of AmortizedGuide and of the model.*model_kwargs"):
        AmortizedGuide(with_options, y, features=x)
    with pytest.raises(ValueError, match="encoder= is a keyword of AmortizedGuide and of the model"):
        AmortizedGuide(with_options, y, x, encoder=None)
    with pytest.raises(TypeError, match=r"AmortizedGuide and the model know no keyword featurs\. Did you mean features"):
        AmortizedGuide(with_options, y, featurs=x)
    guide = AmortizedGuide(with_options, y, model_kwargs={"features": x, "encoder": 2.0})
    assert guide.block_0.features.out_features == 4  # y and three features
    assert guide(y, features=x, encoder=2.0)["z"].shape == (5,)
    with pytest.raises(ValueError, match="num_samples= is a keyword of local_pareto_k and of the model"):
        guide.local_pareto_k(y, x, num_samples=30)
    assert guide.local_pareto_k(y, x, num_samples=30, model_kwargs={"num_samples": 3})["rows"].shape == (5,)
    data = to_arviz((with_options, guide), y, groups=["sample_stats"], progress=False, model_kwargs={"features": x})
    assert data.sample_stats["pareto_k_rows"].shape == (1, 5)


def test_rows_in_another_order_have_their_posteriors_in_that_order():
    y, order = GROUPS[:20].double(), torch.randperm(20)
    guide = AmortizedGuide(rows_of, y)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    draws, swapped = (guide.sample_posterior(2000, x)["z"] for x in (y, y[order]))
    error = (draws.var(0)[order] / 2000 + swapped.var(0) / 2000).sqrt()
    assert ((draws.mean(0)[order] - swapped.mean(0)) / error).abs().max() < 6  # false alarm: 20 * 2e-9
    assert draws.mean(0).std() > 10 * error.max()  # and they differ


def test_an_amortised_guide_starts_with_the_deviation_that_it_is_told():
    """Unconstrained coordinates are normal at the start, since the layers are the identity: 2000 draws are within 10 %.

    Five standard errors of their deviation are 8 %. The rows' coordinates have that of the shared ones besides.
    """

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(mean, spread))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    pyro.set_rng_seed(3)
    guide = AmortizedGuide(model, torch.linspace(-2.0, 2.0, 5), init_scale=0.2)
    draws = guide.sample_posterior(2000, torch.linspace(-2.0, 2.0, 5))
    shared = torch.stack([draws["mean"], draws["spread"].log()])
    assert (shared.std(1) / 0.2 - 1).abs().max() < 0.1
    assert (draws["z"].std(0) / 0.2 - 1).abs().max() < 0.1


@pytest.mark.parametrize("batch", [pytest.param(None, marks=pytest.mark.slow), 50])
def test_a_compiled_step_is_the_step(batch):
    losses = []
    for svi, options in ((SVI, {}), (CompiledSVI, {"mode": Captured(), "audit": False})):
        pyro.set_rng_seed(1)
        guide = AmortizedGuide(rows_of, GROUPS, batch, encoder=nn.Identity(), transform=AFFINE, local_transform=AFFINE)
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        inference = svi(rows_of, guide, Adam({"lr": 0.01}), elbo, **options)
        losses.append([float(inference.step(GROUPS, batch)) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 50])
def test_training_with_and_without_subsampling_comes_near_the_posterior(batch):
    """Of 300 steps: within 1.5 nats of the evidence, and with rows as in the exact posterior."""
    pyro.set_rng_seed(1)
    guide = AmortizedGuide(rows_of, GROUPS, batch, encoder=nn.Identity(), transform=AFFINE, local_transform=AFFINE)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(rows_of, guide, ClippedAdam({"lr": 0.03, "lrd": 0.985}), elbo)
    for _ in range(300):
        svi.step(GROUPS, batch)
    mean, deviation, z, spread, evidence = exact(GROUPS)
    whole = AmortizedGuide(rows_of, GROUPS, encoder=nn.Identity(), transform=AFFINE, local_transform=AFFINE)
    whole.load_state_dict(guide.state_dict())
    draws = whole.sample_posterior(4000, GROUPS)
    assert abs(draws["mean"].mean() - mean) < deviation
    assert ((draws["z"].mean(0) - z) / spread).abs().max() < 0.25
    assert (draws["z"].std(0) / spread - 1).abs().max() < 0.15
    with torch.no_grad():
        weights = torch.stack([log_weight(rows_of, whole, GROUPS) for _ in range(200)])
    error = 6 * weights.std() / 200**0.5
    assert evidence - 1.5 - error < weights.mean() < evidence + error


@pytest.mark.slow
def test_the_mean_gradient_with_subsampling_is_that_of_all_rows():
    """At a guide that is not the posterior. The false-alarm rate is 7 * 2e-9."""
    guides = [AmortizedGuide(rows_of, GROUPS, batch, transform=AFFINE, local_transform=AFFINE) for batch in (None, 50)]
    guides[1].load_state_dict(guides[0].state_dict())
    means, variances = [], []
    for guide, batch in zip(guides, (None, 50), strict=True):
        local, number, gradients = guide.block_1, 150, []
        parameters = [guide.block_0.loc, guide.block_0.log_scale, local.loc, local.log_scale, local.head_bias]
        for _ in range(number):
            loss = Trace_ELBO(max_plate_nesting=1).differentiable_loss(rows_of, guide, GROUPS, batch)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        means.append(torch.stack(gradients).mean(0))
        variances.append(torch.stack(gradients).var(0) / number)
    error = sum(variances).sqrt()
    assert ((means[0] - means[1]) / error).abs().max() < 6
    assert (means[0] / error).abs().max() > 6  # it could fail


def given_rows(y, rows):
    with pyro.plate("groups", 200, subsample=rows) as chosen:
        z = pyro.sample("z", dist.Normal(0.0, SPREAD))
        pyro.sample("y", dist.Normal(z, NOISE), obs=y[chosen])
    return chosen


def minibatch(y):
    with pyro.plate("groups", 200, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(0.0, SPREAD))
        pyro.sample("y", dist.Normal(z, NOISE), obs=y)


def test_rows_that_the_model_is_given_are_those_of_the_guide():
    rows = torch.tensor([7, 3, 150])
    guide = AmortizedGuide(given_rows, GROUPS, torch.arange(10), encoder=nn.Identity())
    trace = poutine.trace(guide).get_trace(GROUPS, rows)
    assert trace.nodes["groups"]["value"] is rows
    assert trace.nodes["z"]["scale"] == pytest.approx(200 / 3)
    guide = AmortizedGuide(minibatch, GROUPS[:10])
    trace = poutine.trace(guide).get_trace(GROUPS[:20])
    assert trace.nodes["z"]["fn"].batch_shape == (20,)
    assert trace.nodes["z"]["scale"] == pytest.approx(10)
    with pytest.raises(ValueError, match="had 200 rows when this guide was built, but the features have 201"):
        guide(torch.zeros(201))


def pupils(y, x, seen=None):
    """A model with a plate in a plate, a latent variable at each level, and a plate of columns."""
    with pyro.plate("columns", 3, dim=-1):
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0))
    with pyro.plate("schools", len(x), dim=-2):
        level = pyro.sample("level", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("pupils", y.shape[1], dim=-1):
            ability = pyro.sample("ability", dist.Normal(level[..., 0] + weights.sum(-1, keepdim=True), spread))
            pyro.sample("y", dist.Normal(ability, 1.0), obs=y)
        with pyro.plate("tests", 4, dim=-3):
            pyro.sample("marks", dist.Dirichlet(torch.ones(3)))


def test_plates_in_plates_have_a_distribution_for_each_level():
    y, x = torch.randn(6, 5), torch.randn(6, 2)
    guide = AmortizedGuide(pupils, y, x)
    assert guide.plates_with_data == {"schools": ["schools"], "schools/pupils": ["schools", "pupils"]}
    trace = poutine.trace(guide).get_trace(y, x)
    model = poutine.trace(poutine.replay(pupils, trace=trace)).get_trace(y, x)
    latents = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
    assert latents == ["weights", "level", "spread", "ability", "marks"]
    for name in latents:
        assert trace.nodes[name]["value"].shape == model.nodes[name]["fn"].shape()
    auxiliary = [site for site in trace.nodes.values() if site.get("infer", {}).get("is_auxiliary")]
    log_q = sum(site["fn"].log_prob(site["value"]).sum() for site in auxiliary)
    torch.testing.assert_close(trace.log_prob_sum(), log_q - jacobian(guide, trace), rtol=1e-4, atol=1e-3)
    assert Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=3).loss(pupils, guide, y, x) > 0
    k = guide.local_pareto_k(y, x, num_samples=50)
    assert {name: values.shape for name, values in k.items()} == {"schools": (6,), "schools/pupils": (6, 5)}
    assert guide.sample_posterior(7, y, x)["marks"].shape == (7, 4, 6, 1, 3)
    flat = torch.arange(12.0).expand(6, 1, 12)
    place = next(site for layout in guide._layouts for site in layout.sites if site.name == "marks")
    marks = place.transform.inv(place.delta(flat[..., :8]).v)
    torch.testing.assert_close(marks[2, 4, 0], torch.tensor([4.0, 5.0]), rtol=1e-3, atol=1e-3)


def partly_seen(y, seen):
    with pyro.plate("rows", len(y), subsample_size=8 if len(y) == 30 else None) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows], obs_mask=seen[rows])


def masked(y, seen):
    with pyro.plate("rows", len(y)), poutine.mask(mask=seen):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y.nan_to_num())


@pytest.mark.parametrize("number", [12, 30])
def test_missing_values_are_sampled_where_they_are_missing(number):
    y, seen = torch.randn(number), torch.arange(number) % 3 > 0
    guide = AmortizedGuide(partly_seen, y, seen)
    trace = poutine.trace(guide).get_trace(y, seen)
    trace.compute_log_prob()
    rows = trace.nodes["rows"]["value"] if number == 30 else torch.arange(number)
    first, second = (next(site for name, site in trace.nodes.items() if name.endswith(f"_rows_{i}")) for i in (0, 1))
    assert bool((first["log_prob"] != 0).all())
    assert torch.equal(second["log_prob"] != 0, ~seen[rows])


def test_rows_that_a_mask_excludes_have_no_part_in_the_bound_and_missing_data_are_marked():
    y, seen = torch.randn(12), torch.arange(12) % 3 > 0
    y[~seen] = torch.nan
    guide = AmortizedGuide(masked, y, seen)
    trace = poutine.trace(guide).get_trace(y, seen)
    trace.compute_log_prob()
    auxiliary = next(site for site in trace.nodes.values() if site.get("infer", {}).get("is_auxiliary"))
    assert torch.equal(auxiliary["log_prob"] != 0, seen)
    assert guide.block_0.features.out_features == 3  # the value, its indicator, the mask
    loss = Trace_ELBO().differentiable_loss(masked, guide, y, seen)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters() if p.grad is not None)
    assert torch.equal(guide.local_pareto_k(y, seen, num_samples=50)["rows"].isnan(), ~seen)


def masked_pupils(y, seen):
    """A model with a mask in the inner plate, and data that are missing there."""
    with pyro.plate("schools", len(y), dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("pupils", y.shape[1], dim=-1), poutine.mask(mask=seen):
            ability = pyro.sample("ability", dist.Normal(level, 1.0))
            pyro.sample("y", dist.Normal(ability, 1.0), obs=y.nan_to_num())


def test_a_mask_in_an_inner_plate_excludes_pupils():
    """All data of one school are missing: its level has a density and k-hat all the same."""
    y, seen = torch.randn(6, 5), torch.arange(30).reshape(6, 5) % 4 > 0
    seen[2] = False
    y[~seen] = torch.nan
    guide = AmortizedGuide(masked_pupils, y, seen)
    assert guide.plates_with_data == {"schools": ["schools"], "schools/pupils": ["schools", "pupils"]}
    trace = poutine.trace(guide).get_trace(y, seen)
    trace.compute_log_prob()
    inner = next(site for name, site in trace.nodes.items() if name.endswith("_schools/pupils_1"))
    assert torch.equal(inner["log_prob"] != 0, seen)
    loss = Trace_ELBO(max_plate_nesting=2).differentiable_loss(masked_pupils, guide, y, seen)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters() if p.grad is not None)
    k = guide.local_pareto_k(y, seen, num_samples=50)
    assert not k["schools"].isnan().any()
    assert torch.equal(k["schools/pupils"].isnan(), ~seen)


def test_missing_data_that_the_model_does_not_replace_are_refused_by_name():
    y, seen = torch.randn(12), torch.arange(12) % 3 > 0
    y[~seen] = torch.nan
    guide = AmortizedGuide(partly_seen, y, seen)
    with pytest.raises(ValueError, match=r"log_prob at site 'y_observed'[\s\S]*invalid values"):
        Trace_ELBO().loss(partly_seen, guide, y, seen)


def test_k_hat_of_rows_that_the_guide_is_not_given_is_told():
    guide = AmortizedGuide(minibatch, GROUPS[:10])
    with pytest.warns(UserWarning, match=r"sample_stats\.pareto_k_groups \(the guide is given data of 10 rows"):
        data = to_arviz((minibatch, guide), GROUPS[:10], num_samples=30, groups=["sample_stats"], progress=False)
    assert "pareto_k_groups" not in data.sample_stats


def closure(batch=None):
    with pyro.plate("rows", 20, subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=GROUPS[rows])


def test_data_may_be_no_argument_or_features_of_ones_own():
    guide = AmortizedGuide(closure, None)
    assert guide(None)["z"].shape == (20,)
    with pytest.raises(ValueError, match=r"5 of 20 rows of plate 'rows', in which 'z' lies.*features="):
        AmortizedGuide(closure, 5)
    guide = AmortizedGuide(closure, 5, features=GROUPS[:20])
    assert guide(5)["z"].shape == (5,)
    guide = AmortizedGuide(closure, 5, features={"rows": lambda batch: GROUPS[:20, None]})
    assert guide(5)["z"].shape == (5,)
    with pytest.raises(ValueError, match=r"features of plate 'rows' must be a tensor \(20 or 5, ...\), but found \(7,\)"):
        AmortizedGuide(closure, 5, features=GROUPS[:7])


def other_mask(y):
    with pyro.plate("rows", len(y)), poutine.mask(mask=y > 0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def no_rows(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def unknown_rows(y, n=10):
    with pyro.plate("rows", 50, subsample=torch.arange(n)) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def in_a_loop(y):
    for i in pyro.plate("rows", 2):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (other_mask, "latent variable 'z' is masked, but not by an argument"),
        (no_rows, "no argument of the model has one row for each row.*AutoFlow"),
        (unknown_rows, "'rows' is given its rows.*no argument of the model"),
        (in_a_loop, "plate 'rows' around 'z_0' is sequential"),
        (mixture, "'kind' is discrete"),
    ],
)
def test_what_an_amortised_guide_does_not_hold_is_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        AmortizedGuide(model, GROUPS[:50])
