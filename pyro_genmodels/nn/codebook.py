r"""Codebooks: K vectors :math:`c_k`, by the nearest of which a vector :math:`e` is replaced.

.. math:: z = \operatorname{argmin}_k |e - c_k|^2, \qquad
    N_k \leftarrow \gamma N_k + (1 - \gamma)\, n_k, \qquad
    c_k \leftarrow \frac{\gamma N_k c_k + (1 - \gamma) \sum_{z_i = k} e_i}{\gamma N_k + (1 - \gamma)\, n_k}

:math:`n_k` is how often code k was chosen in a batch, so that a code is the moving average of the vectors it stands for. A code
that is hardly chosen is put where vectors of the batch are far from their codes, as the starts of k-means++ are.

Van den Oord et al. (arXiv 1711.00937); Razavi et al. (arXiv 1906.00446); Arthur and Vassilvitskii, *k-means++* (2007).
"""

from __future__ import annotations

__all__ = ["Codebook"]

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_genmodels.nn.checks import check_count, check_rate, is_number

USAGE_DECAY = 0.99
"""Decay of the moving average of how often codes are chosen, where codes are trained."""

MAX_DISTANCES = 2**22
"""Number of distances that are held in memory at once."""


def _own(t: Tensor) -> Tensor:
    """Return the tensor of this process, which has all of the batch."""
    return t


class Codebook(nn.Module):
    """Vectors by whose numbers other vectors are coded.

    Args:
        owner: name of what has the codebook, for errors.
        codes: number of vectors.
        code_dim: length of a vector.
        decay: decay per batch of the moving averages that the vectors are. None trains them: then they are the sum of a buffer,
            which changes where unused vectors are moved, and of a parameter, which optimisers alone change.
        commitment: weight of the squared distance of what is coded from its code.
        restart: share of equal use below which a code counts as unused; 0 to leave unused codes where they are.

    Attributes:
        usage: moving average of the number of times that each was chosen in a batch, (codes,).

    Raises:
        ValueError: if a number is outside of its range.

    Example:
        >>> codebook = Codebook("Example", 2, 1, decay=0.9)
        >>> _ = codebook.vectors.copy_(torch.tensor([[0.0], [1.0]]))
        >>> codebook.nearest(torch.tensor([[0.2], [0.9]]))
        tensor([0, 1])
    """

    averaged_buffers = ("places",)
    """Buffers that are learned, so that averages of the parameters average them too."""

    places: Tensor
    usage: Tensor

    def __init__(
        self,
        owner: str,
        codes: int,
        code_dim: int,
        *,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        restart: float = 0.01,
    ) -> None:
        super().__init__()
        check_count(owner, codes=codes, least=2)
        check_count(owner, code_dim=code_dim)
        check_rate(owner, restart=restart, **({} if decay is None else {"decay": decay}))
        if not is_number(commitment) or not 0 <= commitment < float("inf"):
            raise ValueError(f"{owner} wants commitment as a number of 0 or more, but found {commitment!r}.")
        self.decay, self.commitment, self.restart = decay, commitment, restart
        self.register_buffer("places", torch.randn(codes, code_dim))
        self.register_buffer("usage", torch.zeros(codes))
        self.shifts = nn.Parameter(torch.zeros(codes, code_dim)) if decay is None else None

    @property
    def vectors(self) -> Tensor:
        """The vectors, (codes, code_dim)."""
        return self.places if self.shifts is None else self.places + self.shifts

    def forward(self, z: Tensor) -> Tensor:
        """Return the vectors of codes z, integers (...), as (..., code_dim)."""
        return self.vectors[z.long()]

    @torch.no_grad()
    def nearest(self, e: Tensor) -> Tensor:
        """Return the codes, integers (...), whose vectors are nearest to vectors e, (..., code_dim)."""
        vectors = self.vectors
        centre = vectors.mean(0)
        vectors, rows = vectors - centre, (e.to(vectors.dtype) - centre).reshape(-1, len(centre))
        half = vectors.square().sum(-1) / 2  # |e - c|^2 / 2 is this, less the product of both, and a constant
        parts = rows.split(max(1, MAX_DISTANCES // len(vectors)))
        with torch.autocast(e.device.type, enabled=False):  # which would round products to half precision
            codes = [torch.addmm(half, part, vectors.T, alpha=-1).argmin(-1) for part in parts]
        return torch.cat(codes).reshape(e.shape[:-1])

    def penalty(self, e: Tensor, c: Tensor) -> Tensor:
        """Return the weighted squared distance of vectors e from their codes' vectors c, (..., code_dim) each, as (...).

        Vectors that are trained are drawn to e too: that is the codebook loss, of weight 1.
        """
        penalty = self.commitment * (e - c.detach()).square().sum(-1)
        return penalty + (e.detach() - c).square().sum(-1) if self.decay is None else penalty

    @torch.no_grad()
    def update(
        self,
        e: Tensor,
        z: Tensor,
        *,
        total: Callable[[Tensor], Tensor] = _own,
        first: Callable[[Tensor], Tensor] = _own,
    ) -> None:
        """Move the moving averages towards a batch of vectors, and restart unused codes.

        Args:
            e: the vectors, (..., code_dim).
            z: their codes, (...).
            total: function that returns the sum of a tensor over the processes among which the batch is divided.
            first: function that returns the tensor of the first of these.
        """
        e, z = e.reshape(-1, e.shape[-1]).to(self.places), z.reshape(-1)  # also under autocast
        decay = USAGE_DECAY if self.decay is None else self.decay
        counts = total(torch.zeros_like(self.usage).index_add_(0, z, e.new_ones(len(z))))
        usage, before = decay * self.usage + (1 - decay) * counts, self.vectors
        vectors = before
        if self.decay is not None:
            sums = total(torch.zeros_like(vectors).index_add_(0, z, e))
            moves = (1 - decay) * (sums - counts.unsqueeze(-1) * vectors)
            vectors = vectors + moves / usage.clamp(min=torch.finfo(usage.dtype).tiny).unsqueeze(-1)
        if self.restart:
            equal = usage.mean()
            unused = usage < self.restart * equal
            far = (e - before[z]).square().sum(-1).cumsum(0)
            places = torch.searchsorted(far, far[-1] * torch.rand_like(usage)).clamp(max=len(far) - 1)
            vectors = torch.where(unused.unsqueeze(-1), first(e[places]), vectors)
            usage = torch.where(unused, equal, usage)
        self.places.copy_(vectors if self.shifts is None else vectors - self.shifts)
        self.usage.copy_(usage)
