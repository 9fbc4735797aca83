"""Pyro's own examples and tutorials as they are written: what `to_arviz` and `log_likelihood` give for each, in one table."""

import math
import re
import warnings
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import pyro_examples as examples
import pytest
import torch
from pyro.infer import Importance
from pyro.infer.autoguide import AutoGaussian
from readings import close, draws, groups, stat, variables

from pyro_genmodels import Adversarial, MaximumLikelihood, MaximumMeanDiscrepancy, log_likelihood, to_arviz

PRIOR = {"prior", "prior_predictive"}
STANDARD = {"posterior", "posterior_predictive", *PRIOR, "log_likelihood", "log_prior", "sample_stats", "observed_data"}
SHARED = "are shared by all rows"
NO_ROWS = "found no plates"
SUMMED_OUT = "inference has summed"


@dataclass
class Expected:
    """Result of `to_arviz` and `log_likelihood` for an example.

    Attributes:
        posterior: dimensions of each variable of the posterior: names of plates, and +k for k dimensions of the event.
        data: the same of what is observed.
        likelihood: kind of the log-likelihood of rows; or the message of the error.
        without: groups that are missing.
        left_out: message about what is missing, a regular expression.
        constants: names of the constant data.
        kwargs: keyword arguments of `to_arviz`.
        is_scaled: True if the model scales its terms, so that log p is not the sum of the densities.
    """

    posterior: dict
    data: dict
    likelihood: str
    without: set = field(default_factory=set)
    left_out: str | None = None
    constants: set = field(default_factory=set)
    kwargs: dict = field(default_factory=dict)
    is_scaled: bool = False


