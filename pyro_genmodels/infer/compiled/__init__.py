"""Pyro programs captured once and compiled."""

__all__ = [
    "CaptureError",
    "Captured",
    "CapturedLoss",
    "Compiled",
    "CompiledSVI",
    "Eager",
    "Mode",
    "StaleGraphError",
]

from pyro_genmodels.infer.compiled.modes import Captured, Compiled, Eager, Mode
from pyro_genmodels.infer.compiled.program import CapturedLoss, StaleGraphError
from pyro_genmodels.infer.compiled.recorder import CaptureError
from pyro_genmodels.infer.compiled.svi import CompiledSVI
