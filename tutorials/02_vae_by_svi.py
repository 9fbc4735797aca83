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
# # A variational autoencoder, by SVI
#
# A variational autoencoder (VAE) explains each datum $x$ by a latent vector $z$: a decoder gives $p(x \mid z)$, an encoder
# gives $q(z \mid x)$. Both are trained by the evidence lower bound (ELBO),
#
# $$\log p(x) \ge \mathbb{E}_{q(z \mid x)} \log p(x \mid z) - \mathrm{KL}(q(z \mid x) \,\|\, p(z)).$$
#
# In this package a VAE has a Pyro `model` and `guide`, so that Pyro's own `SVI` and `Trace_ELBO` train it. You will learn
#
# 1. to train it by `SVI` in minibatches, and by `train` with early stopping and averaged weights;
# 2. how far the ELBO is from the log-likelihood, by importance-weighted bounds;
# 3. which latent units are used and which have died, why, and what helps;
# 4. to draw, to reconstruct and to interpolate;
# 5. to build a conditional VAE and one with a flow as prior, and to compare all of them on held-out data.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.poutine.messenger import Messenger

from pyro_genmodels import VAE, DiscretizedLogisticLikelihood, Flow, Labels, RealNVP, compare, datasets, log_likelihood, train
from pyro_genmodels.evaluation import LogLikelihood

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small networks gain nothing from more
pyro.set_rng_seed(0)
warnings.filterwarnings("ignore", message=".*Pareto k-hat")  # each printed value says it too

# %% [markdown]
# ## The data
#
# The data are scikit-learn's digits: 8 x 8 pixels with 17 grey levels, split into training, validation and test images.

# %%
data = datasets.digits()
print(f"{len(data.train)} training, {len(data.valid)} validation and {len(data.test)} test images; {data.levels} levels")


def show(rows, title, labels=None):
    """Show rows of images (N, 8, 8), dark on light, each row with a label."""
    _, axes = plt.subplots(len(rows), 1, squeeze=False, figsize=(8, 0.2 + 0.75 * len(rows)), layout="constrained")
    for ax, images, label in zip(axes[:, 0], rows, labels or [""] * len(rows), strict=True):
        padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1))
        ax.imshow(torch.cat(list(padded), -1).numpy(), cmap="gray_r", vmin=0, vmax=16)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    axes[0, 0].set_title(title)
    plt.show()


show([data.train[:14]], "training images")

# %% [markdown]
# ## 1. Training by SVI
#
# The likelihood is a choice: here each pixel is an integer from 0 to 16, drawn from a mixture of discretised logistics. There
# are 16 latent units. The VAE has a model, `vae.model`, with the sites `z` and `x` in a plate `data`, and a guide,
# `vae.guide`.
#
# A minibatch of 64 rows represents all 1437: the plate is told their number by `size=` and scales the log densities. The loss
# is then in nats for the whole data set, and we divide to get nats per image. Dropout is active in `vae.train()` and off in
# `vae.eval()`.


# %%
def new_vae(**options):
    pyro.set_rng_seed(0)
    return VAE(
        (8, 8), latent_dim=16, likelihood=DiscretizedLogisticLikelihood(data.levels, components=3), dropout=0.1, **options
    )