HMM = Expected(
    {"probs_x": "+2", "probs_y": "+2"},
    {f"y_{t}": "sequences tones" for t in range(4)},
    SUMMED_OUT,
    without={"log_likelihood", "sample_stats"},
    left_out="'x_0'.* summed it out.*cannot be summed out row by row",
    constants={"sequences", "lengths"},
)
COIN = {f"obs_{i}": "" for i in range(4)}
NOTHING_LATENT = STANDARD - {"posterior_predictive", "observed_data"}
AIR = {f"{name}_{t}": "data +1" for t in range(2) for name in ("z_pres", "z_what")}
STABLE = ["r_z_uniform", "r_z_exponential", "r_t_uniform", "r_t_exponential"]
SIR = {"R0": "", "rho": "", "auxiliary": "+2"}
TABLE = {
    # Amortised.
    "vae": Expected({"latent": "data +1"}, {"obs": "data +1"}, "lower bound", constants={"x"}),
    "ss_vae_m2": Expected({"z": "data +1"}, {"x": "data +1", "y": "data +1"}, "lower bound"),
    "ss_vae_m2_unlabelled": Expected({"z": "data +1", "y": "data +1"}, {"x": "data +1"}, "lower bound"),
    "ss_vae_m2_classify": Expected({}, {"y_aux": "data +1"}, "exact", without=NOTHING_LATENT, constants={"xs"}),
    "cvae": Expected({"z": "data +1"}, {"y": "data +1"}, "lower bound", constants={"xs", "ys"}),
    "vae_flow_prior": Expected({"z": "data +1"}, {"x": "data +1"}, "lower bound"),
    "scanvi": Expected(
        dict.fromkeys(["z1", "z2", "l"], "batch +1"), {"x": "batch +1", "y": "batch +1"}, "lower bound", is_scaled=True
    ),
    "prod_lda": Expected({"logtheta": "documents +1"}, {"obs": "documents +1"}, "lower bound"),
    "dmm": Expected(
        {f"z_{t}": "z_minibatch +1" for t in (1, 2, 3)},
        {f"obs_x_{t}": "z_minibatch +1" for t in (1, 2, 3)},
        "lower bound",
        constants={"mini_batch", "mini_batch_reversed", "mini_batch_mask", "mini_batch_seq_lengths"},
    ),
    "air": Expected(AIR, {"obs": "data +1"}, "lower bound"),
    "cevae": Expected({"z": "data +1"}, {"x": "data +1", "t": "data", "y": "data"}, "lower bound"),
    # Enumerated.
    "gmm": Expected(
        {"weights": "+1", "scale": "", "locs": "components"},
        {"obs": "data"},
        SUMMED_OUT,
        left_out="'assignment'.* summed it out",
    ),
    "hmm": HMM,
    "hmm_in_batches": Expected(**{**vars(HMM), "kwargs": {"model_kwargs": {"batch_size": 2}}}),
    "gaussian_hmm": Expected({"scale": ""}, {"obs": "series +2"}, SHARED),
    "mixed_hmm": Expected(
        {},
        {f"step_{t}": "individual group" for t in range(3)},
        "found group .2., individual .3.",
        without=STANDARD - {"posterior_predictive", "observed_data", *PRIOR},
        left_out="'e_g'.* summed it out.*cannot be summed out row by row",
        constants={"steps", "missing"},
    ),
    "lda": Expected(
        {"topic_weights": "topics", "topic_words": "topics +1", "doc_topics": "documents +1"},
        {"doc_words": "words documents"},
        "row_dim=1",
        left_out="'word_topics'.* summed it out.*log_q .*'doc_topics', a point mass",
        kwargs={"model_kwargs": {"batch_size": 3}},
    ),
    "capture_recapture": Expected(
        {"phi": "", "rho": ""},
        {f"y_{t}": "animals" for t in range(3)},
        SUMMED_OUT,
        without={"log_likelihood", "sample_stats"},
        left_out="'z_0'.* summed it out.*cannot be summed out row by row",
        constants={"capture_history"},
    ),
    "dirichlet_process": Expected(
        {"beta": "beta_plate", "mu": "mu_plate +1", "z": "data"}, {"obs": "data +1"}, "runs model and guide on some rows"
    ),
    # Regressions and hierarchies.
    "bayesian_regression": Expected(
        {"sigma": "", "linear.weight": "+2", "linear.bias": "+1"}, {"obs": "data"}, SHARED, constants={"x"}
    ),
    "intro": Expected(
        dict.fromkeys(["a", "bA", "bR", "bAR", "sigma"], ""),
        {"obs": "data"},
        SHARED,
        constants={"is_cont_africa", "ruggedness"},
    ),
    "intro_maximum_likelihood": Expected(
        {}, {"obs": "data"}, "exact", without=NOTHING_LATENT, constants={"is_cont_africa", "ruggedness"}
    ),
    "weighing": Expected({"weight": ""}, {"measurement": ""}, "one or more rows"),
    "coin": Expected({"latent_fairness": ""}, COIN, NO_ROWS, constants={"data"}),
    "coin_loop": Expected(
        {"latent_fairness": ""}, {}, SHARED, left_out="most rows of 'data_loop'", constants={"data"}, is_scaled=True
    ),
    "coin_subsampled": Expected({"latent_fairness": ""}, {"obs": "observe_data"}, SHARED),
    "minipyro": Expected({"loc": ""}, {"obs": "data"}, SHARED),
    "eight_schools": Expected({"eta": "+1", "mu": "+1", "tau": "+1"}, {"obs": "+1"}, NO_ROWS, constants={"sigma"}),
    "baseball": Expected(
        {"m": "", "kappa": "", "phi": "num_players"}, {"hits": "num_players"}, "has draws and no guide", constants={"at_bats"}
    ),
    "lkj": Expected({"theta": "dims", "L_omega": "+2"}, {"obs": "observations +1"}, "has draws and no guide"),
    "radon": Expected(
        {"mu_a": "", "sigma_a": "", "b": "", "sigma": "", "a": "counties", "a_decentered": "counties", "mean": "houses"},
        {"log_radon": "houses"},
        SHARED,
        constants={"county", "floor"},
    ),
    "sparse_gamma_def": Expected(
        {"w_top": "w_top_plate", "w_bottom": "w_bottom_plate", "z_top": "data +1", "z_bottom": "data +1"},
        {"obs": "data +1"},
        "found data .4.",
    ),
    "stable": Expected(
        dict.fromkeys(["h_0", "sigma", "r_s", "r_skew"], "") | dict.fromkeys(["v", "v_dct", *STABLE], "+1"),
        {"r": "+1"},
        NO_ROWS,
        without=PRIOR,
        left_out="prior .the model fails for one of its draws: Expected parameter scale",
    ),
    "stable_iid": Expected(
        {"stability": "", "scale": "", **dict.fromkeys(STABLE, "data")},
        {"r": "data"},
        "found data .6.",
        without=PRIOR,
        left_out="prior .the model fails for one of its draws: Expected parameter scale",
    ),
    "svi_flow_guide": Expected({"beta": "+1", "log_scale": "+1"}, {"y": "data"}, SHARED, constants={"x"}),
    "guide_list": Expected({"loc": "", "scale": ""}, {"obs": "data"}, SHARED, left_out="log_q .*'scale', a point"),
    "neutra": Expected(
        {"x": "+1", "x_shared_latent": "+1"},
        {"y": "data"},
        "has draws and no guide",
        without=PRIOR,
        left_out="'x' is sampled from another",
    ),
    # Other kinds of inference.
    "csis": Expected({"z": ""}, {"x1": "", "x2": ""}, "'x'", constants={"prior_mean"}),
    "inclined_plane": Expected({"mu": ""}, {f"obs_{i}": "" for i in range(3)}, "'x'", constants={"observed"}),
    "gp_regression": Expected({"kernel.lengthscale": ""}, {"y": "+1"}, "'x'"),
    "gp_sparse": Expected({"u": "+1"}, {"likelihood.y": "+1"}, "'x'"),
    "sir": Expected({"R0": "+1", "rho": "+1", "auxiliary": "+3"}, {}, "'x'", without=STANDARD - {"posterior"}),
    "sir_by_nuts": Expected(
        SIR,
        {},
        "'x'",
        without={"posterior_predictive", *PRIOR},
        left_out="posterior_predictive .the model fails for one of its draws: Incorrect state.*; prior .the model fails",
    ),
    "forecast": Expected(
        {"drift_scale": "", "drift": "time", "noise_scale": ""},
        {"residual": "+3"},
        "fail: AssertionError",
        without={"observed_data"},
        left_out=r"observed_data\['residual'\] .it is computed from latent variables",
        constants={"data", "covariates"},
    ),
}


