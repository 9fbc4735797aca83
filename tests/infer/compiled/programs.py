"""THE table of Pyro programs for capturing and compiling: name -> a function that builds model, guide, loss and arguments.

Each row is there for something that programs do: a guide, a loss, a handler, a kind of parameter, a kind of argument, a way to
hold data. Sizes are small. Rows that a capture must refuse say so by a pattern of the error's message. Pyro's own examples are
taken from `pyro_examples`, families of this library from `cases`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pyro_examples as examples
import torch
from cases import CASES, REPRESENTATIVE
from pyro import poutine
from pyro.infer import (
    ELBO,
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoStructured,
    init_to_median,
    init_to_value,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from teachers import perturb
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_genmodels import (
    MAF,
    NSF,
    AutoFamily,
    DenseEnergy,
    EnergyModel,
    Flow,
    ImplicitScoreMatching,
    MaximumLikelihood,
    NoiseContrastive,
    SlicedScoreMatching,
)


class Run(NamedTuple):
    """A program with its arguments.

    Attributes:
        model: model as `SVI` takes it.
        guide: guide as `SVI` takes it.
        loss: loss with a method `loss_and_grads`.
        args: positional arguments of model and guide.
        kwargs: keyword arguments of both.
        modules: modules that a closure holds, whose buffers a run changes.
    """

    model: Any
    guide: Any
    loss: ELBO
    args: tuple = ()
    kwargs: Mapping[str, Any] = {}
    modules: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Program:
    """One row of the table.

    Args:
        name: name of the row.
        build: function that builds the program anew.
        refused: pattern of the message with which a capture refuses it; None if it can be captured.
        deterministic: True if the loss has no random numbers, so that all calls return the same.
        representative: True for rows that stand for others, on which longer tests run by default.
    """

    name: str
    build: Callable[[], Run]
    refused: str | None = None
    deterministic: bool = False
    representative: bool = False


PROGRAMS: dict[str, Program] = {}


def program(name: str | None = None, **flags: Any) -> Callable[[Callable[[], Run]], Callable[[], Run]]:
    """Return a decorator that adds a function to the table, by its own name unless another is given."""

    def add(build: Callable[[], Run]) -> Callable[[], Run]:
        key = name or build.__name__
        if key in PROGRAMS:
            raise ValueError(f"The table has two rows {key!r}.")
        PROGRAMS[key] = Program(key, build, **flags)
        return build

    return add


def fresh(build: Callable[[], Run]) -> Run:
    """Return a program that is built from a fixed seed with an empty param store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return build()


POSITIVE = constraints.positive


# Eight schools under every guide and loss.

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCORES = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def schools_under(guide: Callable[[Any], Any], loss: Callable[[], ELBO] = Trace_ELBO) -> Callable[[], Run]:
    return lambda: Run(schools, guide(schools), loss(), (SIGMA, SCORES))


def start(model: Any) -> AutoNormal:
    return AutoNormal(model, init_loc_fn=init_to_value(values={"mu": torch.tensor(1.0)}), init_scale=0.2)


for _name, _guide in {
    "schools, AutoNormal": AutoNormal,
    "schools, AutoNormal with options": start,
    "schools, AutoDiagonalNormal": AutoDiagonalNormal,
    "schools, AutoMultivariateNormal": AutoMultivariateNormal,
    "schools, AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "schools, AutoIAFNormal": AutoIAFNormal,
    "schools, block autoregressive guide": lambda model: AutoNormalizingFlow(
        model, lambda n: T.block_autoregressive(n, hidden_factors=[2])
    ),
    "schools, AutoStructured": AutoStructured,
    "schools, AutoNormalMessenger": lambda model: AutoNormalMessenger(model, init_loc_fn=init_to_median),
    "schools, AutoFamily": lambda model: AutoFamily(model, lambda n: Flow((n,), transform=MAF(transforms=1, hidden=(8,)))),
}.items():
    program(_name, representative=_name == "schools, AutoNormal")(schools_under(_guide))
program("schools, AutoDelta", deterministic=True)(schools_under(AutoDelta))
program("schools, AutoGaussian")(schools_under(lambda model: AutoGaussian(model, backend="dense")))
program("schools, spline guide", refused=r"a mask selects entries.*spline\.py")(
    schools_under(lambda model: AutoNormalizingFlow(model, lambda n: T.spline_autoregressive(n, hidden_dims=[16])))
)

