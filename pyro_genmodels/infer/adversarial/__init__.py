"""Adversarial training: a trainer with the verbs of SVI, its losses, pairings and penalties."""

from pyro_genmodels.infer.adversarial.trainer import Adversarial, LostGameError

__all__ = ["Adversarial", "LostGameError"]
