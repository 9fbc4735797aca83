"""Observations of several sites as one vector, which is the context of a family or the input of a critic."""

from __future__ import annotations

__all__ = ["ObservationEncoder", "embeddings_by_name"]

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_genmodels.posteriors.embeddings import Embedding
from pyro_genmodels.utils.errors import listed, type_with_article


class ObservationEncoder(nn.Module):
    """The context of an amortised posterior: observations in one vector, standardised, embedded and concatenated.

    Args:
        shapes: shape of the observation of each site, by name.
        embeddings: choice or network for each site, by name; a site without one is passed on as it is.
        example: observations, (n, ...) by name, whose mean and deviation standardise all others.
    """

    loc: Tensor
    scale: Tensor
    like: Tensor

    def __init__(
        self,
        shapes: Mapping[str, Size],
        embeddings: Mapping[str, Embedding | nn.Module],
        example: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.shapes, self.choices = dict(shapes), dict(embeddings)
        self.networks = nn.ModuleDict(
            {
                f"site_{i}": choice.build(shapes[name]) if isinstance(choice, Embedding) else choice
                for i, name in enumerate(shapes)
                if (choice := self.choices.get(name)) is not None
            }
        )
        loc, scale = [], []
        for name, shape in shapes.items():
            choice = self.choices.get(name)
            kinds = choice.num_kinds(shape) if isinstance(choice, Embedding) else shape.numel()
            rows, repeats = example[name].double().reshape(-1, kinds), shape.numel() // kinds
            deviation = rows.std(0, correction=0)
            loc.append(rows.mean(0).repeat(repeats))
            scale.append(torch.where(deviation > 0, deviation, 1.0).repeat(repeats))
        self.register_buffer("loc", torch.cat(loc))
        self.register_buffer("scale", torch.cat(scale))
        self.register_buffer("like", torch.zeros(()))
        with torch.no_grad():
            self.out_features = self.eval()(self.flatten({n: x[:2] for n, x in example.items()})).shape[-1]
        self.train()

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return observations, (n, ...) by name, as vectors, (n, numbers)."""
        return torch.cat([values[name].double().reshape(len(values[name]), -1) for name in self.shapes], -1)

    def hide(self, context: Tensor) -> Tensor:
        """Return vectors of observations, (n, numbers), of which some are made missing as the choices want it."""
        parts = []
        for name, part in self._parts(context).items():
            choice = self.choices.get(name)
            parts.append((choice.hide(part) if isinstance(choice, Embedding) else part).reshape(len(part), -1))
        return torch.cat(parts, -1)

    def forward(self, context: Tensor) -> Tensor:
        """Return the embedded observations, (..., out_features), of vectors, (..., numbers)."""
        batch = context.shape[:-1]
        rows = ((context - self.loc) / self.scale).to(self.like.dtype).reshape(-1, context.shape[-1])
        parts = []
        for i, (name, part) in enumerate(self._parts(rows).items()):
            choice = self.choices.get(name)
            if choice is None:
                parts.append(part.reshape(len(part), -1))
            else:
                parts.append(self.networks[f"site_{i}"](part if isinstance(choice, Embedding) else part.nan_to_num()))
        return torch.cat(parts, -1).reshape(*batch, -1)

    def _parts(self, context: Tensor) -> dict[str, Tensor]:
        parts = context.split([shape.numel() for shape in self.shapes.values()], -1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def embeddings_by_name(embedding: Any, names: Sequence[str]) -> dict[str, Embedding | nn.Module]:
    """Return the embedding of each observed site, by name, after checking them."""
    if embedding is None:
        return {}
    if not isinstance(embedding, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"There are {len(names)} observed sites: give embedding= as a dictionary by name, of some of {listed(names)}."
            )
        embedding = {names[0]: embedding}
    for name, choice in embedding.items():
        if name not in names:
            raise ValueError(f"embedding= has {name!r}, which is not among the observed sites {listed(names)}.")
        if not isinstance(choice, (Embedding, nn.Module)):
            raise TypeError(
                f"embedding= wants a choice such as SetEmbedding() or a module, but found {type_with_article(choice)}."
            )
    return dict(embedding)
