"""All rows of a subsampled plate count once; draws made together equal draws made alone; few runs, and no side effects."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from readings import (
    affine_flow,
    check_weights,
    close,
    draws,
    groups,
    mean_guide,
    mean_log_p,
    mean_log_q,
    normal,
    small_vae,
    stat,
    svi,
)

from pyro_genmodels import to_arviz

ROWS = 10


@pytest.fixture
def y():
    return 100.0 * torch.arange(ROWS)


# One subsampled plate.


def local(y, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])


def amortised(y, batch):
    pyro.sample("mu", dist.Normal(0.2, 0.5))
    with pyro.plate("data", len(y), subsample_size=batch) as rows:
        pyro.sample("z", dist.Normal(y[rows] / 2, 0.6))


def local_log_p(mu, z, y):
    return normal(0.0, 1.0, mu) + (normal(mu[:, None], 1.0, z) + normal(z, 0.5, y)).sum(-1)


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 9, 10, None])
@pytest.mark.parametrize("batch_size", [100, 4])
def test_all_rows_of_a_subsampled_plate_appear_once(batch, batch_size, y):
    """Ten rows in blocks that divide them and that do not; every row's latent variable, replicate and density are its own."""
    data = to_arviz((local, amortised), y, batch, num_samples=12, batch_size=batch_size)
    mu, z, predicted = draws(data, "mu"), draws(data, "z"), draws(data, "y", "posterior_predictive")
    assert z.shape == predicted.shape == (12, ROWS)
    assert len(z.unique()) == 12 * ROWS
    assert len(mu.unique()) == 12
    np.testing.assert_array_equal(data["observed_data"]["y"], y)
    np.testing.assert_array_equal(data["posterior"]["data"], np.arange(ROWS))
    assert ((z - y / 2).abs() < 10).all()
    assert ((predicted - z).abs() < 0.5 * 6).all()  # 6 standard deviations: 2e-7 in all
    log_q = normal(0.2, 0.5, mu) + normal(y / 2, 0.6, z).sum(-1)
    # log p is about 3e5, of which single precision leaves 0.03
    close(stat(data, "log_p"), local_log_p(mu, z, y), tolerance=1e-3)
    close(stat(data, "log_q"), log_q)
    close(draws(data, "y", "log_likelihood"), normal(z, 0.5, y))
    close(draws(data, "z", "log_prior"), normal(mu[:, None], 1.0, z))
    close(draws(data, "mu", "log_prior"), normal(0.0, 1.0, mu))


def test_the_prior_of_a_subsampled_plate_has_all_rows_too(y):
    data = to_arviz((local, amortised), y, 3, num_samples=12)
    mu, z = draws(data, "mu", "prior"), draws(data, "z", "prior")
    predicted = draws(data, "y", "prior_predictive")
    assert z.shape == predicted.shape == (12, ROWS)
    assert ((z - mu[:, None]).abs() < 6).all()  # 6 standard deviations: 3e-7 in all
    assert ((predicted - z).abs() < 0.5 * 6).all()


def test_the_rows_share_the_global_latents_of_their_draw():
    """Guide and model stay close to mu in every row, so that a mu drawn anew for a block of rows would show."""

    def model(y, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(y), subsample_size=batch) as rows:
            z = pyro.sample("z", dist.Normal(mu, 0.01))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 0.01), obs=y[rows])

    def guide(y, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(y), subsample_size=batch):
            pyro.sample("z", dist.Normal(mu, 0.01))

    y = torch.zeros(ROWS)
    data = to_arviz((model, guide), y, 3, num_samples=20, batch_size=6)
    mu, z = draws(data, "mu"), draws(data, "z")
    for values in (z, draws(data, "y", "posterior_predictive"), draws(data, "twice") / 2):
        assert ((values - mu[:, None]).abs() < 0.15).all()  # ten standard deviations
    close(draws(data, "twice"), 2 * z)
    mu = draws(data, "mu", "prior")
    assert ((draws(data, "y", "prior_predictive") - mu[:, None]).abs() < 0.15).all()


