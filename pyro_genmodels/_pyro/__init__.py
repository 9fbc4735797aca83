"""The only door to the private parts of Pyro and torch."""