def make(name):
    """Return the fit of an example and the arguments of its model. Its training may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(examples, name)()


def export(fit, args, num_samples=8, left_out=None, **kwargs):
    """Return ArviZ data, and check the message about what is left out."""
    has_draws = hasattr(fit, "get_samples") or hasattr(fit, "samples") or isinstance(fit, Importance)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = to_arviz(fit, *args, progress=False, **({} if has_draws else {"num_samples": num_samples}), **kwargs)
    messages = " ".join(str(warning.message) for warning in caught)
    assert re.search(left_out, messages, re.DOTALL) if left_out else not messages, messages
    return data


def dimensions(name, text):
    """Return the names of dimensions that a text such as "plate +2" stands for."""
    *plates, events = text.split() if "+" in text else [*text.split(), "+0"]
    return (*plates, *(f"{name}_dim_{i}" for i in range(int(events))))


def check_dims(data, group, expected):
    """Assert that a group has these variables with these dimensions, after those of the draws."""
    assert variables(data, group) == set(expected)
    for name, text in expected.items():
        assert data[group][name].dims[2 * (group != "observed_data") :] == dimensions(name, text), (group, name)


def check_sums(data):
    """Assert that log p is the sum of log prior and log-likelihood, and log weight the difference of log p and log q."""
    terms = [values for group in ("log_likelihood", "log_prior") for values in data[group].data_vars.values()]
    total = sum(values.sum([d for d in values.dims if d not in ("chain", "draw")]) for values in terms)
    stats = data["sample_stats"]
    np.testing.assert_allclose(stats["log_p"], total, rtol=1e-5, atol=1e-4)
    if "log_q" in stats:
        np.testing.assert_allclose(stats["log_weight"], stats["log_p"] - stats["log_q"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TABLE)
def test_what_an_example_gives(name):
    expected = TABLE[name]
    fit, args = make(name)
    data = export(fit, args, left_out=expected.left_out, **expected.kwargs)
    constants = {"constant_data"} if expected.constants else set()
    missing = expected.without | ({"posterior"} if not expected.posterior else set())
    assert groups(data) == STANDARD - missing | constants
    if expected.posterior:
        check_dims(data, "posterior", expected.posterior)
    if expected.constants:
        assert variables(data, "constant_data") == expected.constants
    for group in {"log_likelihood", "log_prior", "sample_stats"} & groups(data):
        kinds = {values.dtype.name for values in data[group].data_vars.values()}
        assert kinds <= {"float64", "bool"}, (group, kinds)
        assert all(np.isfinite(values).all() for values in data[group].data_vars.values()), group
    if expected.data and "posterior_predictive" in groups(data):
        check_dims(data, "posterior_predictive", expected.data)
    if expected.data and "observed_data" in groups(data):
        check_dims(data, "observed_data", expected.data)
    if {"log_likelihood", "log_prior", "sample_stats"} <= groups(data) and not expected.is_scaled:
        check_sums(data)


@pytest.mark.parametrize("name", TABLE)
def test_the_log_likelihood_of_rows_of_an_example(name):
    fit, args = make(name)
    expected = TABLE[name].likelihood
    if expected in ("exact", "lower bound"):
        found = log_likelihood(fit, *args, num_samples=4)
        assert found.kind in (expected, "unreliable")
        assert found.values.isfinite().all()
        assert found.values.shape == (len(args[0]),)
    else:
        with pytest.raises((TypeError, ValueError), match=expected):
            log_likelihood(fit, *args, num_samples=4)


# Numbers computed another way.


def zero_networks():
    """Set all parameters to 0: then `Normals` are standard normal, and probabilities equal."""
    for _, parameter in pyro.get_param_store().named_parameters():
        parameter.data.zero_()


def set_params(**values):
    for name, value in values.items():
        pyro.get_param_store()[name] = torch.as_tensor(value)


def evidence(data):
    """Return the log weight of each draw, which is the log evidence if the guide is the exact posterior."""
    return stat(data, "log_weight")


def test_minipyro_with_the_exact_posterior_has_the_evidence_as_log_weight():
    fit, (x,) = make("minipyro")
    n = len(x)
    set_params(guide_loc=x.sum() / (n + 1), guide_scale_log=-0.5 * math.log(n + 1))
    covariance = torch.eye(n, dtype=torch.float64) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance).log_prob(x.double())
    close(evidence(export(fit, (x,))), exact.expand(8))


def test_weighing_with_the_exact_posterior_has_the_evidence_as_log_weight():
    fit, args = make("weighing")
    precision = 1 + 0.75**-2
    set_params(a=(8.5 + 9.5 * 0.75**-2) / precision, b=precision**-0.5)
    exact = dist.Normal(8.5, math.sqrt(1 + 0.75**2)).log_prob(torch.tensor(9.5))
    close(evidence(export(fit, args)), exact.expand(8))


def log_beta(a, b):
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def test_a_coin_with_the_exact_posterior_has_the_evidence_as_log_weight():
    fit, args = make("coin")
    set_params(alpha_q=13.0, beta_q=11.0)
    close(evidence(export(fit, args)), torch.full((8,), log_beta(13, 11) - log_beta(10, 10)))


def test_subsampled_coins_count_once_each():
    fit, (x,) = make("coin_subsampled")
    data = export(fit, (x,))
    f = draws(data, "latent_fairness").double()
    log_p = 12 * f.log() + 10 * (1 - f).log() - log_beta(10, 10)  # 3 heads of 4, and the prior
    close(stat(data, "log_p"), log_p)


def test_a_mixture_sums_over_its_assignments():
    fit, (x,) = make("gmm")
    data = export(fit, (x,), left_out="summed")
    weights, locs, scale = (draws(data, name).double() for name in ("weights", "locs", "scale"))
    terms = weights[:, None].log() + dist.Normal(locs[:, None], scale[:, None, None]).log_prob(x.double()[:, None])
    close(draws(data, "obs", "log_likelihood"), terms.logsumexp(-1))


def test_topics_are_summed_out_word_by_word_in_all_documents():
    """Only the guide subsamples, 3 of 6 documents, which are the second dimension of the data."""
    fit, (words,) = make("lda")
    data = export(fit, (words,), left_out="summed", model_kwargs={"batch_size": 3})
    topics, doc_topics = (draws(data, name).double() for name in ("topic_words", "doc_topics"))
    by_word = torch.einsum("sdk,skv->sdv", doc_topics, topics)  # (draws, documents, vocabulary)
    exact = torch.stack([by_word[:, d, words[:, d]] for d in range(words.shape[1])], -1).log()
    close(draws(data, "doc_words", "log_likelihood"), exact)
    assert (draws(data, "doc_words", "observed_data") == words).all()


def test_a_kalman_filter_is_a_multivariate_normal():
    """Coordinate by coordinate, state t has the variance 1 + t scale, and a datum 1 more."""
    fit, (x,) = make("gaussian_hmm")
    data = export(fit, (x,))
    t = torch.arange(1.0, 5, dtype=torch.float64)
    scale = draws(data, "scale").double()[:, None, None]
    covariance = 1 + scale * torch.minimum(t, t[:, None]) + torch.eye(4, dtype=torch.float64)
    by_coordinate = x.double().movedim(-1, 0)[:, :, None]  # (coordinates, series, 1, time)
    exact = dist.MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance).log_prob(by_coordinate).sum(0)
    close(draws(data, "obs", "log_likelihood"), exact.T)


def test_a_gaussian_process_is_a_multivariate_normal():
    fit, args = make("gp_regression")
    data = export(fit, args)
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    lengthscale = draws(data, "kernel.lengthscale").double()[:, None, None]
    covariance = (-0.5 * ((x - x[:, None]) / lengthscale) ** 2).exp()
    module = fit.model.__self__
    covariance = module.kernel.variance.item() * covariance + (module.noise.item() + 1e-6) * torch.eye(5)
    exact = dist.MultivariateNormal(torch.zeros(5, dtype=torch.float64), covariance).log_prob(x.sin())
    close(draws(data, "y", "log_likelihood"), exact, tolerance=1e-3)


def test_batting_averages_have_the_binomial_likelihood():
    fit, args = make("baseball")
    data = export(fit, args)
    _, n, hits = (arg if callable(arg) else arg.double() for arg in args)
    phi = draws(data, "phi").double()
    choose = n.add(1).lgamma() - hits.add(1).lgamma() - (n - hits).add(1).lgamma()
    close(draws(data, "hits", "log_likelihood"), choose + hits * phi.log() + (n - hits) * (1 - phi).log())


def test_forecasts_are_judged_by_their_residuals():
    """The observed value is the difference of data and level, which differs from draw to draw."""
    fit, (x, covariates) = make("forecast")
    data = export(fit, (x, covariates), left_out="observed_data")
    level, noise = draws(data, "drift").double().cumsum(-1), draws(data, "noise_scale").double()
    exact = dist.Normal(level, noise[:, None]).log_prob(x.double().squeeze(-1)).sum(-1)
    close(draws(data, "residual", "log_likelihood").squeeze(-1), exact)


HALF = math.log(0.5)
LIKELIHOODS = {
    "vae": 6 * HALF,
    "ss_vae_m2": 6 * HALF - math.log(3),
    "ss_vae_m2_unlabelled": 6 * HALF,
    "ss_vae_m2_classify": -math.log(3),
    "cvae": 4 * HALF,  # of the unseen pixels
    "dmm": torch.tensor([12, 12, 8, 8, 4]) * HALF,  # 4 notes at each time step of a sequence
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_networks_of_zeros_have_a_known_likelihood(name):
    """The guide then is the prior, so that all weights are equal, and the likelihood does not depend on latent variables."""
    fit, args = make(name)
    zero_networks()
    found = log_likelihood(fit, *args, num_samples=4)
    close(found.values, torch.as_tensor(LIKELIHOODS[name]).expand(len(args[0])))
    close(found.std_error, torch.zeros(len(args[0])))
    data = export(fit, args)
    if "sample_stats" in groups(data):
        close(evidence(data), found.values.sum().expand(8), tolerance=1e-3)


def test_rows_that_the_guide_chooses_have_a_known_likelihood():
    """AIR with networks of zeros: pictures of 0, with the noise .3."""
    fit, (x, count) = make("air")
    zero_networks()
    exact = dist.Normal(0.0, 0.3).log_prob(x).sum(-1)
    found = log_likelihood(fit, x, count, num_samples=4)
    close(found.values, exact)
    close(evidence(export(fit, (x, count))), exact.sum().expand(8), tolerance=1e-3)


def test_what_a_guide_observes_is_no_part_of_its_density():
    """CEVAE's guide observes treatment and outcome. With networks of zeros, the evidence is known."""
    fit, (x, t, y) = make("cevae")
    guide = fit.guide
    for parameter in (*fit.model.parameters(), *guide.parameters()):  # some of both have one name in the param store
        parameter.data.zero_()
    for network in (guide.z0_nn, guide.z1_nn):  # softplus(.5405) + .001 = 1
        network.fc[-1].bias.data[network.dim :] = math.log(math.exp(0.999) - 1)
    scale_x, scale_y = math.log(2) + 1e-3, math.log(2)
    exact = dist.Normal(0.0, scale_x).log_prob(x).sum(-1) + HALF + dist.Normal(0.0, scale_y).log_prob(y)
    close(log_likelihood(fit, x, t, y, num_samples=4).values, exact, tolerance=1e-3)
    close(evidence(export(fit, (x, t, y))), exact.sum().expand(8), tolerance=1e-3)