def test_an_amortised_global_latent_is_drawn_once():
    """Its guide sees a block of rows at a time; the first one it sees decides."""

    def guide(y, batch):
        with pyro.plate("data", len(y), subsample_size=batch) as rows:
            pass
        pyro.sample("mu", dist.Normal(y[rows].mean(), 0.01))

    def model(y, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=batch) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    y = torch.arange(6.0)
    data = to_arviz((model, guide), y, 2, num_samples=8)
    mu = draws(data, "mu")
    assert len(mu.unique()) == 8
    assert ((mu - 0.5).abs() < 0.1).all()
    check_weights(data, normal(0.0, 1.0, mu) + normal(mu[:, None], 1.0, y).sum(-1), normal(0.5, 0.01, mu))


def test_local_latents_by_an_autoguide_with_plates_of_its_own():
    def plates(y, batch):
        return pyro.plate("data", len(y), subsample_size=batch)

    y = torch.randn(ROWS)
    guide = AutoNormal(local, create_plates=plates)
    data = to_arviz(svi(local, guide, y, 3, steps=30), y, 3, num_samples=9, batch_size=4)
    mu, z = draws(data, "mu"), draws(data, "z")
    assert z.shape == (9, ROWS)
    with torch.no_grad():
        log_q = normal(guide.locs.mu, guide.scales.mu, mu) + normal(guide.locs.z, guide.scales.z, z).sum(-1)
    check_weights(data, local_log_p(mu, z, y), log_q)
    close(draws(data, "y", "log_likelihood"), normal(z, 0.5, y))


def test_masks_and_scales_inside_a_subsampled_plate():
    y = torch.randn(ROWS)
    mask = torch.rand(ROWS) < 0.5

    def model(y, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y), subsample_size=batch) as rows, poutine.mask(mask=mask[rows]), poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y[rows])

    data = to_arviz((model, lambda y, batch: mean_guide(y)), y, 4, num_samples=5)
    mu = draws(data, "mu")
    close(draws(data, "y", "log_likelihood"), normal(mu[:, None], 2.0, y) * mask)
    check_weights(data, normal(0.0, 3.0, mu) + 2 * normal(mu[:, None], 2.0, y[mask]).sum(-1), mean_log_q(mu))


def test_a_factor_inside_a_subsampled_plate():
    y = torch.randn(ROWS)

    def model(y, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y), subsample_size=batch) as rows:
            pyro.factor("bonus", mu * y[rows])
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y[rows])

    data = to_arviz((model, lambda y, batch: mean_guide(y)), y, 4, num_samples=5)
    mu = draws(data, "mu")
    check_weights(data, mean_log_p(mu, y) + mu * y.sum(), mean_log_q(mu))


# Several plates.


ROW_SIZE, COLUMN_SIZE = 5, 7


def crossed(y, some_rows, some_columns):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    rows = pyro.plate("rows", ROW_SIZE, subsample_size=some_rows, dim=-2)
    columns = pyro.plate("columns", COLUMN_SIZE, subsample_size=some_columns, dim=-1)
    with rows as i:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with columns as j:
        b = pyro.sample("b", dist.Normal(-mu, 2.0))
    with rows, columns:
        c = pyro.sample("c", dist.Normal(a + b, 0.1))
        pyro.sample("y", dist.Normal(c, 0.5), obs=y[i[:, None], j])


def crossed_guide(y, some_rows, some_columns):
    pyro.sample("mu", dist.Normal(0.1, 1.0))
    rows = pyro.plate("rows", ROW_SIZE, subsample_size=some_rows, dim=-2)
    columns = pyro.plate("columns", COLUMN_SIZE, subsample_size=some_columns, dim=-1)
    with rows as i:
        a = pyro.sample("a", dist.Normal(y.mean(1)[i, None], 0.7))
    with columns as j:
        b = pyro.sample("b", dist.Normal(y.mean(0)[j], 0.8))
    with rows, columns:
        pyro.sample("c", dist.Normal(a + b, 0.2))


