"""The NumPyro twins of `benchmarks/speed/programs.py`: the same models, guides, optimisers and lengths of chains."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.infer import NUTS, SVI, Trace_ELBO, init_to_uniform
from numpyro.infer.autoguide import AutoNormal

from benchmarks.peers import data


def eight_schools(sigma: jax.Array, y: jax.Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def hierarchical(x: jax.Array, group: jax.Array, y: jax.Array) -> None:
    loc_a, loc_b = numpyro.sample("loc_a", dist.Normal(0.0, 5.0)), numpyro.sample("loc_b", dist.Normal(0.0, 5.0))
    scale_a, scale_b = numpyro.sample("scale_a", dist.HalfNormal(1.0)), numpyro.sample("scale_b", dist.HalfNormal(1.0))
    with numpyro.plate("groups", data.GROUPS):
        a, b = numpyro.sample("a", dist.Normal(loc_a, scale_a)), numpyro.sample("b", dist.Normal(loc_b, scale_b))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(a[group] + b[group] * x, sigma), obs=y)


def logistic(x: jax.Array, y: jax.Array) -> None:
    bias = numpyro.sample("bias", dist.Normal(0.0, 5.0))
    weight = numpyro.sample("weight", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)


def gaussian_process(x: jax.Array, y: jax.Array) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-(distance**2) / 2) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def program(name: str) -> tuple[Callable[..., None], tuple[jax.Array, ...]]:
    """Return a model and its arguments."""
    if name == "eight schools":
        y, sigma = data.eight_schools()
        return eight_schools, (jnp.asarray(sigma), jnp.asarray(y))
    models = {"hierarchical": hierarchical, "logistic": logistic, "gaussian process": gaussian_process}
    arrays = {"hierarchical": data.hierarchical, "logistic": data.logistic, "gaussian process": data.gaussian_process}
    return models[name], tuple(jnp.asarray(array) for array in arrays[name]())


def svi(name: str) -> tuple[SVI, tuple[jax.Array, ...]]:
    """Return an SVI with AutoNormal and Adam, and the arguments of its model."""
    model, arguments = program(name)
    return SVI(model, AutoNormal(model), numpyro.optim.Adam(1e-3), Trace_ELBO()), arguments


def svi_step(name: str) -> Callable[[], object]:
    """Return a function that makes one jitted step, from a loop in Python."""
    made, arguments = svi(name)
    update, state = jax.jit(made.update), made.init(jax.random.key(0), *arguments)

    def step() -> None:
        nonlocal state
        state, loss = update(state, *arguments)
        loss.block_until_ready()

    return step


def svi_run(name: str, num_steps: int) -> Callable[[], object]:
    """Return a function that makes `num_steps` steps: the scan of `SVI.run`, compiled once instead of at each run."""
    made, arguments = svi(name)
    scan = jax.jit(lambda state: lax.scan(lambda s, _: made.update(s, *arguments), state, None, length=num_steps))
    state = made.init(jax.random.key(0), *arguments)

    def run() -> None:
        nonlocal state
        state, losses = scan(state)
        losses.block_until_ready()

    return run


def nuts(name: str, num_warmup: int, num_samples: int) -> tuple[Callable[[], object], Callable[[], dict[str, np.ndarray]]]:
    """Return two functions: one runs a chain of NUTS, compiled once, the other returns its draws (unconstrained)."""
    model, arguments = program(name)
    kernel = NUTS(model, init_strategy=init_to_uniform)
    first = kernel.init(jax.random.key(0), num_warmup, None, model_args=arguments, model_kwargs={})

    def move(state: object, _: None) -> tuple[object, dict[str, jax.Array]]:
        state = kernel.sample(state, arguments, {})
        return state, state.z

    chain = jax.jit(lambda state: lax.scan(move, state, None, length=num_warmup + num_samples)[1])
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    draws: dict[str, jax.Array] = {}

    def run() -> None:
        draws.update(jax.block_until_ready(chain(first._replace(rng_key=next(keys)))))

    return run, lambda: {site: np.asarray(values[num_warmup:]) for site, values in draws.items()}
