# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Normalizing flows in Pyro
#
# A normalizing flow is an invertible network between the data and a simple base distribution. Its density is exact:
#
# $$\log p(x \mid c) = \log p_u(f(x \mid c)) + \log \left|\det \partial f / \partial x\right|.$$
#
# In this package a flow is a module that returns a Pyro distribution. This notebook uses that distribution in four places of
# a Pyro program:
#
# 1. **alone**, as a density of two-dimensional data, trained with early stopping and evaluated on held-out data;
# 2. **as a conditional likelihood** inside a model, trained by `SVI` with `MaximumLikelihood`;
# 3. **as a guide** of a model whose posterior is far from normal;
# 4. **as a frozen prior**, learned from earlier data, under NUTS.
#
# Wherever possible the exact answer is computed too, so that you see what the flow gets right and what it misses.

# %%
import os
from functools import partial

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_genmodels import MAF, NSF, Flow, MaximumLikelihood, compare, log_likelihood, train

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small networks gain nothing from more
pyro.set_rng_seed(0)

# %% [markdown]
# ## 1. A density
#
# The data are two half circles with noise. We write them as a mixture of many small Gaussians along the two arcs. So we can
# draw from them, and we also know their true density.

# %%
angle = torch.linspace(0, torch.pi, 200)
upper = torch.stack([angle.cos(), angle.sin()], -1)
lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
arcs = torch.cat([upper, lower])
moons = dist.MixtureSameFamily(dist.Categorical(torch.ones(len(arcs))), dist.Normal(arcs, 0.1).to_event(1))

x_train, x_valid, x_test = moons.sample((3000,)).split([2000, 500, 500])

# %% [markdown]
# `Flow((2,))` is a family: a module with parameters. Calling it gives a distribution, which does what every Pyro distribution
# does. Before training it does not depend on the data.

# %%
flow = Flow((2,), transform=NSF(transforms=5, hidden=(64, 64)))
p = flow()
print(p, p.support)
x = p.sample((3,))
print("three draws:", x)
print("their log density:", p.log_prob(x).detach())

# %% [markdown]
# `train` minimises the negative log-likelihood by minibatches. After each epoch it scores the validation data. It stops when
# there was no improvement for `patience` epochs (20 by default) and restores the best parameters. `ema_decay=0.99` validates
# and keeps a moving average of the parameters, which is less noisy than the parameters themselves. It also sets mean and
# standard deviation from the training data, so you need not standardise by hand; both are counted in the density.

# %%
fit = train(
    flow,
    x_train,
    valid=x_valid,
    optim=partial(torch.optim.Adam, lr=2e-3),
    epochs=4 if SMOKE else 200,
    ema_decay=0.99,
    seed=0,
    progress=False,
)
print(f"{fit.stopped}; best epoch {fit.best['epoch']} of {len(fit.history)}")

# %%
epochs = [record["epoch"] for record in fit.history]
truth = -moons.log_prob(x_valid).mean()
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.plot(epochs, [record["train"] for record in fit.history], ":", label="training")
ax.plot(epochs, [record["valid"] for record in fit.history], label="validation")
ax.axhline(truth, color="black", linewidth=1, label="true density on the validation data")
ax.axvline(fit.best["epoch"], color="gray", linestyle="--", linewidth=1, label="kept")
ax.set(xlabel="epoch", ylabel="negative log-likelihood (nats)")
ax.legend()
plt.show()

# %% [markdown]
# The validation loss comes down to a level and stays there: more epochs would not help. Now the picture of what was learned.

# %%
side = torch.linspace(-1.6, 2.6, 150), torch.linspace(-1.1, 1.6, 120)
grid = torch.stack(torch.meshgrid(*side, indexing="xy"), -1)
edges = [axis.numpy() for axis in side]
with torch.no_grad():
    densities = {"true density": moons.log_prob(grid).exp().numpy(), "flow's density": flow().log_prob(grid).exp().numpy()}
draws = flow().sample((1000,))

