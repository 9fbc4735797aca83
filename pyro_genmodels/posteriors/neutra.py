r"""NeuTra: Markov chains in the base coordinates of a trained flow, where the posterior is nearly a standard normal one.

.. math:: \log \pi(\epsilon) = \log p(y, T(\epsilon)) + \log \left|\det T'(\epsilon)\right|.

The flow removes the geometry that makes chains slow; the chains remove the flow's error. Hoffman et al., *NeuTra-lizing Bad
Geometry in Hamiltonian Monte Carlo Using Neural Transport* (arXiv 1903.03704).
"""

from __future__ import annotations

__all__ = ["NeuTra"]

from dataclasses import dataclass, field
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_genmodels.posteriors.approximations import Whitened
from pyro_genmodels.posteriors.fits import DrawnPosterior, Posterior
from pyro_genmodels.posteriors.markov_chains import NoUTurn
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.variational import FlowGuide
from pyro_genmodels.utils.errors import type_with_article


@dataclass(frozen=True, repr=False)
class NeuTra(Method):
    """NUTS in the base coordinates of a flow, whose draws are mapped back (arXiv 1903.03704).

    Attributes:
        guide: the flow and how it is trained.
        chains: the chains.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import FlowGuide, NoUTurn, posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> from pyro_genmodels import MAF
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> guide = FlowGuide(MAF(transforms=1, hidden=()), num_steps=20, step_size=0.01)
        >>> chains = NoUTurn(num_chains=2, num_warmup=50, num_samples=50, mode=Captured())
        >>> fit = posterior(model, y, method=NeuTra(guide, chains), progress=False)
        >>> fit.get_samples(group_by_chain=True)["loc"].shape
        torch.Size([2, 50])
    """

    guide: FlowGuide = field(default_factory=FlowGuide)
    chains: NoUTurn = field(default_factory=NoUTurn)

    def __post_init__(self) -> None:
        for name, kind in (("guide", FlowGuide), ("chains", NoUTurn)):
            if not isinstance(getattr(self, name), kind):
                found = type_with_article(getattr(self, name))
                raise TypeError(f"NeuTra wants {kind.__name__}(...) as {name}, but found {found}.")

    def fit(self, problem: Problem) -> Posterior:
        trained = self.guide.fit(problem)
        flow, density = cast(Whitened, trained.approximation), problem.density
        everywhere = dist.ImproperUniform(constraints.real_vector, (), (density.dim,))

        def in_base_coordinates() -> None:
            base = pyro.sample("base", everywhere)
            z, log_det = flow.transport(base.to(density.dtype))
            with poutine.block():
                value = density.value(z)
            pyro.factor("log_density", value + log_det)

        drawn = self.chains.fit(Problem(in_base_coordinates, progress=problem.progress))
        with torch.no_grad():
            z, _ = flow.transport(drawn.get_samples(group_by_chain=True)["base"].to(density.dtype))
        fit = DrawnPosterior(problem, self, z, drawn.stats)
        fit.num_gradients = trained.num_gradients + drawn.num_gradients
        return fit
