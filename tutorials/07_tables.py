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
# # Tables with mixed columns and missing values
#
# A table of patients has columns of different kinds: an age, a bill in euros, a number of visits, a ward. And it has gaps. The
# usual remedies are to drop the rows with gaps, or to fill in the mean of the column. Both give wrong answers here. A
# variational autoencoder (VAE) with one likelihood for each column learns from the values that are known, and draws the others
# given these. You will learn
#
# 1. to choose a likelihood for each column by `Mixed.of`, and to correct its choices;
# 2. to train a VAE on a table with gaps by an importance-weighted bound, and to see how near it is to the truth;
# 3. to read `diagnose_vae`: how many latent variables does the table have?
# 4. to fill in the gaps with their uncertainty, and to test if that uncertainty is right;
# 5. what dropping rows and filling in means do to averages, spreads and correlations;
# 6. to compare models on held-out rows, and to train any other family on completed tables;
# 7. to ask for some columns given any others by `complete`.

# %%
import os
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch

from pyro_genmodels import VAE, Autoregressive, Mixed, NormalLikelihood, compare, log_likelihood, to_arviz, train
from pyro_genmodels.evaluation import LogLikelihood, diagnose_vae, impute
from pyro_genmodels.families import PoissonLikelihood, Transformer
from pyro_genmodels.infer import ImportanceWeightedELBO

warnings.filterwarnings("ignore", message=".*Pareto k-hat")  # each printed value says it too
warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)  # it announces version 1
import arviz as az

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
num_rows, epochs = (900, 2) if SMOKE else (3000, 100)
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small networks gain nothing from more
pyro.set_rng_seed(0)

# %% [markdown]
# ## The table
#
# We make the table ourselves, so that we know what is behind it: one number $s$ for each patient, how ill they are. All columns
# depend on it, each in its own way. Nothing below is told of $s$.


# %%
def columns(s):
    """Return the distribution of each column given s, (...)."""
    return {
        "age": dist.Normal(55 + 10 * s, 5.0),
        "bill": dist.LogNormal(6 + 0.6 * s, 0.4),
        "visits": dist.Poisson((1.2 + 0.6 * s).exp()),
        "ward": dist.Categorical(logits=torch.stack([-2 * s, torch.ones_like(s), 2 * s], -1)),
        "smoker": dist.Bernoulli(logits=-0.5 - 1.5 * s),
        "adherence": dist.Beta(12 * (1.5 - s**2).sigmoid(), 12 * (s**2 - 1.5).sigmoid()),  # lowest at both ends
    }


def draw(rows):
    return pd.DataFrame({name: d.sample().double().numpy() for name, d in columns(torch.randn(rows)).items()})