@pytest.mark.parametrize("some", [(2, 3), (5, 3), (None, 3), (2, 7), (2, None), (1, 1), (None, None)])
@pytest.mark.parametrize("batch_size", [100, 4])
def test_two_crossed_plates(some, batch_size):
    y = 100 * torch.arange(ROW_SIZE)[:, None] + 10.0 * torch.arange(COLUMN_SIZE)
    data = to_arviz((crossed, crossed_guide), y, *some, num_samples=6, batch_size=batch_size)
    mu, a, b, c = (draws(data, name) for name in ("mu", "a", "b", "c"))
    a, b = a[:, :, None], b[:, None, :]
    assert data["posterior"]["a"].dims == ("chain", "draw", "rows")
    assert data["posterior"]["b"].dims == ("chain", "draw", "columns")
    assert data["posterior"]["c"].dims == ("chain", "draw", "rows", "columns")
    np.testing.assert_array_equal(data["observed_data"]["y"], y)
    assert ((c - a - b).abs() < 0.2 * 6).all()  # each cell's by its own row's and column's: 4e-7 in all
    close(draws(data, "y", "log_likelihood"), normal(c, 0.5, y), tolerance=1e-3)
    close(draws(data, "c", "log_prior"), normal(a + b, 0.1, c), tolerance=1e-3)
    assert ((draws(data, "y", "posterior_predictive") - c).abs() < 0.5 * 6).all()
    log_q = (
        normal(0.1, 1.0, mu)
        + normal(y.mean(1)[:, None], 0.7, a).sum((-1, -2))
        + normal(y.mean(0), 0.8, b).sum((-1, -2))
        + normal(a + b, 0.2, c).sum((-1, -2))
    )
    close(stat(data, "log_q"), log_q, tolerance=1e-3)
    log_p = (
        normal(0.0, 1.0, mu)
        + normal(mu[:, None, None], 1.0, a).sum((-1, -2))
        + normal(-mu[:, None, None], 2.0, b).sum((-1, -2))
        + (normal(a + b, 0.1, c) + normal(c, 0.5, y)).sum((-1, -2))
    )
    close(stat(data, "log_p"), log_p, tolerance=1e-3)


@pytest.mark.parametrize("outer", [3, 5])
@pytest.mark.parametrize("inner", [2, 7])
@pytest.mark.parametrize("outer_dim", [-2, -1])
def test_a_subsampled_plate_in_a_full_one_and_the_reverse(outer, inner, outer_dim):
    """Five groups of seven rows, in either order of their dimensions; none, one or both subsampled."""

    def plates():
        dims = {"outer": outer_dim, "inner": -3 - outer_dim}
        return (
            pyro.plate("outer", 5, subsample_size=outer, dim=dims["outer"]),
            pyro.plate("inner", 7, subsample_size=inner, dim=dims["inner"]),
        )

    def cells(y, i, j):
        return y[i[:, None], j] if outer_dim == -2 else y[i, j[:, None]]

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        groups, rows = plates()
        with groups as i:
            a = pyro.sample("a", dist.Normal(mu, 2.0))
            with rows as j:
                pyro.sample("y", dist.Normal(a, 0.5), obs=cells(y, i, j))

    def guide(y):
        pyro.sample("mu", dist.Normal(0.1, 1.0))
        with plates()[0] as i:
            loc = y.mean(1)[i]
            pyro.sample("a", dist.Normal(loc[:, None] if outer_dim == -2 else loc, 0.7))

    y = 10.0 * torch.arange(5)[:, None] + torch.arange(7.0)
    data = to_arviz((model, guide), y, num_samples=6, batch_size=4)
    mu, a = draws(data, "mu"), draws(data, "a")
    names = ("outer", "inner") if outer_dim == -2 else ("inner", "outer")
    shown = data["observed_data"]["y"]
    assert shown.dims == names
    np.testing.assert_array_equal(shown.transpose("outer", "inner"), y)
    log_likelihood = data["log_likelihood"]["y"]
    assert log_likelihood.dims == ("chain", "draw", *names)
    expected = normal(a[:, :, None], 0.5, y)
    close(torch.as_tensor(log_likelihood.transpose("chain", "draw", "outer", "inner").to_numpy()[0]), expected)
    log_p = normal(0.0, 1.0, mu) + normal(mu[:, None], 2.0, a).sum(-1) + expected.sum((-1, -2))
    check_weights(data, log_p, normal(0.1, 1.0, mu) + normal(y.mean(1), 0.7, a).sum(-1))


