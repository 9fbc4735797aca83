"""Normal distributions for which no closed form of a divergence is registered, with and without rsample."""

import pyro.distributions as dist
import torch


def reparametrised(loc, scale):
    """N(loc, scale) with rsample, in a form for which no closed divergence from a Normal is registered."""
    zero = torch.zeros_like(loc)
    return dist.TransformedDistribution(dist.Normal(zero, zero + 1), [dist.transforms.AffineTransform(loc, scale)])


def not_reparametrised(loc, scale):
    """N(loc, scale) without rsample: a mixture of one component."""
    one = torch.ones((*loc.shape, 1))
    return dist.MixtureSameFamily(dist.Categorical(one), dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)))


FORMS = [reparametrised, not_reparametrised]
