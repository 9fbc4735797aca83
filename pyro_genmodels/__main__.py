"""Entry point of `python -m pyro_genmodels`."""

from pyro_genmodels.cli import main

main()
