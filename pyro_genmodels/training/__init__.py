"""Training: one loop for every fit, and its checkpoints."""

from pyro_genmodels.training.fit import Fit
from pyro_genmodels.training.loop import train
from pyro_genmodels.training.runs import Checkpoint, TrainingInterrupted
from pyro_genmodels.utils.errors import suggest_names

__all__ = ["Checkpoint", "Fit", "TrainingInterrupted", "train"]

suggest_names(__name__)
