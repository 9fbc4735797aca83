"""`diagnose_posterior` and `compare_posteriors`: numbers in closed form, and the words that they are told in."""

import re

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_genmodels import to_arviz
from pyro_genmodels.posteriors import (
    Laplace,
    NoUTurn,
    compare_posteriors,
    diagnose_posterior,
    posterior,
    predictive_check,
    psis,
    reloo,
)

Y = torch.tensor([1.0, 2.0, 3.0, 2.5])
EVIDENCE = float(dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 100.0).log_prob(Y))


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


class Guide:
    """A fit of the model by a normal distribution, given as multiples of the exact posterior's moments."""

    model = staticmethod(model)

    def __init__(self, shift=0.0, width=1.0):
        variance = 1 / (4 + 1 / 100)
        self.loc, self.scale = variance * float(Y.sum()) + shift * variance**0.5, width * variance**0.5

    def guide(self, y):
        pyro.sample("loc", dist.Normal(self.loc, self.scale))


def chains(x):
    """Return draws of loc, (chain, draw), that are the exact posterior's if x is standard normal."""
    guide = Guide()
    return {"loc": guide.loc + guide.scale * x}


def test_an_exact_guide_has_no_fault_and_the_exact_evidence():
    found = diagnose_posterior(Guide(), Y, reference=chains(torch.randn(4, 1000)))
    assert found.verdict == "no fault found"
    assert found.elbo[0] == pytest.approx(EVIDENCE, abs=1e-4)
    assert found.log_evidence[0] == pytest.approx(EVIDENCE, abs=1e-4)
    assert abs(found.table["mean_error"]["loc"]) < 0.1


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide(width=0.4), r"^too narrow in loc \(deviation -[56].%\): k-hat (0\.[78]|1\.[01])"),
        (Guide(width=2.0), r"^too wide in loc \(deviation \+\d+%\)"),
        (Guide(shift=1.0), r"off in loc: its mean by \+[01]\.\d+ deviations"),
    ],
)
def test_each_kind_of_error_is_named(guide, words):
    """T26: the tail index of the weights of a guide of width s is 1 - s^2, which is .84 for .4."""
    found = diagnose_posterior(guide, Y, reference=chains(torch.randn(4, 1000)), num_samples=4000)
    assert re.search(words, found.verdict), found.verdict


def test_without_a_reference_the_weights_alone_tell():
    assert diagnose_posterior(Guide(width=0.4), Y, num_samples=4000).verdict.startswith("unlike the posterior: k-hat 0.")


def test_chains_that_have_not_converged_or_are_short_are_told():
    apart = torch.randn(4, 1000) + torch.tensor([0.0, 0.0, 0.0, 1.0])[:, None]
    assert "chains have not converged: R-hat 1." in diagnose_posterior(chains(apart)).verdict
    assert "few draws: bulk effective sample size" in diagnose_posterior(chains(torch.randn(4, 50))).verdict
    assert diagnose_posterior(chains(torch.randn(4, 1000))).verdict == "no fault found"


def test_r_hat_and_sizes_are_those_of_arviz():
    draws = torch.randn(4, 200, 2).cumsum(1)
    table = diagnose_posterior({"x": draws}).table
    data = az.convert_to_dataset({"x": draws.numpy()})
    np.testing.assert_allclose(table["r_hat"], az.rhat(data)["x"])
    np.testing.assert_allclose(table["ess_tail"], az.ess(data, method="tail")["x"])


def test_the_table_of_several_fits():
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(Y)
    exact = posterior(model, Y, method=Laplace(), progress=False)
    fits = {"exact": exact, "svi": svi, "arviz": to_arviz(Guide(), Y, num_samples=300, progress=False)}
    found = compare_posteriors(fits, Y, reference="exact", num_samples=300)
    table = found.table
    assert list(table.index) == list(fits)
    assert table["elbo"]["exact"] == pytest.approx(EVIDENCE, abs=1e-3)
    assert table["c2st"]["svi"] > 0.8 > 0.6 > table["c2st"]["arviz"]
    assert table["mmd_p"]["svi"] < 0.01
    assert table["seconds"].isna().tolist() == [False, True, True]
    assert "too" in table["verdict"]["svi"]
    assert table["verdict"]["exact"] == "no fault found"
    figure = found.plot()
    assert [axes.get_xlabel() for axes in figure.axes][:1] == ["mean and two standard deviations"]
    with pytest.raises(ValueError, match="no scalar 'x' to plot, but loc"):
        found.plot(["x"])


