"""Neural networks. Only families import this package."""