# Kinds of fault that the examples show.


@pytest.mark.parametrize("lengths", [[4, 3, 2, 4], [2, 2, 4, 3]], ids=["long in both", "long in the second"])
def test_sequences_in_batches_do_not_depend_on_the_seed(lengths):
    """A batch of short sequences has no site for the last time steps: they are missing there, whatever batch was seen first."""
    fit, (sequences, _) = make("hmm_in_batches")
    lengths = torch.tensor(lengths)
    wanted = ["posterior_predictive", "observed_data"]
    expected = torch.tensor([[t >= lengths[b : b + 2].max() for b in (0, 0, 2, 2)] for t in range(4)])
    for seed in range(20):
        pyro.set_rng_seed(seed)
        data = export(fit, (sequences, lengths), 1, left_out="x_3", model_kwargs={"batch_size": 2}, groups=wanted)
        for group in wanted:
            found = torch.stack([draws(data, f"y_{t}", group).isnan().all(-1).reshape(-1, 4)[-1] for t in range(4)])
            assert (found == expected).all(), (seed, group)


def normal_model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def normal_guide(x):
    pyro.sample("mu", dist.Normal(0.5, 0.3))


def test_a_loss_in_the_guide_is_no_part_of_its_density():
    def guide(x):
        normal_guide(x)
        pyro.factor("classification_loss", torch.tensor(-7.0), has_rsample=False)
        pyro.sample("seen", dist.Normal(0.0, 1.0), obs=torch.tensor(3.0))

    data = export((normal_model, guide), (torch.zeros(3),))
    close(stat(data, "log_q"), dist.Normal(0.5, 0.3).log_prob(draws(data, "mu")))


