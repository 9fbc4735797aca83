"""The named convex functions, and one of one's own."""

from pyro_genmodels.divergences import (
    Alpha,
    Convex,
    Jeffreys,
    JensenShannon,
    KullbackLeibler,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKullbackLeibler,
    SquaredHellinger,
    TotalVariation,
)

TRIANGULAR = Convex(lambda u: (u - 1) ** 2 / (u + 1), at_zero=1.0, slope_at_infinity=1.0)
NAMED = [
    KullbackLeibler(), ReverseKullbackLeibler(), Jeffreys(), JensenShannon(), TotalVariation(), SquaredHellinger(),
    PearsonChiSquared(), NeymanChiSquared(), Alpha(0.3),
]  # fmt: skip