full, test = draw(num_rows), draw(num_rows // 3)
full.head().round(2)

# %% [markdown]
# Now some values get lost: more of old patients than of young ones. All ages are known, so whether a value is missing depends
# on what is known. This is called *missing at random*, and it is what makes the problem solvable. If large bills were
# missing because they are large, no method could tell from this table alone.


# %%
def with_gaps(frame):
    rate = 1 / (1 + np.exp(1 - (frame["age"] - 55) / 10))
    lost = torch.rand(frame.shape).numpy() < rate.to_numpy()[:, None]
    lost[:, 0] = False
    return frame.mask(lost)


table, test_with_gaps = with_gaps(full), with_gaps(test)
complete_rows = table.dropna()
print(f"{table.isna().to_numpy()[:, 1:].mean():.0%} of the values are missing beside the age")
print(f"{len(complete_rows)} of {len(table)} rows are complete; their mean age is {complete_rows['age'].mean():.0f}")
print(f"the mean age of all rows is {table['age'].mean():.0f}")
table.head().round(2)

# %% [markdown]
# ## 1. A likelihood for each column
#
# `Mixed.of` looks at the numbers and chooses.

# %%
for name, likelihood in zip(table.columns, Mixed.of(table).likelihoods, strict=True):
    print(f"{name:10s} {likelihood}")

# %% [markdown]
# A bill is positive and varies by factors, so it is log-normal; `ward` holds the whole numbers 0, 1 and 2, so they are classes;
# `adherence` lies between 0 and 1, so it has a beta distribution. These are guesses. Numbers do not tell all, and two guesses
# need a word from us. For counts the choice is negative binomial, whose variance may be larger than the mean. But we believe
# that visits vary for reasons that the other columns show, and are Poisson given $z$. And whether `age` is called normal or
# log-normal hangs on the youngest patient. `kinds` names the columns that we know better.

# %%
kinds = Mixed.of(table, kinds={"age": NormalLikelihood(), "visits": PoissonLikelihood()})

# %% [markdown]
# ## 2. A VAE of what is known
#
# With `missing=True` the VAE takes NaN for a missing value. The encoder sees which values are known. The decoder's
# likelihood leaves out the others, because given $z$ the columns are independent:
#
# $$p(x_\text{known}) = \int p(z) \prod_{j \text{ known}} p(x_j \mid z)\,dz.$$
#
# So a bound on this is a bound on the density of what is known. We train by the importance-weighted bound with five draws
# of $z$ per row, which is tighter than the ELBO (MIWAE, [Mattei and Frellsen, 2019](https://arxiv.org/abs/1812.02633)). A data
# frame is taken as it is; its columns are matched by name.

# %%
pyro.set_rng_seed(0)
vae = VAE((6,), latent_dim=4, likelihood=kinds, missing=True, hidden=(64, 64))
options = {"epochs": epochs, "batch_size": 250, "ema_decay": 0.98, "seed": 0, "progress": False}
options["optim"] = partial(torch.optim.Adam, lr=3e-3)
fit = train(vae, table, valid=0.15, objective=ImportanceWeightedELBO(5), **options)
print(f"{fit.stopped}; best epoch {fit.best['epoch']}: {fit.best['valid']:.2f} nats per row")

# %% [markdown]
# Is that good? Since we made the table, we can compute the log-likelihood of the true distribution: $s$ is one number, so a
# sum over a fine grid is exact. No model can beat it on new rows, except by chance.

# %%
grid = torch.linspace(-6, 6, 1201, dtype=torch.float64)


def log_joint(frame):
    """Return log p(s, known values), (rows, grid)."""
    x = torch.tensor(frame.to_numpy())
    total = dist.Normal(0.0, 1.0).log_prob(grid) + (grid[1] - grid[0]).log()
    for j, d in enumerate(columns(grid).values()):
        value = x[:, j : j + 1]
        inner = torch.where(value.isnan(), 0.5 if j in (0, 1, 5) else 0.0, value)  # any number of the support
        total = total + torch.where(value.isnan(), 0.0, d.log_prob(inner))
    return total


truth = log_joint(test_with_gaps).logsumexp(1)
print(f"the truth          {-truth.mean():.3f} nats per row, lower is better")
for k in (1, 10, 100) if SMOKE else (1, 10, 1000):
    print(f"VAE, {k:4d} draws    {-log_likelihood(vae, test_with_gaps, num_samples=k).mean:.3f}")

# %% [markdown]
# The first value of the VAE is its ELBO, an upper bound on its negative log-likelihood; the last is nearly the value itself. It
# is about a hundredth of a nat above the truth, although the VAE has seen nothing but a table with gaps.
#
# ## 3. How many latent variables?
#
# We gave the VAE four. `diagnose_vae` says how many are in use: a unit is active if its mean changes from row to row.

# %%
diagnosis = diagnose_vae(vae, table)
print(diagnosis)
diagnosis.plot()
plt.show()

# %% [markdown]
# One of the four is active. The others are left at the prior and do nothing, so it costs little to have too many. (Information
# and distance are estimates, so that a distance of nearly 0 can come out negative.) The table was made from one number indeed,
# and the active unit is that number, up to a bend:

# %%
with torch.no_grad():
    z = vae.posterior(full).mean[:, diagnosis.active["z"].nonzero().flatten()[:1] if diagnosis.active["z"].any() else 0]
s = (log_joint(full).softmax(1) * grid).sum(1)  # its mean given all columns
plt.figure(figsize=(4.5, 3), layout="constrained")
plt.plot(s, z, ".", markersize=2)
plt.xlabel("$s$, its mean given the row")
plt.ylabel("active unit of $z$")
plt.show()

# %% [markdown]
# ## 4. Filling in the gaps
#
# `impute` draws the missing values from $p(x_\text{missing} \mid x_\text{known})$, by importance weights of draws from the
# encoder. It returns several tables, and their differences are the uncertainty. What is known is left as it is.

# %%
tables = impute(vae, table, num_samples=100, num_particles=50 if SMOKE else 200)
print(tuple(tables.shape), "tables, rows, columns")

# %% [markdown]
# The exact distribution is known here too: draw $s$ given the known values, then the others given $s$. Here is one patient,
# an old one of whom only some values are known.


# %%
def draw_exactly(frame, number):
    """Return tables completed by the true distribution, (number, rows, columns)."""
    x = torch.tensor(frame.to_numpy())
    s = grid[log_joint(frame).softmax(1).multinomial(number, replacement=True).T]
    drawn = torch.stack([d.sample().double() for d in columns(s).values()], -1)
    return torch.where(x.isnan(), drawn, x)


wanted = ["bill", "visits", "adherence"]
old = table[table[wanted].isna().all(axis=1) & (table["ward"] == 2) & (table["smoker"] == 0)]["age"]
patient = table.loc[[(old - 66).abs().idxmin()]]
print(patient.round(2).to_string(index=False))
by_vae = impute(vae, patient, num_samples=2000, num_particles=4000)[:, 0]
exactly = draw_exactly(patient, 2000)[:, 0]

fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
for ax, name in zip(axes, wanted, strict=True):
    j = table.columns.get_loc(name)
    low, high = exactly[:, j].quantile(torch.tensor([0.002, 0.998], dtype=torch.float64)).tolist()
    bins = np.arange(-0.5, high + 1) if name == "visits" else np.linspace(low, high, 30)
    ax.hist(exactly[:, j], bins, density=True, color="0.8", label="truth")
    ax.hist(by_vae[:, j], bins, density=True, histtype="step", color="C0", label="VAE")
    ax.axvline(full.loc[patient.index[0], name], color="C1", label="the lost value")
    ax.set(xlabel=name, yticks=[])
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# Over the whole table: how far are the imputed means from the lost values, in standard deviations of the column? The best that
# anybody could do is the mean of the true distribution. And do 90 % intervals contain 90 % of the lost values?

# %%
completed = {"VAE": tables, "truth": draw_exactly(table, 100)}
rows = {}
for name in ("bill", "visits", "adherence"):
    scaled = np.log if name == "bill" else np.asarray
    lost = table[name].isna().to_numpy(copy=True)
    value, deviation = scaled(full[name])[lost], scaled(full[name]).std()
    guesses, inside = {"mean of the column": np.full(len(value), scaled(table[name].dropna()).mean())}, {}
    for method, drawn in completed.items():
        drawn = scaled(drawn[:, lost, table.columns.get_loc(name)].numpy())
        low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
        guesses[method], inside[method] = drawn.mean(0), np.mean((low <= value) & (value <= high))
    errors = {method: np.sqrt(np.mean((guess - value) ** 2)) / deviation for method, guess in guesses.items()}
    rows["log(bill)" if name == "bill" else name] = {
        **{f"error, {method}": error for method, error in errors.items()},
        **{f"inside, {method}": share for method, share in inside.items()},
    }
pd.DataFrame(rows).round(2)

# %% [markdown]
# The errors of the VAE are nearly those of the truth, and much smaller than those of the mean of the column. An interval from a
# hundred draws is a little too narrow, so that those of the truth contain less than 90 % of the lost real numbers; those
# of whole numbers contain more, since they cannot end between two of them. The intervals of the VAE do the same: its
# uncertainty is right.
#
# ## 5. What the usual remedies do
#
# Here are some quantities that somebody may want from this table, from all values (which nobody has), from the complete rows,
# with means filled in (for classes the most frequent one), and from the tables of `impute`: their mean, and the standard
# deviation over tables.


# %%
def quantities(frame):
    bill = np.log(frame["bill"])
    return {
        "mean bill": frame["bill"].mean(),
        "sd of log(bill)": bill.std(),
        "mean visits": frame["visits"].mean(),
        "share in ward 2": (frame["ward"] == 2).mean(),
        "share of smokers": frame["smoker"].mean(),
        "correlation of age and visits": frame["age"].corr(frame["visits"]),
        "correlation of bill and visits": bill.corr(frame["visits"]),
    }


filled = table.fillna(table.mean().where(~table.columns.isin(["ward", "smoker"]), table.mode().iloc[0]))
of_tables = pd.DataFrame([quantities(pd.DataFrame(one.numpy(), columns=table.columns)) for one in tables])
pd.DataFrame(
    {
        "all values": quantities(full),
        "rows dropped": quantities(complete_rows),
        "means filled in": quantities(filled),
        "imputed": of_tables.mean(),
        "± over tables": of_tables.std(),
    }
).round(3)

# %% [markdown]
# - **Dropping rows** keeps the young patients, so bills and visits are much too low. It would be right only if
#   values were lost by pure chance, and it throws away more than two thirds of the table.
# - **Filling in means** repeats the means of the known values, which are too low as well. And it makes spreads and
#   correlations too small, since what is filled in has neither.
# - **Imputed tables** are near all of these. They are off by up to three times what they differ among themselves: that is the
#   uncertainty of the lost values alone, as if the VAE were the truth.
#
# One filled-in table, even a good one, would hide the uncertainty: use several, compute from each what you want, and look at
# the spread (*multiple imputation*, Rubin, 1987).
#
# ## 6. Which model is better?
#
# An autoregressive model has an exact likelihood and takes the same likelihoods, but no gaps. It can be trained on the complete
# rows, or on a completed table: one of the tables of `impute`. We compare on held-out rows without gaps. The true
# distribution enters as a `LogLikelihood` of its own.


# %%
def autoregressive(x):
    pyro.set_rng_seed(0)
    x = pd.DataFrame(x.numpy(), columns=table.columns) if isinstance(x, torch.Tensor) else x
    network = Transformer(layers=2, width=32, dropout=0.1)
    family = Autoregressive((6,), likelihood=kinds, network=network, order="any")
    train(family, x, valid=0.15, **options)
    return family


on_complete_rows, on_a_completed_table = autoregressive(complete_rows), autoregressive(tables[0])

# %%
exact = log_joint(test).logsumexp(1)
fits = {
    "truth": LogLikelihood(exact, torch.zeros_like(exact), "exact", 1),
    "VAE, rows with gaps": vae,
    "autoregressive, completed table": on_a_completed_table,
    "autoregressive, complete rows": on_complete_rows,
}
comparison = compare(fits, test, num_samples=100 if SMOKE else 500)
comparison.plot()
plt.show()
comparison.table[["kind", "elpd", "elpd_diff", "dse", "weight"]].round(2)

# %% [markdown]
# `elpd_diff` is the loss of log-likelihood against the best, summed over the rows, with its standard error `dse`, as in ArviZ's
# own comparisons. The model that was trained on the complete rows is far behind: it has hardly seen an old patient. The same
# model on a completed table is much better: what it knows beyond the known values, it has from the VAE. The VAE is nearest to
# the truth. Its bound is called *unreliable*, because in some rows a few draws carry most of the weight (Pareto k-hat above
# 0.7). Such a bound may be too low, so the VAE may be better than it looks.
#
# Where are they wrong? `to_arviz` exports draws of each, and ArviZ lays them over the bills of all patients.

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
draws = {"VAE": vae, "completed table": on_a_completed_table, "complete rows": on_complete_rows}
for ax, (title, family) in zip(axes, draws.items(), strict=True):
    x = to_arviz(family, num_samples=500 if SMOKE else 3000, progress=False).posterior_predictive["x"].values[0]
    for label, color, bill in (("all patients", "gray", full["bill"].to_numpy()), ("draws", "C0", x[:, 1])):
        az.plot_dist(np.log(bill), color=color, ax=ax, textsize=10, plot_kwargs={"label": label})
    ax.set(title=title, xlabel="log(bill)", yticks=[], xlim=(3, 10.5))
axes[0].legend()
plt.show()

# %% [markdown]
# ## 7. Some columns given any others
#
# With `order="any"` the transformer has learned every order of the columns, so that `complete` draws any of them given any
# others. How many visits has a patient of 70 in ward 2 who does not smoke? What do we learn from the bill?

# %%
question = pd.DataFrame([{"age": 70.0, "ward": 2, "smoker": 0}]).reindex(columns=table.columns)
costly = question.assign(bill=2000.0)
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharex=True, sharey=True, layout="constrained")
for ax, (title, asked) in zip(axes, {"70, ward 2": question, "70, ward 2, a bill of 2000": costly}.items(), strict=True):
    x = torch.tensor(asked.to_numpy())
    answer = on_a_completed_table().complete(x.float().expand(4000, 6), ~x.isnan()[0])[:, 2]
    bins = np.arange(-0.5, 31)
    ax.hist(draw_exactly(asked, 4000)[:, 0, 2], bins, density=True, color="0.8", label="truth")
    ax.hist(answer, bins, density=True, histtype="step", color="C0", label="complete")
    ax.set(title=title, xlabel="visits", yticks=[])
axes[0].legend()
plt.show()

# %% [markdown]
# A large bill tells of a patient who is more ill, and so has more visits. Both answers are near the truth. They are not exact:
# the network has learned from one completed table, for all orders of its columns.
#
# ## Which tool when
#
# - Gaps in the training data: `VAE(..., missing=True)`, `ImportanceWeightedELBO`, `impute`.
# - An exact likelihood, or questions about any columns given others: `Autoregressive`, on a completed table if the gaps are not
#   few and by chance.
# - If values are missing *because of* what they are, none of this helps. Ask how the table came about.
#
# ## Exercises
#
# 1. Let `with_gaps` lose values at the same rate for all ages. Which of the numbers in section 5 are right now for the complete
#    rows? Which are still wrong for the means?
# 2. Lose large bills more often than small ones. How wrong are the imputed tables?
# 3. Leave `kinds` out of `Mixed.of`. Does the choice of the negative binomial distribution cost held-out likelihood?
# 4. Train the VAE by `Trace_ELBO()`. Do the intervals of section 4 still contain 90 %?
# 5. Compute the quantities of section 5 for 5, 20 and 100 tables. How many do you need for the mean, how many for the spread?
# 6. Add a second hidden number to `columns`, on which bill and adherence depend. How many units are active?
