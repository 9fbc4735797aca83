r"""ArviZ data larger than memory, written to a zarr folder block by block of draws, and resumed after the last block.

Weights are smoothed at the end, in passes over the written ones: the tail is fitted to the largest of all N weights, of which
there are few, :math:`3 \sqrt N`, and their sum is accumulated.
"""

from __future__ import annotations

__all__ = ["draws_of_block", "write_blocks"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels._pyro.identity import fit_digest
from pyro_genmodels.inference_data.attributes import group_attributes
from pyro_genmodels.inference_data.groups import GROUPS, PARETO_K, PROGRESS_DELAY, CollectOptions, Groups
from pyro_genmodels.inference_data.names import check_names, xarray_name
from pyro_genmodels.inference_data.sources import DrawSource
from pyro_genmodels.utils.checksums import arguments_digest
from pyro_genmodels.utils.nested import leaves
from pyro_genmodels.utils.pareto import smooth_log_weights, tail_length
from pyro_genmodels.utils.parts import Output, part_seed
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.zarr_arrays import ZarrArrays

MAX_DRAWS_OF_BLOCK, MAX_RUNS_OF_BLOCK = 100_000, 100
"""Default of the largest number of draws of a block, and of runs of a model that makes its draws together."""
MAX_NUMBERS_OF_BLOCK = 5_000_000
"""Largest product of the number of draws of a block and of numbers among the model's arguments, by default."""
WEIGHTS = ("sample_stats", "log_weight")


def draws_of_block(output: Output, sources: Sequence[DrawSource], batch_size: int) -> int:
    """Return the number of draws of each chain in a block."""
    numbers = sum(int(np.prod(np.shape(leaf))) for _, leaf in leaves([sources[0].args, dict(sources[0].kwargs)]))
    most = min(MAX_DRAWS_OF_BLOCK, MAX_RUNS_OF_BLOCK * batch_size)
    by_size = max(batch_size, min(most, MAX_NUMBERS_OF_BLOCK // max(numbers, 1)))
    return min(output.rows or by_size, sources[0].draws_per_chain)


def write_blocks(
    sources: Sequence[DrawSource],
    collect: Callable[[Sequence[DrawSource], dict[str, str]], Groups],
    output: Output,
    coords: Mapping[str, Sequence[Any]],
    options: CollectOptions,
) -> dict[str, str]:
    """Write all draws of several sources, as chains, to a zarr folder.

    Args:
        sources: sources of draws, of as many draws for each chain.
        collect: function that returns the groups of some sources, and adds to a dictionary what cannot be computed.
        output: the folder.
        coords: labels of dimensions.
        options: options of `to_arviz`.

    Returns:
        What cannot be computed, with the reason.

    Raises:
        ValueError: if the sources have different numbers of draws; if draws are to have labels; or if variables are not in all
            blocks.
    """
    size = sources[0].draws_per_chain
    if any(source.draws_per_chain != size for source in sources):
        raise ValueError(f"Chains have one number of draws, but found {[source.draws_per_chain for source in sources]}.")
    if named := {"chain", "draw"} & coords.keys():
        raise ValueError(f"Draws in a .zarr folder have no labels but their place: leave {min(named)!r} out of coords.")
    step = draws_of_block(output, sources, options.batch_size)
    arrays = ZarrArrays(output, _settings(sources, output, options, size, step), size, step)
    reports: dict[str, str] = arrays.state.setdefault("reports", {})
    with tqdm(total=size, desc="draws", delay=PROGRESS_DELAY, disable=not options.progress, leave=False) as bar:
        bar.update(min(arrays.done * step, size))
        for draws in arrays.blocks:
            with forked_rng(part_seed(output.seed, arrays.done)):
                groups = collect([source.block(draws) for source in sources], reports)
            _without_k_of_rows(groups, reports)
            _put(arrays, groups, coords, draws, reports)
            arrays.save(arrays.done + 1)
            bar.update(draws.stop - draws.start)
    for path in arrays.state["left_out"]:
        arrays.remove(path)
    if "/".join(WEIGHTS) in arrays.state["variables"]:
        _put_smoothed_weights(arrays, step, size)
    arrays.finish()
    return reports


def _settings(
    sources: Sequence[DrawSource], output: Output, options: CollectOptions, size: int, step: int
) -> Mapping[str, Any]:
    """Return what a resumed run must have in common with the one that was interrupted."""
    data = [arguments_digest([source.args, dict(source.kwargs)]) for source in sources]
    digests = []
    for source in sources:
        given = source.guide if isinstance(source.guide, Mapping) else {}
        parts = [part for part in (source.model, None if given else source.guide) if part is not None]
        run = None if given else lambda: traces.run_pair(source.model, source.guide, source.args, source.kwargs)  # noqa: B023
        with handlers.side_effect_free(*parts), forked_rng(0):
            digests.append(fit_digest(parts, run, given.values()))
    return {
        "kind": "arviz", "fit": digests, "data": data, "number_of_draws": size, "draws_of_a_part": step, "seed": output.seed,
        "batch_size": options.batch_size, "parallel": options.parallel, "groups": sorted(options.groups),
    }  # fmt: skip


def _without_k_of_rows(groups: Groups, reports: dict[str, str]) -> None:
    """Remove k-hat of the rows' weights, which is that of all draws together."""
    stats = groups.variables.get("sample_stats", {})
    for name in [name for name in stats if name.startswith(f"{PARETO_K}_")]:
        del stats[name]
        reports[f"sample_stats.{name}"] = "it takes all draws at once; export some of them into memory to see it"


def _put(
    arrays: ZarrArrays, groups: Groups, coords: Mapping[str, Sequence[Any]], draws: slice, reports: dict[str, str]
) -> None:
    """Write a block: what has draws into arrays, and from the first block everything else."""
    labels = {**groups.coords, **coords}
    found = {group: groups.variables[group] for group in GROUPS if group in groups.variables}
    names = [f"{group}/{xarray_name(name)}" for group, variables in found.items() for name in variables]
    if draws.start == 0:
        check_names(groups.variables, groups.coords, coords)
        for group in found:
            _put_shared(arrays, groups, group, labels)
        arrays.state |= {"variables": names, "left_out": []}
    for name in arrays.state["variables"]:
        if name not in names and name not in arrays.state["left_out"]:
            arrays.state["left_out"].append(name)
            reports.setdefault(name, "only some blocks of draws have it")
    if new := [name for name in names if name not in arrays.state["variables"]]:
        raise ValueError(f"The model has {new[0]!r} in some draws only, which ArviZ cannot represent.")
    for group, variables in found.items():
        for name, (array, dims) in variables.items():
            if "draw" in dims:
                kind = {"kind": groups.kinds[name]} if group == "log_likelihood" and name in groups.kinds else {}
                arrays.put(group, xarray_name(name), array, list(map(xarray_name, dims)), dims.index("draw"), draws, kind)


def _put_shared(arrays: ZarrArrays, groups: Groups, group: str, labels: Mapping[str, Any]) -> None:
    """Write the attributes of a group, the labels of its dimensions, and its variables without draws."""
    import xarray as xr

    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name, (array, dims) in groups.variables[group].items():
        sizes = dict(zip(dims, array.shape, strict=True))
        own |= {xarray_name(dim): labels.get(dim, np.arange(size)) for dim, size in sizes.items() if dim != "draw"}
        if "draw" not in dims:
            shared[xarray_name(name)] = (list(map(xarray_name, dims)), array)
    dataset = xr.Dataset(shared, {name: np.asarray(values) for name, values in own.items()}, group_attributes(groups, group))
    dataset.to_zarr(arrays.path, group=group, mode="a", zarr_format=2, consolidated=False)


def _put_smoothed_weights(arrays: ZarrArrays, step: int, size: int) -> None:
    """Write the log weights after smoothing, normalised, and k-hat of all of them, in passes over the written ones."""
    weights = arrays.array(*WEIGHTS)
    number = int(np.prod(weights.shape))
    kept = tail_length(number) + 1

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, size, step):
            draws = slice(start, min(start + step, size))
            yield draws, torch.as_tensor(weights[:, draws])

    top = torch.zeros(0, dtype=torch.float64)
    for _, block in blocks():
        top = torch.cat([top, block.flatten()]).topk(min(kept, len(top) + block.numel())).values  # NaN counts as the largest
    if top.isnan().any():
        weights.attrs["pareto_k"] = float("nan")
        return
    top = top.flip(0)
    smoothed, k = smooth_log_weights(top, num_draws=number)
    weights.attrs["pareto_k"] = float(k)
    if not top[-1].isfinite():
        return
    is_new = smoothed != top
    top, smoothed = top[is_new], smoothed[is_new]

    def replaced(block: Tensor) -> Tensor:
        if not len(top):
            return block
        place = torch.searchsorted(top, block.flatten()).clamp(max=len(top) - 1).reshape(block.shape)
        return torch.where(top[place] == block, smoothed[place], block)

    total = _log_sum(replaced(block) for _, block in blocks())
    for draws, block in blocks():
        values = (replaced(block) - total).numpy()
        arrays.put(WEIGHTS[0], f"smoothed_{WEIGHTS[1]}", values, ["chain", "draw"], 1, draws)


def _log_sum(blocks: Iterable[Tensor]) -> Tensor:
    """Return the log of the sum of exponentials of all blocks."""
    total = torch.tensor(-torch.inf, dtype=torch.float64)
    for block in blocks:
        total = torch.logaddexp(total, block.logsumexp((0, 1)))
    return total
