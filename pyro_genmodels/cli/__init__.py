"""Command line: `pyro-genmodels`, or `python -m pyro_genmodels`."""

from pyro_genmodels.cli.app import main

__all__ = ["main"]
