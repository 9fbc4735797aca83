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
# # Fits compared in ArviZ
#
# `to_arviz` turns a fit into ArviZ's `InferenceData`: draws of the posterior, of the prior and of new data, the
# log-likelihood of each datum under each draw, and the weight of each draw. So a fit by SVI, one with a flow as its guide and
# one by NUTS can be examined with the same tools. You will learn
#
# 1. to fit one regression in three ways and to lay the posteriors side by side;
# 2. to check a guide by its importance weights (Pareto's $\hat k$) and by restarts as chains ($\hat R$), and what each of
#    these misses;
# 3. to compare two rival models by `az.loo` and `az.compare`;
# 4. to compare deep generative models, which have no posterior, on held-out data.
#
# The notebook is written for ArviZ 0.23. In ArviZ 1.x some names differ: `plot_dist` is there instead of `plot_posterior`,
# `plot_ppc_dist` instead of `plot_ppc`, and `to_arviz` returns xarray's `DataTree`.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample

from pyro_genmodels import MAF, NSF, VAE, Autoregressive, Flow, NormalLikelihood, compare, datasets, to_arviz, train

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)  # it announces version 1
warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto", UserWarning)  # the tables below say so too
import arviz as az

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small networks gain nothing from more
pyro.set_rng_seed(0)

# %% [markdown]
# ## 1. One model, three fits
#
# The data are a line with noise. Three of the thirty measurements went wrong.

# %%
x = torch.linspace(0.5, 3.5, 30)
y = 1.0 + 0.5 * x + 0.2 * torch.randn(30)
y[[5, 14, 26]] += torch.tensor([1.2, -1.5, 1.0])

fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
ax.plot(x, y, "o", label="measurements")
ax.plot(x, 1.0 + 0.5 * x, color="gray", label="the line they were made from")
ax.set(xlabel="$x$", ylabel="$y$")
ax.legend()
plt.show()

# %% [markdown]
# The model has one latent vector: slope, offset and the logarithm of the scale. Its likelihood is a Student-t distribution,
# whose heavy tails allow for outliers. All $x$ are positive, so a larger slope goes with a smaller offset: the posterior is
# correlated.
#
# One rule for models that go to `to_arviz`: index events from the right (`theta[..., 0]`). Then one run of the model makes
# many draws. A model that does not allow this is run once per draw, which is slower.

# %%
prior = dist.Normal(torch.tensor([0.0, 0.0, -1.0]), torch.tensor([2.0, 2.0, 1.0])).to_event(1)


def robust(x, y=None):
    theta = pyro.sample("theta", prior)
    slope, offset, log_scale = (theta[..., i] for i in range(3))
    with pyro.plate("measurement", len(x)):
        pyro.sample("y", dist.StudentT(3.0, offset + slope * x, log_scale.exp()), obs=y)


# %% [markdown]
# The three fits are `AutoNormal`, which has no correlation; a flow as guide, in three lines; and NUTS, the reference. Several
# runs of NUTS in a list become the chains of one `InferenceData`.


# %%
def fit(model, guide, seed=0, steps=30 if SMOKE else 1500):
    pyro.set_rng_seed(seed)
    optim = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.998})
    svi = SVI(model, guide, optim, Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(x, y)
    return svi


def flow_guide():
    flow = Flow((3,), transform=MAF(transforms=2, hidden=(32,)))

    def guide(x, y=None):
        pyro.sample("theta", flow())

    return guide


def nuts(model, seed):
    pyro.set_rng_seed(seed)
    num_samples, warmup_steps = (50, 30) if SMOKE else (500, 300)
    mcmc = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(x, y)
    return mcmc


fits = {
    "AutoNormal": fit(robust, AutoNormal(robust)),
    "flow": fit(robust, flow_guide()),
    "NUTS": [nuts(robust, seed) for seed in (1, 2)],
}

# %% [markdown]
# `to_arviz` takes the fit and the model's own arguments. `dims` and `coords` give the entries of `theta` their names.

# %%
options = {"dims": {"theta": ["parameter"]}, "coords": {"parameter": ["slope", "offset", "log scale"]}, "progress": False}
data = {name: to_arviz(fitted, x, y, **options) for name, fitted in fits.items()}
{name: {group: dict(one[group].sizes) for group in one.groups()} for name, one in data.items()}["NUTS"]

# %% [markdown]
# Three posteriors, one picture. The thick lines hold half of the draws, the thin ones 94 %.

# %%
az.plot_forest(list(data.values()), model_names=list(data), combined=True, figsize=(7, 3))
plt.xlabel("value")
plt.show()

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3), sharex=True, sharey=True, layout="constrained")
for ax, (name, one) in zip(axes, data.items(), strict=True):
    theta = one.posterior["theta"].stack(sample=["chain", "draw"])
    ax.plot(theta.sel(parameter="slope")[::2], theta.sel(parameter="offset")[::2], ".", markersize=2)
    ax.set(title=name, xlabel="slope", ylabel="offset")
