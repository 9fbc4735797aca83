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
# # Simulation-based inference
#
# Many models in science are simulators: programs that draw random numbers and return data. Nobody can write down the density of
# these data, so neither NUTS nor a guide can be used. But the program can be run, as often as we like. A conditional density of
# the parameters given the data, trained on such runs, becomes the posterior. You will learn
#
# 1. to train an `AmortizedPosterior`, first where the right answer is known, and to compare it with NUTS;
# 2. to summarise independent rows of any number by `SetEmbedding`;
# 3. to write a simulator as a Pyro model, and what happens to simulations that fail;
# 4. to check the result, which needs no density: calibration, coverage, and simulations from the posterior;
# 5. to spend more simulations on one observation: `refine`;
# 6. to learn the likelihood of one row, or a ratio, in place of the posterior of all.

# %%
import os
import warnings
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints

from pyro_genmodels import NSF, Flow
from pyro_genmodels.posteriors import (
    AmortizedLikelihood,
    AmortizedPosterior,
    AmortizedRatio,
    ConvolutionalEmbedding,
    NoUTurn,
    SetEmbedding,
    compare_posteriors,
    posterior,
    simulation_based_calibration,
)

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
num_simulations, training = (100, {"max_epochs": 1}) if SMOKE else (3000, {"max_epochs": 60, "step_size": 2e-3})
chains = {"num_warmup": 50, "num_samples": 100} if SMOKE else {}
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small networks gain nothing from more
pyro.set_rng_seed(0)

# %% [markdown]
# ## 1. Where the answer is known
#
# Waiting times at a bus stop: a Gamma distribution, of which we want the mean and the shape. The model is ordinary Pyro. Called
# without data it simulates 40 of them.


# %%
def waiting(times=None):
    mean = pyro.sample("mean", dist.LogNormal(2.0, 0.7))
    shape = pyro.sample("shape", dist.LogNormal(0.5, 0.7))
    with pyro.plate("rows", 40 if times is None else len(times)):
        pyro.sample("times", dist.Gamma(shape, shape / mean), obs=times)


flow = partial(Flow, transform=NSF(transforms=2, hidden=(64,)))  # a small one: there are few parameters
amortized = AmortizedPosterior(waiting, observed=["times"], family=flow, embedding=SetEmbedding(min_rows=5))
amortized.train(num_simulations, progress=False, **training)

# %% [markdown]
# That is all: it drew parameters from the prior, simulated data, and trained a flow for the parameters given the data. The
# rows are independent, so their order does not matter: `SetEmbedding` averages over them. With `min_rows=5` it also learned
# to do with fewer.

# %%
fig, ax = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
ax.plot(range(1, len(amortized.history) + 1), amortized.history)
ax.set(xlabel="epoch", ylabel="loss of held-out\nsimulations (nats)")
plt.show()

# %% [markdown]
# `given` returns the posterior for any data at once, without further training. It is a fit as any other. This model has a
# density, so that we can run NUTS beside it.

# %%
true = {"mean": torch.tensor(9.0), "shape": torch.tensor(2.5)}
times = dist.Gamma(true["shape"], true["shape"] / true["mean"]).sample((40,))
nuts = NoUTurn(**chains)


def compared(times):
    fits = {"NUTS": posterior(waiting, times, method=nuts, progress=False), "amortised": amortized.given(times=times)}
    return fits, compare_posteriors(fits, reference="NUTS", num_samples=200 if SMOKE else 4000, distances=False)


fits_of_all, all_rows = compared(times)
_, few_rows = compared(times[:8])
columns = ["pareto_k", "mean_error", "sd_error", "verdict"]
pd.concat({"40 rows": all_rows.table[columns], "8 rows": few_rows.table[columns]}).round(2)

# %%
all_rows.plot()
plt.show()

# %% [markdown]
# Errors of means are in deviations, those of deviations in per cent, each the larger of both variables. NUTS ran for each data
# set; the amortised posterior was trained once. It is too wide and a little off. Since this model has a density, its
# draws have weights, which correct this: $\hat k$ is below 0.7. It is even negative, as of weights that have an upper bound.

# %%
weighted = amortized.given(times=times).psis(200 if SMOKE else 4000)
print(weighted)
moments = {"amortised": weighted.draws, "with weights": weighted.resample(), "NUTS": fits_of_all["NUTS"].get_samples()}
for name, draws in moments.items():
    print(f"{name:12s} " + ", ".join(f"{key} {float(draws[key].mean()):.2f} ± {float(draws[key].std()):.2f}" for key in true))