def test_the_density_that_a_guide_keeps_in_a_factor_counts():
    """AutoGaussian: log q is a quadratic function of mu whose constant is that of a normalised density."""
    x = torch.randn(4)
    guide = AutoGaussian(normal_model)
    data = export(examples.fit_svi(normal_model, guide, x), (x,), num_samples=20)
    a, b, c = np.polyfit(draws(data, "mu").double().numpy(), stat(data, "log_q").double().numpy(), 2)
    assert c == pytest.approx(b**2 / (4 * a) + 0.5 * math.log(-a / math.pi), abs=1e-3)


def test_a_point_mass_at_one_variable_gives_no_bound():
    def model(x):
        with pyro.plate("data", len(x)):
            a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x / 3, 0.5))
            pyro.sample("b", dist.Delta(x / 3))

    x = torch.randn(4)
    with pytest.raises(ValueError, match=r"a point mass .* for 'b'"):
        log_likelihood((model, guide), x)
    data = export((model, guide), (x,), left_out="a single value of 'b'")
    assert variables(data, "sample_stats") == {"log_p"}


def test_a_value_computed_from_a_sample_is_no_point_mass():
    x = torch.randn(4)

    def guide(x):
        z = pyro.sample("z", dist.Normal(0.5, 0.3), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Delta(z))

    data = export((normal_model, guide), (x,))
    close(stat(data, "log_q"), dist.Normal(0.5, 0.3).log_prob(draws(data, "mu")))