for _name, _loss, _flags in [
    ("TraceMeanField_ELBO", TraceMeanField_ELBO, {}),
    ("3 particles", lambda: Trace_ELBO(num_particles=3), {}),
    ("4 vectorised particles", lambda: Trace_ELBO(num_particles=4, vectorize_particles=True), {}),
    ("TraceEnum_ELBO", lambda: TraceEnum_ELBO(strict_enumeration_warning=False), {}),
    ("RenyiELBO", lambda: RenyiELBO(alpha=0.5, num_particles=3), {}),
    (
        "RenyiELBO, vectorised",
        lambda: RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        {"representative": True},
    ),
    (
        "TraceTailAdaptive_ELBO",
        lambda: TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True),
        {"deterministic": True},  # its value is 0, and its gradient is not
    ),
    ("TraceGraph_ELBO", TraceGraph_ELBO, {"refused": "TraceGraph_ELBO"}),
    ("ReweightedWakeSleep", lambda: ReweightedWakeSleep(num_particles=2), {"refused": "ReweightedWakeSleep"}),
]:
    program(f"schools, {_name}", **_flags)(schools_under(AutoNormal, _loss))


@program("schools, float64")
def schools_float64():
    args = (SIGMA.double(), SCORES.double())

    def model(sigma, y):
        zero = sigma.new_zeros(())
        mu = pyro.sample("mu", dist.Normal(zero, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(zero, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return Run(model, AutoNormal(model), Trace_ELBO(), args)


@program("schools, mean-field guide by hand")
def schools_by_hand():
    def guide(sigma, y):
        loc = pyro.param("loc", lambda: torch.zeros(2))
        scale = pyro.param("scale", lambda: torch.full((2,), 0.3), constraint=POSITIVE)
        pyro.sample("mu", dist.Normal(loc[0], scale[0]))
        pyro.sample("tau", dist.LogNormal(loc[1], scale[1]))
        with pyro.plate("schools", len(y)):
            eta_loc = pyro.param("eta_loc", torch.zeros(len(y)), event_dim=0)
            pyro.sample(
                "eta", dist.Normal(eta_loc, pyro.param("eta_scale", torch.ones(len(y)), constraint=POSITIVE, event_dim=0))
            )

    return Run(schools, guide, TraceMeanField_ELBO(), (SIGMA, SCORES))


@program("schools, reparametrised")
def schools_reparam():
    def centred(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    model = poutine.reparam(centred, config={"theta": LocScaleReparam()})  # a learned parameter
    return Run(model, AutoNormal(model), Trace_ELBO(), (SIGMA, SCORES))


# Regressions.


@program()
def logistic_regression():
    x = torch.randn(50, 3)
    y = (torch.rand(50) < x[:, 0].sigmoid()).float()

    def model(x, y):
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)

    return Run(model, AutoNormal(model), Trace_ELBO(), (x, y))


@program("Poisson regression, data in a closure")
def poisson_regression():
    x = torch.randn(20, 2)
    y = torch.poisson(x[:, 0].exp())

    def model():
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Poisson((x @ weights).exp()), obs=y)

    return Run(model, AutoNormal(model), Trace_ELBO())


@program("hierarchical regression, nested plates and a gather", representative=True)
def hierarchical_regression():
    groups, rows, times = 4, 12, 3
    group = torch.arange(rows) % groups
    x, y = torch.randn(times, rows), torch.randn(times, rows)

    def model(x, y):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("groups", groups):
            slope = pyro.sample("slope", dist.Normal(0.0, scale))
        with pyro.plate("rows", rows, dim=-1), pyro.plate("times", times, dim=-2):
            noise = pyro.sample("noise", dist.StudentT(5.0, 0.0, 1.0))
            pyro.sample("y", dist.Normal(slope[group] * x + 0.1 * noise, 1.0), obs=y)

    return Run(model, AutoNormal(model), TraceMeanField_ELBO(), (x, y))


@program("scale and masks")
def scale_and_masks():
    x = torch.randn(8)
    seen = torch.tensor([True, False] * 4)

    def model(x, seen):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)), poutine.scale(scale=0.3), poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(loc, 1.0).mask(~seen | True))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("prior", -loc.abs())
        pyro.deterministic("twice", 2 * loc)

    return Run(model, AutoNormal(model), Trace_ELBO(), (x, seen))


@program("partly observed by obs_mask")
def partly_observed():
    x = torch.randn(6)
    seen = torch.tensor([True, True, False, True, False, True])

    def model(x, seen):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=seen)

    return Run(model, AutoNormal(model), Trace_ELBO(), (x, seen))


@program("varying slopes, LKJ, subsampled plate", representative=True)
def varying_slopes():
    rows, groups = 30, 4
    group, x, y = torch.arange(rows) % groups, torch.randn(rows), torch.randn(rows)

    def model(x, y):
        with pyro.plate("dims", 2):
            theta = pyro.sample("theta", dist.HalfCauchy(1.0))
        omega = pyro.sample("omega", dist.LKJCholesky(2, 2.0))
        with pyro.plate("groups", groups):
            beta = pyro.sample("beta", dist.MultivariateNormal(torch.zeros(2), scale_tril=theta.diag() @ omega))
        with pyro.plate("rows", rows, subsample_size=10) as i:
            pyro.sample("y", dist.Normal(beta[group[i], 0] + beta[group[i], 1] * x[i], 1.0), obs=y[i])

    return Run(model, AutoNormal(model), Trace_ELBO(), (x, y))


