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
# # Fast
#
# A step of Pyro's `SVI` for a small model takes milliseconds, of which the arithmetic is some hundredth. The rest is Python.
# Here the program is run once, its operations are recorded as a graph, and the graph is compiled. We start from an ordinary
# Pyro program. You will learn
#
# 1. to replace `SVI` by `CompiledSVI`, with the same losses, and to make long runs by `run`;
# 2. what happens when the program changes after it was compiled;
# 3. to fit from 64 starting points at once, and why that matters;
# 4. to replace `MCMC(NUTS(model))` by `CompiledNUTS`, and to compare all fits in ArviZ;
# 5. when none of this pays.
#
# Times below are seconds of a processor, on a busy machine: trust the ratios, to a factor of two. The page
# [Speed](../docs/speed.md) has the details.

# %%
import os
import time
import warnings
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample

from pyro_genmodels import VAE, BernoulliLikelihood, CompiledNUTS, CompiledSVI, to_arviz
from pyro_genmodels.infer.compiled import Captured, StaleGraphError

warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)  # it announces version 1
import arviz as az

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
mode = Captured() if SMOKE else None  # None: compiled, if there is a C++ compiler
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small models gain nothing from more
pyro.set_rng_seed(0)

# %% [markdown]
# ## 1. A Pyro program
#
# Twenty groups with twenty measurements each. In each group the measurements lie near a line, and the offsets and slopes of
# the groups come from one distribution.

