"""Adversarial training: a trainer with the verbs of SVI, its losses, pairings and penalties."""

from pyro_genmodels.infer.adversarial.losses import (
    FGAN,
    WGAN,
    AdversarialLoss,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Relativistic,
)
from pyro_genmodels.infer.adversarial.pairings import (
    AggregatePairing,
    JointPairing,
    ObservationsPairing,
    Pairing,
    PosteriorPairing,
)
from pyro_genmodels.infer.adversarial.penalties import R1, R2, GradientPenalty, Penalty, WeightClipping, spectral_normalized
from pyro_genmodels.infer.adversarial.trainer import Adversarial, LostGameError
from pyro_genmodels.utils.errors import suggest_names

__all__ = [
    "FGAN", "R1", "R2", "WGAN", "Adversarial", "AdversarialLoss", "AggregatePairing", "GradientPenalty", "Hinge",
    "JointPairing", "LeastSquares", "LostGameError", "Minimax", "NonSaturating", "ObservationsPairing", "Pairing", "Penalty",
    "PosteriorPairing", "Relativistic", "WeightClipping", "spectral_normalized",
]  # fmt: skip

suggest_names(__name__)
