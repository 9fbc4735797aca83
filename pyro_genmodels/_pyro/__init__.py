"""All uses of private names of Pyro and torch. `tests/pyro_internals` asserts that each still does what is relied on."""
