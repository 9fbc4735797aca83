"""Torch optimisers, and moving averages of the parameters they train."""