plt.show()

# %% [markdown]
# `AutoNormal` gets the means right. Its intervals of slope and offset are far too narrow: it covers only the middle of the
# narrow ellipse. The flow and NUTS agree.

# %%
axes = az.plot_posterior(data["flow"], figsize=(10, 2.8), textsize=10)
for ax, true in zip(axes, (0.5, 1.0, -1.61), strict=True):
    ax.axvline(true, color="C1")
plt.show()

# %% [markdown]
# The orange lines are the values behind the data.
#
# ## 2. How good is a guide, without a reference
#
# ### Importance weights
#
# The group `sample_stats` holds `log_p`, the log joint density of draw and data, `log_q`, the guide's log density of the
# draw, and their difference `log_weight`. If the guide were the posterior, all weights would be equal. Pareto-smoothed
# importance sampling fits the tail of the weights; its shape $\hat k$ says how heavy it is. Below 0.7 the weights can be
# used, and the guide is near the posterior. Above, they cannot ([Yao et al., 2018](https://arxiv.org/abs/1802.02538)).

# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for name in ("AutoNormal", "flow"):
    log_weight = data[name].sample_stats["log_weight"].values.ravel()
    smoothed, k_hat = az.psislw(log_weight)
    size = 1 / (torch.as_tensor(smoothed).exp() ** 2).sum()
    print(f"{name:12s} k-hat {float(k_hat):5.2f}, effective sample size {size:4.0f} of {len(log_weight)}")
    ax.hist(log_weight - log_weight.mean(), bins=60, histtype="step", label=f"{name}: $\\hat k$ = {float(k_hat):.2f}")
