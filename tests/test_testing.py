"""The contracts notice what is broken: each mutant breaks one clause, which the error names."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import SMALL
from torch.distributions import constraints

from pyro_genmodels import MAF, Autoregressive, Flow, MaximumLikelihood
from pyro_genmodels.distributions import GenerativeDistribution
from pyro_genmodels.testing import CLAUSES, check_distribution, check_family, check_objective


class Normals(GenerativeDistribution):
    """A standard normal over two coordinates."""

    has_rsample = True

    def __init__(self):
        super().__init__((2,))

    def _log_prob(self, y, context):
        return dist.Normal(0.0, 1.0).log_prob(y).sum(-1)

    def _draw(self, shape, context):
        return torch.randn(*shape, 2)


class WrongShape(Normals):
    def sample(self, sample_shape=()):
        return super().sample(sample_shape)[..., :1]


class Unsummed(Normals):
    def log_prob(self, value):
        return dist.Normal(0.0, 1.0).log_prob(value)


class LosesType(Normals):
    def expand(self, batch_shape, _instance=None):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1).expand(batch_shape)


class AcceptsNaN(Normals):
    def _validate_sample(self, value):
        pass

    def _log_prob(self, y, context):
        return dist.Normal(0.0, 1.0, validate_args=False).log_prob(y).sum(-1)


class KeepsDraws(Normals):
    def _draw(self, shape, context):
        self.last = super()._draw(shape, context)
        return self.last


class ScoreOffGraph(Normals):
    def score(self, value):
        return super().score(value).detach()


def two(n):
    return torch.randn(n, 2)


def test_a_distribution_that_keeps_the_contract_passes():
    check_distribution(Normals, two)


@pytest.mark.parametrize(
    ("mutant", "clause"),
    [
        (WrongShape, "sample"),
        (Unsummed, "log_prob"),
        (LosesType, "expand"),
        (AcceptsNaN, "errors"),
        (KeepsDraws, "cache"),
        (ScoreOffGraph, "score"),
    ],
)
def test_a_broken_distribution_is_noticed_by_clause(mutant, clause):
    others = [name for name in CLAUSES["distribution"] if name != clause]
    with pytest.raises(AssertionError, match=f'the distribution contract is broken, clause "{clause}": '):
        check_distribution(mutant, two, skip=others)


class Deaf(Autoregressive):
    """A family that takes any data."""

    def validate(self, x):
        pass

    def _check_values(self, x):
        pass


def test_a_broken_family_is_noticed_by_clause():
    shared = Flow((2,), transform=MAF(**SMALL))
    with pytest.raises(AssertionError, match='clause "two_in_one_model": two families have the name'):
        check_family(lambda: shared, two)
    with pytest.raises(AssertionError, match='the family contract is broken, clause "errors"'):
        check_family(lambda: Deaf((2,), hidden=(8,)), two, skip=[name for name in CLAUSES["family"] if name != "errors"])
    frozen = [name for name, _ in shared.named_parameters()]
    with pytest.raises(AssertionError, match="no parameters to train"):
        check_family(lambda: Flow((2,), transform=MAF(**SMALL)), two, untrained=tuple(frozen))


class IgnoresTransform(Autoregressive):
    """A family whose distribution counts neither its support nor its standardisation."""

    def forward(self, context=None):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("clause", "message", "support"),
    [("standardize", "the mean of the data", constraints.real), ("draws", "the support", constraints.positive)],
)
def test_a_family_that_ignores_its_transform_is_noticed(clause, message, support):
    others = [name for name in CLAUSES["family"] if name != clause]
    with pytest.raises(AssertionError, match=f'clause "{clause}": .*{message}'):
        check_family(lambda: IgnoresTransform((2,), hidden=(8,), support=support), two, skip=others)


class IgnoresUnits(Flow):
    """A family that gives its networks the contexts as they are."""

    def embed(self, context):
        return context


def test_a_family_that_ignores_the_unit_of_contexts_is_noticed():
    others = [name for name in CLAUSES["family"] if name != "unit_of_contexts"]
    with pytest.raises(AssertionError, match='clause "unit_of_contexts": contexts in another unit change it'):
        check_family(lambda: IgnoresUnits((2,), context=2), two, context=two, skip=others)


def test_a_family_in_place_of_a_function_is_refused():
    with pytest.raises(TypeError, match=r"lambda: Flow\(...\), but found a family"):
        check_family(Flow((2,), transform=MAF(**SMALL)), two)


class IgnoresScale(MaximumLikelihood):
    def differentiable_loss(self, model, guide, *args, **kwargs):
        return super().differentiable_loss(model, guide, *args, **kwargs) ** 2


def test_a_broken_objective_is_noticed_by_clause():
    with pytest.raises(AssertionError, match='the objective contract is broken, clause "size"'):
        check_objective(IgnoresScale, lambda: Autoregressive((2,), hidden=(8,)), two)


def test_an_unknown_clause_is_refused():
    with pytest.raises(ValueError, match=r"names of clauses, among sample, .* but found nats"):
        check_distribution(Normals, two, skip=["nats"])


def test_the_callers_random_state_and_param_store_are_left_alone():
    before = torch.get_rng_state()
    check_objective(MaximumLikelihood, lambda: Autoregressive((2,), hidden=(8,)), two)
    assert torch.get_rng_state().equal(before)
    assert not list(pyro.get_param_store())
