"""Sequences of symbols of any length up to a largest one, which end at a symbol of their own.

An event has the largest length. After the first end symbol it holds end symbols only, so that sequences and events correspond
one to one, and these coordinates have probability 1.
"""

from __future__ import annotations

__all__ = ["EndedSequences", "is_after_end"]

from torch import Tensor
from torch.distributions import constraints


def is_after_end(x: Tensor, end: int) -> Tensor:
    """Return True for symbols after the first end symbol of their sequence, (..., length).

    Example:
        >>> import torch
        >>> is_after_end(torch.tensor([3, 0, 0, 0]), end=0)
        tensor([False, False,  True,  True])
    """
    is_end = x == end
    return is_end.cumsum(-1) > is_end


class EndedSequences(constraints.Constraint):
    """The sequences that hold end symbols only after the first one.

    Args:
        symbols: set of the symbols.
        end: end symbol.

    Example:
        >>> import torch
        >>> support = EndedSequences(constraints.integer_interval(0, 4), end=0)
        >>> support.check(torch.tensor([[3, 1, 2], [3, 0, 0], [3, 0, 1]]))
        tensor([ True,  True, False])
    """

    is_discrete = True
    event_dim = 1

    def __init__(self, symbols: constraints.Constraint, end: int) -> None:
        self.symbols, self.end = symbols, end
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        allowed = self.symbols.check(value) & ((value == self.end) | ~is_after_end(value, self.end))
        return allowed.all(-1)

    def __repr__(self) -> str:
        return f"EndedSequences({self.symbols}, end={self.end})"
