r"""Training on many devices and machines, by a `lightning.Trainer`.

`LightningFit` is a `LightningModule` around any fit and any Pyro loss. On R devices each of R processes computes the loss of
its rows of a joint batch, and Lightning averages their gradients. For a loss that is a sum over the data this is the gradient
of the joint batch (see `shares`), so that a fit does not depend on the number of devices, apart from its random numbers.

Decisions (an explosion, the best epoch, the end) are made on every rank from the same reduced numbers. Rank 0 writes files.
"""

from __future__ import annotations

__all__ = ["LightningFit"]

import sys
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from math import inf, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pyro_genmodels._pyro import params, traces
from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.optim.adapters import make_optimizer
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.checkpoints import tensors_of
from pyro_genmodels.training.epochs import Epochs
from pyro_genmodels.training.fit import Fit
from pyro_genmodels.training.joint_buffers import JointBuffers
from pyro_genmodels.training.lightning_checks import check_callbacks, check_launcher, check_loss, check_precision
from pyro_genmodels.training.lightning_parameters import RunParameters
from pyro_genmodels.training.lightning_validation import JointValidation
from pyro_genmodels.training.limits import Limits
from pyro_genmodels.training.options import (
    EMA_DECAY,
    check_options,
    identity_of,
    load_data,
    prepare_family,
    statistics_restored_on_error,
    subsample_held_out,
)
from pyro_genmodels.training.runs import Checkpoint, RunCheckpoint
from pyro_genmodels.training.sharding import clip_norm
from pyro_genmodels.training.shares import Share, check_divisible
from pyro_genmodels.training.steps import make_step
from pyro_genmodels.utils.checksums import arguments_digest
from pyro_genmodels.utils.errors import check_positive_int, import_extra
from pyro_genmodels.utils.keywords import joined_keywords
from pyro_genmodels.utils.nested import is_array, map_nested
from pyro_genmodels.utils.ranks import Ranks, joint_ranks, joint_seed

if TYPE_CHECKING:
    from lightning import Callback, LightningModule
else:
    _lightning = import_extra("lightning", extra="lightning", by="Training by a Trainer")
    Callback, LightningModule = _lightning.Callback, _lightning.LightningModule


