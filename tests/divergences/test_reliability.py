"""Means whose terms have heavy tails say so, and good ones do not."""

import copy
import pickle
import warnings
from math import inf

import pyro.distributions as dist
import pytest
import torch
from normals import FORMS, not_reparametrised, reparametrised

from pyro_genmodels.divergences import (
    Divergence,
    EnergyKernel,
    NeymanChiSquared,
    PearsonChiSquared,
    SquaredHellinger,
    divergence_table,
    f_divergence,
    fisher,
    js,
    kl,
    mmd,
    sliced_wasserstein,
    tv,
    wasserstein,
)
from pyro_genmodels.divergences.divergence import warn_unless_reliable
from pyro_genmodels.divergences.means import mean_of
from pyro_genmodels.utils.pareto import is_unreliable, pareto_k

pytestmark = pytest.mark.usefixtures("float64")
P, Q = reparametrised(torch.tensor(0.0), torch.tensor(1.0)), reparametrised(torch.tensor(1.0), torch.tensor(2.0))
CAUCHY = dist.Cauchy(torch.tensor(0.0), 1.0)


def test_an_infinite_divergence_is_called_unreliable():
    """The integral of q^2 / p is infinite, which no sample proves."""
    with pytest.warns(RuntimeWarning, match=r"f_divergence: its value is unreliable, and may be infinite.*k-hat of \d\.\d"):
        found = f_divergence(P, Q, NeymanChiSquared())
    assert found.pareto_k > 2
    assert not found.reliable
    assert "pareto_k=tensor(" in repr(found)
    with pytest.warns(RuntimeWarning, match="kl: its value is unreliable"):
        assert kl(CAUCHY, P).pareto_k > 1  # the mean of x^2 under a Cauchy distribution
    with pytest.warns(RuntimeWarning, match="fisher: its value is unreliable"):
        assert fisher(CAUCHY, P).pareto_k > 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(5))
def test_good_means_are_reliable(form, seed):
    torch.manual_seed(seed)
    p, q = form(torch.tensor(0.0), torch.tensor(1.0)), form(torch.tensor(1.0), torch.tensor(2.0))
    for found in (kl(p, q), kl(q, p), js(p, q), tv(p, q), f_divergence(p, q, SquaredHellinger()), fisher(p, q),
                  f_divergence(p, q, PearsonChiSquared())):  # fmt: skip
        assert found.reliable
        assert found.pareto_k < 0.7
        assert "pareto_k" not in repr(found)


def test_bounded_terms_have_no_tail_and_what_is_exact_has_no_k():
    far = reparametrised(torch.tensor(9.0), torch.tensor(0.1))
    assert js(P, far).pareto_k == tv(far, CAUCHY).pareto_k == -inf
    assert kl(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)).pareto_k is None
    assert mmd(torch.randn(9), torch.randn(9)).pareto_k is None
    assert kl(P, dist.Uniform(0.0, 1.0)) == (inf, 0)
    assert kl(P, dist.Uniform(0.0, 1.0)).reliable
    assert f_divergence(P, P, NeymanChiSquared()).pareto_k == -inf


def test_a_batch_has_a_k_of_each():
    scale = torch.tensor([1.0, 2.0])
    with pytest.warns(RuntimeWarning, match="1 of its 2 values are unreliable"):
        found = f_divergence(P, not_reparametrised(torch.zeros(2), scale), NeymanChiSquared())
    assert (found.pareto_k > 0.7).tolist() == [False, True]
    assert not found.reliable


def test_smoothing_lowers_the_variance_of_a_heavy_mean_and_keeps_its_value():
    """Neyman's terms with k of 0.5: 200 estimates of 200 samples against the closed form."""
    q = (torch.zeros(200), torch.full((200,), 1.15))
    p, exact = reparametrised(torch.zeros(200), torch.ones(200)), dist.Normal(torch.tensor(0.0), 1.0)
    truth = f_divergence(exact, dist.Normal(torch.tensor(0.0), 1.15), NeymanChiSquared()).value
    with pytest.warns(RuntimeWarning, match="of its 200 values are unreliable"):  # k-hat is above 0.7 in most sets this small
        value, _ = f_divergence(p, reparametrised(*q), NeymanChiSquared(), num_samples=400)
    assert abs(value.mean() - truth) < 6 * value.std() / 200**0.5


def test_the_table_says_unreliable_in_place_of_an_error_and_warns_once():
    with pytest.warns(RuntimeWarning) as caught:
        table = divergence_table(P, Q, num_samples=2000, set_size=20, seed=0)
    assert [str(w.message).split(" (k")[0] for w in caught] == ["divergence_table: neyman_chi_squared"]
    assert table.pareto_k["neyman_chi_squared"] > 2
    assert table.reliable.drop("neyman_chi_squared").all()
    assert not table.reliable["neyman_chi_squared"]
    assert table.std_error["js"] < 0.01


