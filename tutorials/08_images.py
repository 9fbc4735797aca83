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
# # Images: autoregressive models and flows
#
# A grey picture is a grid of whole numbers. An autoregressive model draws one pixel after the other, each given those before
# it. A flow bends noise into a picture in one piece. Both have a likelihood, so they can be trained by it, and compared by it.
# You will learn
#
# 1. to build an autoregressive model by a `PixelCNN` or a `Transformer`, and to choose how a pixel is distributed;
# 2. to measure images in bits per dimension;
# 3. to train all orders of the pixels at once, and to complete an image of which any part is known;
# 4. to draw at a lower temperature, and what it costs;
# 5. to put a flow on integers: what dequantisation is, and why the likelihood becomes a lower bound;
# 6. to compare all of them on held-out images, and to find images that a model did not expect.

# %%
import math
import os
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from torch.nn.functional import one_hot, pad

from pyro_genmodels import (
    Autoregressive,
    CategoricalLikelihood,
    DiscretizedLogisticLikelihood,
    Flow,
    compare,
    datasets,
    log_likelihood,
    to_arviz,
    train,
)
from pyro_genmodels.families import Glow, PixelCNN, Transformer

warnings.filterwarnings("ignore", message=".*Pareto k-hat")  # each printed value says it too
warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)  # it announces version 1
import arviz as az

SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))  # small settings, to see that everything runs
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # small networks gain nothing from more
pyro.set_rng_seed(0)

# %% [markdown]
# ## The data
#
# Scikit-learn's digits have 8 x 8 pixels with 17 grey levels. They are small enough to train everything below in a few minutes.

# %%
data = datasets.digits()
pixels, levels = 64, data.levels
print(f"{len(data.train)} training, {len(data.valid)} validation and {len(data.test)} test images; {levels} levels")


