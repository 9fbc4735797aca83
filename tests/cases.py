"""THE table: one row for each variant of each family. Tests of all families read it.

Tests run over the twelve rows of `REPRESENTATIVE` by default, and over all rows with the marker `slow`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import pi
from typing import Literal

import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO
from teachers import perturb
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels import (
    GAN,
    MAF,
    NCSF,
    NSF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContrastiveDivergence,
    ConvolutionalCritic,
    ConvolutionalEnergy,
    ConvolutionalGenerator,
    DenoisingScoreMatching,
    DenseCritic,
    DenseEnergy,
    DenseField,
    DenseGenerator,
    Diffusion,
    DiscretizedLogisticLikelihood,
    Dopri5,
    DPMSolver,
    EnergyModel,
    Flow,
    FlowDensity,
    FlowMatching,
    Hutchinson,
    Labels,
    MaximumLikelihood,
    MaximumMeanDiscrepancy,
    Mixed,
    NormalLikelihood,
    ODEFlow,
    Persistent,
    RealNVP,
    RestrictedBoltzmannMachine,
    UNet,
    VariationalBound,
)
from pyro_genmodels.families import (
    BPF,
    NAF,
    NICE,
    RK4,
    SOSPF,
    UNAF,
    Annealed,
    BetaLikelihood,
    BoltzmannMachine,
    Family,
    GammaLikelihood,
    Glow,
    Hamiltonian,
    HierarchicalVAE,
    LogNormalLikelihood,
    NegativeBinomialLikelihood,
    ParallelTempering,
    PixelCNN,
    Planar,
    PoissonLikelihood,
    Radial,
    StudentTLikelihood,
    Transformer,
    VectorQuantizedVAE,
    ZeroInflatedLikelihood,
    circular,
)

LEVELS, CLASSES = 5, 3


def nothing(n: int) -> None:
    return None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: name of the row.
        build: function that builds a fresh, untrained family.
        event_shape: shape of one datum.
        data: function n -> n valid data, (n, *event_shape).
        context: function n -> n contexts, (n, c) or (n,) labels; returns None without a context.
        has_rsample: True if draws carry gradients.
        density: what `log_prob` returns.
        discrete: True if the data are integers, or zeros and ones.
        bisection: True if a draw takes a bisection (50-120 ms).
        tolerance: largest round-trip error per coordinate of standardised data, for a flow; else None.
        smooth: False if log_prob has jumps, such as those of an adaptive solver within its tolerances.
        learned_score: True if the score is the network's output, not the gradient of log_prob.
        objective: function that makes the loss it is trained with.
        untrained: prefixes of the names of parameters that this loss does not train.
    """

    name: str
    build: Callable[[], Family]
    event_shape: tuple[int, ...]
    data: Callable[[int], Tensor]
    context: Callable[[int], Tensor | None] = nothing
    has_rsample: bool = True
    density: Literal["exact", "lower bound", "estimate", "unnormalized", "none"] = "exact"
    discrete: bool = False
    bisection: bool = False
    tolerance: float | None = None
    smooth: bool = True
    learned_score: bool = False
    objective: Callable[[], ELBO] = MaximumLikelihood
    untrained: tuple[str, ...] = ()

    @property
    def conditional(self) -> bool:
        return self.context is not nothing

    @property
    def labelled(self) -> bool:
        return self.context is labels

    def batch(self, n: int) -> tuple[Tensor, ...]:
        """Return the arguments of the family's model: data, and contexts if there are any."""
        return (self.data(n), self.context(n)) if self.conditional else (self.data(n),)


def real(*shape: int) -> Callable[[int], Tensor]:
    def draw(n: int) -> Tensor:
        x = torch.randn(n, *shape)
        return 1.0 + 2.0 * x + 0.5 * x.flip(-1)

    return draw


