"""Large layers of networks divided among the processes of a run, so that each holds a part of their parameters.

While a run lasts, each large linear layer, convolution and embedding of a fit is replaced by a sharded copy of it: every rank
holds a part of its parameters, of their gradients, of their average and of the state of the optimiser. The parameters of a
layer are gathered when it is called, and let go afterwards (torch's `fully_shard`). All other parameters, such as those of
Pyro's own, are the same on all ranks, and their gradients are averaged.

What is read or written as a whole, such as a checkpoint, is gathered between epochs in the memory of the CPU. After the run the
fit has its own layers again. Zhao et al., *PyTorch FSDP* (arXiv 2304.11277).
"""

from __future__ import annotations

__all__ = ["ShardedStrategy", "Sharding", "clip_norm"]

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from pyro_genmodels._pyro.modules import output_without_view
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.utils.errors import check_positive_int, import_extra
from pyro_genmodels.utils.ranks import Ranks

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy
else:
    DDPStrategy = import_extra("lightning", extra="lightning", by="ShardedStrategy").pytorch.strategies.DDPStrategy

LARGE = 2**16
"""Number of parameters from which on a layer is sharded."""
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""Layers whose parameters are read by their calls."""


class ShardedStrategy(DDPStrategy):
    """A strategy for `lightning.Trainer` by which large layers of a fit are divided among the processes.

    It starts processes as "ddp" does, and takes the options of Lightning's `DDPStrategy`. It trains what `LightningFit` trains
    by losses that are differentiated, not adversarial ones.

    Args:
        min_parameters: number of parameters from which on a layer is sharded.
        kwargs: passed to `DDPStrategy`.

    Raises:
        ValueError: if `min_parameters` is not positive; in a run, if the module is no `LightningFit`, its loss is adversarial
            or no layer is that large.

    Example:
        >>> ShardedStrategy(min_parameters=10**6).min_parameters
        1000000
    """

    def __init__(self, *, min_parameters: int = LARGE, **kwargs: Any) -> None:
        check_positive_int("ShardedStrategy", min_parameters=min_parameters)
        super().__init__(**kwargs)
        self.min_parameters = min_parameters

    def configure_ddp(self) -> None:
        """Shard the layers of the module, in place of wrapping it."""
        module: Any = self.lightning_module
        if not hasattr(module, "shard"):
            raise ValueError(f"ShardedStrategy trains a LightningFit, but found {type(module).__name__}. Use another strategy.")
        module.shard(self.min_parameters)


class _Place:
    """A large layer in its parent, and its sharded copy.

    Args:
        parent: module that has the layer.
        name: name of the layer in it.
    """

    def __init__(self, parent: nn.Module, name: str) -> None:
        self.parent, self.name = parent, name
        self.layer: nn.Module = parent._modules[name]  # type: ignore[assignment]
        self.copy = copy.copy(self.layer)
        for key, value in vars(self.copy).items():
            if isinstance(value, (dict, set)):
                vars(self.copy)[key] = value.copy()
        self.shapes = {name: p.shape for name, p in self.layer.named_parameters(recurse=False)}

    def shard(self, mesh: Any) -> None:
        """Put the sharded copy in the place of the layer, and let the layer's own numbers go."""
        from torch.distributed.fsdp import fully_shard  # slow to import

        self.copy.register_forward_hook(output_without_view)
        fully_shard(self.copy, mesh=mesh, reshard_after_forward=True)  # Pyro sees the sharded parameters between calls
        self.parent._modules[self.name] = self.copy
        for name in self.shapes:
            own = self.layer._parameters[name]
            own.data = own.data.new_empty(0)  # type: ignore[union-attr]

    def end(self) -> None:
        """Put the layer back, with parameters of its shapes."""
        for name, shape in self.shapes.items():
            own: Any = self.layer._parameters[name]
            own.data = own.data.new_empty(shape)
            own.grad = None
        self.parent._modules[self.name] = self.layer