def test_two_subsampled_plates_side_by_side():
    """Neither counts the other's blocks."""

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("first", len(x), subsample_size=2) as i:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[i])
        with pyro.plate("second", len(y), subsample_size=3) as j:
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y[j])

    x, y = torch.randn(5), torch.randn(7)
    data = to_arviz((model, lambda x, y: mean_guide(y)), x, y, num_samples=5)
    mu = draws(data, "mu")
    np.testing.assert_array_equal(data["observed_data"]["x"], x)
    np.testing.assert_array_equal(data["observed_data"]["y"], y)
    close(draws(data, "x", "log_likelihood"), normal(mu[:, None], 1.0, x))
    close(draws(data, "y", "log_likelihood"), normal(mu[:, None], 2.0, y))
    check_weights(data, mean_log_p(mu, y) + normal(mu[:, None], 1.0, x).sum(-1), mean_log_q(mu))


# Minibatches of a family.


def test_a_minibatch_of_a_family_is_scaled():
    vae, x = small_vae(standardize=False).eval(), torch.randn(5, 3)
    data = to_arviz(vae, x, size=100, num_samples=4)
    z = draws(data, "z")
    assert z.shape == (4, 5, 2)
    np.testing.assert_array_equal(data["posterior"]["data"], np.arange(5))
    with torch.no_grad():
        log_likelihood = vae.decode(z).log_prob(x)
        log_prior = normal(0.0, 1.0, z).sum(-1)
        log_q = vae.posterior(x).log_prob(z)
    close(draws(data, "x", "log_likelihood"), log_likelihood)
    close(draws(data, "z", "log_prior"), log_prior)
    check_weights(data, 20 * (log_likelihood + log_prior).sum(-1), 20 * log_q.sum(-1), tolerance=1e-3)


def test_given_rows_are_labelled_by_themselves():
    """`subsample=` of the caller's own: these rows and no others."""
    rows = torch.tensor([7, 2, 4])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", ROWS, subsample=rows):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    y = torch.randn(3)
    data = to_arviz((model, mean_guide), y, num_samples=4)
    mu = draws(data, "mu")
    np.testing.assert_array_equal(data["observed_data"]["data"], rows)
    close(draws(data, "y", "log_likelihood"), normal(mu[:, None], 2.0, y))
    check_weights(data, normal(0.0, 3.0, mu) + ROWS / 3 * normal(mu[:, None], 2.0, y).sum(-1), mean_log_q(mu))