def show(rows, labels=None, title=None):
    """Show rows of images (n, 8, 8), dark on light, each row with a label."""
    _, axes = plt.subplots(len(rows), 1, squeeze=False, figsize=(8, 0.3 + 0.65 * len(rows)), layout="constrained")
    for ax, images, label in zip(axes[:, 0], rows, labels or [""] * len(rows), strict=True):
        padded = pad(images.float(), (1, 1, 1, 1))
        ax.imshow(torch.cat(list(padded), -1).numpy(), cmap="gray_r", vmin=0, vmax=levels - 1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    axes[0, 0].set_title(title or "")
    plt.show()


show([data.train[:12]], title="training images")

# %% [markdown]
# ## 1. One pixel after the other
#
# The chain rule holds for any distribution, and for any order of the pixels:
#
# $$\log p(x) = \sum_{i=1}^{64} \log p(x_i \mid x_1, \dots, x_{i-1}).$$
#
# A network returns all 64 conditionals in one pass, as long as output $i$ does not look at pixel $i$ and later ones. A
# `PixelCNN` ([van den Oord et al., 2016](https://arxiv.org/abs/1606.05328)) is a convolutional network with masked kernels: a
# pixel sees those above it and to its left.
#
# How is one pixel distributed? `CategoricalLikelihood(17)` has a probability of its own for each grey level. It does not know
# that 8 is near 9. `DiscretizedLogisticLikelihood(17)` does: it is a mixture of bell curves, cut into levels. We train both.

# %%
epochs = 1 if SMOKE else 18


def fit(family, **options):
    options = {"epochs": epochs, "batch_size": 64, "ema_decay": 0.98, "seed": 0, "progress": False} | options
    result = train(family, data.train, valid=data.valid, optim=partial(torch.optim.Adam, lr=3e-3), **options)
    print(f"{result.stopped}; best epoch {result.best['epoch']}: {result.best['valid']:.1f} nats per validation image")
    return family


network = PixelCNN(layers=3, channels=24, kernel=3, dropout=0.1)
classes = fit(Autoregressive((8, 8), likelihood=CategoricalLikelihood(levels), network=network))
ordered = fit(Autoregressive((8, 8), likelihood=DiscretizedLogisticLikelihood(levels, components=3), network=network))

# %% [markdown]
# The ordered levels are better by about two nats with the same network. From here on we use them.
#
# ## 2. Bits per dimension
#
# Nats per image depend on the number of pixels. So images are measured in bits per dimension: the negative log-likelihood in
# bits, divided by the number of pixels. It is the length of the file into which a perfect compressor would pack an image by
# this model, per pixel. Here is the scale: the same for all levels, and for pixels that are independent, each with the
# frequencies of its grey levels (plus one count each, so that no level is impossible).

# %%
counts = one_hot(data.train.long(), levels).sum(0) + 1.0
independent = (counts / counts.sum(-1, keepdim=True)).log()
nats = {
    "all levels alike": torch.full((len(data.test),), pixels * math.log(levels)),
    "independent pixels": -(one_hot(data.test.long(), levels) * independent).sum((1, 2, 3)),
    "PixelCNN, classes": -log_likelihood(classes, data.test).values,
    "PixelCNN, ordered": -log_likelihood(ordered, data.test).values,
}
for name, values in nats.items():
    print(f"{name:20s} {values.mean():6.1f} nats per image, {values.mean() / pixels / math.log(2):.3f} bits per dimension")

# %% [markdown]
# Where are the bits? A pixel costs much where those before it do not tell what it is: at the top, where a digit begins, and
# near the bottom, where its last strokes turn. The columns at the edges cost little, since they are nearly always white.

# %%
with torch.no_grad():
    y = data.test.flatten(1)
    conditionals = ordered.likelihood(ordered.conditionals(ordered.likelihood.encode(y).float(), None, ordered.order))
    bits = -conditionals.log_prob(y).mean(0).reshape(8, 8) / math.log(2)
_, axes = plt.subplots(1, 2, figsize=(6, 2.6), layout="constrained")
axes[0].imshow(data.test.float().mean(0).numpy(), cmap="gray_r")
axes[0].set(title="mean test image", xticks=[], yticks=[])
shown = axes[1].imshow(bits.numpy(), cmap="viridis")
axes[1].set(title="bits per pixel", xticks=[], yticks=[])
plt.colorbar(shown)
plt.show()

# %% [markdown]
# ## 3. Any order, and half an image
#
# The PixelCNN draws from top to bottom. So it can complete the lower half of an image, but not the upper one: the known pixels
# have to come first.

# %%
lower = torch.zeros(8, 8, dtype=torch.bool)
lower[4:] = True
try:
    ordered().complete(data.test[:1], known=lower)
except ValueError as error:
    print(error)

# %% [markdown]
# A transformer whose tokens know their positions serves every order. With `order="any"`, training draws a new order for each
# image, so that the network learns all conditionals of a pixel given any others
# ([Uria et al., 2014](https://arxiv.org/abs/1310.1757)). That is a much harder task than one order.

# %%
network = Transformer(layers=2, width=48, heads=2, positions="rotary")
any_order = Autoregressive((8, 8), likelihood=DiscretizedLogisticLikelihood(levels, components=3), network=network, order="any")
fit(any_order, epochs=1 if SMOKE else 35)
orders = [torch.arange(pixels), torch.arange(pixels).flip(0), *(torch.randperm(pixels) for _ in range(4))]
with torch.no_grad():
    by_order = torch.stack([any_order().in_order(order).log_prob(data.test) for order in orders])
for name, values in zip(["row by row", "backwards", *["random order"] * 4], by_order, strict=True):
    print(f"{name:15s} {-values.mean():.1f} nats per image")
mixed = by_order.logsumexp(0) - math.log(len(orders))
print(f"{'their mean':15s} {-mixed.mean():.1f}")

# %% [markdown]
# Each order is a distribution of its own, though all of them come from one network. The mean of their densities is a density as
# well, and better than any of them here. All are far behind the PixelCNN: 35 epochs are not nearly enough for so many tasks at
# once.
#
# In return, any part can be known. Each row below has one test image, what is known of it, and six completions. What is known
# is left as it is, and the completions differ in the rest.

# %%
parts = {name: torch.zeros(8, 8, dtype=torch.bool) for name in ("upper half", "lower half", "left half", "every third")}
parts["upper half"][:4] = parts["lower half"][4:] = parts["left half"][:, :4] = True
parts["every third"].view(-1)[::3] = True
rows = []
for image, known in zip(data.test[[1, 3, 4, 7]], parts.values(), strict=True):
    completed = any_order().complete(image.expand(6, 8, 8), known)
    rows.append(torch.cat([image[None], torch.where(known, image, 0)[None], completed]))
show(rows, list(parts), title="a test image, what is known, and six completions")

# %% [markdown]
# ## 4. Temperature
#
# `tempered` divides the logits of each conditional by a temperature. Below 1, likely levels become likelier, and strokes become
# cleaner. The result is a distribution like any other, with its own exact likelihood. So we can see what the beauty costs.

# %%
temperatures = [0.5, 0.8, 1.0, 1.2]
with torch.no_grad():
    tempered = {t: ordered().tempered(temperature=t) for t in temperatures}
    show([d.sample((12,)) for d in tempered.values()], [f"$T$ = {t:g}" for t in temperatures], title="draws of the PixelCNN")
    for t, d in tempered.items():
        print(f"temperature {t:g}: {-d.log_prob(data.test).mean():6.1f} nats per test image")

# %% [markdown]
# The likelihood of real images is best near a temperature of 1, and falls on both sides. A model that draws nothing but pretty
# pictures is a bad model of all pictures.
#
# ## 5. A flow on integers
#
# A flow is a density on real numbers: an invertible map $f$ from images to normal noise. `Glow`
# ([Kingma and Dhariwal, 2018](https://arxiv.org/abs/1807.03039)) builds $f$ from convolutions that can be inverted, at
# several scales. Its draws take one pass, however many pixels there are.
#
# But grey levels are integers, and a density that is trained on integers grows without bound: it puts spikes on them. The
# cure is to spread each integer over an interval of length 1. A density $p$ on $[0, 17]^{64}$ then gives an image the
# probability
#
# $$P(x) = \int_{[0,1]^{64}} p(x + u)\,du, \qquad
# \log P(x) \ge \mathbb{E}_{u \sim q(u \mid x)}\left[\log p(x + u) - \log q(u \mid x)\right].$$
#
# The integral is out of reach, but the right side is not: add noise $u$ and evaluate the density. It is a *lower bound*: the
# true log-likelihood is higher, by the divergence of $q$ from what the flow believes about the remainder $u$. With uniform
# noise $q$ the flow has to be flat within each level, or pay. Let a second flow choose the noise (`dequantization=`), and the
# bound becomes tighter ([Ho et al., 2019](https://arxiv.org/abs/1902.00275)).

# %%
transform, epochs_of_flows = Glow(levels=2, steps=4, channels=32), 1 if SMOKE else 40
uniform = fit(Flow((8, 8), transform=transform, levels=levels), epochs=epochs_of_flows)
noise = Glow(levels=1, steps=2, channels=16, bins=8)
learned = fit(Flow((8, 8), transform=transform, levels=levels, dequantization=noise), epochs=epochs_of_flows)

# %% [markdown]
# With $k$ draws of the noise, the log of the mean of $p(x + u) / q(u \mid x)$ is a tighter bound, as it is for a VAE. Each
# flow is better with more draws, and the flow with learned noise is better throughout.

# %%
draws = [1, 10] if SMOKE else [1, 10, 100]
for name, flow in {"uniform noise": uniform, "learned noise": learned}.items():
    bounds = [log_likelihood(flow, data.test, num_samples=k).bits_per_dim(pixels) for k in draws]
    print(f"{name}: " + ", ".join(f"{bits:.3f} bits with k = {k}" for k, bits in zip(draws, bounds, strict=True)))

# %%
with torch.no_grad():
    show([uniform().sample((12,)), learned().sample((12,))], ["uniform noise", "learned noise"], title="draws of the flows")

# %% [markdown]
# ## 6. Compared on held-out images
#
# `compare` scores all of them on the test images, in a table like that of ArviZ. It says which values are exact and which are
# bounds. Noise is drawn anew, so that the bounds differ a little from those above.

# %%
fits = {
    "PixelCNN, classes": classes,
    "PixelCNN, ordered": ordered,
    "transformer, any order": any_order,
    "Glow, uniform noise": uniform,
    "Glow, learned noise": learned,
}
comparison = compare(fits, data.test, num_samples=draws[-1])
comparison.plot()
plt.show()
comparison.table[["kind", "bits_per_dim", "elpd_diff", "dse", "weight"]].round(3)

# %% [markdown]
# How to read this: the value of a PixelCNN is exact. That of a flow is a bound, below its log-likelihood on average, and called
# *unreliable*, since a few of the draws carry most of the weight (Pareto k-hat above 0.7) and more draws would raise it. So
# where a flow is ahead by more than the standard error `dse`, it is better. Where it is behind, it may still be better.
# `weight` is the stacking weight, the share of each model in the mixture of them that predicts the test images best.
#
# Which images did the best model not expect?

# %%
best = log_likelihood(fits[comparison.table.index[0]], data.test, num_samples=draws[-1]).values.argsort()
show([data.test[best[:12]], data.test[best[-12:]]], ["least likely", "most likely"], title=comparison.table.index[0])

# %% [markdown]
# The most likely images are plain strokes, as of ones; the least likely have many turns and shades.
#
# A likelihood says that a model is wrong, but not how. For that, compare draws with data in what you care about, here the ink
# of an image and how much two neighbours differ. `to_arviz` exports draws of a family, of which ArviZ makes pictures.

# %%
statistics = {
    "mean grey level": lambda x: x.mean((1, 2)),
    "mean step to the right": lambda x: np.abs(np.diff(x, axis=2)).mean((1, 2)),
}
drawn = {}
for name in ("PixelCNN, ordered", "transformer, any order", "Glow, learned noise"):
    drawn[name] = to_arviz(fits[name], num_samples=100 if SMOKE else 500, progress=False).posterior_predictive["x"].values[0]
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for ax, (title, statistic) in zip(axes, statistics.items(), strict=True):
    for (name, x), color in zip({"test images": data.test.numpy(), **drawn}.items(), ("gray", "C0", "C1", "C2"), strict=True):
        az.plot_dist(statistic(x.astype(float)), color=color, ax=ax, textsize=10, plot_kwargs={"label": name})
    ax.set(xlabel=title, yticks=[])
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# Draws of the PixelCNN and of the flow have the ink and the steps of the test images, or nearly so. The ink of the
# transformer's draws varies too much: some are fainter or blacker than any test image.
#
# ## Which one when
#
# - An exact likelihood: `Autoregressive` with a `PixelCNN`. A draw takes one step for each pixel.
# - Images with unknown parts, in any place: `Transformer` with `order="any"`. With a fixed order, the known pixels come first.
# - Many draws, or maps from images to noise and back: `Flow` with `Glow`. Its likelihood of integers is a bound: give the
#   number of draws $k$ with it, and compare flows with the same $k$.
#
# ## Exercises
#
# 1. Give the PixelCNN one layer more, and then a kernel of 5. Does a pixel have to see farther?
# 2. Train on the first 200 images only. How much more do classes lose than ordered levels?
# 3. Evaluate the transformer with `in_order` of 20 random orders. How much better is the mean of all than the best one?
# 4. Complete the lower halves of half of the test images, and give them to `pyro_genmodels.evaluation.c2st` with the other
#    half. Can a classifier tell them apart?
# 5. Train the flow without `levels=`, on `data.train + 0.5` as real numbers. Read the warning, and look at the loss.
# 6. Build a PixelCNN with `context=Labels(10)`, train it on `(data.train, data.train_labels)`, and draw each digit. Does
#    knowing the digit save bits?