class Sharding:
    """The large layers of a fit during a run, and its other parameters, whose gradients are averaged.

    Args:
        modules: modules of the fit and its objective.
        parameters: trained parameters by name, of which those of large layers are replaced by sharded ones.
        ranks: the processes of the run.
        min_parameters: number of parameters from which on a layer is sharded.

    Raises:
        ValueError: if no layer is that large.
    """

    def __init__(
        self, modules: Sequence[nn.Module], parameters: dict[str, nn.Parameter], ranks: Ranks, min_parameters: int
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.size,))
        with torch.no_grad():
            for t in _tensors_of(modules):
                distributed.broadcast(t.detach(), src=0)
        trained = {id(p) for p in parameters.values()}
        self.places = [_Place(parent, name) for parent, name in _large_layers(modules, trained, min_parameters)]
        if not self.places:
            largest = max((p.numel() for p in parameters.values()), default=0)
            raise ValueError(
                f"ShardedStrategy found no layer of {min_parameters:,} trained parameters or more to shard: the largest tensor "
                f"has {largest:,}. Use strategy='ddp', or pass a smaller min_parameters."
            )
        new: dict[int, nn.Parameter] = {}
        for place in self.places:
            before = {name: id(place.layer._parameters[name]) for name in place.shapes}
            place.shard(self.mesh)
            new |= {before[name]: place.copy._parameters[name] for name in place.shapes}
        for name, p in parameters.items():
            parameters[name] = new.get(id(p), p)
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda p: _average(p.grad, ranks.size))
            for p in parameters.values()
            if not is_sharded(p)
        ]
        self._groups: list[tuple[Optimizer, list[list[nn.Parameter]]]] = []

    @staticmethod
    def split_average(average: Any) -> None:
        """Update the average of sharded parameters apart from that of other ones, which torch cannot do together.

        Args:
            average: torch's `AveragedModel` of the parameters.
        """
        update = average.multi_avg_fn

        def by_kind(averages: Sequence[Tensor], parameters: Sequence[Tensor], steps: Any) -> None:
            for kind in (True, False):
                pairs = [pair for pair in zip(averages, parameters, strict=True) if is_sharded(pair[1]) == kind]
                if pairs:
                    update(*map(list, zip(*pairs, strict=True)), steps)

        average.multi_avg_fn = by_kind

    def split_groups(self, optimiser: Any) -> None:
        """Divide the groups of an optimiser's parameters into sharded and other ones, which torch cannot step together."""
        for part in getattr(optimiser, "optimisers", [optimiser]):
            groups = [list(group["params"]) for group in part.param_groups]
            self._groups.append((part, groups))
            self._divide(part, groups)

    @staticmethod
    def _divide(optimiser: Optimizer, groups: list[list[nn.Parameter]]) -> None:
        options = [{n: v for n, v in group.items() if n != "params"} for group in optimiser.param_groups]
        divided = [
            {**option, "params": params}
            for option, group in zip(options, groups, strict=True)
            for params in ([p for p in group if is_sharded(p)], [p for p in group if not is_sharded(p)])
            if params
        ]
        optimiser.param_groups[:] = divided

    @contextmanager
    def whole(self, weights: TrainedWeights) -> Iterator[None]:
        """Gather parameters, averages and the state of the optimiser in the memory of the CPU, inside a `with` block.

        All ranks enter it together. What the block changes is divided among the ranks at its end.

        Args:
            weights: parameters of the run.
        """
        live, places = weights.live, {}
        full = {id(p): nn.Parameter(whole(p)) for p in live if is_sharded(p)}
        weights.live = [full.get(id(p), p) for p in live]
        for place in self.places:
            for name in place.shapes:
                p: Any = place.copy._parameters[name]
                places[place, name] = p
                place.copy._parameters[name] = full[id(p)]
        weights.best = [whole(t) for t in weights.best]
        average: Any = None if weights.average is None else weights.average.module
        averages = {} if average is None else {n: p for n, p in average._parameters.items() if is_sharded(p)}
        for name, p in averages.items():
            average._parameters[name] = nn.Parameter(whole(p), requires_grad=p.requires_grad)
        for optimiser, groups in self._groups:
            self._gather_state(optimiser, groups, full)
        try:
            yield
        finally:
            for p in live:
                self._scatter(full.get(id(p)), p)
            for (place, name), p in places.items():
                place.copy._parameters[name] = p
            for name, p in averages.items():
                self._scatter(average._parameters[name], p)
                average._parameters[name] = p
            weights.live = live
            for optimiser, groups in self._groups:
                self._scatter_state(optimiser, groups, full)

    def _gather_state(self, optimiser: Any, groups: list[list[nn.Parameter]], full: dict[int, nn.Parameter]) -> None:
        """Give an optimiser its groups as they were made, of whole parameters and their state."""
        divided, optimiser.param_groups[:] = list(optimiser.param_groups), []
        for group in groups:
            options = next(each for each in divided if any(p is group[0] for p in each["params"]))
            optimiser.param_groups.append({**options, "params": [full.get(id(p), p) for p in group]})
        for p in (p for group in groups for p in group if id(p) in full and p in optimiser.state):
            optimiser.state[full[id(p)]] = {n: whole(v) for n, v in optimiser.state.pop(p).items()}

    def _scatter_state(self, optimiser: Any, groups: list[list[nn.Parameter]], full: dict[int, nn.Parameter]) -> None:
        """Undo `_gather_state`, with the state that the optimiser has now."""
        for p in (p for group in groups for p in group if id(p) in full and full[id(p)] in optimiser.state):
            state = optimiser.state.pop(full[id(p)])
            optimiser.state[p] = {
                n: self._parted(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v for n, v in state.items()
            }
        self._divide(optimiser, groups)

    def _parted(self, t: Tensor, like: Any) -> Tensor:
        """Return the parts of a whole tensor that the ranks hold, divided like another."""
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t.detach().to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    @torch.no_grad()
    def _scatter(self, t: Tensor | None, target: Any) -> None:
        if t is not None:
            target.copy_(self._parted(t, target))

    def end(self, weights: TrainedWeights | None) -> None:
        """Put the fit's own layers back. Their parameters are those of the run from now on, still without values.

        Args:
            weights: parameters of the run, or None if there are none yet; then the layers get those of now, by all ranks.
        """
        own: dict[int, nn.Parameter] = {}
        values = {} if weights is not None else {id(p): whole(p) for place in self.places for p in place.copy.parameters()}
        for place in self.places:
            place.end()
            for name in place.shapes:
                own[id(place.copy._parameters[name])] = place.layer._parameters[name]  # type: ignore[assignment]
        for key, value in values.items():
            own[key].data.copy_(value)
        if weights is not None:
            weights.live = [own.get(id(p), p) for p in weights.live]
            weights.average = None
        for hook in self._hooks:
            hook.remove()


def is_sharded(t: Any) -> bool:
    """Return True for a tensor of which each rank holds a part."""
    return hasattr(t, "full_tensor")


def whole(t: Any) -> Any:
    """Return a sharded tensor as a whole in the memory of the CPU, by all ranks together; anything else as it is."""
    return t.detach().full_tensor().cpu() if is_sharded(t) else t


def clip_norm(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Return the norm of the gradient of parameters, of which some may be sharded, after it was limited.

    Args:
        parameters: the parameters.
        largest: largest norm.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    parts = [[g for g in found if is_sharded(g)], [g for g in found if not is_sharded(g)]]
    norms: list[Any] = [nn.utils.get_total_norm(part) for part in parts if part]
    total = torch.stack([whole(norm).to(torch.float64).cpu() for norm in norms]).norm() if norms else torch.zeros(())
    factor = float(largest / (total + 1e-6))
    for g in found if factor < 1 else ():
        g.mul_(factor)
    return float(total)


def _tensors_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return parameters and buffers, once each."""
    return list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())


def _large_layers(modules: Sequence[nn.Module], trained: set[int], least: int) -> Iterator[tuple[nn.Module, str]]:
    """Yield (parent, name) of the layers that are sharded. Layers that share parameters with others are not."""
    parts = list({id(part): part for module in modules for part in module.modules()}.values())
    owners: dict[int, int] = {}
    for part in parts:
        for p in part.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    seen: dict[int, int] = {}
    children = [(parent, name, child) for parent in parts for name, child in parent.named_children()]
    for _, _, child in children:
        seen[id(child)] = seen.get(id(child), 0) + 1
    for parent, name, child in children:
        own = list(child.parameters(recurse=False))
        alone = seen[id(child)] == 1 and all(owners[id(p)] == 1 for p in own)
        if isinstance(child, LAYERS) and alone and sum(p.numel() for p in own) >= least and all(id(p) in trained for p in own):
            yield parent, name


def _average(gradient: Tensor | None, size: int) -> None:
    if gradient is not None:
        distributed.all_reduce(gradient)
        gradient.div_(size)
