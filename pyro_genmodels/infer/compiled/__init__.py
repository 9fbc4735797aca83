"""Pyro programs captured once as graphs and compiled: SVI, NUTS and log densities without Python in every step."""

from pyro_genmodels.infer.compiled.audit import Finding
from pyro_genmodels.infer.compiled.coordinates import Coordinates
from pyro_genmodels.infer.compiled.density import LogDensity, log_density
from pyro_genmodels.infer.compiled.functions import CapturedFunction, capture
from pyro_genmodels.infer.compiled.losses import CapturedLoss
from pyro_genmodels.infer.compiled.modes import Captured, Compiled, Eager, Mode
from pyro_genmodels.infer.compiled.nuts import CompiledNUTS
from pyro_genmodels.infer.compiled.recorder import CaptureError, StaleGraphError
from pyro_genmodels.infer.compiled.restarts import RestartedFits
from pyro_genmodels.infer.compiled.svi import CompiledSVI
from pyro_genmodels.infer.compiled.targets import captured_target
from pyro_genmodels.utils.errors import suggest_names

__all__ = [
    "CaptureError",
    "Captured",
    "CapturedFunction",
    "CapturedLoss",
    "Compiled",
    "CompiledNUTS",
    "CompiledSVI",
    "Coordinates",
    "Eager",
    "Finding",
    "LogDensity",
    "Mode",
    "RestartedFits",
    "StaleGraphError",
    "capture",
    "captured_target",
    "log_density",
]

suggest_names(__name__)
