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
# # Comparing posteriors: which one do I trust?
#
# One model and its data have one posterior, but every method gives another answer. Here a small hierarchical model is fitted in
# five ways. Most of the answers are wrong, each in its own way, and the tools below say which and how. You will learn
#
# 1. to fit a model by `posterior(model, ..., method=...)`, and to write it so that it can be fitted;
# 2. to read the verdicts of `diagnose_posterior` and `compare_posteriors`, with and without a reference;
# 3. what a mean-field guide gets wrong in a scale parameter, and what importance weights can correct (Pareto's $\hat k$);
# 4. to compare models by leave-one-out with refits, `reloo`;
# 5. to ask if a method is right for a model at all, by simulation-based calibration;
# 6. to ask if the model fits the data, by a posterior predictive check.
#
# The third tutorial compares fits by Pyro's own `SVI` and `MCMC` in ArviZ. The page [Posteriors](../docs/posteriors.md) lists
# all methods.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

from pyro_genmodels.posteriors import (
    FlowGuide,
    FullRank,
    MeanField,
    NoUTurn,
    Pathfinder,
    compare_posteriors,
    diagnose_posterior,
    posterior,
    predictive_check,
    reloo,
    simulation_based_calibration,
)

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)  # it announces version 1
import arviz as az

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
chains = {"num_warmup": 50, "num_samples": 100} if SMOKE else {}  # {}: the methods' own defaults
steps = {"num_steps": 10, "num_draws": 8, "step_size": 0.01} if SMOKE else {}
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small models gain nothing from more
pyro.set_rng_seed(0)

# %% [markdown]
# ## 1. Eight schools, written in two ways
#
# Eight schools tried a programme of coaching. For each there is an estimate of its effect and the standard error of this
# estimate ([Rubin, 1981](https://doi.org/10.3102/10769986006004377)).

# %%
effect = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
error = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

fig, ax = plt.subplots(figsize=(5.5, 2.5), layout="constrained")
ax.errorbar(range(8), effect, yerr=error, fmt="o")
ax.axhline(0, color="gray", lw=0.5)
ax.set(xticks=range(8), xticklabels="ABCDEFGH", xlabel="school", ylabel="effect (points)")
plt.show()

# %% [markdown]
# The schools' true effects $\theta_j$ come from a normal distribution with unknown mean $\mu$ and deviation $\tau$. How much do
# the schools differ: how large is $\tau$?
#
# The same model can be written with $\theta_j$ as latent variables (centred), or with $\theta_j = \mu + \tau \eta_j$ and
# standard normal $\eta_j$ (non-centred). To the statistician it is one model. To an algorithm it is two.


# %%
def centred(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(10.0))
    with pyro.plate("school", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=effect)


def non_centred(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(10.0))
    with pyro.plate("school", len(error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, error), obs=effect)


# %% [markdown]
# NUTS takes any model with continuous latent variables. `posterior(non_centred, error, effect)` alone would choose it too.

# %%
nuts = NoUTurn(target_accept_prob=0.95, **chains)
nuts_fits = {model.__name__: posterior(model, error, effect, method=nuts, progress=False) for model in (centred, non_centred)}
for name, fit in nuts_fits.items():
    print(f"{name}: {diagnose_posterior(fit).verdict}")

# %% [markdown]
# The chains of the centred model have not converged: their trajectories diverge. The picture shows why.

# %%
draws = {name: fit.get_samples(group_by_chain=True) for name, fit in nuts_fits.items()}
draws["non_centred"]["theta"] = (
    draws["non_centred"]["mu"][..., None] + draws["non_centred"]["tau"][..., None] * draws["non_centred"]["eta"]
)

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
for ax, (name, fit) in zip(axes, nuts_fits.items(), strict=True):
    theta, log_tau = draws[name]["theta"][..., 0], draws[name]["tau"].log()
    diverging = fit.stats["diverging"].bool()
    ax.plot(theta.flatten(), log_tau.flatten(), ".", markersize=2, alpha=0.5)
    ax.plot(theta[diverging], log_tau[diverging], ".", markersize=5, label="divergences")
    ax.set(title=name, xlabel=r"$\theta_A$", ylabel=r"$\log\,\tau$")
    ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# If $\tau$ is small, all $\theta_j$ must be near $\mu$: the posterior of the centred model is a funnel, and no step size suits