@pytest.mark.parametrize("rows", [[7, 2, 4], [0, 1, 2], [2, 0, 1]])
def test_given_rows_are_those_of_an_autoguide_too(rows):
    """An autoguide chooses rows at random, and Pyro would label the data by them (pyro#3468)."""
    rows, y = torch.tensor(rows), 10.0 * torch.arange(ROWS)

    def model(y):
        with pyro.plate("data", ROWS, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.sample("y", dist.Normal(z, 2.0), obs=y[rows])

    guide = AutoNormal(model, init_scale=1e-4)
    guide(y)
    guide.locs.z.data = torch.arange(1.0 * ROWS)
    with pytest.warns(UserWarning, match="rows of 'data' that the model is not given .*create_plates="):
        data = to_arviz((model, guide), y, num_samples=3)
    for group, name in (("observed_data", "y"), ("log_likelihood", "y"), ("posterior", "z"), ("posterior_predictive", "y")):
        np.testing.assert_array_equal(data[group][name]["data"], rows)
    np.testing.assert_array_equal(data["observed_data"]["y"], y[rows])
    z = draws(data, "z")
    close(z, rows.expand_as(z), tolerance=1e-2)
    close(draws(data, "y", "log_likelihood"), normal(z, 2.0, y[rows]))


def test_an_autoguide_with_the_given_rows_is_taken_as_it_is():
    rows, y = torch.tensor([7, 2, 4]), torch.randn(ROWS)

    def plate(y):
        return pyro.plate("data", ROWS, subsample=rows, dim=-1)

    def model(y):
        with plate(y):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.sample("y", dist.Normal(z, 2.0), obs=y[rows])

    data = to_arviz((model, AutoNormal(model, create_plates=plate)), y, num_samples=3)
    np.testing.assert_array_equal(data["posterior"]["data"], rows)


# Sequential plates.


def one_by_one(y, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    for i in pyro.plate("data", len(y), subsample_size=batch):
        pyro.sample(f"y_{i}", dist.Normal(mu, 2.0), obs=y[i])


def test_a_sequential_plate():
    y = torch.randn(3)
    data = to_arviz((one_by_one, lambda y, batch: mean_guide(y)), y, None, num_samples=5)
    mu = draws(data, "mu")
    for i in range(3):
        assert data["posterior_predictive"][f"y_{i}"].dims == ("chain", "draw")
        assert data["observed_data"][f"y_{i}"].item() == y[i]
        close(draws(data, f"y_{i}", "log_likelihood"), normal(mu, 2.0, y[i]))
    check_weights(data, mean_log_p(mu, y), mean_log_q(mu))


def test_a_subsampled_sequential_plate_is_reported():
    y = torch.randn(5)
    with pytest.warns(UserWarning, match="most rows of 'data'"):
        data = to_arviz((one_by_one, lambda y, batch: mean_guide(y)), y, 2, num_samples=5)
    mu, shown = draws(data, "mu"), sorted(data["observed_data"].data_vars)
    assert len(shown) == 2
    rows = torch.stack([y[int(name[2:])] for name in shown])
    check_weights(data, normal(0.0, 3.0, mu) + 2.5 * normal(mu[:, None], 2.0, rows).sum(-1), mean_log_q(mu))


# Draws together or alone.


def adds_up(y):
    """Reads its latent variable from the right, so that draws may be made together."""
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.deterministic("total", b.sum(-1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b.sum(-1), 0.5), obs=y)


def adds_up_guide(y):
    pyro.sample("b", dist.Normal(torch.ones(3), 0.5).to_event(1))


@pytest.mark.parametrize("parallel", [True, False, None])
def test_draws_together_and_alone_say_the_same(parallel):
    y = torch.randn(4)
    data = to_arviz((adds_up, adds_up_guide), y, num_samples=7, batch_size=3, parallel=parallel)
    b = draws(data, "b")
    assert len(b.unique()) == 21
    close(draws(data, "total"), b.sum(-1))
    close(draws(data, "y", "log_likelihood"), normal(b.sum(-1, keepdim=True), 0.5, y))
    log_p = normal(0.0, 1.0, b).sum(-1) + normal(b.sum(-1, keepdim=True), 0.5, y).sum(-1)
    check_weights(data, log_p, normal(1.0, 0.5, b).sum(-1))


@pytest.mark.parametrize("given", [False, True], ids=["guide", "draws"])
@pytest.mark.parametrize("batch", [None, 3])
def test_a_model_that_reads_from_the_left_is_run_draw_by_draw(given, batch):
    def model(y):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y), subsample_size=batch) as rows:
            pyro.sample("y", dist.Normal(b[0] + b.sum(), 0.5), obs=y[rows])

    y, b = torch.randn(7), torch.randn(1, 6, 3)
    data = to_arviz({"b": b}, y, model=model) if given else to_arviz((model, adds_up_guide), y, num_samples=6)
    b = b[0] if given else draws(data, "b")
    assert torch.equal(draws(data, "b"), b)
    loc = (b[:, 0] + b.sum(-1))[:, None]
    close(draws(data, "y", "log_likelihood"), normal(loc, 0.5, y))
    close(stat(data, "log_p"), normal(0.0, 1.0, b).sum(-1) + normal(loc, 0.5, y).sum(-1))