@program("subsampled local latents, guide in the same plate")
def subsampled_latents():
    x = torch.randn(20)

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x), subsample_size=5) as i:
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=0) if i is None else x[i])

    def guide(x):
        pyro.sample("scale", dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), 0.1))
        with pyro.plate("rows", len(x), subsample_size=5) as i:
            loc = pyro.param("z_loc", lambda: torch.zeros(len(x)))
            pyro.sample("z", dist.Normal(loc[i], 1.0))

    return Run(model, guide, Trace_ELBO(), (x,))


@program("AutoNormal over subsampled latents")
def autonormal_subsampled():
    x = torch.randn(20, 3)

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x), subsample_size=5, dim=-2), pyro.plate("columns", 3, dim=-1):
            batch = pyro.subsample(x, event_dim=0)
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    def create_plates(x):
        return [pyro.plate("rows", len(x), subsample_size=5, dim=-2), pyro.plate("columns", 3, dim=-1)]

    return Run(model, AutoNormal(model, create_plates=create_plates), Trace_ELBO(), (x,))


@program("sequential plate", representative=True)
def sequential_plate():
    x = torch.randn(4)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", len(x)):
            z = pyro.sample(f"z_{i}", dist.Normal(loc, 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        loc = pyro.param("guide_loc", torch.tensor(0.1))
        pyro.sample("loc", dist.Normal(loc, 1.0))
        for i in pyro.plate("rows", len(x)):
            pyro.sample(f"z_{i}", dist.Normal(pyro.param(f"loc_{i}", torch.tensor(0.1 * i)), 1.0))

    return Run(model, guide, Trace_ELBO(), (x,))


# Guides of other distributions, with parameters of every kind.


@program("Gamma, Beta and Dirichlet guide, constrained parameters", representative=True)
def gamma_beta_dirichlet():
    counts = torch.tensor([3.0, 1.0, 4.0])

    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 3):
            pyro.sample("counts", dist.Poisson(rate * p * 10 * weights), obs=counts)

    def guide(counts):
        a = pyro.param("a", lambda: torch.tensor(2.0), constraint=POSITIVE)
        b = pyro.param("b", lambda: torch.ones(2), constraint=constraints.greater_than(0.1))
        p = pyro.param("fraction", lambda: torch.tensor(0.4), constraint=constraints.unit_interval)
        weights = pyro.param("mean_weights", lambda: torch.ones(3) / 3, constraint=constraints.simplex)
        pyro.sample("rate", dist.Gamma(a, 1.0))
        pyro.sample("p", dist.Beta(b[0] * p, b[1] * (1 - p)))
        pyro.sample("weights", dist.Dirichlet(9 * weights))

    return Run(model, guide, Trace_ELBO(), (counts,))


@program("multivariate guide, lower Cholesky parameter")
def cholesky_parameter():
    x = torch.randn(6, 2)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("mean", torch.zeros(2))
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        pyro.sample("loc", dist.MultivariateNormal(loc, scale_tril=tril))

    return Run(model, guide, Trace_ELBO(), (x,))


@program("LKJ guide")
def lkj_guide():
    x = torch.randn(6, 3)

    def model(x):
        omega = pyro.sample("omega", dist.LKJCholesky(3, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=omega), obs=x)

    def guide(x):
        pyro.sample("omega", dist.LKJCholesky(3, pyro.param("concentration", torch.tensor(2.0), constraint=POSITIVE)))

    return Run(model, guide, Trace_ELBO(), (x,))


@program("VonMises guide", refused=r"reads the value.*programs\.py.*pyro\.sample\(\"angle\"")
def von_mises_guide():
    """A guide whose sampler repeats until all proposals are accepted: a loop on values."""
    x = torch.tensor([0.1, 0.3, -0.2])

    def model(x):
        angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.VonMises(angle, 4.0), obs=x)

    def guide(x):
        pyro.sample("angle", dist.VonMises(pyro.param("loc", torch.tensor(0.0)), 3.0))

    return Run(model, guide, Trace_ELBO(), (x,))