fig, axes = plt.subplots(1, 3, figsize=(11, 3), sharex=True, sharey=True, layout="constrained")
for ax, (title, density) in zip(axes, densities.items(), strict=False):
    image = ax.pcolormesh(*edges, density, vmin=0, vmax=densities["true density"].max(), rasterized=True)
    ax.set_title(title)
fig.colorbar(image, ax=axes[1], label="density")
axes[2].plot(*draws.T, ".", markersize=2)
axes[2].set_title("1000 draws from the flow")
for ax in axes:
    ax.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-1.6, 2.6), ylim=(-1.1, 1.6))
plt.show()

# %% [markdown]
# The flow is one connected piece of space, bent by a smooth map. It cannot cut itself in two. So there is a thin bridge of
# probability between the arcs, and some draws fall on it.
#
# A number says how much this costs. `log_likelihood` scores data that played no part in training. For a flow the value is
# exact.

# %%
print("flow: ", log_likelihood(flow, x_test))
print("truth:", moons.log_prob(x_test).mean().item())

# %% [markdown]
# `compare` does this for several fits on the same rows. A fit is a family or any pair (model, guide), so the truth may take
# part: it is a Pyro model with no parameters. The other candidates are a flow of affine layers (`MAF`) and one Gaussian,
# which is a flow with no bending at all.

# %%
affine = Flow((2,), transform=MAF(transforms=3, hidden=(64, 64)))
train(affine, x_train, valid=x_valid, epochs=4 if SMOKE else 200, ema_decay=0.99, seed=0, progress=False)


def truth_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", moons, obs=x)


def gaussian_model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(x_train.mean(0), x_train.T.cov()), obs=x)


def no_guide(x):
    """There are no latent variables."""


fits = {"splines": flow, "affine": affine, "Gaussian": (gaussian_model, no_guide), "truth": (truth_model, no_guide)}
comparison = compare(fits, x_test)
comparison.table[["kind", "nats", "elpd", "se", "elpd_diff", "dse"]].round(2)

# %% [markdown]
# `nats` is the negative log-likelihood per datum, `elpd` the sum over the 500 rows, and `elpd_diff` the difference to the best
# row with `dse`, its paired standard error. The spline flow loses a little to the truth, the
# affine flow more, and the Gaussian most.

# %% [markdown]
# ## 2. A conditional likelihood inside a Pyro model
#
# A normal likelihood does not fit this regression: for each $t$ the response $y$ has two branches, and they drift apart.

# %%
t = dist.Beta(2.0, 2.0).sample((2000, 1))
branch = 2 * dist.Bernoulli(0.6).sample((2000, 1)) - 1
y = branch * t.sqrt() + (0.03 + 0.1 * t) * torch.randn(2000, 1)

# %% [markdown]
# The model draws $t$ from a beta distribution with two unknown parameters, and $y$ given $t$ from a conditional flow. The
# flow has one dimension; with `context=1` it is conditioned on one number. `conditional(t)` returns a batch of distributions,
# one per row of `t`, and is used at a `pyro.sample` in a plate like any other distribution.
#
# Parameters of the flow and ordinary `pyro.param`s are trained together. `MaximumLikelihood` is a Pyro loss for models
# without latent variables: the sum of the log densities of all observed sites. In your own model you call `standardize`
# yourself.

# %%
conditional = Flow((1,), context=1, transform=NSF(transforms=2, hidden=(64, 64)))
conditional.standardize(y)


def model(t=None, y=None, size=1):
    a = pyro.param("a", torch.tensor(1.0), constraint=dist.constraints.positive)
    b = pyro.param("b", torch.tensor(1.0), constraint=dist.constraints.positive)
    rows = size if t is None else len(t)
    with pyro.plate("data", max(size, rows), subsample=torch.arange(rows)):
        t = pyro.sample("t", dist.Beta(a, b).expand([1]).to_event(1), obs=t)
        pyro.sample("y", conditional(t), obs=y)


def guide(t=None, y=None, size=1):
    """No latent variables."""


svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), MaximumLikelihood())
losses = []
for _ in range(2 if SMOKE else 60):
    for rows in torch.randperm(2000).split(200):
        losses.append(svi.step(t[rows], y[rows], size=2000) / 2000)