# both its mouth and its neck. The chains stop above the neck, and small values of $\tau$ are left out. In the non-centred model
# $\eta_j$ and $\tau$ are nearly independent, and NUTS comes down as far as it should. Its draws, with $\theta$ computed from
# them, are our reference.
#
# ## 2. Five fits, and a verdict for each
#
# We fit the centred model, the hard one, by all methods. Some tell at once that they failed; the messages are printed here.

# %%
reference = {name: draws["non_centred"][name] for name in ("mu", "tau", "theta")}
methods = {
    "mean field": MeanField(**steps),
    "full rank": FullRank(**steps),
    "flow": FlowGuide(**{"num_steps": 1000, "num_draws": 64, "step_size": 0.01, **steps}),
    "Pathfinder": Pathfinder(),
}


def fit(model, method):
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        found = posterior(model, error, effect, method=method, progress=False)
    for message in messages:
        print(message.message)
    return found


fits = {"NUTS": nuts_fits["centred"]} | {name: fit(centred, method) for name, method in methods.items()}

# %% [markdown]
# `compare_posteriors` takes fits of any kind, a dictionary of them, and a reference: one of the fits, or draws.

# %%
comparison = compare_posteriors(fits, reference=reference, distances=False)
for name, verdict in comparison.verdicts.items():
    print(f"{name}: {verdict}")

# %%
columns = ["elbo", "log_evidence", "pareto_k", "r_hat", "ess_bulk", "divergences", "mean_error", "sd_error", "gradients"]
comparison.table[columns].round(2)

# %% [markdown]
# Errors of means are in deviations of the reference, those of deviations in per cent; each is the largest of all variables.
# `comparison.plot()` shows all fits.

# %%
comparison.plot(["mu", "tau", "theta[0]"])
plt.show()

# %% [markdown]
# ## 3. What the mean field gets wrong

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
shown = {"reference": reference} | {name: fit.get_samples(4000) for name, fit in fits.items() if name in ("mean field", "flow")}
for i, (name, one) in enumerate(shown.items()):
    axes[0].hist(one["tau"].log().flatten(), bins=60, range=(-4, 4), density=True, histtype="step", color=f"C{i}", label=name)
    axes[1].plot(one["theta"][..., 0].flatten()[:1500], one["tau"].log().flatten()[:1500], ".", markersize=2, color=f"C{i}")
axes[0].set(xlabel=r"$\log\,\tau$", ylabel="density")
axes[0].legend()
axes[1].set(xlabel=r"$\theta_A$", ylabel=r"$\log\,\tau$", ylim=(-4, 4))
plt.show()

# %% [markdown]
# A mean-field guide has one width of $\theta_A$ for every $\tau$. A guide pays without bound for draws where the posterior has
# none, and little for leaving something out. So it stays in the mouth of the funnel, where one width will do. The means of
# $\theta$ come out nearly right. "How much do the schools differ?" gets a confident, wrong answer.
#
# ### Without a reference
#
# In earnest there is no reference. What remains are $\hat k$ of the importance weights $p(y, z) / q(z)$, and the evidence,
# which is the same for all guides of one model, and for both ways to write it.

# %%
better = {name: fit(non_centred, methods[name]) for name in ("mean field", "flow")}
guides = {f"{name}, centred": fits[name] for name in methods} | {f"{name}, non-centred": fit for name, fit in better.items()}
compare_posteriors(guides, num_samples=200 if SMOKE else 2000).table[
    ["elbo", "elbo_se", "log_evidence", "log_evidence_se", "pareto_k"]
].round(2)

# %% [markdown]
# Look for three things. First, $\hat k$ above 0.7: the weights cannot correct the guide. It is an estimate from the largest
# weights, and varies by some tenths from one set of draws to the next. Second, a bound, `elbo`, far below that of another fit:
# the guide is worse. Third, a `log_evidence` below that of another fit by several standard errors: the draws miss a part of the
# posterior, and their weights do not know, since no draw is there. This finds faults that $\hat k$ misses, and needs no
# reference, only a second fit.
#
# Where $\hat k$ is low, weighted draws of a plain guide can stand for the posterior. `psis()` gives them.

# %%
weighted = {name: fit.psis(200 if SMOKE else 2000) for name, fit in guides.items() if hasattr(fit, "psis")}
rows = {"reference": {"draws": reference["tau"].mean(), "small": (reference["tau"] < 1).float().mean()}}
for name, one in weighted.items():
    tau = one.draws["tau"]
    rows[name] = {
        "draws": tau.mean(),
        "weighted": one.mean(lambda tau, **_: tau),
        "small": (tau < 1).float().mean(),
        "small, weighted": one.mean(lambda tau, **_: (tau < 1).float()),
        "k-hat": one.pareto_k,
        "worth": one.effective_sample_size,
    }