vae = new_vae()
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
size = len(data.train)
for epoch in range(2 if SMOKE else 30):
    vae.train()
    loss = sum(svi.step(batch, size=size) for batch in data.train[torch.randperm(size)].split(64))
    vae.eval()
    if epoch % 10 == 0:
        steps = -(-size // 64)
        valid = svi.evaluate_loss(data.valid) / len(data.valid)
        print(f"epoch {epoch:2d}: training {loss / steps / size:6.1f}, validation {valid:6.1f} nats per image")

# %% [markdown]
# `train` is the same loop with the usual additions: early stopping by the validation data, an exponential moving average of
# the weights (which is validated and kept), and clipped gradients. Its loss is `Trace_ELBO`, because the model has latent
# variables.

# %%
epochs = 3 if SMOKE else 200
options = {"valid": data.valid, "epochs": epochs, "batch_size": 64, "ema_decay": 0.99, "seed": 0, "progress": False}
plain = new_vae()
fit = train(plain, data.train, **options)
print(f"{fit.stopped}; best epoch {fit.best['epoch']}: {fit.best['valid']:.1f} nats per image on the validation data")

# %% [markdown]
# ## 2. How tight is the bound?
#
# The ELBO is the first of a family of bounds. With $k$ draws from the encoder,
#
# $$\log p(x) \ge \mathbb{E} \log \frac{1}{k} \sum_{j=1}^k \frac{p(x, z_j)}{q(z_j \mid x)},$$
#
# which rises with $k$ and meets $\log p(x)$ in the limit ([Burda et al., 2016](https://arxiv.org/abs/1509.00519)).
# `log_likelihood` computes it and says which kind of value it is. A bound is called unreliable where few samples carry most of
# the weight (Pareto k-hat above 0.7, [Vehtari et al., 2024](https://arxiv.org/abs/1507.02646)): it may be much too low, and its
# standard error is not to be trusted.

# %%
draws = [1, 10, 100] if SMOKE else [1, 3, 10, 30, 100, 300, 1000]
bounds = [log_likelihood(plain, data.test, num_samples=k) for k in draws]
print(bounds[0])
print(bounds[-1])

# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.semilogx(draws, [bound.mean for bound in bounds], "o-")
ax.set(xlabel="draws $k$", ylabel="bound on log p(x)\n(nats per held-out image)")
plt.show()

# %% [markdown]
# The bound with $k = 1$ is the ELBO. It is some nats below the last ones: that is the gap between the encoder's normal
# distribution and the true posterior of $z$. Towards the end the curve rises only slowly, so the last value is close to the
# log-likelihood, from below. Compare models at the same large $k$, never one's ELBO with another's bound at $k = 300$.
#
# ## 3. Which latent units have died
#
# The KL term of the ELBO is a sum over units, since prior and encoder are both normal and independent in each unit. Averaged
# over the data, the KL of a unit is an upper bound on the information, in nats, that the unit carries about an image.
# `vae.posterior(x)` is the encoder's distribution.


# %%
@torch.no_grad()
def kl_per_unit(vae, x):
    q = vae.posterior(x).base_dist
    return torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0)).mean(0)


def plot_units(vaes):
    _, axes = plt.subplots(1, len(vaes), figsize=(4.2 * len(vaes), 2.8), sharey=True, squeeze=False, layout="constrained")
    for ax, (name, vae) in zip(axes[0], vaes.items(), strict=True):
        kl = kl_per_unit(vae, data.train).sort(descending=True).values
        ax.bar(range(1, 17), kl.tolist())
        ax.set(
            xlabel="latent unit, sorted", xticks=range(1, 17, 3), title=f"{name}: {int((kl > 0.1).sum())} of 16 above 0.1 nats"
        )
    axes[0, 0].set_ylabel("mean KL to the prior (nats)")
    plt.show()


plot_units({"plain": plain})

# %% [markdown]
# Most of the units carry no information: their posterior is the prior for every image. This is called posterior collapse. The
# next cell checks that the decoder does not use them either. It replaces units by draws from the prior and computes the
# likelihood of the images.


# %%
@torch.no_grad()
def mean_likelihood(vae, replaced):
    """Return the mean of log p(x | z), in nats per image, with some units of z replaced by draws from the prior."""
    z = vae.posterior(data.test).sample((20,))
    z = torch.where(replaced, torch.randn_like(z), z)
    return vae().likelihood(z, None).log_prob(data.test).mean().item()


dead = kl_per_unit(plain, data.train) < 0.1
print(f"z from the encoder           {mean_likelihood(plain, torch.zeros(16).bool()):8.1f} nats")
print(f"dead units from the prior    {mean_likelihood(plain, dead):8.1f} nats")
print(f"used units from the prior    {mean_likelihood(plain, ~dead):8.1f} nats")