print(f"loss {losses[0]:.2f} -> {sum(losses[-10:]) / 10:.2f} nats per row")
print(f"a = {pyro.param('a').item():.2f}, b = {pyro.param('b').item():.2f} (the data were made with 2 and 2)")

# %% [markdown]
# With `size=2000` a minibatch of 200 rows counts ten times, so that its loss is an unbiased estimate of the loss over all
# data.
#
# Pyro's `Predictive` draws from the trained model. The last plot shows the conditional density of $y$ at each $t$.

# %%
conditional.eval()
drawn = Predictive(model, guide=guide, num_samples=1)(size=2000)
ts, ys = torch.linspace(0.02, 0.98, 80), torch.linspace(-1.5, 1.5, 120)
with torch.no_grad():
    density = conditional(ts[:, None]).log_prob(ys[:, None, None]).exp()  # (120, 80)

fig, axes = plt.subplots(1, 3, figsize=(11, 3), sharex=True, sharey=True, layout="constrained")
axes[0].plot(t, y, ".", markersize=2)
axes[0].set_title("data")
axes[1].plot(drawn["t"].flatten(), drawn["y"].flatten(), ".", markersize=2)
axes[1].set_title("draws of the model")
image = axes[2].pcolormesh(ts.numpy(), ys.numpy(), density.numpy(), rasterized=True)
axes[2].set_title("$p(y \\mid t)$")
fig.colorbar(image, ax=axes[2], label="density")
for ax in axes:
    ax.set(xlabel="$t$", ylabel="$y$")
plt.show()

# %% [markdown]
# The few draws between the branches are the thin bridge again.
#
# ## 3. A flow as a guide
#
# Now the flow is a variational posterior instead of a model of data. The model has two latent coordinates and sees one noisy
# number, a curved function of both. The posterior is a crescent.


# %%
def curved(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[..., 1] + z[..., 0].square(), 0.2), obs=y)


y_seen = torch.tensor(1.5)

# %% [markdown]
# Two dimensions can be integrated on a grid. This gives the exact posterior and the exact evidence $\log p(y)$. The ELBO of
# any guide is the evidence minus $\mathrm{KL}(q \,\|\, p(z \mid y))$, so the distance to the evidence measures how good the
# guide is.

# %%
axis = torch.linspace(-4, 4, 401)
z_grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
log_joint = dist.Normal(0.0, 1.0).log_prob(z_grid).sum(-1)
log_joint += dist.Normal(z_grid[..., 1] + z_grid[..., 0].square(), 0.2).log_prob(y_seen)
cell = (axis[1] - axis[0]).item() ** 2
evidence = (log_joint.exp().sum() * cell).log().item()
posterior = log_joint.exp() / log_joint.exp().sum() / cell

# %% [markdown]
# Pyro's `AutoNormal` and `AutoMultivariateNormal` are the usual guides. The flow's guide is one line.

# %%
crescent = Flow((2,), transform=NSF(transforms=3, hidden=(64, 64)))


def flow_guide(y):
    pyro.sample("z", crescent())


