"""Plain functions over tensors, without parameters and without Pyro: processes of noise, and ODE solvers."""