# %% [markdown]
# Why do units die? A unit is worth its cost when it improves the reconstruction by more nats than its own KL. It can fail to
# do so for two very different reasons:
#
# - **It is not needed.** The decoder and its likelihood explain what is left without it. Then the optimum of the ELBO has a
#   KL of zero there, and a dead unit is the right answer. In linear models one can show that such collapse is in the
#   log-likelihood itself, not a fault of the ELBO ([Lucas et al., 2019](https://arxiv.org/abs/1911.02469)).
# - **It was never tried.** At the start the decoder makes no use of $z$, so each unit only costs. The encoder moves it to the
#   prior before the decoder has learned to read it. Then the unit is pure noise, the decoder learns to ignore it, and the
#   gradient that could bring it back is gone. This is a trap of the optimisation, not a property of the data.
#
# The picture of the KL alone cannot tell these apart. Training differently can. A common cure for the second is to let the KL
# count little at first and raise its weight to 1 ([Bowman et al., 2016](https://arxiv.org/abs/1511.06349)). In Pyro this is a
# handler of five lines that scales the site `z` in model and guide.


# %%
class ScaleLatent(Messenger):
    """A handler that multiplies the log densities of the site "z" by a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["scale"] = msg["scale"] * self.weight


def warm_up(vae, *context, epochs=2 if SMOKE else 50):
    """Train by SVI while the weight of the KL rises from 0 to 1."""
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    vae.train()
    for epoch in range(epochs):
        with ScaleLatent((epoch + 1) / epochs):
            for rows in torch.randperm(size).split(64):
                svi.step(data.train[rows], *(c[rows] for c in context), size=size)


# %% [markdown]
# With weights below 1 the loss is no bound on $\log p(x)$. So this is a start only: afterwards `train` goes on from there
# with the true ELBO.

# %%
warmed = new_vae()
warm_up(warmed)
train(warmed, data.train, **options)
plot_units({"plain": plain, "warmed up": warmed})

# %%
k = 20 if SMOKE else 300
comparison = compare({"plain": plain, "warmed up": warmed}, data.test, num_samples=k)
comparison.table[["kind", "num_samples", "nats", "elpd_diff", "dse"]].round(2)

# %% [markdown]
# More units are in use, and the held-out log-likelihood is better by much more than the standard error of the difference
# (`elpd_diff` and `dse` are sums over the 180 images). So for these units collapse was the trap, not the optimum. For the
# units that are still dead we do not know. And more units in use are not a goal in themselves: only the held-out score says
# whether they were worth it.
#
# ## 4. Draws, reconstructions, interpolations
#
# `vae()` is a Pyro distribution. You can draw from it, but it has no density, because the integral over $z$ cannot be
# computed.

# %%
drawn = warmed().sample((28,))
show([data.test[:14], drawn[:14], drawn[14:]], "held-out images and draws", ["held out", "draws", "draws"])

# %% [markdown]
# `vae().likelihood(z, None)` is the distribution $p(x \mid z)$; here we plot its mean. A reconstruction goes from an image to
# the mean of $q(z \mid x)$ and back.


# %%
@torch.no_grad()
def decode(vae, z):
    return vae().likelihood(z, None).mean


x = data.test[:14]
show(
    [x, decode(plain, plain.posterior(x).mean), decode(warmed, warmed.posterior(x).mean)],
    "reconstructions of held-out images",
    ["held out", "plain", "warmed up"],
)

# %% [markdown]
# On a line between two latent means the decoder passes through images that were never seen. Some steps look like digits
# and some do not: nothing in the objective asks that all of them should.

# %%
start, end = warmed.posterior(data.test[:4]).mean, warmed.posterior(data.test[4:8]).mean
weights = torch.linspace(0, 1, 14)[:, None]
show([decode(warmed, a + weights * (b - a)) for a, b in zip(start, end, strict=True)], "from one held-out image to another")

# %% [markdown]
# ## 5. A conditional VAE
#
# With `context=Labels(10)` the encoder, the decoder and therefore the distribution depend on the digit's label. The label is
# the second argument of `model`, `guide` and `posterior`.

# %%
conditional = new_vae(context=Labels(10))
warm_up(conditional, data.train_labels)
train(conditional, (data.train, data.train_labels), **{**options, "valid": (data.valid, data.valid_labels)})
by_label = conditional(torch.arange(10)).sample((14,))  # (14, 10, 8, 8)
show(by_label.transpose(0, 1), "draws, a row for each label", [str(label) for label in range(10)])

# %% [markdown]
# The conditional VAE gives $p(x \mid c)$, which cannot be compared with $p(x)$, because it uses the label. But with equal
# probabilities of the labels, $p(x) = \frac{1}{10} \sum_c p(x \mid c)$, and $p(c \mid x)$ follows by Bayes' rule, though the
# model was never trained to classify.

# %%
labels = range(10)
scores = [log_likelihood(conditional, data.test, torch.full((len(data.test),), c), num_samples=k) for c in labels]
given_label = torch.stack([score.values for score in scores], -1)  # (180, 10)
accuracy = (given_label.argmax(-1) == data.test_labels).float().mean()
print(f"{accuracy:.1%} of the held-out images are most probable under their own label")

# %%
own = given_label.log_softmax(-1)[range(len(data.test)), data.test_labels].exp()
least = own.argsort()[:14]
print("lowest p(own label | x):", [f"{p:.2f}" for p in own[least][:7].tolist()])
show([data.test[least]], "held-out images that are least sure of their label, least sure first")

# %% [markdown]
# With so few draws the bounds of odd images are rough, and so are these probabilities: with other draws the order changes.
#
# ## 6. A flow as prior
#
# The standard normal prior can be changed as well. The average of the encoder's distributions over the data may differ from
# it, and then the prior draws latent vectors that no image has. A flow as the prior is trained together with the VAE, by the
# same ELBO. It is a family, passed as `prior=`.

# %%
flow = Flow((16,), transform=RealNVP(transforms=4, hidden=(64, 64)))
with_flow = new_vae(prior=flow)
warm_up(with_flow)
train(with_flow, data.train, **options)
drawn = with_flow().sample((28,))
show([drawn[:14], drawn[14:]], "draws with a flow as prior")

# %% [markdown]
# The next picture shows two units of $z$: on the left one draw from the encoder for each of 700 training images, coloured by
# label; on the right the same number of draws from the prior. The units are those whose encoder is sharpest, compared with
# their spread over the data.

# %%
fig, axes = plt.subplots(2, 2, figsize=(8, 6), sharex="row", sharey="row", layout="constrained")
for row, (name, vae) in zip(axes, {"normal prior": warmed, "flow as prior": with_flow}.items(), strict=True):
    with torch.no_grad():
        q = vae.posterior(data.train[:700])
        encoded = q.sample()
        prior = vae.prior().sample((700,)) if vae.prior else torch.randn(700, 16)
    two = (q.stddev.mean(0) / encoded.std(0)).topk(2, largest=False).indices.sort().values
    row[0].scatter(*encoded[:, two].T, s=4, c=data.train_labels[:700], cmap="tab10")
    row[1].scatter(*prior[:, two].T, s=4, color="gray")
    row[0].set_title(f"{name}: encoder")
    row[1].set_title(f"{name}: prior")
    for ax in row:
        ax.set(xlabel=f"$z_{{{int(two[0])}}}$", ylabel=f"$z_{{{int(two[1])}}}$")
plt.show()

# %% [markdown]
# In these two units both priors cover the encoder's draws; the flow has learned a wider shape with heavier tails. But two
# units of sixteen say little; the held-out log-likelihood says more.
#
# The last table compares all candidates. The conditional VAE is represented by its mixture over the labels, whose values we
# put into a `LogLikelihood` ourselves.

# %%
mixture = given_label.logsumexp(-1) - torch.tensor(10.0).log()
mixture = LogLikelihood(mixture, torch.full_like(mixture, float("nan")), "lower bound", k)  # its standard error is not known
fits = {"plain": plain, "warmed up": warmed, "flow as prior": with_flow, "conditional, mixed": mixture}
comparison = compare(fits, data.test, num_samples=k)
comparison.plot()
plt.show()
comparison.table[["kind", "nats", "bits_per_dim", "elpd_diff", "dse", "weight"]].round(3)

# %% [markdown]
# `weight` is the stacking weight: the weights of the mixture of candidates that gives the held-out images the highest
# likelihood. All values are lower bounds with the same $k$. We do not know exactly how loose each of them is, and a looser
# one understates its model, so do not trust small differences. One seed and 180 images do not settle the ranking either.