# %%
num_groups, rows = 20, 400
group = torch.arange(num_groups).repeat_interleave(rows // num_groups)
x = torch.randn(rows)
true_lines = torch.tensor([1.0, -0.5]) + torch.tensor([0.8, 0.3]) * torch.randn(num_groups, 2)
y = true_lines[group, 0] + true_lines[group, 1] * x + 0.4 * torch.randn(rows)


def model(x, group, y=None):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", num_groups):
        line = pyro.sample("line", dist.Normal(loc, scale).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(line[..., group, 0] + line[..., group, 1] * x, noise), obs=y)


def processor_seconds():
    """Return the seconds that this process, and those that it has started and ended, have used of a processor."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def timed(step, repeats):
    """Return the median seconds of a call, and what the calls returned."""
    seconds, results = [], []
    for _ in range(repeats):
        start = processor_seconds()
        results.append(step())
        seconds.append(processor_seconds() - start)
    return median(seconds), torch.tensor(results)


# %% [markdown]
# Pyro's own inference, with the seconds of a step:

# %%
steps = 5 if SMOKE else 200
pyro.set_rng_seed(1)
svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
stock_seconds, stock_losses = timed(lambda: svi.step(x, group, y), steps)
print(f"a step takes {1e3 * stock_seconds:.0f} ms")

# %% [markdown]
# Now `CompiledSVI` in place of `SVI`. Nothing else changes. The first step is Pyro's own, the second captures the program and
# compiles it, and all others run the graph. The seed is the same, so that the losses should be, too.

# %%
pyro.clear_param_store()
pyro.set_rng_seed(1)
svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), mode=mode)
start = processor_seconds()
first_losses = [svi.step(x, group, y) for _ in range(2)]
compile_seconds = processor_seconds() - start
compiled_seconds, compiled_losses = timed(lambda: svi.step(x, group, y), steps - 2)

difference = (torch.tensor([*first_losses, *compiled_losses]) - stock_losses).abs().max()
print(
    f"largest difference of the losses: {difference:.4f} nats, of losses from {stock_losses[0]:.0f} to {stock_losses[-1]:.0f}"
)
print(f"a step takes 1/{stock_seconds / compiled_seconds:.0f} of the time of Pyro's")
print(f"compiling took as long as {compile_seconds / stock_seconds:.0f} steps of Pyro")

# %% [markdown]
# The losses are those of Pyro to rounding: the graph draws the same random numbers. The last line says when this pays: in a
# fit of more steps than that. Torch keeps what it compiled on disk, so that it is much less the next time.
#
# `run` makes many steps, and in a long run puts several of them into one graph. Their random numbers are then drawn at once,
# and are no longer those of Pyro with the same seed.

# %%
num_steps = 30 if SMOKE else 20_000
start = processor_seconds()
losses = svi.run(num_steps, x, group, y, progress=False)
seconds = processor_seconds() - start
print(f"{num_steps:,} steps took as long as {seconds / stock_seconds:,.0f} steps of Pyro")

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
smooth = losses[: num_steps // 10 * 10].reshape(-1, 10).mean(1)
ax.plot(10 * torch.arange(len(smooth)), smooth, linewidth=0.7)
ax.set(
    xlabel="step",
    ylabel="loss (nats), mean of 10 steps",
    xscale="symlog",
    ylim=(losses.min().item() - 5, losses.median().item() + 60),
)
plt.show()

# %% [markdown]
# The parameters are where they always are. Guide and model are used as after a fit by `SVI`.

# %%
posterior = {"groups": ["posterior"], "progress": False}
fits = {"CompiledSVI": to_arviz(svi, x, group, y, num_samples=200 if SMOKE else 1000, **posterior)}
names = ["loc", "scale", "noise"]
az.summary(fits["CompiledSVI"], var_names=names, kind="stats")

# %% [markdown]
# ## 2. When the program changes
#
# A graph that is out of date would be worse than a slow program. Tensors are no problem: the graph reads the very tensors that
# the program reads, so that a change in place counts at the next step. But what if a name is given another value?

# %%
weight = 1.0


def weighted(x):
    with pyro.poutine.scale(scale=weight):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def quick(model):
    pyro.clear_param_store()
    return CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), mode=Captured())


annealed = quick(weighted)
for value in (1.0, 1.0, 0.5, 0.5):
    weight = value
    annealed.step(x)
print([(finding.kind, finding.name) for finding in annealed.findings if finding.kind != "audit"])

# %% [markdown]
# `findings` lists each capture and its cause. The new value was noticed, and the program was captured again. A weight that
# changes at each step should be a tensor among the arguments of the model; these may have new values at each call.
#
# (`Captured()` runs the graph without a C++ compiler. It is captured in a second and is five to ten times as fast as Pyro for
# such a model, which is right for short runs.)
#
# Some changes cannot be noticed from outside, such as that of an array whose numbers Python computes with. For these there is
# the audit. At steps 1, 2, 4, 8, ... and at every 1000th it compares the graph with the program.

# %%
centre = np.zeros(1)


def hidden(x):
    z = pyro.sample("z", dist.Normal(float(centre[0]), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


audited = quick(hidden)
try:
    for step in range(20):
        if step == 5:
            centre += 100
        audited.step(x)
except StaleGraphError as error:
    print(f"at step {step}: {error}")

# %% [markdown]
# ## 3. Sixty-four fits at once
#
# Variational inference finds one optimum, and it depends on the starting point which one. Here a sine of unknown frequency is
# observed with noise. Most frequencies that are wrong are local optima.

# %%
t = torch.linspace(0, 6, 60)
signal = 1.5 * torch.sin(4.3 * t + 0.7) + 0.3 * torch.randn(60)


def sine(t, signal=None):
    frequency = pyro.sample("frequency", dist.Uniform(0.5, 10.0))
    amplitudes = pyro.sample("amplitudes", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    angle = frequency[..., None] * t
    mean = amplitudes[..., :1] * angle.sin() + amplitudes[..., 1:] * angle.cos()
    pyro.sample("signal", dist.Normal(mean, noise[..., None]).to_event(1), obs=signal)


# %% [markdown]
# `num_restarts=64` maps the step over 64 sets of parameters, in one graph. `run` returns the losses of all. The guide has to
# start at random: `init_to_sample` starts at a draw from the prior.

# %%
num_restarts = 4 if SMOKE else 64
num_steps = 30 if SMOKE else 3000
pyro.clear_param_store()
guide = AutoNormal(sine, init_loc_fn=init_to_sample, init_scale=0.02)
many = CompiledSVI(sine, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), num_restarts=num_restarts, mode=mode)
many.run(2, t, signal, progress=False)  # compiles
many_seconds, _ = timed(lambda: many.step(t, signal).tolist(), 5 if SMOKE else 100)
losses = many.run(num_steps, t, signal, progress=False)

one_guide = type("OneNormal", (AutoNormal,), {})(sine)  # a name, and so parameters, of its own
one = SVI(sine, one_guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
one_seconds, _ = timed(lambda: one.step(t, signal), 3 if SMOKE else 50)
print(f"a step of all {num_restarts} fits takes 1/{one_seconds / many_seconds:.0f} of the time of one step of one fit by Pyro")

# %%
final = losses[-200:].mean(0)
best = many.restarts.select()
poor = int((final - final.median()).abs().argmin())  # one as most are, unless the best are in the majority
draws = many.restarts.samples(100, t, signal)

fig, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
axes[0].plot(draws["frequency"].mean(1).flatten(), final, "o", markersize=3)
axes[0].axvline(4.3, color="C1", linewidth=0.8)
axes[0].set(
    xlabel="frequency at which a restart ends", ylabel="loss (nats)", ylim=(final.min().item() - 10, final.median().item() + 40)
)
fine = torch.linspace(0, 6, 300)
for index, label in ((best, "best"), (poor, "median")):
    frequency, amplitudes = draws["frequency"][index].reshape(-1, 1), draws["amplitudes"][index].reshape(-1, 2)
    curves = amplitudes[:, :1] * (frequency * fine).sin() + amplitudes[:, 1:] * (frequency * fine).cos()
    axes[1].plot(fine, curves.mean(0), label=f"{label}, {final[index]:.0f} nats")
axes[1].plot(t, signal, "k.", markersize=3)
axes[1].set(xlabel="$t$", ylabel="signal")
axes[1].legend(loc="lower right")
plt.show()
print(f"{(final < final.min() + 5).sum()} of {num_restarts} restarts end within 5 nats of the best")

# %% [markdown]
# A single fit would more likely have ended at a wrong frequency (the orange line is the true one).
# `restarts.select()` has written the parameters of the best one to where the guide has them, so that guide and param store
# are used as after a single fit. As chains, the restarts tell of the modes: $\hat R$ compares the spread between them with
# that within, and is near 1 where all have ended at one place.

# %%
chains = to_arviz(draws, t, signal, model=sine, **posterior)
print(f"R-hat of the frequency: {az.rhat(chains.posterior)['frequency'].item():.1f}")

# %% [markdown]
# ## 4. NUTS
#
# Pyro's NUTS runs the model for each of thousands of gradients. `CompiledNUTS` captures the log density once, and
# [nutpie](https://github.com/pymc-devs/nutpie), a sampler in Rust, asks the graph for gradients. Each chain has a process of
# its own. `init=svi` would start the chains at a fit; here they start as Pyro's do.

# %%
draws_of_pyro = 5 if SMOKE else 200
start = processor_seconds()
mcmc = MCMC(NUTS(model), num_samples=draws_of_pyro, warmup_steps=draws_of_pyro, disable_progbar=True)
mcmc.run(x, group, y)
mcmc_seconds = processor_seconds() - start

# %%
options = {"num_chains": 4, "num_warmup": 30 if SMOKE else 500, "num_samples": 30 if SMOKE else 1000}
nuts = CompiledNUTS(model, **options, mode=mode, progress=False)
start = processor_seconds()
nuts.run(x, group, y)
nuts_seconds = processor_seconds() - start

# %% [markdown]
# How many independent draws per second of a processor is each worth? `az.ess` estimates the effective sample size; we take
# that of the worst parameter. The times include the warm-up, and that of `CompiledNUTS` includes compiling.

# %%
fits |= {"NUTS": to_arviz(mcmc, x, group, y, **posterior), "CompiledNUTS": to_arviz(nuts, x, group, y, **posterior)}


def worst_ess(data):
    return min(float(ess.min()) for ess in az.ess(data.posterior).data_vars.values())


stock, compiled = worst_ess(fits["NUTS"]) / mcmc_seconds, worst_ess(fits["CompiledNUTS"]) / nuts_seconds
print(f"{compiled / stock:.0f} times as many effective draws per second as by Pyro's NUTS")
print(f"divergences: {nuts.statistics['diverging'].sum()}, gradients per draw: {nuts.statistics['n_steps'].mean():.1f}")

# %% [markdown]
# All three posteriors, of 200 draws by NUTS, 4000 by `CompiledNUTS` and 1000 by the guide:

# %%
print("NUTS\n", az.summary(fits["NUTS"], var_names=names, kind="stats").to_string(), "\n")
print("CompiledNUTS\n", az.summary(fits["CompiledNUTS"], var_names=names).to_string(), "\n")
print("CompiledSVI\n", az.summary(fits["CompiledSVI"], var_names=names, kind="stats").to_string())

# %%
az.plot_forest(list(fits.values()), model_names=list(fits), var_names=names, combined=True, figsize=(7, 3.5))
plt.xlabel("value")
plt.show()

# %% [markdown]
# The two samplers agree to their Monte Carlo error. The guide, a normal distribution without correlations, has the means
# right and some intervals a little too narrow; the third tutorial says how to find such cases.
#
# ## 5. When it does not pay
#
# A network spends its time in matrix products, which a compiler cannot remove. Here is a VAE for images of 28 x 28 pixels.

# %%
images = (torch.rand(128, 784) < 0.3).float()
ratios = {}
for width in (32,) if SMOKE else (64, 1024):
    pair = []
    for cls, arguments in ((SVI, {}), (CompiledSVI, {"mode": mode})):
        vae = VAE((784,), latent_dim=16, likelihood=BernoulliLikelihood(), hidden=(width, width))
        inference = cls(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), **arguments)
        for _ in range(3):
            inference.step(images)
        pair.append(timed(lambda: inference.step(images), 5 if SMOKE else 50)[0])  # noqa: B023
    ratios[width] = pair[0] / pair[1]
print("\n".join(f"width {width:4d}: {ratio:.1f} times as fast as SVI" for width, ratio in ratios.items()))

# %% [markdown]
# The gain for small networks is some times, for large ones little. And compiling has to be paid for first: in short runs,
# `Captured()` or Pyro's own `SVI` is quicker. Nor does it pay where the shapes of the data change all the time, since each
# shape has a graph of its own.
#
# ## Exercises
#
# 1. Replace `AutoNormal` in section 1 by `AutoMultivariateNormal`, and compare the intervals with those of NUTS. How much
#    longer does a step take by Pyro, and how much by `CompiledSVI`?
# 2. Make the noise of section 1 depend on the sign of the slope by `if`, read the error, and write it with `torch.where`.
# 3. Anneal the weight of section 2 from 0 to 1 in a thousand steps, with a single capture.
# 4. Repeat section 3 with `init_loc_fn=init_to_median`. What does the warning say, and how many restarts find the frequency?
#    Then with 1000 observations: are there more local optima, or fewer?
# 5. Sample the posterior of section 3 by `CompiledNUTS`, once as it is and once with `init=(sine, guide)`. Look at `r_hat`.
# 6. Fit your own model by `CompiledSVI`, and print `svi.findings`. Was it captured more than once? Why?