@program("VonMises likelihood")
def von_mises_likelihood():
    x = torch.tensor([0.1, 0.3, -0.2])

    def model(x):
        angle = pyro.sample("angle", dist.Uniform(-3.0, 3.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.VonMises(angle, 4.0), obs=x)

    return Run(model, AutoNormal(model), Trace_ELBO(), (x,))


@program("normalizing flow of Pyro as guide", representative=True)
def affine_flow_guide():
    def guide(sigma, y):
        pyro.module("coupling", flow)
        both = pyro.sample(
            "both",
            dist.TransformedDistribution(dist.Normal(torch.zeros(10), 1.0).to_event(1), [flow]),
            infer={"is_auxiliary": True},
        )
        pyro.sample("mu", dist.Delta(both[0]))
        tau = both[1].exp()
        pyro.sample("tau", dist.Delta(tau, log_density=-both[1]))
        with pyro.plate("schools", len(y)):
            pyro.sample("eta", dist.Delta(both[2:]))

    flow = T.affine_coupling(10, hidden_dims=[8])
    return Run(schools, guide, Trace_ELBO(), (SIGMA, SCORES))


# Score-function gradients.


def mixture_data():
    return torch.tensor([-2.0, -1.8, 2.1, 1.9, 2.0])


def two_means(x):
    weights = pyro.param("weights", lambda: torch.ones(2) / 2, constraint=constraints.simplex)
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


@program("mixture, Categorical guide, score function", representative=True)
def score_function():
    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x), 2))
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    return Run(two_means, guide, Trace_ELBO(), (mixture_data(),))


@program("discrete latents of several kinds, score function")
def discrete_latents():
    x = torch.tensor([2.0, 3.0, 1.0])

    def model(x):
        switch = pyro.sample("switch", dist.Bernoulli(0.3))
        count = pyro.sample("count", dist.Poisson(2.0))
        tries = pyro.sample("tries", dist.Binomial(5, torch.tensor(0.5)))
        kind = pyro.sample("kind", dist.OneHotCategorical(torch.ones(3)))
        with pyro.plate("rows", 3):
            wait = pyro.sample("wait", dist.Geometric(0.5 * torch.ones(3)))
            pyro.sample("x", dist.Normal(switch + count + tries + wait + kind, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.zeros(4))
        pyro.sample("switch", dist.Bernoulli(logits=logit[0]))
        pyro.sample("count", dist.Poisson(logit[1].exp()))
        pyro.sample("tries", dist.Binomial(5, logits=logit[2]))
        pyro.sample("kind", dist.OneHotCategorical(logits=logit[:3]))
        with pyro.plate("rows", 3):
            pyro.sample("wait", dist.Geometric(logits=logit[3].expand(3)))

    return Run(model, guide, Trace_ELBO(), (x,))


@program("decaying average baseline", refused="TraceGraph_ELBO")
def decaying_baseline():
    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x), 2))
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits), infer={"baseline": {"use_decaying_avg_baseline": True}})

    return Run(two_means, guide, TraceGraph_ELBO(), (mixture_data(),))


# Enumerated.


@program("mixture, enumerated in the model", deterministic=True)
def enumerated_mixture():
    return Run(config_enumerate(two_means), lambda x: None, TraceEnum_ELBO(max_plate_nesting=1), (mixture_data(),))


@program("mixture, enumerated in the guide", deterministic=True)
def enumerated_guide():
    @config_enumerate
    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x), 2))
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    return Run(two_means, guide, TraceEnum_ELBO(max_plate_nesting=1), (mixture_data(),))


@program("HMM, enumerated, AutoNormal", representative=True)
def enumerated_hmm():
    x = torch.randn(2, 5)

    def model(x):
        with pyro.plate("states", 3):
            rows = pyro.sample("rows", dist.Dirichlet(torch.ones(3)))
            locs = pyro.sample("locs", dist.Normal(0.0, 1.0))
        state = torch.tensor(0)
        with pyro.plate("series", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"state_{t}", dist.Categorical(rows[state]), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(locs[state], 1.0), obs=x[:, t])

    guide = AutoNormal(poutine.block(model, expose=["rows", "locs"]))
    return Run(model, guide, TraceEnum_ELBO(max_plate_nesting=1), (x,))


@program("HMM, enumerated one state after another", deterministic=True)
def sequentially_enumerated():
    @config_enumerate(default="sequential")
    def guide(x):
        logits = pyro.param("logits", torch.zeros(2))
        pyro.sample("a", dist.Bernoulli(logits=logits[0]))
        pyro.sample("b", dist.Bernoulli(logits=logits[1]))

    def model(x):
        a, b = pyro.sample("a", dist.Bernoulli(0.3)), pyro.sample("b", dist.Bernoulli(0.6))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    return Run(model, guide, TraceEnum_ELBO(max_plate_nesting=0), (torch.tensor(1.2),))


@program("HMM summed out by DiscreteHMM")
def discrete_hmm():
    x = torch.randn(2, 6)

    def model(x):
        transition = pyro.param("transition", torch.zeros(3, 3))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("series", len(x)):
            pyro.sample("x", dist.DiscreteHMM(torch.zeros(3), transition, dist.Normal(locs, 1.0), duration=6), obs=x)

    return Run(model, AutoNormal(model), Trace_ELBO(), (x,))