# %% [markdown]
# ## 2. A simulator
#
# Hares and lynxes. Hares are born, hares are eaten, which feeds lynxes, and lynxes die; each at a rate. Within a twentieth of a
# year the numbers of these events are Poisson distributed. We see both populations once a year, for twenty years. What happens
# in between is not seen, so that the probability of the data is a sum over all that could have happened.
#
# The simulator takes one value of each parameter or many, (...,), and returns (..., years, 2). Where a population explodes it
# gives up, and returns NaN.


# %%
def simulate(birth, hunting, death, years=20, steps=20):
    hares = torch.full_like(birth, 100.0)
    lynxes = hares.clone()
    seen = []
    for step in range(1, years * steps + 1):
        rates = birth * hares, hunting * hares * lynxes / 100, death * lynxes
        born, eaten, died = (torch.poisson(rate / steps) for rate in rates)
        hares = (hares + born - eaten).clamp(0, 1e6)
        lynxes = (lynxes + eaten - died).clamp(0, 1e6)
        if step % steps == 0:
            seen.append(torch.stack([hares, lynxes], -1))
    counts = torch.stack(seen, -2)
    exploded = counts.amax((-1, -2), keepdim=True) > 1e4
    return counts.log1p().masked_fill(exploded, torch.nan)


def ecosystem():
    birth = pyro.sample("birth", dist.LogNormal(0.0, 0.5))  # per year
    hunting = pyro.sample("hunting", dist.LogNormal(0.0, 0.5))  # per 100 lynxes and year
    death = pyro.sample("death", dist.LogNormal(0.0, 0.5))  # per year
    pyro.deterministic("animals", simulate(birth, hunting, death), event_dim=2)


# %% [markdown]
# A site of `pyro.deterministic` may be observed: the simulator draws its random numbers by itself. `parallel=True` says that
# the program may be run with many values at once, here some hundred times as fast. A simulator that does not allow this is run
# for one value after another, with `n_jobs=` in several processes.
#
# Twenty years of two populations are a series with two channels, for which there is a convolutional embedding.

# %%
nature = AmortizedPosterior(ecosystem, observed=["animals"], family=flow, embedding=ConvolutionalEmbedding())
with warnings.catch_warnings(record=True) as messages:
    warnings.simplefilter("always")
    nature.train(num_simulations, parallel=True, progress=False, **training)
print(*(message.message for message in messages))
print(nature)
print(dict(nature.failures))

# %% [markdown]
# Simulations that failed, with NaN or by an error, are counted and left out. This does no harm here: our data did not explode,
# and the posterior given such data does not depend on what happens to others. The table `nature.simulations` can be saved, and
# passed as `simulations=` the next time; it may also come from elsewhere.
#
# Now something is observed.

# %%
true = {"birth": torch.tensor(1.0), "hunting": torch.tensor(1.0), "death": torch.tensor(0.8)}
pyro.set_rng_seed(1)
seen = simulate(**true)
fit = nature.given(animals=seen)

prior = {name: nature.simulations[name] for name in true}
compare_posteriors({"prior": {n: x[None, :1000] for n, x in prior.items()}, "posterior": fit}).plot()
plt.show()
{
    name: f"{float(x.mean()):.2f} ± {float(x.std()):.2f}, true {float(true[name]):.2f}"
    for name, x in fit.get_samples(4000).items()
}

# %% [markdown]
# ## 3. Is it right?
#
# All three true values are inside of the intervals. Birth, hunting and death go together: if all are larger, the same happens
# faster.
#
# The trained density is an approximation, and there is no density of the data to weigh its draws with. But there are
# simulations.
#
# ### Do simulations from the posterior look like the data?

# %%
again = simulate(**fit.get_samples(200))
fig, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for i, (ax, name) in enumerate(zip(axes, ("hares", "lynxes"), strict=True)):
    ax.plot(range(1, 21), again[:50, :, i].expm1().T, color=f"C{i}", alpha=0.15)
    ax.plot(range(1, 21), seen[:, i].expm1(), "ko-", markersize=3)
    ax.set(title=name, xlabel="year", ylabel="animals", ylim=(0, 400))
plt.show()

# %% [markdown]
# Black are the data. Their waves are among those of the simulations: chance shifts the phase of each.
#
# ### Is it right on average?
#
# Simulation-based calibration draws new parameters from the prior, simulates, and ranks the true value among draws of its
# posterior. An amortised posterior needs no refits, so this is cheap.

# %%
with warnings.catch_warnings(record=True) as messages:
    warnings.simplefilter("always")
    calibration = simulation_based_calibration(
        ecosystem, method=nature, observed=["animals"], num_simulations=20 if SMOKE else 300, seed=0, progress=False
    )