class LightningFit(LightningModule):
    """A fit and its loss, as a module that any `lightning.Trainer` trains.

    ``train(..., trainer=Trainer(...))`` builds one. Build it yourself to give the Trainer dataloaders of your own, whose items
    are arguments of the model (see `train`). A family's mean and deviation are then set by the first 10,000 rows of rank 0.
    After training the fit has its best parameters and is in evaluation mode.

    Args:
        fit: a family, or a pair (model, guide).
        objective: a Pyro loss, or an adversarial one; None for the default of the fit (see `train`).
        optim: function parameters -> torch optimiser, or one of Pyro's optimisers.
        rows: number of rows of all data, over all devices; None takes it from the dataset of the dataloader.
        ema_decay: decay per step of the averaged parameters, which are then validated and kept; see `train`.
        clip_norm: largest norm of the gradient (per datum) over all devices, or None.
        patience: number of epochs without a better validation loss after which training stops; None for no limit.
        checkpoint: path without suffix, or a `Checkpoint`; see `train`. Rank 0 writes it, all ranks read it.
        seed: seed of the training. Each rank has random numbers of its own, made of the seed, the epoch and the rank.
        model_kwargs: further keyword arguments of model and guide, the same at every step.

    Attributes:
        result: the fit with its history, as `train` returns it.
        ranks: the processes of the run.

    Raises:
        ImportError: if lightning is not installed.
        TypeError: if an argument is of the wrong type.
        ValueError: in a run, if the number of rows is not known, if the Trainer starts its processes by forks or spawns, or if
            the loss computes its gradients in another way than by automatic differentiation.

    Example:
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import TensorDataset
        >>> from pyro_genmodels import Flow
        >>> module = LightningFit(Flow((2,)), rows=64)
        >>> batches = TensorDataset(torch.randn(2, 32, 2))  # two batches of 32 rows: any iterable, such as a DataLoader
        >>> Trainer(max_epochs=2, barebones=True, accelerator="cpu").fit(module, batches, batches)
        >>> [sorted(record) for record in module.result.history]
        [['epoch', 'seconds', 'train', 'valid'], ['epoch', 'seconds', 'train', 'valid']]
    """

    trainer: Any
    step: Any

    def __init__(
        self,
        fit: Any,
        objective: ELBO | Adversarial | AdversarialLoss | None = None,
        *,
        optim: Any = None,
        rows: int | None = None,
        ema_decay: float | Literal["auto"] | None = "auto",
        clip_norm: float | None = 10.0,
        patience: int | None = None,
        checkpoint: str | Path | Checkpoint | None = None,
        seed: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if rows is not None:
            check_positive_int("LightningFit", rows=rows)
        patience = sys.maxsize if patience is None else patience
        check_options(1, 1, patience, ema_decay, clip_norm, checkpoint, seed, None, None, None)
        fit = fit.family if isinstance(fit, Fit) else fit
        self.model, self.guide = traces.as_pair(fit)
        self.result = Fit(fit)
        self.rows, self.ema_decay, self.clip_norm, self.seed = rows, ema_decay, inf if clip_norm is None else clip_norm, seed
        self.limits = Limits(sys.maxsize, patience, inf)
        self.checkpoint = Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
        self.ranks = Ranks()
        self._objective, self._optim, self._model_kwargs = objective, optim, joined_keywords({}, model_kwargs)
        constants = arguments_digest(self._model_kwargs) if self._model_kwargs else None
        self.settings: dict[str, Any] = {"batch_size": None, "valid": None, "model_kwargs": constants}
        self._networks = nn.ModuleList(traces.modules_of(self.model, self.guide))
        self._extra_networks = nn.ModuleList()
        self._loose_parameters = nn.ParameterList()
        has_critic = objective is None and isinstance(getattr(fit, "critic", None), nn.Module)
        self.automatic_optimization = not (has_critic or isinstance(objective, Adversarial | AdversarialLoss))
        self.step = None
        self._held_out: Batches | None = None
        self._has_all_rows = True
        self._epochs: Epochs | None = None
        self._validation: Any = None
        self._parameters_of_run: Any = None

    # Before the run.

    def prepare(self, batches: Batches, held_out: Batches | None = None, *, progress: bool = False) -> None:
        """Make a family ready for the data, and find all parameters by a first run. `setup` calls it if nobody has.

        Args:
            batches: the data.
            held_out: held-out data.
            progress: True to show the progress of a first pass over data that are larger than memory.
        """
        self._batches, self._held_out = batches, held_out
        for module in self.parts:
            module.train()
        with statistics_restored_on_error(self.model):
            prepare_family(self.model, batches, held_out, progress=progress)
            self.step = make_step(self.result.family, self._objective, self._optim, batches, self.clip_norm)
            if held_out is not None and batches.is_whole:
                subsample_held_out(self.step, batches, held_out)
        self.step.rows = self.rows or batches.rows
        check_loss(self.step, is_differentiated=self.automatic_optimization)
        self._extra_networks.extend(self.step.extra_modules)
        owned = {id(p) for p in self.parameters()}
        for name, p in self.step.parameters.items():
            if id(p) not in owned:
                self.step.parameters[name] = params.as_module_parameter(name)
                self._loose_parameters.append(self.step.parameters[name])
        if self.ema_decay == "auto":
            self.ema_decay = EMA_DECAY if self.step.wants_average else None

    def setup(self, stage: str) -> None:
        """Learn the ranks, and prepare the step, before Lightning moves and wraps the parameters."""
        trainer = self.trainer
        check_launcher(trainer)
        check_precision(trainer)
        self.ranks = Ranks(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
        if self.step is None:
            self.prepare(self._batches_of_trainer())
        modules = [*self._networks, *self._extra_networks, self._loose_parameters]
        self._parameters_of_run = RunParameters(self.step, modules, self.ranks)
        if self.ranks.size > 1 and self.automatic_optimization:
            batch, rows = next(self._batches.shares(self.ranks))
            check_divisible(rows, self.ranks)
            self._parameters_of_run.find_unused(batch)

    def _batches_of_trainer(self) -> Batches:
        """Return the data of the Trainer's dataloader, or its first batch in place of all rows if it has no number of rows."""
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if not (hasattr(dataset, "__len__") and isinstance(loader, torch.utils.data.DataLoader)):
            if self.rows is None:
                raise ValueError(
                    "LightningFit wants the number of rows of all data, but the dataloader does not tell: pass rows=."
                )
            loader, self._has_all_rows = next(iter(loader)), False
        modules = list(self._networks)
        batches, _, _ = load_data(loader, None, None, sys.maxsize, self.seed, self.model, modules, self._model_kwargs)
        return batches

    def shard(self, min_parameters: int) -> None:
        """Divide large layers among the ranks: see `ShardedStrategy`, which calls this.

        Args:
            min_parameters: number of parameters from which on a layer is sharded.

        Raises:
            ValueError: if the loss is adversarial, or no layer is that large.
        """
        if not self.automatic_optimization:
            raise ValueError("ShardedStrategy trains by differentiable losses, not adversarial ones. Use strategy='ddp'.")
        self._parameters_of_run.shard(min_parameters)

    def _whole(self) -> AbstractContextManager[None]:
        """Return a block in which sharded parameters are whole."""
        return self._parameters_of_run.whole(self.weights)

    def configure_optimizers(self) -> Any:
        """Return the optimisers of the parameters, which are on their device now."""
        if not self.automatic_optimization:
            return list(self.step.trainer.optimisers.values())
        self.step.optimiser = make_optimizer(self._optim, list(self.step.parameters.values()))
        self._parameters_of_run.split(optimiser=self.step.optimiser)
        return self.step.optimiser

    def configure_callbacks(self) -> Any:
        """Return a callback that ends the run after an error.

        Raises:
            ValueError: if a callback of the Trainer averages the parameters.
        """
        check_callbacks(self.trainer)
        return [_EndOnError(self)]

    def on_fit_start(self) -> None:
        """Begin or resume the run, with the parameters on their device."""
        trainer, step, ranks = self.trainer, self.step, self.ranks
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.broadcast_buffers = False  # chains differ by rank; `JointBuffers` averages what is learned
        self._batches.convert.device = trainer.strategy.root_device  # of batches that are read
        if self._held_out is not None:
            self._held_out.source.move(trainer.strategy.root_device)
        self._seed = (
            ranks.first_object(int(torch.randint(2**32, ())) if self.seed is None else int(self.seed)) if ranks.size > 1 else 0
        )
        modules = list(self._networks)
        self.weights = TrainedWeights(step.parameters, modules, self.ema_decay, step.excluded, step.extra_modules)  # type: ignore[arg-type]
        self._parameters_of_run.split(average=self.weights.average)
        self._joint_buffers = JointBuffers(ranks, [*modules, *self._extra_networks])
        settings = {
            "seed": self._seed if self.seed is None and ranks.size > 1 else self.seed,
            "objective": type(step.objective).__name__,
            **self.settings,
            "ema_decay": self.ema_decay,
            "clip_norm": None if self.clip_norm == inf else self.clip_norm,
        }
        with self._whole():
            run = ranks.alike(lambda: self._checkpoint_of_run(settings))
        limit = trainer.max_epochs
        limits = replace(self.limits, epochs=min(self.limits.epochs, limit if limit and limit > 0 else sys.maxsize))
        self._validation = JointValidation(step, self.weights, ranks, self._held_out)
        self._epochs = Epochs(step, self.result, self.weights, run, limits, is_validated=trainer.enable_validation)
        progress = trainer.fit_loop.epoch_progress.current
        progress.ready = progress.started = progress.processed = progress.completed = len(self.result.history)
        self._global_step = trainer.global_step
        self.has_ended = self._has_validated = False
        if self._epochs.is_over:
            self._end()
            trainer.should_stop = True

    def _checkpoint_of_run(self, settings: dict[str, Any]) -> RunCheckpoint:
        """Return the checkpoint of the run. Rank 0 writes it; the others only read a run that is resumed."""
        reads = self.ranks.rank == 0 or (self.checkpoint is not None and self.checkpoint.resume)
        data: Any = partial(identity_of, self._batches, self._held_out)
        if not self._has_all_rows:
            data = lambda: {"rows": self.step.rows, "data": None, "valid": None}  # noqa: E731
        checkpoint = self.checkpoint if reads and not self.trainer.fast_dev_run else None
        run = RunCheckpoint(checkpoint, self.result, self.weights, self.step.optimiser, data, settings)
        if self.ranks.size > 1 and checkpoint is not None and checkpoint.resume:
            saved = run.identity["settings"].get("seed")
            self._seed = self._seed if saved is None else saved
        if run.part is not None:
            raise ValueError(
                f"{run.run_path} stopped in the middle of epoch {len(self.result.history) + 1}, where a Trainer cannot go on: "
                f"finish this epoch without a trainer first, by epochs={len(self.result.history) + 1}."
            )
        self._batches.seed = run.seed or self._batches.seed
        if self.ranks.rank:
            run.path = None
        return run

    @property
    def parts(self) -> list[nn.Module]:
        """The modules of the fit, its objective and its critic."""
        return [*self._networks, *self._extra_networks, *traces.modules_of(getattr(self._objective, "critic", None))]

    @property
    def written_path(self) -> Path | None:
        """Path of the parameters that have been written, or that other ranks may read; None if there are none."""
        if self._epochs is None or not self.result.best or self.checkpoint is None:
            return None
        return tensors_of(self.checkpoint.path)

    # Epochs.

    @property
    def epochs(self) -> Epochs:
        """The epochs of the run."""
        if self._epochs is None:
            raise RuntimeError("LightningFit has no run yet: pass it to Trainer.fit.")
        return self._epochs

    @property
    def order(self) -> int | None:
        """Seed of the order of the rows in the next epoch, the same on all ranks; None for one rank that shuffles."""
        if self.trainer.overfit_batches:  # always the same rows
            return joint_seed(self._seed, 0)
        return None if self.ranks.size == 1 else joint_seed(self._seed, self.epochs.number)

    def on_train_epoch_start(self) -> None:
        """Seed the random numbers of each rank."""
        self._part = self.epochs.begin(self._batches.count)
        self._valid = nan
        if self.ranks.size > 1:
            pyro.set_rng_seed(self.ranks.seed(self._seed, self.epochs.number))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a batch, at any depth."""
        if not isinstance(batch, Share):
            return self._batches.convert(batch)
        (args, kwargs, rows), weight = batch
        args, kwargs = (
            map_nested(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t, value, is_array)
            for value in (args, kwargs)
        )
        return Share(Batch(args, kwargs, rows), weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the loss of this rank's rows, whose mean over ranks is the loss of the joint batch per datum.

        Raises:
            FloatingPointError: on all ranks, if the loss or, for adversarial losses, its gradient is not finite.
        """
        share = batch if isinstance(batch, Share) else Share(batch)
        self._batch, self._number = share.batch, batch_idx + 1
        with joint_ranks(replace(self.ranks, weight=share.weight)):
            if not self.automatic_optimization:
                losses = self.step.step(share.batch, self._number)
                self._part.add(losses, int(self.ranks.sum(share.batch.rows)[0]))
                self._log("train_step", losses["train"], on_step=True)
                return None
            try:
                loss = self.step.differentiable_loss(share.batch)
            except Exception:
                self.ranks.sum(nan, 0.0)  # the other ranks wait for this one
                raise
        total, rows = self.ranks.sum(loss.item() * share.batch.rows, share.batch.rows)
        joint = total / rows
        if not isfinite(joint):
            self._fail("loss", joint)
        self._part.add({"train": joint}, int(rows))
        self._log("train_step", joint, on_step=True)
        return share.weight * loss + self._parameters_of_run.zero()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient of the joint batch, by the Trainer's options too.

        Raises:
            FloatingPointError: on all ranks, if it is not finite.
        """
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        norm = clip_norm(self.step.parameters.values(), self.clip_norm)
        if not isfinite(norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self._fail("norm of the gradient", norm)

    def _fail(self, what: str, value: float) -> None:
        """Raise an error about a number that is not finite on any rank."""
        own = self._batch.nonfinite_rows()
        place = self._batches.place_of_nonfinite(self._batch)
        found = [text for text in self.ranks.gathered(f"{own}. {place}".removesuffix(". ")) if text]
        if found and self._number == 1:
            self.epochs.first_loss.append(0.0)  # the parameters are not to blame
        advice = found[0] if found else "lower the learning rate, or look for outliers"
        raise FloatingPointError(f"the {what} is {value} at step {self._number}: {advice}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average after a step of the optimiser."""
        if batch_idx == 0:
            self.epochs.first_loss.append(self._part.means["train"])
        if not self.automatic_optimization or self.trainer.global_step != self._global_step:
            self._global_step = self.trainer.global_step
            self.weights.update()

    def on_train_epoch_end(self) -> None:
        """Append the epoch to the history, on all ranks alike, and stop at a limit.

        Raises:
            FloatingPointError: if a parameter is not finite.
        """
        if not self.weights.finite:
            raise FloatingPointError("a parameter is not finite after the last step: lower the learning rate")
        losses = self._part.means
        if self.epochs.is_validated:
            losses["valid"] = self._valid
        self._joint_buffers.agree()
        seconds = self.ranks.first_object(self.epochs.seconds)
        with self._whole():
            record = self.ranks.alike(lambda: self.epochs.add(losses, seconds=seconds))
        for name in losses.keys() - {"valid"}:
            self._log(name, record[name])
        if self.epochs.is_over or self.epochs.has_exploded:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """End the run with the best parameters; with the last ones if the Trainer has validated none."""
        if not self._has_validated:
            with self._whole():
                self.ranks.alike(self.epochs.keep_last)
        self._end()

    def _end(self) -> None:
        self.ranks.alike(lambda: self.epochs.finish(f"the Trainer stopped after {len(self.result.history)} epochs"))
        self.put_back()

    def put_back(self) -> None:
        """Restore the best parameters, and put all modules in evaluation mode."""
        if not self.has_ended:
            self.has_ended = True
            self._parameters_of_run.release(self.weights)
            self.weights.restore_best()
            self.eval()

    # Validation.

    @property
    def _validates(self) -> bool:
        """True in a validation of the run, apart from the one by which Lightning tries out the module."""
        return self._validation is not None and not self.trainer.sanity_checking

    def on_validation_epoch_start(self) -> None:
        """Begin a validation of the averaged parameters, always with the same random numbers."""
        if self._validates:
            self._joint_buffers.agree()
            self._validation.begin()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Compute the loss of this rank's rows of a batch of held-out data."""
        batch = batch.batch if isinstance(batch, Share) else batch
        if self._validates and batch.rows:
            self._validation.add(batch, self._held_out_rows)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over the held-out rows of all ranks."""
        if self._validates:
            self._valid, self._has_validated = self._validation.end(), True
            self._log("valid", self._valid)

    @property
    def _held_out_rows(self) -> int:
        """Number of held-out rows on all ranks."""
        if self._held_out is not None:
            return self._held_out.rows
        dataset: Any = getattr(self.trainer.val_dataloaders, "dataset", None)
        return len(dataset) if hasattr(dataset, "__len__") else self.step.rows

    def _log(self, name: str, value: float, *, on_step: bool = False) -> None:
        """Log a loss, which is the same on all ranks."""
        if self.trainer.barebones:
            return
        unit = self.step.units.get(name.removesuffix("_step"), "")
        shown: dict[str, Any] = {"on_step": on_step, "on_epoch": not on_step, "batch_size": 1, "sync_dist": not on_step}
        self.log(name, value, prog_bar=on_step, **shown)
        if not on_step:
            self.log(f"{name} ({unit})", value, prog_bar=True, logger=False, **shown)


class _EndOnError(Callback):
    """A callback that ends a run after an error with its best parameters, before Lightning frees its devices."""

    def __init__(self, owner: LightningFit) -> None:
        self.owner = owner

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the state after the last full epoch, and restore the best parameters."""
        owner = self.owner
        if owner._validation is not None:
            owner._validation.close()
        if pl_module is not owner or owner._epochs is None:
            if owner._parameters_of_run is not None:
                owner._parameters_of_run.release(None)
            return
        epochs, fit = owner._epochs, owner.result
        if isinstance(exception, FloatingPointError):
            epoch = len(fit.history) + (not fit.exploded_epochs)
            with owner._whole():
                epochs.fail()
            if fit.best:
                fit.stopped = f"{exception} (epoch {epoch}); the state of epoch {fit.best['epoch']} is kept"
        else:
            fit.stopped = "interrupted" if isinstance(exception, KeyboardInterrupt) else "an error"
        with suppress(OSError):  # the error that ends the run is told instead
            epochs.run.write()
        owner.put_back()