@program("HMM, lengths of its series in a closure")
def hmm_with_lengths():
    """A model whose loops and masks depend on data that it holds, which are fixed as long as nobody changes them."""
    x, lengths, seen = torch.randn(3, 5), torch.tensor([3, 5, 2]), torch.tensor([True, False, True])

    def model():
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("series", len(x)):
            state = torch.tensor(0)
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=t < lengths):
                    probs = torch.tensor([[0.8, 0.2], [0.3, 0.7]])[state]
                    state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                    pyro.sample(f"x_{t}", dist.Normal(locs[state], 1.0), obs=x[:, t])
        with pyro.plate("seen", int(seen.sum())):
            pyro.sample("first", dist.Normal(locs[0], 1.0), obs=x[seen, 0])

    guide = AutoNormal(poutine.block(model, expose=["locs"]))
    return Run(model, guide, TraceEnum_ELBO(max_plate_nesting=1))


# Gaussian processes.


@program("Gaussian process by hand, AutoMultivariateNormal")
def gaussian_process():
    x = torch.linspace(0, 1, 8)
    y = (6 * x).sin()

    def model(x, y):
        length = pyro.sample("length", dist.LogNormal(-1.0, 0.5))
        noise = pyro.sample("noise", dist.HalfNormal(0.5))
        kernel = (-((x[:, None] - x) ** 2) / (2 * length**2)).exp() + (noise**2 + 1e-3) * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)

    return Run(model, AutoMultivariateNormal(model), Trace_ELBO(), (x, y))


@program("Gaussian process of Pyro, variational", representative=True)
def variational_gaussian_process():
    x = torch.linspace(0, 1, 6)
    y = (x > 0.5).float()
    module = gp.models.VariationalGP(x, y, gp.kernels.Matern52(1), gp.likelihoods.Binary(), whiten=True)
    return Run(module.model, module.guide, Trace_ELBO())


# Networks.


class BayesianNetwork(PyroModule):
    """A network with a prior of its weights, and parameters of other kinds."""

    def __init__(self):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](2, 4)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, 2]).to_event(2))
        self.hidden.bias = PyroParam(torch.zeros(4))
        self.out = PyroModule[nn.Linear](4, 1)
        self.scale = PyroParam(torch.tensor(0.5), constraint=POSITIVE)
        self.tilt = PyroSample(lambda self: dist.Normal(0.0, self.scale))
        self.register_buffer("centre", torch.tensor([0.5, -0.5]))

    def forward(self, x, y=None):
        mean = self.out(self.hidden(x - self.centre).tanh()).squeeze(-1) + self.tilt
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)
        return mean


@program("Bayesian network, PyroModule, PyroSample, PyroParam", representative=True)
def bayesian_network():
    model, x = BayesianNetwork(), torch.randn(6, 2)
    return Run(model, AutoDiagonalNormal(model), Trace_ELBO(), (x, x.sum(-1)))


class PyroMethods(PyroModule):
    """A module with model and guide as methods, whose parameters are shared by both."""

    def __init__(self):
        super().__init__()
        self.shared = PyroParam(torch.tensor([0.1, 0.2]))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.interval(0.1, 2.0))

    @pyro_method
    def model(self, x, *, offset):
        z = pyro.sample("z", dist.Normal(self.shared[0], 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z + offset, 1.0), obs=x)

    @pyro_method
    def guide(self, x, *, offset):
        pyro.sample("z", dist.Normal(self.shared.sum() + offset, self.scale))


@program("pyro_method model and guide, keyword float")
def pyro_methods():
    module = PyroMethods()
    return Run(module.model, module.guide, Trace_ELBO(), (torch.randn(5),), {"offset": 0.5})


def vae_program(layers: nn.Module, x: Tensor, z_dim: int = 2) -> Run:
    """Return an autoencoder whose encoder begins with `layers`, which return (n, 6)."""
    encoder = nn.ModuleDict({"layers": layers, "loc": nn.Linear(6, z_dim), "scale": nn.Linear(6, z_dim)})
    decoder = nn.Sequential(nn.Linear(z_dim, 8), nn.Softplus(), nn.Linear(8, x[0].numel()))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x.flatten(1))

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            hidden = encoder["layers"](x)
            pyro.sample("z", dist.Normal(encoder["loc"](hidden), encoder["scale"](hidden).exp()).to_event(1))

    return Run(model, guide, Trace_ELBO(), (x,), modules=(encoder, decoder))


@program("VAE, BatchNorm")
def vae_batch_norm():
    return vae_program(nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6), nn.ReLU()), examples.binary(8, 9))


@program("VAE, Dropout", representative=True)
def vae_dropout():
    return vae_program(nn.Sequential(nn.Linear(9, 6), nn.Dropout(0.3), nn.ReLU(inplace=True)), examples.binary(8, 9))


