"""Dynamics in time: ODE solvers, noising processes, denoisers, and samplers of the reverse process."""