def test_a_discrete_variable_at_one_value_is_no_point_mass():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.25))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Delta(torch.ones(len(x))))

    x = torch.randn(4)
    exact = math.log(0.25) + dist.Normal(1.0, 1.0).log_prob(x)
    close(evidence(export((model, guide), (x,))), exact.sum().expand(8))
    close(log_likelihood((model, guide), x, num_samples=3).values, exact)


def test_a_density_that_all_rows_share_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        both = pyro.sample("both", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(both))

    with pytest.raises(ValueError, match="'both' of the guide lies outside"):
        log_likelihood((model, guide), torch.randn(4))


@pytest.mark.parametrize("kind", ["domain", "matrix", "predictive"])
def test_draws_that_the_model_refuses_cost_their_own_groups_only(kind):
    """A negative scale, a matrix that is not positive definite, and a prediction that a later distribution cannot take."""

    def model(x):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        if kind == "matrix":
            dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]) * s, validate_args=False)
        with pyro.plate("data", len(x)):
            y = pyro.sample("x", dist.Normal(0.0, s if kind == "domain" else 1.0), obs=x)
            if kind == "predictive":
                pyro.sample("y", dist.Poisson(y), obs=torch.ones(len(x)))

    def guide(x):
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    data = export((model, guide), (torch.ones(3),), left_out="prior .the model fails for one of its draws", parallel=False)
    assert PRIOR.isdisjoint(groups(data))
    assert {"posterior", "log_likelihood", "sample_stats"} <= groups(data)
    assert ("posterior_predictive" in groups(data)) == (kind != "predictive")