@program("VAE, evaluation mode")
def vae_evaluation():
    layers = nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)).eval()
    return vae_program(layers, examples.binary(8, 9))


@program("VAE, convolutions")
def vae_convolutions():
    layers = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 6), nn.GELU()
    )
    return vae_program(layers, examples.binary(5, 16).reshape(5, 1, 4, 4))


@program("VAE, weight norm and layer norm")
def vae_weight_norm():
    layers = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(9, 6)), nn.LayerNorm(6))
    return vae_program(layers, examples.binary(8, 9))


@program("VAE, spectral norm")
def vae_spectral_norm():
    """A layer whose power iteration moves a buffer at every call."""
    layers = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(9, 6)), nn.Tanh())
    return vae_program(layers, examples.binary(8, 9))


@program("VAE, frozen layer")
def vae_frozen():
    layer = nn.Linear(9, 6).requires_grad_(False)

    class Frozen(nn.Module):
        """A layer that the param store does not see."""

        def forward(self, x):
            return layer(x)

    return vae_program(nn.Sequential(Frozen(), nn.Tanh()), examples.binary(8, 9))


@program("VAE, attention")
def vae_attention():
    layers = nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 6)
    )
    return vae_program(layers, examples.binary(4, 12))


@program("word embeddings of integers, dict argument")
def embeddings():
    net = nn.ModuleDict({"words": nn.Embedding(7, 3), "out": nn.Linear(3, 1)})
    batch = {"words": torch.randint(0, 7, (6, 4)), "y": torch.randn(6), "weights": (torch.rand(6), [torch.ones(6)])}

    def model(batch):
        pyro.module("net", net)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        weights = batch["weights"][0] + batch["weights"][1][0]
        with pyro.plate("rows", len(batch["y"])), poutine.scale(scale=weights):
            loc = net["out"](net["words"](batch["words"]).mean(-2)).squeeze(-1)
            pyro.sample("y", dist.Normal(loc, scale), obs=batch["y"])

    return Run(model, AutoNormal(model), Trace_ELBO(), (batch,))


@program("arguments of many kinds")
def many_arguments():
    def model(x, flag, size, y=None, *, weight=1.0, mode="plain", options=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", size), poutine.scale(scale=weight):
            scale = options["scale"] if mode == "plain" and flag else 2.0
            pyro.sample("x", dist.Normal(loc, scale), obs=x)
        if y is not None:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    kwargs = {"weight": 0.5, "mode": "plain", "options": OrderedDict(scale=torch.tensor(0.8), unused=None)}
    return Run(model, AutoNormal(model), Trace_ELBO(), (torch.randn(4), True, 4), kwargs)


@program("unused and shared parameters")
def unused_parameters():
    layer = nn.Linear(2, 2)

    def model(x):
        pyro.module("tied", layer)
        loc = pyro.param("shared", torch.zeros(()))
        pyro.param("unused", torch.ones(3))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z + layer(x).sum(-1) @ torch.ones(len(x)) / len(x), 1.0), obs=x[:, 0])

    def guide(x):
        pyro.module("tied", layer)
        pyro.sample("z", dist.Normal(pyro.param("shared", torch.zeros(())), layer.bias.exp().sum()))

    return Run(model, guide, Trace_ELBO(), (torch.randn(5, 2),))


@program("in-place arithmetic and constants made inside")
def in_place():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        loc = torch.zeros(len(x))
        loc[0] = scale
        loc[1:] += x[:-1] * scale
        weights = torch.tensor([0.2, 0.8])
        component = dist.Normal(torch.stack([loc, -loc], -1), torch.tensor(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), component), obs=x)

    return Run(model, AutoNormal(model), Trace_ELBO(), (torch.randn(5),))


@program("flow in a subsampled plate, no guide", deterministic=True)
def flow_without_guide():
    flow = Flow((2,), transform=MAF(transforms=1, hidden=(8,)), standardize=False)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("rows", 40, subsample_size=len(x)):
            pyro.sample("x", flow(), obs=x)

    return Run(model, lambda x: None, MaximumLikelihood(), (torch.randn(6, 2),))


@program("EnergyDistance", refused="nonzero depends on values")
def energy_distance():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return Run(model, lambda x: None, EnergyDistance(num_particles=4), (torch.randn(5),))


# What a capture must refuse.


