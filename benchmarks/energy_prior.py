"""Benchmark of a VAE with an energy-based prior against the same VAE with a normal prior, on scikit-learn's digits.

python benchmarks/energy_prior.py

Latent energy-based priors: Pang et al. 2020 (arXiv 2006.08205). Both are trained by the same call, and evaluated on the same
held-out images.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads free the cores

import time

import pyro
import torch
from torch import Tensor

from pyro_genmodels import VAE, DenseEnergy, DiscretizedLogisticLikelihood, EnergyModel, Persistent, log_likelihood, train
from pyro_genmodels.datasets import load


def fit(name: str, prior: EnergyModel | None) -> Tensor:
    """Train a VAE, evaluate it and print a row; return the log-likelihoods of the held-out images."""
    start = time.perf_counter()
    digits = load("digits")
    pyro.set_rng_seed(0)
    pixels = DiscretizedLogisticLikelihood(17, components=3)
    vae = VAE((8, 8), latent_dim=16, likelihood=pixels, hidden=(256, 256), dropout=0.1, prior=prior)
    options = {"epochs": 300, "batch_size": 64, "patience": 60, "ema_decay": 0.99, "seed": 0}
    train(vae, digits.train, valid=digits.valid, **options)
    pyro.set_rng_seed(0)
    likelihood = log_likelihood(vae, digits.test, num_samples=512)
    log_z = "" if likelihood.log_partition is None else f"; {likelihood.log_partition}"
    seconds = time.perf_counter() - start
    value, error = -likelihood.mean, likelihood.mean_std_error
    print(f"{name:14} {value:6.2f} ± {error:.2f} nats ({likelihood.kind}){log_z} {seconds:4.0f} s")
    return likelihood.values


if __name__ == "__main__":
    torch.set_num_threads(2)
    normal = fit("normal prior", None)
    tilt = EnergyModel((16,), energy=DenseEnergy((128,)), negatives=Persistent(128, steps=5), standardize=False)
    gain = fit("energy prior", tilt) - normal
    print(f"gain of the energy-based prior: {gain.mean():.2f} ± {gain.std() / len(gain) ** 0.5:.2f} nats per image")