def uniform(low: float, high: float, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: low + (high - low) * torch.rand(n, *shape)


def integers(k: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(k, (n, *shape))


def zeros_and_ones(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(2, (n, *shape)).to(torch.get_default_dtype())


def counts(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.poisson(4 * torch.rand(n, *shape))


def positive(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: 1e-3 * torch.randn(n, *shape).exp()


def table(n: int) -> Tensor:
    """Return rows of a real number, a positive one, a count, a class and a zero or one."""
    columns = [real()(n), positive()(n), counts()(n), torch.randint(CLASSES, (n,)), torch.randint(2, (n,))]
    return torch.stack([column.to(columns[0]) for column in columns], -1)


def columns(n: int) -> Tensor:
    """Return rows of an angle, a real number, a positive one and one on the unit interval: `BY_COLUMN`."""
    return torch.stack([uniform(-pi, pi)(n), real()(n), positive()(n), uniform(0.0, 1.0)(n)], -1)


def vectors(n: int) -> Tensor:
    return torch.randn(n, 2)


labels = integers(CLASSES)

SMALL = {"transforms": 2, "hidden": (16, 16)}
BISECTION = {"bisection": True, "tolerance": NAF.tolerance}
DISCRETE = {"has_rsample": False, "discrete": True}
KINDS = [
    NormalLikelihood(),
    GammaLikelihood(),
    NegativeBinomialLikelihood(),
    CategoricalLikelihood(CLASSES),
    BernoulliLikelihood(),
]
IMPLICIT = {"density": "none", "objective": Trace_ELBO}


def _flow(*, event_shape=(3,), transform=None, **options):
    return Flow(event_shape, transform=transform or MAF(**SMALL), **options)


def _autoregressive(*, event_shape=(3,), **options):
    small = {} if "network" in options else {"hidden": (16, 16)}
    return Autoregressive(event_shape, **small, **options)


def _vae(*, event_shape=(3,), latent_dim=2, **options):
    return VAE(event_shape, hidden=(16, 16), latent_dim=latent_dim, **options)


def _hierarchical(*, event_shape=(3,), **options):
    return HierarchicalVAE(event_shape, hidden=(16,), latent_dims=(2, 1), num_features=8, **options)


def _vector_quantized(*, event_shape=(3,), **options):
    return VectorQuantizedVAE(event_shape, codes=4, latent_shape=(2,), code_dim=2, hidden=(16,), **options)


def _energy(*, event_shape=(3,), energy=None, **options):
    """Return an energy with few chains and few steps, for speed: no test of the table needs converged chains."""
    conditional = "context" in options
    negatives = Annealed(2, steps=3) if conditional else Persistent(8, steps=2)
    return EnergyModel(event_shape, energy=energy or DenseEnergy((16, 16)), negatives=negatives, num_steps=5, **options)


def _ode(*, event_shape=(3,), **options):
    return ODEFlow(event_shape, **{"network": DenseField(16, blocks=1), "solver": RK4(2), **options})


def _gan(*, event_shape=(3,), **options):
    defaults = {"generator": DenseGenerator((16, 16)), "critic": DenseCritic((16, 16)), "latent_dim": 4}
    return GAN(event_shape, **{**defaults, **options})


def _diffusion(*, event_shape=(3,), **options):
    defaults = {"network": DenseField(16, blocks=1), "likelihood": FlowDensity(RK4(2)), "sampler": DPMSolver(3)}
    return Diffusion(event_shape, **{**defaults, **options})


UNIT = constraints.interval(0.0, 1.0)
BY_COLUMN = constraints.stack([circular, constraints.real, constraints.positive, UNIT], dim=-1)
LINES = constraints.stack(BY_COLUMN.cseq[1:], dim=-1)
THIRDS = constraints.integer_interval(0, CLASSES - 1)
UNNORMALIZED = {"has_rsample": False, "density": "unnormalized", "objective": ContrastiveDivergence}
LEARNED_SCORE = {"learned_score": True, "objective": DenoisingScoreMatching}
ONE_PASS = {"tolerance": NSF.tolerance}
ADVERSARIAL = {"density": "none", "objective": MaximumMeanDiscrepancy, "untrained": ("critic.",)}

CASES = [
    Case("NICE", lambda: _flow(transform=NICE(**SMALL)), (3,), real(3), **ONE_PASS),
    Case("RealNVP", lambda: _flow(transform=RealNVP(**SMALL)), (3,), real(3), **ONE_PASS),
    Case("MAF", lambda: _flow(transform=MAF(**SMALL)), (3,), real(3), **ONE_PASS),
    Case("NSF", lambda: _flow(transform=NSF(**SMALL)), (3,), real(3), **ONE_PASS),
    Case("NCSF", lambda: _flow(transform=NCSF(**SMALL)), (3,), uniform(-pi, pi, 3), **ONE_PASS),
    Case("MAF, scalar", lambda: _flow(event_shape=(), transform=MAF(**SMALL)), (), real()),
    Case("Autoregressive, scalar", lambda: _autoregressive(event_shape=(), context=2), (), real(), vectors),
    Case("Planar", lambda: _flow(event_shape=(2,), transform=Planar(2)), (2,), real(2), tolerance=1e-4),
    Case("Radial", lambda: _flow(event_shape=(2,), transform=Radial(2)), (2,), real(2), tolerance=1e-4),
    Case("NAF", lambda: _flow(event_shape=(2,), transform=NAF(**SMALL)), (2,), real(2), **BISECTION),
    Case("UNAF", lambda: _flow(event_shape=(2,), transform=UNAF(**SMALL)), (2,), real(2), **BISECTION),
    Case("SOSPF", lambda: _flow(event_shape=(2,), transform=SOSPF(**SMALL)), (2,), real(2), **BISECTION),
    Case("BPF", lambda: _flow(event_shape=(2,), transform=BPF(**SMALL)), (2,), real(2), **BISECTION),
    Case("Flow, on an interval", lambda: _flow(support=UNIT), (3,), uniform(0.0, 1.0, 3), **ONE_PASS),
    Case(
        "Flow, by column",
        lambda: _flow(event_shape=(4,), support=BY_COLUMN, transform=NSF(**SMALL)),
        (4,),
        columns,
        **ONE_PASS,
    ),
    Case("Flow, 2-d events", lambda: _flow(event_shape=(2, 2)), (2, 2), real(2, 2), **ONE_PASS),
    Case(
        "Flow, dequantized",
        lambda: _flow(levels=LEVELS),
        (3,),
        integers(LEVELS, 3),
        density="lower bound",
        **DISCRETE,
        **ONE_PASS,
    ),
    Case(
        "Flow, learned dequantization",
        lambda: _flow(levels=LEVELS, dequantization=RealNVP(**SMALL)),
        (3,),
        integers(LEVELS, 3),
        density="lower bound",
        **DISCRETE,
        **ONE_PASS,
    ),
    Case("Flow, context", lambda: _flow(context=2), (3,), real(3), vectors, **ONE_PASS),
    Case("Flow, labels", lambda: _flow(context=Labels(CLASSES)), (3,), real(3), labels, **ONE_PASS),
    Case(
        "Glow",
        lambda: _flow(event_shape=(2, 4, 4), transform=Glow(levels=2, steps=1, channels=8), context=2),
        (2, 4, 4),
        real(2, 4, 4),
        vectors,
        **ONE_PASS,
    ),
    Case(
        "Glow, splines",
        lambda: _flow(event_shape=(4, 4), transform=Glow(levels=1, steps=2, channels=8, bins=4)),
        (4, 4),
        real(4, 4),
        **ONE_PASS,
    ),
    Case(
        "Glow, learned dequantization",
        lambda: _flow(
            event_shape=(4, 4),
            transform=Glow(levels=1, steps=1, channels=8),
            levels=LEVELS,
            context=Labels(CLASSES),
            dequantization=Glow(levels=1, steps=1, channels=8),
        ),
        (4, 4),
        integers(LEVELS, 4, 4),
        labels,
        density="lower bound",
        **DISCRETE,
        **ONE_PASS,
    ),
    Case("Autoregressive, Normal", lambda: _autoregressive(likelihood=NormalLikelihood()), (3,), real(3)),
    Case(
        "Autoregressive, mixture",
        lambda: _autoregressive(likelihood=NormalLikelihood(components=3)),
        (3,),
        real(3),
        has_rsample=False,
    ),
    Case(
        "Autoregressive, Bernoulli",
        lambda: _autoregressive(likelihood=BernoulliLikelihood()),
        (3,),
        zeros_and_ones(3),
        **DISCRETE,
    ),
    Case(
        "Autoregressive, Categorical",
        lambda: _autoregressive(likelihood=CategoricalLikelihood(LEVELS)),
        (3,),
        integers(LEVELS, 3),
        **DISCRETE,
    ),
    Case(
        "Autoregressive, DiscretizedLogistic",
        lambda: _autoregressive(event_shape=(2, 2), likelihood=DiscretizedLogisticLikelihood(LEVELS)),
        (2, 2),
        integers(LEVELS, 2, 2),
        **DISCRETE,
    ),
    Case("Autoregressive, Student t", lambda: _autoregressive(likelihood=StudentTLikelihood()), (3,), real(3)),
    Case("Autoregressive, log-normal", lambda: _autoregressive(likelihood=LogNormalLikelihood()), (3,), positive(3)),
    Case("Autoregressive, gamma", lambda: _autoregressive(likelihood=GammaLikelihood()), (3,), positive(3)),
    Case("Autoregressive, beta", lambda: _autoregressive(likelihood=BetaLikelihood()), (3,), uniform(0.0, 1.0, 3)),
    Case("Autoregressive, Poisson", lambda: _autoregressive(likelihood=PoissonLikelihood()), (3,), counts(3), **DISCRETE),
    Case(
        "Autoregressive, zero-inflated",
        lambda: _autoregressive(event_shape=(2, 2), likelihood=ZeroInflatedLikelihood()),
        (2, 2),
        counts(2, 2),
        **DISCRETE,
    ),
    Case(
        "Autoregressive, mixed",
        lambda: _autoregressive(event_shape=(5,), likelihood=Mixed(KINDS), order=[3, 1, 4, 0, 2]),
        (5,),
        table,
        **DISCRETE,
    ),
    Case(
        "Autoregressive, mixed without integers",
        lambda: _autoregressive(event_shape=(2,), likelihood=Mixed(KINDS[:2])),
        (2,),
        lambda n: table(n)[:, :2],
    ),
    Case("Autoregressive, order", lambda: _autoregressive(order=[2, 0, 1]), (3,), real(3)),
    Case("Autoregressive, context", lambda: _autoregressive(context=2), (3,), real(3), vectors),
    Case("Autoregressive, direct", lambda: _autoregressive(context=2, direct=True), (3,), real(3), vectors),
    Case(
        "Autoregressive, labels",
        lambda: _autoregressive(likelihood=BernoulliLikelihood(), context=Labels(CLASSES)),
        (3,),
        zeros_and_ones(3),
        labels,
        **DISCRETE,
    ),
    Case("Autoregressive, transformer", lambda: _autoregressive(network=Transformer(2, 16, 2)), (3,), real(3)),
    Case(
        "Autoregressive, transformer of any order",
        lambda: _autoregressive(
            event_shape=(2, 2),
            likelihood=CategoricalLikelihood(CLASSES),
            network=Transformer(1, 16, 2, positions="rotary"),
            order="any",
            context=2,
        ),
        (2, 2),
        integers(CLASSES, 2, 2),
        vectors,
        **DISCRETE,
    ),
    Case(
        "Autoregressive, PixelCNN",
        lambda: _autoregressive(
            event_shape=(2, 2, 2),
            likelihood=BernoulliLikelihood(),
            network=PixelCNN(2, 8, 3),
            context=Labels(CLASSES),
        ),
        (2, 2, 2),
        zeros_and_ones(2, 2, 2),
        labels,
        **DISCRETE,
    ),
    Case("VAE, Normal", lambda: _vae(likelihood=NormalLikelihood()), (3,), real(3), **IMPLICIT),
    Case("VAE, scalar", lambda: _vae(event_shape=(), likelihood=NormalLikelihood()), (), real(), **IMPLICIT),
    Case(
        "VAE, Bernoulli",
        lambda: _vae(event_shape=(2, 2), likelihood=BernoulliLikelihood()),
        (2, 2),
        zeros_and_ones(2, 2),
        **DISCRETE,
        **IMPLICIT,
    ),
    Case(
        "VAE, DiscretizedLogistic",
        lambda: _vae(likelihood=DiscretizedLogisticLikelihood(LEVELS)),
        (3,),
        integers(LEVELS, 3),
        **DISCRETE,
        **IMPLICIT,
    ),
    Case("VAE, mixture", lambda: _vae(likelihood=NormalLikelihood(components=2)), (3,), real(3), has_rsample=False, **IMPLICIT),
    Case("VAE, beta", lambda: _vae(likelihood=BetaLikelihood()), (3,), uniform(0.0, 1.0, 3), **IMPLICIT),
    Case(
        "VAE, negative binomial",
        lambda: _vae(likelihood=NegativeBinomialLikelihood()),
        (3,),
        counts(3),
        **DISCRETE,
        **IMPLICIT,
    ),
    Case("VAE, mixed", lambda: _vae(event_shape=(5,), likelihood=Mixed(KINDS)), (5,), table, **DISCRETE, **IMPLICIT),
    Case("VAE, flow prior", lambda: _vae(prior=_flow(event_shape=(2,))), (3,), real(3), **IMPLICIT),
    Case("VAE, labels", lambda: _vae(context=Labels(CLASSES)), (3,), real(3), labels, **IMPLICIT),
    Case("VAE, energy prior", lambda: _vae(prior=_energy(event_shape=(2,))), (3,), real(3), has_rsample=False, **IMPLICIT),
    Case(
        "VAE, diffusion prior",
        lambda: _vae(prior=_diffusion(event_shape=(2,), likelihood=VariationalBound())),
        (3,),
        real(3),
        density="none",
        objective=DenoisingScoreMatching,
    ),
    Case("Hierarchical VAE", _hierarchical, (3,), real(3), **IMPLICIT),
    Case(
        "Hierarchical VAE, labels",
        lambda: _hierarchical(event_shape=(2, 2), context=Labels(CLASSES), likelihood=BernoulliLikelihood()),
        (2, 2),
        zeros_and_ones(2, 2),
        labels,
        **DISCRETE,
        **IMPLICIT,
    ),
    Case("Vector-quantised VAE", _vector_quantized, (3,), real(3), has_rsample=False, **IMPLICIT),
    Case(
        "Vector-quantised VAE, labels",
        lambda: _vector_quantized(
            event_shape=(2, 2),
            context=Labels(CLASSES),
            likelihood=BernoulliLikelihood(),
            prior=_autoregressive(event_shape=(2,), context=Labels(CLASSES), likelihood=CategoricalLikelihood(4)),
            decay=None,
        ),
        (2, 2),
        zeros_and_ones(2, 2),
        labels,
        **DISCRETE,
        **IMPLICIT,
    ),
    Case("ODE flow", _ode, (3,), real(3)),
    Case("ODE flow, adaptive", lambda: _ode(solver=Dopri5()), (3,), real(3), smooth=False),
    Case("ODE flow, Hutchinson", lambda: _ode(trace=Hutchinson()), (3,), real(3), density="estimate"),
    Case("ODE flow, flow matching", _ode, (3,), real(3), objective=FlowMatching),
    Case("ODE flow, scalar", lambda: _ode(event_shape=()), (), real()),
    Case("ODE flow, on an interval", lambda: _ode(support=UNIT), (3,), uniform(0.0, 1.0, 3)),
    Case("ODE flow, by column", lambda: _ode(support=LINES), (3,), lambda n: columns(n)[:, 1:]),
    Case("ODE flow, 2-d events", lambda: _ode(event_shape=(2, 2)), (2, 2), real(2, 2)),
    Case("ODE flow, dequantized", lambda: _ode(levels=LEVELS), (3,), integers(LEVELS, 3), density="lower bound", **DISCRETE),
    Case("ODE flow, base", lambda: _ode(base=_flow()), (3,), real(3)),
    Case("ODE flow, context", lambda: _ode(context=2), (3,), real(3), vectors),
    Case("ODE flow, labels", lambda: _ode(context=Labels(CLASSES)), (3,), real(3), labels),
    Case("Diffusion", _diffusion, (3,), real(3), **LEARNED_SCORE),
    Case(
        "Diffusion, bound",
        lambda: _diffusion(likelihood=VariationalBound(2)),
        (3,),
        real(3),
        density="lower bound",
        **LEARNED_SCORE,
    ),
    Case("Diffusion, scalar", lambda: _diffusion(event_shape=()), (), real(), **LEARNED_SCORE),
    Case("Diffusion, on an interval", lambda: _diffusion(support=UNIT), (3,), uniform(0.0, 1.0, 3), **LEARNED_SCORE),
    Case(
        "Diffusion, levels",
        lambda: _diffusion(levels=LEVELS),
        (3,),
        integers(LEVELS, 3),
        density="lower bound",
        **DISCRETE,
        **LEARNED_SCORE,
    ),
    Case("Diffusion, flow matching", _diffusion, (3,), real(3), learned_score=True, objective=FlowMatching),
    Case("Diffusion, context", lambda: _diffusion(context=2), (3,), real(3), vectors, **LEARNED_SCORE),
    Case("Diffusion, labels", lambda: _diffusion(context=Labels(CLASSES)), (3,), real(3), labels, **LEARNED_SCORE),
    Case(
        "Diffusion, images",
        lambda: perturb(_diffusion(event_shape=(8, 8), network=UNet((8, 8)), likelihood=VariationalBound()), 0.1),
        (8, 8),
        real(8, 8),
        density="lower bound",
        **LEARNED_SCORE,
    ),
    Case("Energy", _energy, (3,), real(3), **UNNORMALIZED),
    Case("Energy, scalar", lambda: _energy(event_shape=()), (), real(), **UNNORMALIZED),
    Case("Energy, on an interval", lambda: _energy(support=UNIT), (3,), uniform(0.0, 1.0, 3), **UNNORMALIZED),
    Case("Energy, Hamiltonian", lambda: _energy(sampler=Hamiltonian(num_leapfrog=2)), (3,), real(3), **UNNORMALIZED),
    Case("Energy, tempered", lambda: _energy(sampler=ParallelTempering(temperatures=3)), (3,), real(3), **UNNORMALIZED),
    Case("Energy, base", lambda: _energy(base=_flow()), (3,), real(3), **UNNORMALIZED),
    Case("Energy, noise", lambda: _energy(noise=(0.1, 2.0)), (3,), real(3), **UNNORMALIZED),
    Case(
        "Energy, images",
        lambda: _energy(event_shape=(4, 4), energy=ConvolutionalEnergy((4, 4))),
        (4, 4),
        real(4, 4),
        **UNNORMALIZED,
    ),
    Case(
        "Energy, binary", lambda: _energy(support=constraints.boolean), (3,), zeros_and_ones(3), discrete=True, **UNNORMALIZED
    ),
    Case("Energy, classes", lambda: _energy(support=THIRDS), (3,), integers(CLASSES, 3), discrete=True, **UNNORMALIZED),
    Case(
        "Energy, restricted Boltzmann machine",
        lambda: _energy(event_shape=(2, 2), energy=RestrictedBoltzmannMachine(4), support=constraints.boolean),
        (2, 2),
        zeros_and_ones(2, 2),
        discrete=True,
        **UNNORMALIZED,
    ),
    Case(
        "Energy, Boltzmann machine",
        lambda: _energy(energy=BoltzmannMachine(2), support=THIRDS),
        (3,),
        integers(CLASSES, 3),
        discrete=True,
        **UNNORMALIZED,
    ),
    Case("Energy, context", lambda: _energy(context=2), (3,), real(3), vectors, **UNNORMALIZED),
    Case("Energy, labels", lambda: _energy(context=Labels(CLASSES)), (3,), real(3), labels, **UNNORMALIZED),
    Case("GAN", _gan, (3,), real(3), **ADVERSARIAL),
    Case("GAN, scalar", lambda: _gan(event_shape=()), (), real(), **ADVERSARIAL),
    Case("GAN, on an interval", lambda: _gan(support=UNIT), (3,), uniform(0.0, 1.0, 3), **ADVERSARIAL),
    Case("GAN, levels", lambda: _gan(levels=LEVELS), (3,), integers(LEVELS, 3), **DISCRETE, **ADVERSARIAL),
    Case("GAN, packed", lambda: _gan(pack=2), (3,), real(3), **ADVERSARIAL),
    Case("GAN, context", lambda: _gan(context=2), (3,), real(3), vectors, **ADVERSARIAL),
    Case("GAN, labels", lambda: _gan(context=Labels(CLASSES)), (3,), real(3), labels, **ADVERSARIAL),
    Case(
        "GAN, images",
        lambda: _gan(event_shape=(4, 4), generator=ConvolutionalGenerator((8, 8)), critic=ConvolutionalCritic((8, 8))),
        (4, 4),
        real(4, 4),
        **ADVERSARIAL,
    ),
]


REPRESENTATIVE = {
    "Flow, on an interval",
    "Flow, dequantized",
    "SOSPF",
    "Autoregressive, scalar",
    "Autoregressive, labels",
    "VAE, Normal",
    "VAE, diffusion prior",
    "ODE flow, Hutchinson",
    "Diffusion",
    "Energy",
    "Energy, classes",
    "GAN, labels",
}
"""Names of twelve rows, with each family and each value of each flag among them, except `smooth=False`."""


def rows(condition: Callable[[Case], bool] = lambda case: True, also_slow: Collection[str] = ()) -> pytest.MarkDecorator:
    """Parametrise a test by `case`: the rows that meet the condition, slow ones unless representative or the only ones.

    Args:
        condition: condition on the rows.
        also_slow: names of representative rows that are slow in this test.
    """
    cases = [case for case in CASES if condition(case)]
    default = [case for case in cases if case.name in REPRESENTATIVE and case.name not in also_slow] or cases[:1]
    slow = pytest.mark.slow
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=() if c in default else slow) for c in cases])


def exact(case: Case) -> bool:
    return case.density == "exact"


def scored(case: Case) -> bool:
    return case.density != "none"


def implicit(case: Case) -> bool:
    return case.density == "none"


def latent(case: Case) -> bool:
    return case.density == "none" and not case.untrained


def continuous(case: Case) -> bool:
    return case.density == "exact" and not case.discrete
