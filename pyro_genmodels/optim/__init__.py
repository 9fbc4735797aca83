"""Optimisers by name, and averages of the weights they move."""