def test_the_table_of_normals_is_exact_where_it_can_be():
    table = divergence_table(dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0), num_samples=100, set_size=20, seed=0)
    assert table.value["neyman_chi_squared"] == inf
    assert (table.method[["squared_hellinger", "pearson_chi_squared", "neyman_chi_squared"]] == "closed form").all()


def test_a_divergence_is_a_pair():
    value, error = found = Divergence(torch.tensor(1.0), torch.tensor(0.1))
    assert found == (value, error)
    assert found.pareto_k is None
    assert found.reliable
    assert Divergence(value, error, torch.tensor(torch.nan), 10).reliable  # too few samples to tell
    made = Divergence(value, error, torch.tensor(0.9), 1000)
    for twin in (made._replace(value=-value), copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin.pareto_k == 0.9  # the copy with another value had no attribute of this name
        assert not twin.reliable
    with pytest.raises(ValueError, match="num_samples=0"):
        Divergence(value, error, pareto_k=torch.tensor(0.9))


@pytest.mark.parametrize("k", [0.69, 0.71, 0.8, 0.95, 1.2, 3.0, inf, torch.nan])
@pytest.mark.parametrize("n", [25, 99, 100, 1000, 10_000])
def test_what_is_not_reliable_warns_and_is_so_everywhere(k, n):
    """A k of .8 from 1000 terms was not reliable, without a warning; the same weights had another rule in `log_likelihood`."""
    found = Divergence(torch.tensor(1.0), torch.tensor(0.1), torch.tensor(k), n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert warn_unless_reliable(found, by="mine") is found
    assert found.reliable == (not caught) == (not is_unreliable(torch.tensor(k), n))


def test_terms_of_both_signs_have_two_tails():
    """Log ratios of normals are bounded above: the absolute values of 50 had a k-hat above .7 in more than half of all sets."""
    p, q = dist.Normal(0.3, 0.8), dist.Normal(-0.5, 1.4)
    terms = p.log_prob(x := p.sample((50, 500))) - q.log_prob(x)
    k = mean_of(terms)[2]
    assert (pareto_k(terms.abs().log()) > 0.7).double().mean() > 0.5
    assert (k > 0.7).double().mean() < 0.05
    heavy = mean_of(0.5 - torch.rand(1000, 50).log().mul(-1.2).exp())[2]
    assert (heavy > 0.7).double().mean() > 0.9
    torch.testing.assert_close(mean_of(-terms)[2], k)
    assert mean_of(torch.tensor([-1.0, 1.0]).repeat(50))[2] == -inf
    assert mean_of(torch.full((50,), -1.0))[2] == -inf


def test_one_sample_has_one_k_in_divergences_and_elsewhere():
    terms = torch.rand(10_000, 20).log().mul(-0.8).exp()
    torch.testing.assert_close(mean_of(terms)[2], pareto_k(terms.log()))


def of_samples(x, y):
    """The distances of two sets that a few samples can decide, by name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {
            "wasserstein": wasserstein(x, y), "sliced_wasserstein": sliced_wasserstein(x, y, num_projections=10),
            "mmd": mmd(x, y, kernel=EnergyKernel()),
        }  # fmt: skip
    return found, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("dims", [1, 2])
def test_distances_of_samples_without_a_mean_are_unreliable(dims):
    """Of two Cauchys shifted by 1 the distance was 16.6 +- 9.9 without a word; 1 is right. From a normal it is infinite.

    The energy distances are finite, and their errors right.
    """
    torch.manual_seed(dims)
    x, y = (dist.Cauchy(torch.tensor(float(loc)), 1.0).sample((400, dims)) for loc in (0, 1))
    for other in (y, torch.randn(400, dims)):
        found, _ = of_samples(x, other)
        assert [name for name, d in found.items() if d.reliable] == ["mmd"]
    assert all("mmd with a kernel of bounded values" in text for text in of_samples(x, y)[1])
    with pytest.warns(RuntimeWarning, match=r"mmd: its value is unreliable.*Use a kernel of bounded values"):
        mmd(x, y**3, kernel=EnergyKernel())
    assert mmd(x, y**3).pareto_k is None


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_distances_of_samples_with_light_tails_are_reliable(dims, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(400, dims), torch.randn(400, dims)
    for other in (y, 2 * y + 1, x, x + 1, y.exp().clamp(max=5), torch.rand(400, dims), (y > 0).double()):
        found, texts = of_samples(x, other)
        assert not texts
        assert all(d.reliable for d in found.values())