ax.set(xlabel="log weight less its mean (nats)", ylabel="draws", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# The long right tail of `AutoNormal` consists of draws at its edge, which are far more probable under the posterior than
# under the guide.
#
# The weights depend only on regions where the guide draws. A guide that covers one of two separate modes
# and fits it well has a low $\hat k$ and misses half of the posterior.
#
# ### Restarts as chains
#
# To find such cases, fit again from other starting points and treat the restarts as chains. $\hat R$ compares the spread
# between chains with that within. The starting points must differ: by default Pyro's autoguides all start at the same place,
# and restarts from there agree long before they have converged. `init_to_sample` starts at a draw from the prior. Each
# restart has its own guide and parameters, so the param store is cleared before each.


# %%
def restarts(steps):
    runs = []
    for seed in range(4):
        pyro.clear_param_store()
        runs.append(fit(robust, AutoNormal(robust, init_loc_fn=init_to_sample), seed, steps))
    return to_arviz(runs, x, y, num_samples=500, **options)


tables = {f"{steps} steps": az.summary(restarts(steps)) for steps in ((10, 20) if SMOKE else (100, 1500))}
for title, table in tables.items():
    print(title)
    print(table[["mean", "sd", "r_hat"]].to_string(), "\n")
print("NUTS")
print(az.summary(data["NUTS"])[["mean", "sd", "r_hat"]].to_string())

# %% [markdown]
# After 100 steps the restarts disagree, and $\hat R$ says so: train longer. After 1500 steps $\hat R$ is near 1. Yet the
# standard deviations of slope and offset are less than half of those by NUTS in all restarts. $\hat R$ of restarts finds fits
# that did not converge and guides that end in different modes. It cannot find a fault that all restarts have in common;
# $\hat k$ can. Use both.
#
# ## 3. Two rival models
#
# The rival has a normal likelihood. Both models are fitted with a flow guide. First, what would new data look like?


# %%
def normal(x, y=None):
    theta = pyro.sample("theta", prior)
    slope, offset, log_scale = (theta[..., i] for i in range(3))
    with pyro.plate("measurement", len(x)):
        pyro.sample("y", dist.Normal(offset + slope * x, log_scale.exp()), obs=y)


rivals = {"Student-t": data["flow"], "normal": to_arviz(fit(normal, flow_guide()), x, y, **options)}

fig, axes = plt.subplots(1, 2, figsize=(10, 3), sharex=True, layout="constrained")
for ax, (name, one) in zip(axes, rivals.items(), strict=True):
    az.plot_ppc(one, num_pp_samples=100, random_seed=0, ax=ax)
    ax.set(title=name, xlabel="$y$", ylabel="density", xlim=(-2, 6))
plt.show()

# %% [markdown]
# It is hard to judge this by eye. Leave-one-out cross-validation asks how well each model predicts a measurement that it has
# not seen. `az.loo` approximates it from the group `log_likelihood`, without fitting again. `p_loo` is about the number of
# parameters that are in use; Pareto's $\hat k$ of each datum says whether the approximation holds for it.

# %%
print(az.loo(rivals["Student-t"]))

# %%
table = az.compare(rivals, ic="loo")
table[["rank", "elpd_loo", "p_loo", "elpd_diff", "dse", "weight", "warning"]].round(2)

# %%
loo = {name: az.loo(one, pointwise=True) for name, one in rivals.items()}
gain = loo["Student-t"].loo_i - loo["normal"].loo_i
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.stem(x.tolist(), gain, basefmt="gray")
ax.set(xlabel="$x$", ylabel="elpd of Student-t\nless that of normal (nats)")
plt.show()

# %% [markdown]
# The Student-t model is better by more than the standard error of the difference. The last plot shows where: by about half a
# nat at most ordinary measurements, because the outliers do not widen its scale, and by more at the worst outlier. It is
# worse at measurements that are off by a moderate amount, which the wider normal distribution expects. `warning` is true
# where some $\hat k$ is above its limit: the normal model depends so much on its outliers that leaving one out changes its
# posterior, so its score is only rough. One would refit without these measurements; here that would not change the
# conclusion.
#
# Does the guide matter for this? The next cell scores one model under the three fits.

# %%
for name, one in data.items():
    scores = az.loo(one)
    print(f"{name:12s} elpd_loo {scores.elpd_loo:7.2f}   p_loo {scores.p_loo:.2f}")

# %% [markdown]
# It hardly matters. Scores of predictions change little if a posterior is too narrow, as long as it is in the right place.
# But the intervals of the slope, which somebody may want to publish, were wrong by more than a factor of two. Which of the
# two matters depends on the question.

# %% [markdown]
# ## 4. Deep generative models on held-out data
#
# A flow trained by maximum likelihood has no posterior: its weights are one point, fitted to the training data. So LOO cannot
# be used, and `to_arviz` gives no `log_likelihood` group. Instead, evaluate the log-likelihood of held-out data. `compare`
# does this and returns a table like ArviZ's, with stacking weights.

# %%
moons = datasets.moons()
rows = slice(500) if SMOKE else slice(2000)
families = {
    "splines (NSF)": Flow((2,), transform=NSF(transforms=3, hidden=(64, 64))),
    "affine (MAF)": Flow((2,), transform=MAF(transforms=3, hidden=(64, 64))),
    "autoregressive normal": Autoregressive((2,), likelihood=NormalLikelihood(), hidden=(64, 64)),
    "VAE": VAE((2,), latent_dim=2, likelihood=NormalLikelihood(), hidden=(64, 64)),
}
for family in families.values():
    epochs = 3 if SMOKE else 100
    train(family, moons.train[rows], valid=moons.valid[rows], epochs=epochs, ema_decay=0.99, seed=0, progress=False)

# %%
comparison = compare(families, moons.test[rows], num_samples=20 if SMOKE else 500)
comparison.plot()
plt.show()
comparison.table[["kind", "num_samples", "elpd", "elpd_diff", "dse", "weight"]].round(2)

# %% [markdown]
# The column `kind` matters. A flow's score is exact, the VAE's is a lower bound: its true score is at least that. The
# stacking weight answers another question than the rank: which mixture of the four predicts best? A family that is worse
# alone may get weight if it is better in some region; here the splines are better everywhere. The autoregressive model has
# one normal distribution for $x_2$ given $x_1$, where two are needed. The VAE could do better than this: the second tutorial
# says what to look for.
#
# `to_arviz` exports draws of a family too, as `posterior_predictive`.

# %%
fig, axes = plt.subplots(1, 4, figsize=(12, 3), sharex=True, sharey=True, layout="constrained")
for ax, (name, family) in zip(axes, families.items(), strict=True):
    drawn = to_arviz(family, num_samples=1000, progress=False).posterior_predictive["x"][0]
    ax.plot(drawn[:, 0], drawn[:, 1], ".", markersize=2)
    ax.set(title=name, xlabel="$x_1$", ylabel="$x_2$", xlim=(-2, 3), ylim=(-1.5, 2))
plt.show()