def refused_model(body: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Run]:
    """Return the builder of a model whose mean is a function of a latent vector and the data that no graph can hold."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(body(z, x), 1.0), obs=x)

    return lambda: Run(model, AutoNormal(model), Trace_ELBO(), (torch.randn(3),))


program("refused: if on a latent", refused=r"reads the value.*programs\.py.*if z\.sum\(\) > 0")(
    refused_model(lambda z, x: z if z.sum() > 0 else -z)
)
program("refused: boolean mask of a latent", refused=r"a mask selects.*programs\.py.*z\[z > 0\]")(
    refused_model(lambda z, x: z[z > 0].sum() + x)
)
program("refused: boolean mask of an argument", refused=r"a mask selects.*programs\.py.*z\[x > 0\]")(
    refused_model(lambda z, x: z[x > 0].sum() + x)
)
program("refused: a count as int", refused=r"reads the value.*programs\.py.*int\(\(z > 0\)")(
    refused_model(lambda z, x: z * int((z > 0).sum()))
)
program("refused: float of a latent", refused=r"reads the value.*programs\.py.*float\(z")(
    refused_model(lambda z, x: z * float(z.detach().sum()))
)
program("refused: item", refused=r"reads the value.*programs\.py.*\.item\(\)")(
    refused_model(lambda z, x: z * z.exp().sum().item())
)
program("refused: numpy of a latent", refused=r"reads the values.*programs\.py.*\.numpy\(\)")(
    refused_model(lambda z, x: z * torch.as_tensor(z.detach().numpy().sum()))
)
program("refused: nonzero", refused=r"nonzero depends on values.*programs\.py.*nonzero\(\)")(
    refused_model(lambda z, x: z + (z > 0).nonzero().sum())
)
program("refused: unique", refused=r"unique2 depends on values.*programs\.py.*unique\(\)")(
    refused_model(lambda z, x: z + z.detach().round().unique().sum())
)
program("refused: length given by a tensor", refused=r"reads the value.*programs\.py.*torch\.arange")(
    refused_model(lambda z, x: z + torch.arange(x.abs().sum().ceil()).sum())
)


program("refused: list of a latent", refused=r"reads the values.*programs\.py.*tolist\(\)")(
    refused_model(lambda z, x: z * sum(z.detach().tolist()))
)


@program("refused: sequential subsampled plate", refused=r"reads the value.*'rows'.*programs\.py.*for i in pyro\.plate")
def sequential_subsampled():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", len(x), subsample_size=2):
            pyro.sample(f"x_{i}", dist.Normal(loc, 1.0), obs=x[i])

    return Run(model, AutoNormal(model), Trace_ELBO(), (torch.randn(5),))


@program(
    "refused: computed from a parameter before", refused="computed from a parameter, by SoftmaxBackward0, before the capture"
)
def computed_before():
    """A model that reads a tensor which was computed from a parameter: its gradient would be of another graph."""
    weight = nn.Parameter(torch.tensor([0.3, 0.4]))
    softmax = weight.softmax(-1)

    def model(x):
        pyro.param("weight", weight)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("x", dist.Normal(z + softmax, 1.0), obs=x)

    return Run(model, AutoNormal(model), Trace_ELBO(retain_graph=True), (torch.randn(2),))


# Pyro's own examples.


def example(build: Callable[[], tuple[Any, tuple]], *args: Any, **kwargs: Any) -> Callable[[], Run]:
    """Return the builder of one of Pyro's examples, with other arguments if some are given."""

    def run() -> Run:
        svi, own = build()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return Run(svi.model, svi.guide, svi.loss_and_grads.__self__, args or own, kwargs)

    return run


EXAMPLES = {
    "bayesian_regression": {},
    "capture_recapture": {},
    "coin": {},
    "coin_loop": {"refused": r"'data_loop'.*pyro_examples\.py"},
    "coin_subsampled": {},
    "cvae": {"refused": r"pyro_examples\.py"},
    "dirichlet_process": {},
    "dmm": {},
    "eight_schools": {},
    "gaussian_hmm": {},
    "gmm": {},
    "gp_regression": {},
    "gp_sparse": {},
    "guide_list": {},
    "hmm": {"refused": r"pyro_examples\.py"},
    "intro": {},
    "intro_maximum_likelihood": {"deterministic": True},
    "minipyro": {},
    "mixed_hmm": {"deterministic": True},
    "prod_lda": {"refused": r"pyro_examples\.py"},
    "radon": {},
    "scanvi": {},
    "sparse_gamma_def": {},
    "stable": {"refused": r"'r_t_exponential'.*pyro_examples\.py"},
    "stable_iid": {"refused": r"'r_t_exponential'.*pyro_examples\.py"},
    "svi_flow_guide": {},
    "vae": {"representative": True},
    "vae_flow_prior": {},
    "weighing": {},
}
for _name, _flags in EXAMPLES.items():
    program(f"example: {_name}", **_flags)(example(getattr(examples, _name)))


def semi_supervised(*, labelled: bool) -> Callable[[], Run]:
    def run() -> Run:
        module, x, y = examples.SemiSupervised(), examples.binary(5, 6), examples.one_hot(5, 3)
        guide = config_enumerate(module.guide, "parallel", expand=True)
        loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
        return Run(module.model, guide, loss, (x, y) if labelled else (x,))

    return run