def test_a_plate_without_a_size_is_that_of_its_sites_for_every_reader():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]), obs=x)

    x = 3 + torch.randn(50)
    close(log_likelihood((model, lambda x: None), x).values, dist.Normal(0.0, 1.0).log_prob(x))
    for objective in (MaximumLikelihood(), MaximumMeanDiscrepancy()):
        pyro.clear_param_store()
        examples.fit_svi(model, lambda x: None, x, loss=objective, steps=20, lr=0.1)
        assert pyro.param("loc").item() > 0.5
    pyro.clear_param_store()
    critic = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 1))
    assert set(Adversarial(model, critic).step(x)) == {"generator", "critic"}


def test_a_model_that_adds_dimensions_is_not_tried_further():
    """Particles taken for states would multiply the numbers by 8 at each step."""
    largest = 0

    def model(x):
        nonlocal largest
        p = pyro.sample("p", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        z = torch.zeros(len(x), dtype=torch.long)
        with pyro.plate("data", len(x)):
            for t in range(6):
                z = pyro.sample(f"z_{t}", dist.Categorical(p[z]))
                largest = max(largest, z.numel())
            pyro.sample("x", dist.Normal(z.float(), 1.0), obs=x)

    def guide(x):
        pyro.sample("p", dist.Dirichlet(torch.ones(2, 2)).to_event(1))

    export((model, guide), (torch.randn(2),), num_samples=4)
    assert largest < 100


def test_rows_without_a_site_add_nothing_to_the_densities():
    """Series of different lengths in batches: log p is that of the values there are."""
    x, lengths = torch.randn(4, 3), torch.tensor([1, 1, 3, 2])

    def model(x, lengths):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("series", len(x), subsample_size=2) as rows:
            for t in range(int(lengths[rows].max())):
                with pyro.poutine.mask(mask=t < lengths[rows]):
                    pyro.sample(f"x_{t}", dist.Normal(mu, 1.0), obs=x[rows, t])

    for seed in range(5):
        pyro.set_rng_seed(seed)
        data = export((model, lambda *args: normal_guide(x)), (x, lengths))
        mu = draws(data, "mu")
        there = torch.arange(3) < lengths[:, None]
        terms = torch.where(there, dist.Normal(mu[:, None, None], 1.0).log_prob(x), 0.0)
        found = torch.stack([draws(data, f"x_{t}", "log_likelihood") for t in range(3)], -1)
        close(found, terms)
        close(stat(data, "log_p"), terms.sum((1, 2)) + dist.Normal(0.0, 1.0).log_prob(mu))


def test_data_in_the_place_of_indices_may_be_a_minibatch():
    """The rows of the minibatch are then counted from 0, and scaled to all."""
    fit, (x, t, y) = make("cevae")
    data = export(fit, (x, t, y), size=60)
    assert data["posterior"]["data"].values.tolist() == list(range(6))
    parts = [draws(data, name, "log_likelihood").sum(-1) for name in "xty"] + [draws(data, "z", "log_prior").sum(-1)]
    close(stat(data, "log_p"), 10 * sum(parts), tolerance=1e-3)
    assert log_likelihood(fit, x, t, y, num_samples=4, size=60).values.shape == (6,)


def test_rows_in_the_second_dimension_have_a_likelihood():
    """As in LDA, documents are the columns of the data."""

    def model(data):
        with pyro.plate("documents", data.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", data.shape[0]):
                pyro.sample("w", dist.Normal(z, 1.0), obs=data)

    def guide(data):  # the exact posterior
        n = len(data)
        with pyro.plate("documents", data.shape[1]):
            pyro.sample("z", dist.Normal(data.sum(0) / (n + 1), (n + 1) ** -0.5))

    data = torch.randn(3, 6)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(data.T)
    close(log_likelihood((model, guide), data, num_samples=4, row_dim=1).values, exact)
