"""Training by a `lightning.Trainer` in one process, and the division of batches among ranks without processes."""

import copy
import signal
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import GAN, VAE, Adversarial, EnergyModel, Flow, Persistent, train
from pyro_genmodels.families import VectorQuantizedVAE
from pyro_genmodels.infer import MaximumLikelihood
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.nn.codebook import Codebook
from pyro_genmodels.training import Checkpoint, TrainingInterrupted, checkpoints
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.joint_buffers import JointBuffers
from pyro_genmodels.training.lightning import LightningFit
from pyro_genmodels.training.lightning_checks import check_trainer
from pyro_genmodels.training.shares import Share, Shares
from pyro_genmodels.utils.ranks import Ranks, current_ranks, joint_ranks, joint_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
same_fit = {"valid": 0.25, "epochs": 2, "batch_size": 7, "seed": 5, "progress": False}


@pytest.fixture(scope="module")
def x():
    return torch.randn(24, 2, generator=torch.Generator().manual_seed(1))


def trainer(*callbacks, **options):
    options = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0, **options}
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **options)


def without_seconds(fit):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in fit.history]


# One process.


@pytest.mark.parametrize("family", [Flow, GAN], ids=["a Pyro loss", "an adversarial loss"])
def test_a_fit_by_a_trainer_is_the_fit_without(x, family):
    fit = family((2,))
    other = copy.deepcopy(fit)
    wanted = train(fit, x, **same_fit)
    found = train(other, x, trainer=trainer(), **same_fit)
    for a, b in zip(without_seconds(found), without_seconds(wanted), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert found.best["epoch"] == wanted.best["epoch"]
    assert (found.stopped, found.units) == (wanted.stopped, wanted.units)
    assert torch.equal(found.held_out, wanted.held_out)
    assert not any(module.training for module in other.modules())
    for a, b in zip(other.state_dict().values(), fit.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_parameters_in_the_store_and_lazy_guides_are_trained(x):
    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", size or len(x), subsample=x[:, 0]):
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    fits = {}
    for by in (None, trainer()):
        pyro.clear_param_store()
        fits[by] = train((model, AutoNormal(model)), x, epochs=2, batch_size=10, seed=2, progress=False, trainer=by)
        fits[by].loc = pyro.param("loc").detach().clone()
        fits[by].guide_loc = pyro.param("AutoNormal.locs.scale").detach().clone()
    without, by = fits.values()
    assert without.loc.abs().min() > 0
    torch.testing.assert_close(by.loc, without.loc)
    torch.testing.assert_close(by.guide_loc, without.guide_loc)


def test_a_run_is_resumed_by_the_other_loop(x, tmp_path):
    runs = {}
    for name, first, second in [("by", trainer(), None), ("without", None, trainer())]:
        options = {**same_fit, "epochs": 1, "checkpoint": tmp_path / name}
        pyro.set_rng_seed(3)
        train(Flow((2,)), x, **options, trainer=first)
        pyro.set_rng_seed(3)
        checkpoint = Checkpoint(tmp_path / name, resume=True)
        runs[name] = train(Flow((2,)), x, **{**options, "epochs": 3, "checkpoint": checkpoint}, trainer=second)
    assert [record["epoch"] for record in runs["by"].history] == [1, 2, 3]
    for a, b in zip(*map(without_seconds, runs.values()), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_module_takes_the_dataloaders_of_a_user(x):
    by_rows = TensorDataset(x)
    module = LightningFit(Flow((2,)), MaximumLikelihood(), seed=1, ema_decay=0.5)
    by = trainer(max_epochs=2, enable_checkpointing=False)
    by.fit(module, DataLoader(by_rows, batch_size=10), DataLoader(by_rows, batch_size=10))
    flow = module.result.family
    assert len(module.result.history) == 2
    assert module.result.best["valid"] == pytest.approx(-flow().log_prob(x).mean().item(), rel=1e-5)
    assert by.callback_metrics["valid"] == pytest.approx(module.result.history[-1]["valid"])


def test_no_file_of_lightning_is_written_unless_asked_for(x, tmp_path):
    by = trainer(default_root_dir=tmp_path)
    callbacks = list(by.callbacks)
    train(Flow((2,)), x, epochs=1, progress=False, trainer=by)
    assert by.callbacks == callbacks
    assert not list(tmp_path.rglob("*.*"))
    train(Flow((2,)), x, epochs=1, progress=False, trainer=trainer(ModelCheckpoint(tmp_path, filename="mine")))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.ckpt"]


class _NaN(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            next(p for p in pl_module.parameters() if p.requires_grad).grad.fill_(float("nan"))


def test_a_gradient_that_is_not_finite_ends_training_with_the_parameters_before(x):
    with pytest.warns(RuntimeWarning, match="Training stopped: the norm of the gradient is nan at step 1"):
        fit = train(Flow((2,)), x, valid=x, epochs=5, progress=False, trainer=trainer(_NaN()))
    assert [record["epoch"] for record in fit.history] == [1, 2]
    assert fit.best["epoch"] == 2
    assert all(p.isfinite().all() and p.requires_grad for p in fit.family.parameters())


class _CtrlC(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_a_run_that_can_be_resumed(x, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"The state after epoch 2 is in .*run\.safetensors") as caught:
        train(Flow((2,)), x, epochs=5, progress=False, checkpoint=tmp_path / "run", trainer=trainer(_CtrlC()))
    assert caught.value.epoch == 2
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(KeyboardInterrupt) as caught:
        train(Flow((2,)), x, epochs=5, progress=False, trainer=trainer(_CtrlC()))
    assert not isinstance(caught.value, TrainingInterrupted)


def test_accumulated_gradients_are_those_of_the_joint_rows(x):
    flow = Flow((2,))
    one = copy.deepcopy(flow)
    options = {"epochs": 1, "optim": partial(torch.optim.SGD, lr=1.0), "clip_norm": None, "progress": False}
    train(flow, x[:23], batch_size=8, trainer=trainer(accumulate_grad_batches=3), **options)
    train(one, x[:23], batch_size=23, **options)
    for a, b in zip(flow.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_run_of_which_no_epoch_was_validated_keeps_its_last_parameters(x, tmp_path):
    flow = Flow((2,))
    fit = train(flow, x, checkpoint=tmp_path / "run", trainer=trainer(max_steps=2), **same_fit)  # of the 3 steps of an epoch
    assert (fit.best["epoch"], fit.stopped) == (1, "the Trainer stopped after 1 epochs")
    saved = checkpoints.load(tmp_path / "run")
    for a, b in zip(saved.state_dict().values(), flow.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    resumed = train(Flow((2,)), x, checkpoint=Checkpoint(tmp_path / "run", resume=True), trainer=trainer(), **same_fit)
    assert resumed.best["epoch"] == 2  # the first with a validation loss


def test_a_trainer_that_makes_no_step_says_so(x):
    flow = Flow((2,))
    before = [p.detach().clone() for p in flow.parameters()]
    with pytest.warns(RuntimeWarning, match="The Trainer made no step"):
        fit = train(flow, x, trainer=trainer(max_steps=0), **same_fit)
    assert (fit.history, fit.stopped) == ([], "the Trainer made no step")
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))


def test_a_dry_run_writes_no_files_and_overfitting_sees_the_same_rows(x, tmp_path):
    train(Flow((2,)), x, checkpoint=tmp_path / "run", trainer=trainer(fast_dev_run=True), **same_fit)
    assert not list(tmp_path.iterdir())

    rows = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rows.append(batch.batch.args[0])

    train(Flow((2,)), x, trainer=trainer(Seen(), overfit_batches=1), **same_fit)
    assert len(rows) == 2
    assert torch.equal(*rows)


# What is refused.


def test_callbacks_that_average_parameters_are_refused(x):
    with pytest.raises(ValueError, match="A fit averages its parameters itself: leave StochasticWeightAveraging out"):
        train(Flow((2,)), x, trainer=trainer(StochasticWeightAveraging(1e-2)), **same_fit)


def test_what_is_no_trainer_and_steps_by_a_graph_are_refused(x):
    with pytest.raises(TypeError, match=r"train wants a lightning.Trainer\(...\) as trainer, but found 'cpu'"):
        train(Flow((2,)), x, trainer="cpu")
    with pytest.raises(ValueError, match="takes eager steps"):
        train(Flow((2,)), x, trainer=trainer(), mode=Captured())
    gan = GAN((2,))
    with pytest.raises(ValueError, match="takes eager steps"):
        train(gan, x, objective=Adversarial(gan.model, gan.critic, mode=Captured()), trainer=trainer())


def test_a_trainer_that_copies_this_process_is_refused():
    by = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="copies of this process, from which no fit returns"):
        check_trainer(by, None)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_trainer_that_rounds_parameters_is_refused(precision, x):
    wanted = rf"rounds parameters, log densities and losses .* precision='{precision.replace('true', 'mixed')}'"
    with pytest.raises(ValueError, match=wanted):
        train(Flow((2,)), x, trainer=trainer(precision=precision))
    batches = DataLoader(TensorDataset(x), batch_size=20)
    with pytest.raises(ValueError, match=wanted):
        trainer(precision=precision, max_epochs=1).fit(LightningFit(Flow((2,))), batches, batches)


def test_a_loss_without_a_differentiable_form_is_refused(x):
    with pytest.raises(ValueError, match="TraceGraph_ELBO computes its gradients in another way"):
        train(VAE((2,)), x, objective=TraceGraph_ELBO(), epochs=1, progress=False, trainer=trainer())


def test_a_batch_is_not_divided_among_more_ranks_than_it_has_rows(x):
    shares = Shares(Batches(x[:5], None, 2, x), lambda: Ranks(0, 3), order=lambda: 1)
    with pytest.raises(ValueError, match="batch of 2 rows cannot be divided among 3 devices: pass a larger batch_size"):
        next(iter(shares))


# Ranks.


def test_the_parts_of_all_ranks_are_all_rows_once():
    for size in range(1, 6):
        for rows in range(20):
            parts = [Ranks(rank, size).part(rows) for rank in range(size)]
            assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
            lengths = [part.stop - part.start for part in parts]
            assert max(lengths) - min(lengths) <= 1


def test_ranks_have_seeds_of_their_own_and_one_in_common():
    seeds = {Ranks(rank, 4).seed(3, epoch) for rank in range(4) for epoch in range(5)}
    seeds |= {joint_seed(3, epoch) for epoch in range(5)}
    assert len(seeds) == 25


@pytest.mark.parametrize("number", [1, 2], ids=["one batch", "accumulated"])
@pytest.mark.parametrize("kind", ["tensor", "dataset", "loader"])
def test_the_weighted_mean_over_ranks_is_the_mean_over_the_joint_batch(x, kind, number):
    data = {"tensor": x, "dataset": TensorDataset(x), "loader": DataLoader(TensorDataset(x), 7, shuffle=True)}[kind]
    if kind == "dataset":
        data = torch.utils.data.Subset(data, range(24))
    batches = Batches(data, None, 7, x)
    found, seen = [], []
    for rank in range(3):
        shares = Shares(batches, lambda rank=rank: Ranks(rank, 3), order=lambda: 4, accumulated=lambda: number)
        mine = list(shares)
        assert len(mine) == len(shares)
        seen += [row for share in mine for row in share.batch.x.tolist()]
        found.append([share.weight * share.batch.x.mean(0) for share in mine])
    assert sorted(seen) == sorted(x.tolist())
    means = torch.stack([torch.stack(own) for own in found]).mean(0)  # (batches, 2), as DDP averages
    joint = [
        torch.cat([list(Shares(batches, lambda r=r: Ranks(r, 3), order=lambda: 4))[i].batch.x for r in range(3)])
        for i in range(4)
    ]
    for first in range(0, 4, number):
        rows = torch.cat(joint[first : first + number])
        torch.testing.assert_close(means[first : first + number].mean(0), rows.mean(0))


def test_one_rank_alone_changes_nothing(x):
    ranks = Ranks()
    assert ranks.mean([x])[0] is x
    assert ranks.total(x) is x
    assert ranks.first(x) is x
    assert ranks.gathered("a") == ["a"]
    assert ranks.first_object("a") == "a"
    with pytest.raises(ZeroDivisionError):
        ranks.alike(lambda: 1 / 0)
    JointBuffers(ranks, [Codebook("Test", 4, 2)]).agree()


def test_the_joint_ranks_are_those_of_the_innermost_block():
    with joint_ranks(Ranks(1, 2)), joint_ranks(Ranks(1, 3)):
        assert current_ranks().size == 3
    assert current_ranks().size == 1


class _Pair(Ranks):
    """Two ranks in one process, of which this one hears what the other has in the list `other`."""

    other: list = []  # noqa: RUF012

    def total(self, t):
        return t + self.other.pop(0)

    def first(self, t):
        return t


def test_a_codebook_learns_from_the_joint_batch():
    e, z = torch.randn(10, 2), torch.randint(4, (10,))
    joint = Codebook("Test", 4, 2, decay=0.9, restart=0.0)
    own = copy.deepcopy(joint)
    joint.update(e, z)
    counts = torch.zeros(4).index_add_(0, z[6:], torch.ones(4))
    sums = torch.zeros(4, 2).index_add_(0, z[6:], e[6:])
    pair = _Pair(0, 2)
    object.__setattr__(pair, "other", [counts, sums])
    own.update(e[:6], z[:6], total=pair.total, first=pair.first)
    torch.testing.assert_close(own.places, joint.places)
    torch.testing.assert_close(own.usage, joint.usage)


class _Twins(Ranks):
    """Two ranks that have the same rows."""

    def total(self, t):
        return 2 * t


def test_a_vector_quantized_vae_learns_from_the_joint_batch_though_lightning_computes_gradients_later(x):
    pyro.set_rng_seed(0)
    joint = VectorQuantizedVAE((2,), codes=4, latent_shape=(2,), code_dim=2, hidden=(8,), restart=0.0)
    joint.prepare(x)
    own, loss = copy.deepcopy(joint), Trace_ELBO()
    loss.differentiable_loss(joint.model, joint.guide, torch.cat([x, x])).backward()
    with joint_ranks(_Twins(0, 2)):
        found = loss.differentiable_loss(own.model, own.guide, x)
    found.backward()
    torch.testing.assert_close(own.codebook.places, joint.codebook.places)
    torch.testing.assert_close(own.codebook.usage, joint.codebook.usage)


def test_chains_are_no_joint_buffers():
    energy = EnergyModel((2,), negatives=Persistent(4))
    buffers = JointBuffers(Ranks(0, 2), [energy]).buffers
    names = {name for name, b in energy.named_buffers() if any(b is own for own in buffers)}
    assert not any(name.endswith("chains") for name in names)
    assert any(name.endswith("partition_cache.values") for name in names)


def test_tensors_at_any_depth_move_to_the_device_of_a_rank(x):
    module = LightningFit(Flow((2,)))
    share = Share(Batch((x, [x, "text"]), {"mask": {"a": x}}, 24), 0.5)
    moved = module.transfer_batch_to_device(share, torch.device("meta"), 0)
    assert moved.batch.args[0].is_meta
    assert moved.batch.args[1][0].is_meta
    assert moved.batch.kwargs["mask"]["a"].is_meta
    assert (moved.batch.args[1][1], moved.weight, moved.batch.rows) == ("text", 0.5, 24)