@pytest.mark.parametrize("read", [lambda b: b.sum(), lambda b: b[0]], ids=["sum", "index"])
def test_a_deterministic_site_alone_may_read_from_the_left(read):
    """It has no density by which one would find out."""

    def model(y):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("read", read(b))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1), 0.5), obs=y)

    data = to_arviz((model, adds_up_guide), torch.randn(4), num_samples=6)
    close(draws(data, "read"), torch.stack([read(b) for b in draws(data, "b")]))


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (10, 3), (2, 100), (10, 1), (10, 2)])
@pytest.mark.parametrize("given", [False, True], ids=["guide", "draws"])
def test_no_more_draws_are_made_at_once_than_allowed(num_samples, batch_size, given):
    """Memory is bounded from the first run on, whatever is tried out."""
    together = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        together.append(mu.numel())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    y = torch.randn(3)
    if given:
        data = to_arviz({"mu": torch.randn(1, num_samples)}, y, model=model, batch_size=batch_size)
    else:
        data = to_arviz((model, mean_guide), y, num_samples=num_samples, batch_size=batch_size)
    assert data["posterior"].sizes["draw"] == num_samples
    assert max(together) <= batch_size
    assert max(together) == min(num_samples, batch_size)


# What it leaves alone.


def test_the_same_seed_gives_the_same_draws(y):
    def seeded(seed):
        pyro.set_rng_seed(seed)
        return to_arviz((local, amortised), y, 3, num_samples=5, batch_size=2)

    first, second, other = seeded(3), seeded(3), seeded(4)
    assert groups(first) == groups(second)
    for group in groups(first):
        for name in first[group].data_vars:
            np.testing.assert_array_equal(first[group][name], second[group][name])
    assert not np.array_equal(first["posterior"]["z"], other["posterior"]["z"])


def test_numpys_and_pythons_generators_are_left_alone(y):
    import random

    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    to_arviz((local, amortised), y, 3, num_samples=5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_parameters_that_runs_make_are_not_left_in_the_store(y):
    def guide(y, batch):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
        with pyro.plate("data", len(y), subsample_size=batch):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    to_arviz((local, guide), y, 3, num_samples=2)
    assert len(pyro.get_param_store()) == 0


def test_a_module_may_be_registered_under_two_names(y):
    """As when a family, which registers itself, is given to `pyro.module` too."""
    flow = affine_flow()

    def model(y):
        pyro.module("another", flow)
        b = pyro.sample("b", flow())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=y)

    def guide(y):
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    to_arviz((model, guide), y, num_samples=2)
    assert len(pyro.get_param_store()) == 0


def test_no_gradient_and_no_memory_of_it_is_left(y):
    loc = torch.tensor(0.1, requires_grad=True)

    def guide(y):
        pyro.sample("mu", dist.Normal(loc, 1.0))

    def model(y):
        assert not torch.is_grad_enabled()
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    to_arviz((model, guide), y, num_samples=2)
    assert loc.grad is None
    assert torch.is_grad_enabled()


# The number of runs.


def counted(model):
    """Return a model, and a list that grows by one in each of its runs."""
    runs = []

    def counting(*args):
        runs.append(1)
        return model(*args)

    return counting, runs