def test_a_bound_far_below_another_is_a_fault_and_verdicts_are_whole_in_print():
    """The bound of a normal guide of width s is below the exact one's by (s^2 - 1) / 2 - log s, which is 4.94 for 4 widths."""
    truth = chains(torch.randn(4, 1000))
    fits = {"exact": Guide(), "wide": Guide(width=3.8), "a little wide": Guide(width=1.3), "draws": truth}
    found = compare_posteriors(fits, Y, reference="exact", distances=False)
    gap = (3.8**2 - 1) / 2 - np.log(3.8)
    words = re.search(r"; its bound is (\d\.\d) nats below that of exact$", found.verdicts["wide"])
    assert abs(float(words[1]) - gap) < 5 * found.table["elbo_se"]["wide"] + 0.05
    assert not any("bound" in found.verdicts[name] for name in ("exact", "a little wide", "draws"))
    assert f"\nwide: {found.verdicts['wide']}\n" in str(found)
    assert str(found) == repr(found)
    assert "..." not in str(found)


def test_distances_of_equal_draws_and_a_reference_of_draws_in_the_plot():
    """The distance of two sets of n normal draws is about 1 / sqrt(n); that of a shift by v in one dimension is v."""
    truth = chains(torch.randn(4, 500))
    found = compare_posteriors({"exact": Guide(), "off": Guide(shift=2.0)}, Y, reference=truth)
    table = found.table
    assert table["sliced_wasserstein"]["exact"] < 0.2 < 1.7 < table["sliced_wasserstein"]["off"] < 2.3
    assert table["c2st"]["exact"] < 0.6 < 0.75 < table["c2st"]["off"]
    legend = found.plot().axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["exact", "off", "reference"]
    plt.close("all")


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(TypeError, match="a dictionary of fits by name, but found a list"):
        compare_posteriors([Guide()], Y)
    with pytest.raises(ValueError, match="an empty dictionary"):
        compare_posteriors({}, Y)
    with pytest.raises(ValueError, match="reference 'b' is not one of the fits 'a'"):
        compare_posteriors({"a": Guide()}, Y, reference="b")
    with pytest.raises(ValueError, match="The reference has no draws of loc, but of z"):
        diagnose_posterior(Guide(), Y, reference={"z": torch.randn(2, 100)})


def guide_of_others(y):
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("other", dist.Normal(0.0, 1.0))


def plate_of_four(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


JUDGES = {
    "diagnose_posterior": diagnose_posterior,
    "compare_posteriors": lambda fit, y, **options: compare_posteriors({"fit": fit}, y, **options),
    "reloo": lambda fit, y, **options: reloo(fit, y, progress=False, **options),
    "predictive_check": lambda fit, y, **options: predictive_check(fit, y, progress=False, **options),
}


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    ("fit", "y", "message"),
    [
        ((model, guide_of_others), Y, "The guide samples other, which the model lacks: it has loc"),
        ((plate_of_four, Guide().guide), Y[:3], r"data of site 'y' have the shape \(3,\), but its distribution has \(4,\)"),
        (Guide(), torch.tensor([1.0, torch.nan]), "data of site 'y' hold NaN"),
    ],
    ids=["names", "shape", "NaN"],
)
def test_fits_that_do_not_go_with_their_model_are_refused(judge, fit, y, message):
    with pytest.raises(ValueError, match=message):
        JUDGES[judge](fit, y, num_samples=100)


def test_auxiliary_variables_of_a_guide_are_allowed():
    def guide(y):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("loc", dist.Delta(Guide().loc + Guide().scale * noise, log_density=-torch.tensor(Guide().scale).log()))

    assert diagnose_posterior((model, guide), Y).verdict == "no fault found"


def test_draws_that_are_not_finite_are_refused():
    bad = torch.randn(2, 100)
    bad[1, 7] = torch.inf
    with pytest.raises(ValueError, match="Draws of 'loc' are not finite in 1 of 200 draws"):
        diagnose_posterior({"loc": bad})
    with pytest.raises(ValueError, match="Draws of 'loc' are not finite in 200 of 200 draws"):
        diagnose_posterior(Guide(), Y, reference={"loc": bad * torch.nan})
    ragged = {"z": torch.where(torch.tensor([True, False]), torch.randn(2, 400, 2), torch.nan)}
    assert list(diagnose_posterior(ragged).table.index) == ["z[0]", "z[1]"]