guides = {"AutoNormal": AutoNormal(curved), "AutoMultivariateNormal": AutoMultivariateNormal(curved), "flow": flow_guide}
elbos, drawn = {}, {}
for name, q in guides.items():
    pyro.set_rng_seed(0)
    optim = pyro.optim.ClippedAdam({"lr": 5e-3, "lrd": 0.999, "clip_norm": 10.0})
    svi = SVI(curved, q, optim, Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(30 if SMOKE else 1500):
        svi.step(y_seen)
    elbo = Trace_ELBO(num_particles=5000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        elbos[name] = -elbo.loss(curved, q, y_seen)
        drawn[name] = torch.stack([pyro.poutine.trace(q).get_trace(y_seen).nodes["z"]["value"] for _ in range(500)])
    print(f"{name:24s} ELBO {elbos[name]:7.3f}   KL to the posterior {evidence - elbos[name]:.3f}")
print(f"{'exact':24s} evidence {evidence:.3f}")

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharex=True, sharey=True, layout="constrained")
levels = [posterior.max().item() * share for share in (0.03, 0.2, 0.6)]
for ax, (name, z) in zip(axes, drawn.items(), strict=True):
    ax.plot(*z.T, ".", markersize=3, alpha=0.6)
    ax.contour(axis.numpy(), axis.numpy(), posterior.numpy(), levels=levels, colors="black", linewidths=0.8)
    ax.set_title(f"{name}: KL {evidence - elbos[name]:.2f}")
    ax.set(xlabel="$z_1$", ylabel="$z_2$", xlim=(-3, 3), ylim=(-3, 3))
plt.show()

# %% [markdown]
# Black lines are contours of the exact posterior, points are draws of the guides. The two normal guides cover only a part of
# the crescent, because the ELBO penalises draws where the posterior has no mass more than posterior mass that is never drawn.
# The flow follows the whole crescent.

# %% [markdown]
# ## 4. A learned flow as a frozen prior, under NUTS
#
# Back to the half circles. Someone learned their density from past data (`flow`). Now a new point is measured, but only its
# second coordinate, and with error. The flow is the prior. It must be frozen by `requires_grad_(False)`; otherwise `SVI`
# would go on training it. Its log density is differentiable in $x$, which is all that NUTS needs.

# %%
flow.requires_grad_(False)
flow.eval()


def measured(y):
    x = pyro.sample("x", flow())
    pyro.sample("y", dist.Normal(x[..., 1], 0.1), obs=y)


pyro.set_rng_seed(2)
num_samples, warmup_steps = (30, 30) if SMOKE else (1000, 300)
mcmc = MCMC(NUTS(measured), num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
mcmc.run(torch.tensor(0.9))
x_drawn = mcmc.get_samples()["x"]
print("effective sample sizes:", mcmc.diagnostics()["x"]["n_eff"].tolist())
print("divergent transitions:", len(mcmc.diagnostics()["divergences"]["chain 0"]))

# %% [markdown]
# The next cell computes the posterior on the grid, once with the learned prior and once with the true density as the prior.


# %%
def on_the_grid(log_prior):
    weight = (log_prior + dist.Normal(grid[..., 1], 0.1).log_prob(torch.tensor(0.9))).exp()
    return weight / weight.sum()


learned, exact = on_the_grid(flow().log_prob(grid)), on_the_grid(moons.log_prob(grid))
fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.pcolormesh(*edges, learned.numpy(), cmap="Blues", rasterized=True)
ax.contour(*edges, exact.numpy(), levels=[exact.max().item() * share for share in (0.1, 0.5)], colors="black", linewidths=0.8)
ax.plot(*x_drawn[::3].T, ".", color="C1", markersize=2.5)
ax.axhline(0.9, color="gray", linestyle="--", linewidth=1)
ax.set(
    xlabel="$x_1$",
    ylabel="$x_2$",
    title="posterior: learned prior (blue), true prior (lines), NUTS (points)",
    xlim=(-1.6, 1.6),
    ylim=(0.4, 1.4),
)
plt.show()

for name, weight in {"grid, learned prior": learned, "grid, true prior": exact}.items():
    mean = (weight[..., None] * grid).sum((0, 1))
    sd = (weight[..., None] * (grid - mean).square()).sum((0, 1)).sqrt()
    print(f"{name:20s} mean {mean[0]:.2f}, {mean[1]:.2f}   sd {sd[0]:.2f}, {sd[1]:.2f}")
mean, sd = x_drawn.mean(0), x_drawn.std(0)
print(f"{'NUTS':20s} mean {mean[0]:.2f}, {mean[1]:.2f}   sd {sd[0]:.2f}, {sd[1]:.2f}")

# %% [markdown]
# NUTS agrees with the grid for the learned prior, up to the error of its draws. The rest of the difference from the true
# prior is the error of the flow.
#
# One warning. This posterior is in one piece. Had we measured the first coordinate, say $x_1 = 0.5$, the posterior would have
# one piece on each arc, and a single chain of NUTS would hardly ever cross between them. That is a limit of the sampler, not
# of the prior; run several chains from different places, and compare them.