def sequence(y):
    """Two observed sites, of which the second depends on the value of the first."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        first = pyro.sample("first", dist.Normal(100 * mu, 1.0), obs=y)
        pyro.sample("second", dist.Normal(first, 1e-3), obs=y)


def computed(y):
    """A deterministic site that depends on the observed value."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        value = pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        pyro.deterministic("twice", 2 * value)


def mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(("model", "expected"), [(mean, 4), (sequence, 5), (computed, 5)])
def test_a_plain_model_runs_few_times_for_one_block_of_draws(model, expected, y):
    """The runs are for the layout, the block, a single particle and the prior; and for predictions that depend on others."""
    model, runs = counted(model)
    data = to_arviz((model, mean_guide), y, num_samples=20)
    assert len(runs) == expected
    assert {"posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood"} <= groups(data)


def test_each_block_more_is_one_run_more(y):
    model, runs = counted(mean)
    to_arviz((model, mean_guide), y, num_samples=30, batch_size=10, groups=["posterior"])
    assert len(runs) == 2 + 3


def test_a_prediction_that_depends_on_another_is_of_the_same_run(y):
    data = to_arviz((sequence, mean_guide), y, num_samples=20)
    first, second = (draws(data, name, "posterior_predictive") for name in ("first", "second"))
    assert (first - y).abs().max() > 10
    torch.testing.assert_close(first, second, rtol=0, atol=0.01)


def test_predictions_are_of_their_own_draw_of_the_latents(y):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1e-4), obs=y)

    data = to_arviz((model, mean_guide), y, num_samples=20)
    predicted, mu = draws(data, "y", "posterior_predictive"), draws(data, "mu")
    torch.testing.assert_close(predicted, mu[:, None].expand_as(predicted), rtol=0, atol=0.01)


def test_a_discrete_latent_that_is_read_from_the_left_is_run_draw_by_draw(y):
    """A particle may have the value that the model reads by chance, so the one that differs most from the first runs alone."""
    levels = torch.tensor([-5.0, 5.0])

    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(levels[k.flatten()[0].long()], 1.0), obs=y)

    def guide(y):
        pyro.sample("k", dist.Bernoulli(0.5))

    data = to_arviz((model, guide), y, num_samples=20)
    k, log_p = draws(data, "k").to(levels), stat(data, "log_p")
    expected = normal(levels[k.long()][:, None], 1.0, y).sum(1) + torch.tensor(0.5).log()
    close(log_p, expected)


# A model that takes particles for coordinates, z.sum(), in any unit.


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-6, 0.0), (1e-20, 0.0), (1e6, 0.0), (1.0, 1e4), (1e-3, 10.0)])
def test_values_of_a_particle_are_compared_in_their_own_unit(scale, offset):
    """Together, every draw has the sum of all; with an absolute tolerance that went unseen at 1e-6, and at an offset of 1e4."""

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))
        pyro.deterministic("total", offset + z.sum())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))

    data = to_arviz((model, guide), torch.randn(4), num_samples=20)
    torch.testing.assert_close(draws(data, "total"), offset + draws(data, "z").sum(-1), rtol=1e-5, atol=1e-3 * scale)


def test_densities_of_a_particle_are_compared_in_nats():
    """log p is about -1e5 nats, of which z.sum() moves 14 for each unit: a relative tolerance of 1e-3 let 100 pass."""
    y = torch.full((1000,), 0.14)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(1e-5 * z.sum(), 0.01), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    data = to_arviz((model, guide), y, num_samples=10)
    mean = 1e-5 * draws(data, "z").double().sum(-1, keepdim=True)
    exact = dist.Normal(mean, 0.01).log_prob(y.double()).sum(-1)
    found = draws(data, "y", "log_likelihood").sum(-1)
    torch.testing.assert_close(found, exact, rtol=0.0, atol=0.5)
    assert exact.max() - exact.min() > 20