pd.DataFrame.from_dict(rows, orient="index").astype(float).round(2)

# %% [markdown]
# In brackets are the numbers without weights.
#
# ## 4. Leave one out, with refits
#
# How well is each school predicted from the others? `reloo` answers from the draws, and weights tell where that can be trusted.
# Where not, the row is left out in earnest and the model fitted again, by the fit's own method.

# %%
limit = {"max_pareto_k": float("inf")} if SMOKE else {}  # no refits
again = NoUTurn(target_accept_prob=0.95, num_chains=2, **chains)  # the way to refit
loo = reloo(nuts_fits["non_centred"], method=again, seed=0, progress=False, **limit)
print(loo)

# %% [markdown]
# Now suppose that the first effect had been entered as 58 instead of 28.

# %%
wrong = effect.clone()
wrong[0] = 58.0
mistaken = reloo(posterior(non_centred, error, wrong, method=again, progress=False), seed=0, progress=False, **limit)
print(mistaken)
print("refitted:", ["ABCDEFGH"[i] for i in mistaken.refitted.nonzero()[:, 0]])
print(
    "log density of A from the others:",
    f"{float(mistaken.pointwise[0]):.1f} nats, with 28 instead: {float(loo.pointwise[0]):.1f}",
)


# %% [markdown]
# `to_arviz()` of the result goes to `az.compare`. The rival says that all schools have one effect.


# %%
def one_effect(error, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("school", len(error)):
        pyro.sample("y", dist.Normal(mu, error), obs=effect)


rival = posterior(one_effect, error, effect, method=FullRank(**steps), progress=False)
table = az.compare(
    {
        "hierarchical": loo.to_arviz(),
        "one effect": reloo(rival, method=again, seed=0, progress=False, **limit).to_arviz(),
    }
)
table[["rank", "elpd_loo", "p_loo", "elpd_diff", "dse"]].round(2)

# %% [markdown]
# ## 5. Is the method right for this model at all?
#
# So far we judged fits to one data set. Simulation-based calibration draws $\mu$, $\tau$ and $\theta$ from the prior, simulates
# the effects of eight schools from them, fits these, and ranks the true values among the draws. The ranks of a right method are
# uniform.

# %%
quick = MeanField(num_steps=10 if SMOKE else 100, num_draws=16, step_size=0.05)
calibration = simulation_based_calibration(
    centred, error, effect, method=quick, num_simulations=3 if SMOKE else 10, num_draws=50, seed=0, progress=False
)
print(calibration.verdict)
calibration.plot(["mu", "tau", "theta[0]"])
plt.show()

# %% [markdown]
# ## 6. Does the model fit the data?
#
# All of this asked if the fit is the posterior. The posterior of a wrong model can be exact. `predictive_check` draws new data
# from the posterior, and compares them with those that were seen.

# %%
check = predictive_check(better["flow"], num_samples=200 if SMOKE else 1000, progress=False)
print(check)
check.plot()
plt.show()

# %% [markdown]
# P-values near 0 or 1 speak against the model. There are none. That says little with eight numbers, to which two parameters and
# eight effects were fitted; but a model that could not make such data would have been found.
#
# ## Which one do I trust?
#
# 1. Write the model so that its latent variables do not depend on each other. This helped more than any method.
# 2. Run NUTS if there is time. Believe it if R-hat, effective sample sizes and divergences pass; `diagnose_posterior` looks.
# 3. Otherwise fit a flow and something plain. Believe the one with the higher bound, if its $\hat k$ is below 0.7 and its
#    evidence not below that of another.
# 4. If one answer is needed many times, calibrate the method once on simulations.
#
# ## Exercises
#
# 1. Repeat sections 2 and 3 with errors a tenth as large. Which way to write the model is better then, and why?
# 2. Add `Laplace()` to the methods, for both models. What does the message for the centred one say?
# 3. Add `ImportanceWeighted(FullRank())`. Is it wider than `FullRank()` in `tau`?
# 4. Correct the mean field of the non-centred model by `psis().resample()`, and give the draws to `compare_posteriors`, as
#    `{name: x[None] for name, x in ...}`: one chain.
# 5. Calibrate `MeanField()` on `non_centred` with 200 simulations. Is the fault of section 3 still found?
# 6. Start the chains by `NoUTurn(init=Pathfinder())`. Do those of the centred model converge now?