program("example: ss_vae, labelled")(semi_supervised(labelled=True))
program("example: ss_vae, unlabelled", representative=True)(semi_supervised(labelled=False))


@program("example: ss_vae, classifier", deterministic=True)
def classifier():
    module, x, y = examples.SemiSupervised(), examples.binary(5, 6), examples.one_hot(5, 3)
    return Run(module.model_classify, module.guide_classify, Trace_ELBO(), (x, y))


@program("example: air", refused="TraceGraph_ELBO")
def air():
    svi, (x, _) = examples.air()
    return Run(svi.model, svi.guide, TraceGraph_ELBO(), (x,), {"batch_size": 4})


@program("example: lda")
def lda():
    svi, args = examples.lda()
    pyro.clear_param_store()
    return Run(svi.model, svi.guide, TraceEnum_ELBO(max_plate_nesting=2), args, {"batch_size": 3})


@program("example: baseball")
def baseball():
    at_bats, hits = torch.tensor([45.0, 45, 45, 45]), torch.tensor([18.0, 17, 16, 12])

    def partially_pooled(at_bats, hits):
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("num_players", at_bats.shape[0]):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)

    model = poutine.condition(partially_pooled, data={"hits": hits})
    return Run(model, AutoNormal(model), Trace_ELBO(), (at_bats, None))


@program("example: lkj")
def lkj():
    def model(y):
        with pyro.plate("dims", 3):
            theta = pyro.sample("theta", dist.HalfCauchy(1.0))
        l_omega = pyro.sample("L_omega", dist.LKJCholesky(3, torch.tensor(1.0)))
        with pyro.plate("observations", len(y)):
            pyro.sample("obs", dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.diag(theta.sqrt()) @ l_omega), obs=y)

    return Run(model, AutoNormal(model), Trace_ELBO(), (torch.randn(6, 3),))


# Families of this library.


def family(case: Any, rows: int = 6) -> Callable[[], Run]:
    """Return the builder of a row of the table of families, with its objective."""

    def run() -> Run:
        module = perturb(case.build(), 0.1)  # networks whose last layer is zero would hide their gradients
        batch = case.batch(rows)
        module.prepare(batch[0])
        return Run(module.model, module.guide, case.objective(), batch)

    return run


FAMILIES = REPRESENTATIVE | {
    "MAF",
    "NSF",
    "Flow, labels",
    "Autoregressive, Normal",
    "VAE, Bernoulli",
    "VAE, flow prior",
    "ODE flow, flow matching",
    "ODE flow",
    "Diffusion, labels",
    "Energy, binary",
    "GAN",
}
REFUSED_FAMILIES = {"ODE flow, adaptive": "Dopri5", "ODE flow": "RK4", "ODE flow, Hutchinson": "RK4"}
DETERMINISTIC = {
    "Flow, on an interval",
    "MAF",
    "NSF",
    "SOSPF",
    "Flow, labels",
    "Autoregressive, scalar",
    "Autoregressive, labels",
    "Autoregressive, Normal",
    "ODE flow",
}
for _case in CASES:
    if _case.name in FAMILIES or _case.name in REFUSED_FAMILIES:
        program(
            f"family: {_case.name}",
            refused=REFUSED_FAMILIES.get(_case.name),
            deterministic=_case.name in DETERMINISTIC,
            representative=_case.name in ("NSF", "Energy"),
        )(family(_case))


def energy(objective: Callable[[], ELBO]) -> Callable[[], Run]:
    def run() -> Run:
        module, x = EnergyModel((2,), energy=DenseEnergy((8, 8))), torch.randn(6, 2)
        module.prepare(x)
        return Run(module.model, module.guide, objective(), (x,))

    return run


program("family: Energy, ImplicitScoreMatching", deterministic=True)(energy(ImplicitScoreMatching))
program("family: Energy, SlicedScoreMatching")(energy(SlicedScoreMatching))
program("family: Energy, NoiseContrastive")(energy(lambda: NoiseContrastive(dist.Normal(torch.zeros(2), 2.0).to_event(1))))


@program("flow as likelihood over a latent")
def flow_likelihood():
    flow = Flow((2,), context=1, transform=NSF(transforms=1, hidden=(8,)))
    x = torch.randn(6, 2)
    flow.prepare(x)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", flow(z), obs=x)

    return Run(model, AutoNormal(model), Trace_ELBO(), (x,))


CAPTURED = {name: row for name, row in PROGRAMS.items() if row.refused is None}
REFUSED = {name: row for name, row in PROGRAMS.items() if row.refused is not None}
SHOWN = {name: row for name, row in CAPTURED.items() if row.representative}