def test_densities_that_are_zero_everywhere_are_no_good_fit():
    def impossible(y):
        model(y)
        pyro.factor("never", torch.tensor(-torch.inf))

    class Never(Guide):
        model = staticmethod(impossible)

    assert diagnose_posterior(Never(), Y).verdict == "unlike the posterior: and weights cannot correct it"
    with pytest.raises(ValueError, match="The weights of all draws are zero"):
        reloo(Never(), Y, num_samples=100)
    weighted = psis({"z": torch.zeros(100)}, torch.full((100,), -torch.inf), torch.zeros(100))
    assert weighted.pareto_k == float("inf")


def scaled(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Uniform(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc + share.sum(-1, keepdim=True), scale), obs=y)


class Drawn:
    """Draws, (chain, draw, ...) by name, of the model above, given the data."""

    def __init__(self, **draws):
        self.model, self.args, self.kwargs, self.stats, self.draws = scaled, (Y,), {}, {}, draws

    def get_samples(self, num_samples=None, group_by_chain=False):
        return self.draws if group_by_chain else {name: x.flatten(0, 1) for name, x in self.draws.items()}


def scaled_draws(**changed):
    return {"loc": torch.randn(1, 100), "scale": torch.rand(1, 100) + 0.5, "share": torch.rand(1, 100, 2)} | changed


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loc": torch.randn(1, 100, 4)}, r"Each draw of 'loc' must have the shape \(\), but has \(4,\)"),
        (
            {"scale": torch.linspace(-0.5, 9.4, 100)[None]},
            "Draws of 'scale' are outside its support, GreaterThan.*, in 6 of 100",
        ),
        ({"loc": torch.full((1, 100), torch.inf)}, "Draws of 'loc' are not finite in 100 of 100 draws"),
    ],
    ids=["shape", "support", "infinite"],
)
def test_draws_that_do_not_go_with_the_model_are_refused_by_name(judge, changed, message):
    fit = Drawn(**scaled_draws(**changed))
    options = {"progress": False} if judge in ("reloo", "predictive_check") else {}
    function = {"diagnose_posterior": diagnose_posterior, "reloo": reloo, "predictive_check": predictive_check}.get(judge)
    with pytest.raises(ValueError, match=message):
        compare_posteriors({"fit": fit}) if function is None else function(fit, **options)


def test_draws_that_lack_a_variable_have_no_leave_one_out_densities():
    draws = scaled_draws()
    del draws["loc"]
    with pytest.raises(ValueError, match="no draws of loc, but the model has loc, scale, share"):
        reloo(Drawn(**draws), max_pareto_k=float("inf"), progress=False)
    found = reloo(Drawn(**scaled_draws()), max_pareto_k=float("inf"), progress=False)
    assert found.pointwise.shape == Y.shape


def test_a_value_outside_a_support_that_depends_on_others_is_named():
    with pytest.raises(ValueError, match=r"The log density of 'share' cannot be computed: Expected value.*within the support"):
        diagnose_posterior(Drawn(**scaled_draws(share=torch.full((1, 100, 2), 7.0))))


@pytest.mark.slow
def test_long_trajectories_are_told_with_the_way_out():
    """Two coordinates whose deviations along and across their correlation have the ratio 450."""
    covariance = torch.tensor([[1.0, 0.99999], [0.99999, 1.0]], dtype=torch.float64)

    def model():
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance))
        pyro.factor("nothing", torch.zeros((), dtype=torch.float64))

    told = {}
    for low_rank in (False, True):
        method = NoUTurn(num_samples=100, num_warmup=200, num_chains=2, low_rank=low_rank)
        fit = posterior(model, method=method, progress=False)
        told[low_rank] = [fault for fault in diagnose_posterior(fit).faults if "low_rank=True" in fault]
    assert len(told[False]) == 1
    assert re.search(r"long trajectories: \d+ gradients a draw", told[False][0])
    assert told[True] == []


def test_fits_of_other_data_are_told():
    fits = {name: posterior(model, y, method=Laplace(), progress=False) for name, y in {"a": Y, "b": Y + 5, "c": Y}.items()}
    with pytest.warns(RuntimeWarning, match="'b' was given other data than 'a'"):
        compare_posteriors(fits, distances=False)
    compare_posteriors({name: fits[name] for name in "ac"}, distances=False)