print(*(message.message for message in messages))
print(calibration)
calibration.plot()
plt.show()

# %% [markdown]
# Simulations that exploded are left out here as well. The lines stay in the band, which holds all of a line with a probability
# of 95 % if the posteriors are right.
#
# Ranks look at one variable at a time. Expected coverage looks at all together: do regions that hold a share $\alpha$ of the
# posterior hold the truth in a share $\alpha$ of the simulations?

# %%
coverage = calibration.coverage()
print(coverage)
coverage.plot()
plt.show()

# %% [markdown]
# ## 4. One observation
#
# Most of the simulations look nothing like our data. If there is one observation only, `refine` spends simulations where they
# matter: it draws parameters from the prior, keeps those in the region of the present posterior, and trains on.

# %%
with warnings.catch_warnings(record=True) as messages:
    warnings.simplefilter("always")
    refined = nature.refine(animals=seen, num_rounds=1, num_simulations=num_simulations // 2, progress=False, **training)
print(refined)

# %%
compare_posteriors({"amortised": fit, "refined": refined.given()}).plot()
plt.show()

# %% [markdown]
# The refined posterior is about half as wide. Was the first one wrong, then? It passed all checks, but these are averages: a
# network that looks at the data less closely gives wider posteriors, each of them right for what it saw. The prior passes them
# too. Near the data there is more to learn, and `refine` learns it.
#
# The refined posterior holds for this observation only, and `refined.given(...)` of another is refused. To calibrate it would
# need a refinement for each simulation. So check the amortised posterior, then refine, and refine again with another seed to
# see if the two agree.
#
# ## 5. Any number of rows
#
# The posterior of section 1 was trained on 40 waiting times and takes 5 to 40. If the likelihood of one time is learned
# instead, any number of them can be observed, since their log densities add up. `AmortizedLikelihood` trains a conditional
# density of the observation, here on positive numbers. `AmortizedRatio` trains a classifier to tell which parameters an
# observation belongs to, and needs no density. Both then run NUTS for each data set.


# %%
def one_time():
    mean = pyro.sample("mean", dist.LogNormal(2.0, 0.7))
    shape = pyro.sample("shape", dist.LogNormal(0.5, 0.7))
    pyro.sample("time", dist.Gamma(shape, shape / mean))


positive_flow = partial(flow, support=constraints.positive)
likelihood = AmortizedLikelihood(one_time, observed=["time"], family=positive_flow)
ratio = AmortizedRatio(one_time, observed=["time"])
for learned in (likelihood, ratio):
    learned.train(3 * num_simulations, batch_size=200, progress=False, **training | {"max_epochs": 1 if SMOKE else 30})

# %%
fits = {"NUTS": fits_of_all["NUTS"]}
for name, learned in {"likelihood": likelihood, "ratio": ratio}.items():
    fits[name] = learned.given(time=times, method=NoUTurn(num_chains=2, **chains), progress=False)
compare_posteriors(fits, reference="NUTS", distances=False).table[["mean_error", "sd_error", "verdict"]].round(2)

# %% [markdown]
# A small error of the density of one time is added forty times. That is the price: many rows want a better trained density.
#
# ## 6. What to choose
#
# - The model has a density, and there is one data set: `posterior(model, data)`, with NUTS or a flow guide.
# - The model has a density, and there are many data sets, or an answer is wanted at once: `AmortizedPosterior`, with weights to
#   check and correct every answer.
# - The model is a simulator: `AmortizedPosterior`, checked by calibration, by coverage, and by simulations from the posterior.
#   Only the last looks at your data. If these are unlike all simulations, the network answers all the same.
# - Independent rows of any number: `AmortizedLikelihood` for few numbers a row, also counts and classes; `AmortizedRatio` for
#   many numbers a row, or for values without a density, such as exact zeros among real numbers.
#
# ## Exercises
#
# 1. Train the first posterior on 500 and on 20,000 simulations. What becomes of the errors, and of $\hat k$?
# 2. Leave out `embedding=`, so that the flow sees 40 numbers in their order. How many simulations does that cost?
# 3. Train the posterior of section 2 on 20,000 simulations, without refining. Is it as narrow as the refined one?
# 4. Let a trap catch each animal with probability 0.5: draw from `dist.Binomial` at the end of `simulate`. How much wider are
#    the intervals?
# 5. Use a diffusion in place of the flow: `family=Diffusion`. Compare the time of training and that of 1000 draws.
# 6. Give `nature` data with a hundred hares and no lynxes in all years. Are the intervals wider? Compare simulations from
#    this posterior with the data.
