"""A checkpoint gives back the family that was saved, runs nothing, and is refused in clear words where it is not whole."""

import copy
import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
import zuko
from cases import latent, rows, scored
from teachers import perturb
from torch import nn
from torch.distributions import constraints

from pyro_genmodels import (
    GAN,
    MAF,
    NSF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    CategoricalLikelihood,
    ConvolutionalCritic,
    ConvolutionalGenerator,
    DenseCritic,
    DenseGenerator,
    Diffusion,
    EnergyModel,
    Flow,
    Labels,
    NormalLikelihood,
    RealNVP,
    train,
)
from pyro_genmodels.families import NICE, SOSPF, PixelCNN, Transformer
from pyro_genmodels.training import Checkpoint, Fit, checkpoints, rebuild, runs
from pyro_genmodels.training.allocation import limited

SMALL = MAF(transforms=1, hidden=(4,))


def small_flow(d=2, **options):
    return Flow((d,), **{"transform": SMALL, **options})


def trained(family, x=None):
    """As training leaves it: standardised, away from its start, in evaluation mode."""
    if x is not None:
        family.train().standardize(x)
    return perturb(family, 0.1).eval()


def same_state(a, b):
    a, b = (dict(f if isinstance(f, dict) else f.state_dict()) for f in (a, b))
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def seeded(function, *args):
    pyro.set_rng_seed(7)
    with torch.no_grad():
        return function(*args)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "family"


def file_of(path):
    return path.with_name(path.name + ".safetensors")


def forge(path, record, state=None):
    """A file whose checksum is right, and whose record says what it is told to."""
    state = {"a": torch.ones(3)} if state is None else {name: t.clone() for name, t in state.items()}
    text = record if isinstance(record, str) else json.dumps(record)
    metadata = {"pyro_genmodels": text, "sha256": checkpoints._digest(state, text)}
    safetensors.torch.save_file(state, file_of(path), metadata=metadata)


def check_refusal(path, *words, load=checkpoints.load):
    """Check that a file is refused by its name, in one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(path)
    text = str(caught.value)
    assert path.name in text
    assert "\n" not in text
    assert len(text) < 600
    for word in words:
        assert word in text


# There and back.


@rows()
@pytest.mark.parametrize("double", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "float64"])
def test_every_family_comes_back_as_it_was(case, double, path):
    family = case.build().double() if double else case.build()
    x, *context = (t.double() if double and t.is_floating_point() else t for t in case.batch(5))
    trained(family, x)
    assert checkpoints.save(path, family) == file_of(path)
    again = checkpoints.load(path)

    assert type(again) is type(family)
    assert same_state(again, family)
    assert [(name, b.dtype) for name, b in again.named_buffers()] == [(name, b.dtype) for name, b in family.named_buffers()]
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), family.buffers(), strict=True))
    assert not any(module.training for module in again.modules())
    assert again.name != family.name
    draws = [seeded(f(*context).sample, () if case.conditional else (3,)) for f in (again, family)]
    assert draws[0].dtype == draws[1].dtype
    assert torch.equal(*draws)
    if scored(case):
        assert torch.equal(*(seeded(f(*context).log_prob, x) for f in (again, family)))
    if latent(case):
        torch.testing.assert_close(*(seeded(f.guide, x, *context) for f in (again, family)), rtol=0, atol=0)


CHOICES = {
    "default": lambda: Flow((2,)),
    "randperm": lambda: Flow((4,), transform=NSF(transforms=2, hidden=[8], randperm=True, bins=4, dropout=0.5, passes=2)),
    "NICE, randperm": lambda: Flow((4,), transform=NICE(transforms=3, hidden=(4,), randperm=True)),
    "RealNVP, randperm": lambda: Flow((4,), transform=RealNVP(transforms=3, hidden=(4,), randperm=True)),
    "SOSPF": lambda: Flow((2,), transform=SOSPF(transforms=1, hidden=(4,), degree=2, polynomials=2)),
    "size": lambda: small_flow(context=2),
    "scalar": lambda: Flow((), transform=SMALL),
    "above": lambda: small_flow(support=constraints.greater_than(2.0)),
    "from": lambda: small_flow(support=constraints.greater_than_eq(-1.5)),
    "below": lambda: small_flow(support=constraints.less_than(-3.0)),
    "half open": lambda: small_flow(support=constraints.half_open_interval(0.25, 7.0)),
    "unit": lambda: small_flow(support=constraints.unit_interval),
    "positive": lambda: small_flow(support=constraints.positive),
    "tensor bounds": lambda: small_flow(support=constraints.interval(torch.tensor(0.0), torch.tensor(2.0))),
    "not standardised": lambda: small_flow(standardize=False),
    "levels": lambda: small_flow(levels=7),
    "order": lambda: Autoregressive((3,), order=torch.tensor([2, 0, 1]), hidden=[4], likelihood=NormalLikelihood(components=2)),
    "transformer of any order": lambda: Autoregressive((3,), order="any", network=Transformer(1, 8, 2, "rotary", dropout=0.5)),
    "sequences": lambda: Autoregressive((3,), likelihood=CategoricalLikelihood(3), network=Transformer(1, 8, 2), end=0),
    "PixelCNN": lambda: Autoregressive((2, 1, 2), likelihood=BernoulliLikelihood(), network=PixelCNN(1, 4, 3)),
    "made on an interval": lambda: Autoregressive((2,), hidden=(4,), support=constraints.interval(-1.0, 1.0)),
    "dropout": lambda: VAE((2,), latent_dim=1, hidden=(), dropout=0.25),
    "labelled prior": lambda: VAE((2,), context=Labels(3), prior=Flow((2,), context=Labels(3), transform=SMALL), hidden=(4,)),
    "prior of a prior": lambda: VAE((2,), prior=Autoregressive((1,), hidden=(4,)), hidden=(4,)),
    "named": lambda: small_flow(name="mine"),
    "GAN": lambda: GAN((2,)),
    "GAN, octaves and packs": lambda: GAN(
        (2,), latent_dim=3, generator=DenseGenerator((8,), octaves=2), critic=DenseCritic([8], octaves=1), pack=3
    ),
    "GAN, images": lambda: GAN(
        (1, 4, 4), generator=ConvolutionalGenerator((8, 4)), critic=ConvolutionalCritic((4, 8)), levels=3, context=Labels(2)
    ),
    "GAN, on an interval": lambda: GAN((), support=constraints.unit_interval, standardize=False, critic=DenseCritic((8,))),
}


def description(family):
    """What options leave behind."""
    parts = [family, *([family.prior] if getattr(family, "prior", None) is not None else [])]
    return [
        (
            type(part).__name__,
            part.event_shape,
            part.context_size,
            str(part.support),
            str(part.data_support),
            part._standardize,
            part._standardized,
            getattr(part, "levels", None),
            getattr(part, "likelihood", None),
            [m.p for m in part.modules() if isinstance(m, nn.Dropout)],
            [(type(m).__name__, m.pack) for m in part.modules() if hasattr(m, "pack")],
        )
        for part in parts
    ]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_comes_back(choice, path):
    family = trained(CHOICES[choice]())
    again = checkpoints.load(checkpoints.save(path, family))
    assert description(again) == description(family)
    assert same_state(again, family)
    assert again.name != family.name
    if family.context is None:
        assert torch.equal(*(seeded(f().sample, (4,)) for f in (again, family)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["deepcopy", "pickle"])
def test_a_copy_is_saved_as_well(copied, path):
    for family in (small_flow(), VAE((2,), prior=small_flow(), hidden=(4,), context=Labels(2))):
        twin = copied(trained(family))
        assert same_state(checkpoints.load(checkpoints.save(path, twin)), family)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_its_precision_comes_back_whatever_the_default(dtype, path):
    family = small_flow(support=constraints.interval(0.0, 1.0)).to(dtype)
    again = checkpoints.load(checkpoints.save(path, family))
    assert {t.dtype for t in again.state_dict().values() if t.is_floating_point()} == {dtype}
    assert same_state(again, family)


def test_whether_it_is_standardised_comes_back(path):
    x = 5 + 3 * torch.randn(50, 2)
    fresh, known = small_flow(), small_flow()
    known.train().standardize(x)
    for family in (fresh, known):
        again = checkpoints.load(checkpoints.save(path, family)).train()
        again.model(x[:10] - 5)
        loc = x.mean(0) if family is known else (x[:10] - 5).mean(0)
        torch.testing.assert_close(again.loc, loc)


def test_a_name_of_its_own_is_not_taken_from_one_that_is_there(path):
    family = small_flow(name="mine")
    again = checkpoints.load(checkpoints.save(path, family))
    assert family.name == "mine"
    assert again.name not in ("mine", "")
    assert same_state(checkpoints.load(path), again)


def test_what_training_wrote_is_loaded_alike(path):
    flow, x = small_flow(), torch.randn(30, 2)
    checkpoint = Checkpoint(path, notes={"source": "a b"})
    train(flow, x, valid=x, epochs=2, checkpoint=checkpoint, progress=False)
    assert same_state(checkpoints.load(path), flow)
    assert checkpoints.read(path)[1]["notes"] == {"source": "a b"}


def test_a_record_of_ones_own_is_kept(path):
    note = {"text": "ü €\n\0", "numbers": [1, 2.5, -0.0, 1e300, None, True], "deep": {"a": [{"b": []}]}}
    checkpoints.save(path, small_flow(), note=note)
    _, record = checkpoints.read(path)
    assert record["note"] == note
    assert (record["format"], record["class"]) == (checkpoints.FORMAT, "Flow")
    assert json.loads(path.with_name("family.json").read_text()) == record


def test_a_fit_is_refused_and_its_family_is_named(path):
    with pytest.raises(TypeError, match=r"wants a family, but found Fit.*pass fit\.family"):
        checkpoints.save(path, Fit(small_flow()))


@pytest.mark.parametrize("value", [99, "text", [1, 2]], ids=repr)
@pytest.mark.parametrize("name", sorted(checkpoints.RESERVED))
def test_a_record_cannot_be_taken_for_the_checkpoints_own(name, value, path):
    with pytest.raises(ValueError, match=rf"entries named '{name}', which checkpoints use.* such as 'my_{name}'"):
        checkpoints.save(path, small_flow(), **{name: value})
    assert not path.parent.exists() or not list(path.parent.iterdir())
    checkpoints.save(path, small_flow(), **{f"my_{name}": value}, history=[])
    assert checkpoints.read_record(path)[f"my_{name}"] == value


def test_what_json_cannot_say_is_refused_and_leaves_what_was_there(path):
    flow = small_flow()
    checkpoints.save(path, flow)
    with pytest.raises((TypeError, ValueError)):
        checkpoints.save(path, perturb(small_flow()), notes={"x": torch.ones(2)})
    assert same_state(checkpoints.load(path), flow)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("name", ["flow.v1", "a.b.c", ".hidden", "a b", "größe", "2.5", "run.training", "x" * 200])
def test_any_name_will_do(name, tmp_path):
    flow = trained(small_flow())
    path = tmp_path / "made" / "now" / name
    checkpoints.save(str(path), flow)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([f"{name}.json", f"{name}.safetensors"])
    for given in (path, str(path), file_of(path), f"{path}.json"):
        assert same_state(checkpoints.load(given), flow)
    assert checkpoints.save(file_of(path), flow) == checkpoints.save(f"{path}.json", flow) == file_of(path)
    assert len(list(path.parent.iterdir())) == 2


def test_neighbours_are_told_apart_and_a_renamed_file_is_found(tmp_path):
    one, two = trained(small_flow()), trained(small_flow())
    checkpoints.save(tmp_path / "flow", one)
    checkpoints.save(tmp_path / "flow.v1", two)
    assert same_state(checkpoints.load(tmp_path / "flow"), one)
    assert same_state(checkpoints.load(tmp_path / "flow.v1"), two)
    renamed = (tmp_path / "flow.safetensors").rename(tmp_path / "best.bin")
    assert same_state(checkpoints.load(renamed), one)


# Parts of one's own.


class Mine(Flow):
    pass


class MyNormal(NormalLikelihood):
    pass


def tail():
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


OWN = {
    "transform": (lambda: Flow((2,), transform=zuko.flows.MAF(2, 0, transforms=1, hidden_features=(4,)).transform), "Compos"),
    "context": (lambda: small_flow(context=nn.Linear(3, 2)), "Linear"),
    "support": (lambda: small_flow(support=constraints.interval(torch.zeros(2), torch.ones(2))), "Interval"),
    "likelihood": (lambda: VAE((2,), likelihood=MyNormal(), hidden=(4,)), "MyNormal"),
    "encoder": (lambda: VAE((2,), latent_dim=1, encoder=tail(), hidden=(4,)), "Sequential"),
    "decoder": (
        lambda: VAE((2,), latent_dim=2, decoder=nn.Linear(2, 2 * NormalLikelihood().num_outputs), hidden=(4,)),
        "Linear",
    ),
    "generator": (lambda: GAN((2,), latent_dim=2, generator=nn.Linear(2, 2), critic=DenseCritic((4,))), "Linear"),
    "critic": (lambda: GAN((2,), generator=DenseGenerator((4,)), critic=nn.Sequential(nn.Linear(2, 1))), "Sequential"),
    "prior": (lambda: VAE((2,), prior=dist.Normal(torch.zeros(2), 2.0).to_event(1), hidden=(4,)), "Independent"),
    "prior: context": (lambda: VAE((2,), context=3, prior=small_flow(context=nn.Linear(3, 2)), hidden=(4,)), "Linear"),
    "class Mine": (lambda: Mine((2,), transform=SMALL), "Mine"),
}


@pytest.mark.parametrize("own", OWN)
def test_parts_of_ones_own_are_named_and_can_be_brought(own, path):
    build, kind = OWN[own]
    family = trained(build())
    checkpoints.save(path, family)
    check_refusal(path, own, kind, "of your own", "load(path, family)")
    twin = build()
    assert not same_state(twin, family)
    assert checkpoints.load(path, twin) is twin
    assert same_state(twin, family)
    assert not twin.training


def test_several_parts_are_all_named(path):
    checkpoints.save(path, VAE((2,), latent_dim=1, encoder=tail(), context=nn.Linear(3, 2), hidden=(4,)))
    check_refusal(path, "encoder", "context")


def test_what_is_no_family_says_what_it_is(path):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    train((model, lambda x: None), torch.randn(9), epochs=1, checkpoint=path, progress=False)
    check_refusal(path, "no family", "checkpoints.read")
    assert checkpoints.read(path)[0].keys() == {"loc"}


def test_the_run_is_not_taken_for_the_parameters(path):
    train(small_flow(), torch.randn(9, 2), epochs=1, checkpoint=path, progress=False)
    check_refusal(path.with_name("family.training"), "resume training", "family.safetensors")


# What does not fit.


@pytest.mark.parametrize(
    "other",
    [
        lambda: VAE((2,), hidden=(4,)),
        lambda: small_flow(3),
        lambda: small_flow(context=2),
        lambda: small_flow(transform=MAF(transforms=2, hidden=(4,))),
        lambda: small_flow(transform=MAF(transforms=1, hidden=(5,))),
    ],
    ids=["class", "shape", "context", "more layers", "wider"],
)
def test_another_family_is_refused_and_left_as_it_was(other, path):
    checkpoints.save(path, small_flow())
    family = other()
    before = copy.deepcopy(family.state_dict())
    check_refusal(path, "Flow", load=lambda path: checkpoints.load(path, family))
    assert same_state(family, before)


def record_of(family, **changes):
    record = rebuild.describe(family)
    return {**record, "arguments": {**record["arguments"], **changes}}


def part(name, **arguments):
    return {"class": name, "arguments": arguments}


FORGED = {
    "shape": {"event_shape": [3]},
    "no shape": {"event_shape": None},
    "negative shape": {"event_shape": [-1]},
    "shape of text": {"event_shape": "ab"},
    "new argument": {"novelty": 1},
    "one level": {"levels": 1},
    "levels of text": {"levels": "many"},
    "context": {"context": 1.5},
    "unknown constraint": {"support": {"constraint": "simplest"}},
    "no constraint": {"support": None},
    "one bound": {"support": {"constraint": "interval", "bounds": [1]}},
    "bounds of text": {"support": {"constraint": "interval", "bounds": ["a", "b"]}},
    "constraint by a list": {"support": {"constraint": ["a"]}},
    "unknown part": {"transform": part("Diffusion")},
    "refused part": {"transform": part("GF")},
    "widths": {"transform": part("MAF", hidden=5)},
    "negative widths": {"transform": part("MAF", hidden=[-1])},
    "no arguments": {"transform": {"class": "MAF"}},
    "function as dtype": {"transform": {"tensor": [1], "dtype": "load"}},
    "module as dtype": {"transform": {"tensor": [1], "dtype": "os"}},
    "ragged tensor": {"transform": {"tensor": [[1], [1, 2]], "dtype": "float32"}},
    "tensor of text": {"transform": {"tensor": ["a"], "dtype": "float32"}},
    "tensor too large": {"transform": {"tensor": [10**30], "dtype": "int64"}},
    "infinite integer": {"transform": {"tensor": [float("inf")], "dtype": "int64"}},
    "memory": {"event_shape": [10**15]},
    "many classes": {"context": part("Labels", num_classes=10**10)},
}


@pytest.mark.parametrize("change", FORGED)
def test_a_description_that_cannot_be_built_is_refused_by_the_name_of_the_file(change, path):
    flow = small_flow()
    forge(path, record_of(flow, **FORGED[change]), flow.state_dict())
    check_refusal(path)


def places(value, at=()):
    """The keys that lead to each value in JSON."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


OTHERS = [
    None,
    -1,
    3,
    1.5,
    True,
    "x",
    [],
    [2],
    ["a"],
    {},
    {"constraint": "real"},
    {"tensor": [1], "dtype": "int64"},
    part("NSF"),
]


@pytest.mark.parametrize("choice", ["randperm", "order", "labelled prior"])
def test_a_description_changed_at_random_is_built_or_refused_by_the_name_of_the_file(choice, path):
    rng, family = random.Random(0), CHOICES[choice]()
    original, state = rebuild.describe(family), family.state_dict()
    refused = 0
    for _ in range(60):
        record = copy.deepcopy(original)
        *way, last = rng.choice([at for at in places(record) if at])
        inside = record
        for key in way:
            inside = inside[key]
        inside[last] = copy.deepcopy(rng.choice(OTHERS))
        forge(path, record, state)
        try:
            checkpoints.load(path)
        except (ValueError, OSError) as error:
            assert path.name in str(error)  # noqa: PT017 (either way is well)
            refused += 1
    assert refused > 30


RECORDS = {
    "a newer format": ({"format": checkpoints.FORMAT + 1, "pyro_genmodels": "9.8.7", "class": "Flow"}, ["9.8.7", "Update"]),
    "a newer family": ({"format": 1, "class": "Diffusion", "arguments": {}}, ["Diffusion"]),
    "an abstract family": ({"class": "Family", "arguments": {"event_shape": [2]}}, ["Family"]),
    "a function of torch": ({"class": "load", "arguments": {"f": "x"}}, ["load"]),
    "a function of Python": ({"class": "eval", "arguments": {"source": "1"}}, ["eval"]),
    "no class": ({"arguments": {}}, []),
    "a class by a list": ({"class": ["Flow"], "arguments": {}}, []),
    "a class of nothing": ({"class": None, "arguments": {}}, []),
    "a part": ({"class": "NSF", "arguments": {}}, ["NSF"]),
    "labels": ({"class": "Labels", "arguments": {"num_classes": 3}}, ["Labels"]),
    "arguments in a list": ({"class": "Flow", "arguments": []}, []),
    "no arguments": ({"class": "Flow", "arguments": None}, []),
    "own parts in a number": ({"class": "Flow", "own": 5}, []),
    "nothing": ({}, []),
    "a list": ([], ["damaged"]),
    "null": ("null", ["damaged"]),
    "a format of text": ({"format": "new"}, []),
    "no JSON": ("{'a': 1}", ["damaged"]),
    "an open list": ("[" * 100_000, []),
    "a deep list": ("[" * 100_000 + "]" * 100_000, []),
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_is_no_family_is_refused_by_the_name_of_the_file(record, path):
    text, words = RECORDS[record]
    forge(path, text)
    check_refusal(path, *words)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F8_E4M3", "F4", "F6_E2M3", "BOOL", "I8", "Q9", ""])
def test_tensors_of_another_kind_are_refused(kind, path):
    flow = small_flow()
    forge(path, record_of(flow), {**flow.state_dict(), "loc": torch.zeros(2, dtype=torch.uint8)})
    raw = file_of(path).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    tensors = json.loads(raw[8 : 8 + length])
    tensors["loc"]["dtype"] = kind
    file_of(path).write_bytes(header(json.dumps(tensors)) + raw[8 + length :])
    check_refusal(path)


# What is larger than it looks.


BOMBS = {
    "wide": (Flow, {"transform": part("NSF", hidden=[10**9])}),
    "wide twice": (Flow, {"transform": part("MAF", hidden=[10**6, 10**6])}),
    "many layers": (Flow, {"transform": part("NSF", transforms=10**6)}),
    "many coupling layers": (Flow, {"transform": part("RealNVP", transforms=10**6)}),
    "many bins": (Flow, {"transform": part("NSF", bins=10**9)}),
    "many bins below the limit of integers": (Flow, {"transform": part("NSF", bins=10**6)}),
    "many polynomials": (Flow, {"transform": part("SOSPF", degree=10**6)}),
    "a long signal": (Flow, {"transform": part("NAF", signal=10**6)}),
    "many labels": (Flow, {"context": part("Labels", num_classes=10**6)}),
    "a long context": (Flow, {"context": 10**6}),
    "a large event": (Flow, {"event_shape": [10**6]}),
    "many events": (Flow, {"event_shape": [100] * 9}),
    "many hidden layers": (VAE, {"hidden": [10] * 10**6}),
    "many latent numbers": (VAE, {"latent_dim": 10**6}),
    "a wide autoregressive network": (Autoregressive, {"hidden": [10**6, 10**6]}),
    "many components": (Autoregressive, {"likelihood": part("NormalLikelihood", components=10**6)}),
    "many classes": (Autoregressive, {"likelihood": part("CategoricalLikelihood", num_classes=10**6)}),
    "many octaves": (GAN, {"generator": part("DenseGenerator", octaves=10**6)}),
    "many rows for a critic": (GAN, {"pack": 10**6}),
    "many blocks": (Diffusion, {"network": part("DenseField", blocks=10**6)}),
    "many channels": (Diffusion, {"event_shape": [8, 8], "network": part("UNet", channels=[8 * 10**5])}),
    "many temperatures": (EnergyModel, {"sampler": part("ParallelTempering", temperatures=10**6)}),
    "many chains": (EnergyModel, {"negatives": part("Persistent", num_chains=10**6)}),
    "many hidden units": (
        EnergyModel,
        {"energy": part("RestrictedBoltzmannMachine", hidden=10**7), "support": {"constraint": "boolean", "bounds": []}},
    ),
    "more steps than can be taken": (EnergyModel, {"num_steps": 10**9}),
    "more levels than can be": (Flow, {"levels": 10**10}),
    "a prior of a prior": (
        VAE,
        {"prior": part("VAE", event_shape=[2], prior=part("Flow", event_shape=[2]), hidden=[10**6])},
    ),
}


def defaults(family, **changes):
    """The arguments of a family's description."""
    return {"class": family.__name__, "arguments": {"event_shape": [2], **changes}}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_cannot_ask_for_a_large_family(kind, path):
    """The limits are on bytes and calls, so this takes no time either."""
    family, changes = BOMBS[kind]
    forge(path, defaults(family, **changes))
    before = getrusage(RUSAGE_SELF).ru_maxrss
    check_refusal(path, "far larger than its 1 tensors of 12 bytes" if kind != "many events" else "", "load(path, family)")
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@rows()
def test_what_a_family_takes_to_build_is_far_from_the_limits(case):
    """At most a quarter of what a file of its tensors may ask for, whatever its size."""
    state = case.build().state_dict()
    held = sum(t.nbytes for t in state.values())
    with limited(
        max_bytes=2**16 + rebuild.REBUILD_BYTES[1] * held // 4,
        max_operations=50 + rebuild.REBUILD_OPERATIONS[1] * len(state) // 4,
    ):
        case.build()


def test_a_family_of_many_labels_and_of_many_layers_comes_back(path):
    for family in (small_flow(context=Labels(2000)), small_flow(transform=MAF(transforms=60, hidden=(4,)))):
        assert same_state(checkpoints.load(checkpoints.save(path, family)), family)


def test_a_large_file_of_others_is_refused_by_its_header(path):
    safetensors.torch.save_file({"a": torch.ones(3)}, file_of(path))
    os.truncate(file_of(path), 3_000_000_000)  # a hole: it takes no room on the disk
    tracemalloc.start()
    try:
        check_refusal(path, "not a checkpoint of pyro_genmodels")
        checkpoints.save(path, small_flow())
        os.truncate(file_of(path), 3_000_000_000)
        check_refusal(path, "takes 3,000,000,000 bytes, but at most 1,000,000,000 are read. If you trust it, raise max_bytes")
        file_of(path).write_bytes(struct.pack("<Q", 2**31))
        os.truncate(file_of(path), 3_000_000_000)
        check_refusal(path, "its header takes 2,147,483,648 bytes")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_the_largest_size_can_be_raised(path):
    flow = small_flow()
    size = checkpoints.save(path, flow).stat().st_size
    assert same_state(checkpoints.load(path, max_bytes=size), flow)
    for read in (checkpoints.load, checkpoints.read):
        with pytest.raises(ValueError, match="raise max_bytes"):
            read(path, max_bytes=size - 1)
    assert checkpoints.read_record(path) == checkpoints.read(path)[1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("loc", torch.float64),
        ("loc", torch.float16),
        ("loc", torch.int64),
        ("standardized", torch.uint8),
        ("last", torch.float64),
    ],
)
def test_a_tensor_of_another_data_type_is_refused(name, dtype, path):
    flow = small_flow()
    state = flow.state_dict()
    name = list(state)[-1] if name == "last" else name
    forge(path, record_of(flow), {**state, name: state[name].to(dtype)})
    check_refusal(path, "data type", name)
    check_refusal(path, "data type", load=lambda path: checkpoints.load(path, small_flow()))


# Entries of the wrong type.


WRONG = {
    "class": [3, None, ["Flow"], {}],
    "arguments": [3, [], "x", None],
    "own": [3, "x", [3], {}, None],
    "pyro_genmodels": [3, None],
    "rows": ["x", 0, -1, 1.5, True, []],
    "data": [3, [], {}],
    "valid": [3, True],
    "history": [3, None, {}, "x", [3], [{}], [{"epoch": 1}], [{"epoch": 2, "train": 1.0, "seconds": 1.0}], [{"epoch": "1"}]],
    "best": [3, None, [], {"epoch": "x"}, {"epoch": 0}, {"epoch": 2}, {"train": 1.0}, {"epoch": 1, "valid": "low"}],
    "stopped": [3, None, []],
    "units": [3, None, [], {"train": 3}],
    "run": [3, None, {}, {"id": "x"}, {"id": 1, "begun": "x", "settings": {}}, {"id": "x", "begun": "x", "settings": 3}],
    "options": [3, None, {}, {"optimiser": "Adam"}],
}


@pytest.mark.parametrize("name", WRONG)
def test_an_entry_of_the_wrong_type_is_refused_by_its_name(name, path):
    flow = small_flow()
    for value in WRONG[name]:
        record = {**record_of(flow), "history": [{"epoch": 1, "train": 1.0, "seconds": 1.0}], name: value}
        forge(path, record, flow.state_dict())
        check_refusal(path, "is damaged: its", name)
        check_refusal(path, load=checkpoints.read_record)
        if name not in ("class", "arguments", "own"):
            checkpoints.save(path, flow)
            before = file_of(path).read_bytes()
            with pytest.raises(ValueError, match=name):
                checkpoints.save(path, flow, **{"history": record["history"], name: value})
            assert file_of(path).read_bytes() == before


def test_texts_of_a_record_reach_messages_without_control_characters(path):
    flow = small_flow()
    for record in (
        {"class": "Fl\x1b[31mow\n\n", "arguments": {}},
        {"class": "Flow", "own": ["\x1b[2J" * 1000]},
        {"class": "x" * 10**6},
        {"format": 99, "pyro_genmodels": "\x07" * 1000},
        {"rows": "\r" * 1000},
        {**record_of(flow), "arguments": {"\x1b[2J": 1}},
    ):
        forge(path, record)
        with pytest.raises(ValueError, match=r".") as caught:
            checkpoints.load(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


# What is no checkpoint, or no longer one.


def test_there_is_none(path):
    check_refusal(path, "no checkpoint", load=checkpoints.load)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(path)
    checkpoints.save(path.with_name("families"), small_flow())
    check_refusal(path, "families.safetensors")
    check_refusal(path.parent)
    (path.with_name("folder.safetensors")).mkdir()
    check_refusal(path.with_name("folder"), "no checkpoint")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"sha256": "0" * 64}], ids=str)
def test_tensors_of_others_are_refused(metadata, path):
    safetensors.torch.save_file(small_flow().state_dict(), file_of(path), metadata=metadata)
    check_refusal(path, "not a checkpoint of pyro_genmodels", "load_file")


def test_a_record_of_others_is_refused(path):
    safetensors.torch.save_file({"a": torch.ones(2)}, file_of(path), metadata={"pyro_genmodels": '{"class": "Flow"}'})
    check_refusal(path, "damaged")


def test_it_is_refused_wherever_it_is_cut_off(path):
    checkpoints.save(path, small_flow())
    raw = file_of(path).read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for length in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(raw) - 1):
        file_of(path).write_bytes(raw[:length])
        check_refusal(path)


def test_damage_to_a_number_is_noticed(path):
    checkpoints.save(path, trained(small_flow()))
    raw = file_of(path).read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for at in (header, (header + len(raw)) // 2, len(raw) - 1):
        changed = bytearray(raw)
        changed[at] ^= 1
        file_of(path).write_bytes(changed)
        check_refusal(path, "damaged", "checksum")


def header(text, length=None):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def zipped(size):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(size))
    return file.getvalue()


FOREIGN = {
    "nothing": b"",
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"not a checkpoint at all\n" * 10,
    "JSON": b'{"format": 1, "class": "Flow"}',
    "a zip bomb": zipped(50_000_000),
    "a gzip bomb": gzip.compress(bytes(50_000_000)),
    "a header of 2^64": header("{}", 2**64 - 1),
    "a header of 2^63": header("{}", 2**63),
    "a header of 10^8": header("{}", 10**8),
    "a header of 10^8 and more": header("{}", 10**8 + 1),
    "an empty header": header(""),
    "no tensors": header("{}"),
    "a list": header("[]"),
    "a deep header": header("[" * 100_000),
    "a deep dictionary": header('{"a":' * 100_000),
    "no UTF-8": header(b'{"\xff\xfe": 1}'),
    "a tensor out of nowhere": header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    "a tensor of 2^60": header('{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}') + bytes(4),
    "a tensor of 2^80": header('{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}') + bytes(4),
    "a negative shape": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
    "offsets in reverse": header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + bytes(4),
    "an unknown type": header('{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
    "metadata of numbers": header('{"__metadata__":{"pyro_genmodels":1}}'),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_refused(kind, path):
    file_of(path).write_bytes(FOREIGN[kind])
    check_refusal(path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def saved_by_torch(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


PICKLES = {
    "pickle": pickle.dumps,
    "pickle 0": lambda value: pickle.dumps(value, protocol=0),
    "torch.save": saved_by_torch,
    "torch.save of old": lambda value: saved_by_torch(value, _use_new_zipfile_serialization=False),
    "a header, then a pickle": lambda value: header("{}") + pickle.dumps(value),
    "metadata of a pickle": lambda value: header(json.dumps({"__metadata__": {"pyro_genmodels": repr(pickle.dumps(value))}})),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_in_disguise_is_refused_and_does_not_run(kind, path):
    target = path.with_name("ran")
    raw = PICKLES[kind]({"state": small_flow().state_dict(), "trap": Trap(target)})
    for file in (file_of(path), path, path.with_name("family.pt")):
        file.write_bytes(raw)
        check_refusal(file.with_name(file.name.removesuffix(".safetensors")))
        file.unlink()
    assert not target.exists()
    if kind == "pickle":
        pickle.loads(raw)
        assert target.exists(), "the trap is none"


def test_the_file_beside_it_is_for_human_eyes(path):
    flow = trained(small_flow())
    checkpoints.save(path, flow)
    beside = path.with_name("family.json")
    for text in ('{"format": 99}', "no JSON", json.dumps(rebuild.describe(VAE((5,))))):
        beside.write_text(text)
        assert same_state(checkpoints.load(path), flow)
    beside.unlink()
    assert same_state(checkpoints.load(path), flow)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="wants the permissions of Unix")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_is_refused(what):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deep", "family")
        checkpoints.save(path, small_flow())
        os.chmod(folder, 0o755)
        os.chmod(file_of(path) if what == "file" else path.parent, 0)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)  # root may read everything
            check_refusal(path)
            with pytest.raises(OSError, match=path.name):
                checkpoints.load(path)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(path.parent, 0o755)


def mutations(raw, n, seed=0):
    """Bytes changed, cut, put in, doubled and swapped, mostly a few of them."""
    rng = random.Random(seed)

    def place():
        return rng.choice([rng.randrange(len(raw)), min(len(raw) - 1, rng.randrange(4000)), rng.randrange(16)])

    def flip(data):
        for _ in range(rng.choice([1, 1, 2, 5, 50])):
            data[place()] ^= 1 << rng.randrange(8)

    def overwrite(data):
        at = place()
        data[at : at + rng.randrange(1, 9)] = rng.choice([b"\0", b"\xff", b'"', b"{", b"9", b" ", b"-1", b"null"])

    def cut(data):
        del data[place() :]

    def drop(data):
        at = place()
        del data[at : at + rng.choice([1, 2, 8, 300])]

    def insert(data):
        at = place()
        data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 2, 8, 300])))

    def splice(data):
        a, b, length = place(), place(), rng.choice([1, 4, 32, 500])
        data[a : a + length] = data[b : b + length]

    def double(data):
        a, b = sorted((place(), place()))
        data[b:b] = data[a:b]

    kinds = (flip, overwrite, cut, drop, insert, splice, double)
    for i in range(n):
        data = bytearray(raw)
        kinds[i % len(kinds)](data)
        yield bytes(data)


@pytest.mark.parametrize("number", [300, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["family", "run"])
def test_mutations_are_refused_or_change_nothing(kind, number, path):
    flow = Flow((1,), transform=MAF(transforms=1, hidden=(2,)))
    train(flow, torch.randn(9, 1), epochs=2, checkpoint=path, progress=False)
    path = path if kind == "family" else path.with_name("family.training")
    raw, (state, record) = file_of(path).read_bytes(), checkpoints.read(path)
    same = 0
    for changed in mutations(raw, number):
        file_of(path).write_bytes(changed)
        try:
            found = checkpoints.read(path)
            assert same_state(found[0], state)
            assert found[1] == record
            if kind == "family":
                assert same_state(checkpoints.load(path), flow)
            same += 1
        except (ValueError, OSError) as error:
            assert path.name in str(error)  # noqa: PT017 (either way is well)
    assert same < number / 10


# Writing.


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no"), KeyboardInterrupt(), Stop()])
@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "alone"])
def test_a_failure_half_way_leaves_what_was_there(error, old, path, monkeypatch):
    flow = trained(small_flow())
    if old:
        checkpoints.save(path, flow)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    def half(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(type(error)):
        checkpoints.save(path, small_flow())
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_full_disk_is_an_oserror_by_the_name_of_the_file_and_leaves_what_was_there(path):
    resource = pytest.importorskip("resource")
    flow = trained(small_flow())
    checkpoints.save(path, flow)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"family\.safetensors"):
            checkpoints.save(path, small_flow())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_folder_in_the_way_is_an_oserror(path):
    file_of(path).mkdir()
    with pytest.raises(OSError, match=r"family\.safetensors"):
        checkpoints.save(path, small_flow())
    path.with_name("file").touch()
    with pytest.raises(OSError, match="file"):
        checkpoints.save(path.with_name("file") / "family", small_flow())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_its_files_have_the_permissions_of_any_new_file(umask, path):
    before = os.umask(umask)
    try:
        checkpoints.save(path, small_flow())
        path.with_name("other").touch()
    finally:
        os.umask(before)
    assert len({p.stat().st_mode for p in path.parent.iterdir()}) == 1


def test_tensors_that_share_memory_are_saved_apart(path):
    vae = VAE((2,), latent_dim=2, hidden=(4,))
    vae.decoder.mlp[0].weight = vae.encoder.mlp[0].weight
    checkpoints.save(path, vae)
    again = checkpoints.load(path)
    assert torch.equal(again.decoder.mlp[0].weight, vae.encoder.mlp[0].weight)


# Several at once.


def test_one_that_is_replaced_while_it_is_read_is_the_old_or_the_new(path, monkeypatch):
    old, new = trained(small_flow()), trained(small_flow())
    checkpoints.save(path, old)
    read_header = checkpoints._read_header

    def replace_first(*args):
        found = read_header(*args)
        checkpoints.save(path, new)
        return found

    monkeypatch.setattr(checkpoints, "_read_header", replace_first)
    assert same_state(checkpoints.load(path), old)
    monkeypatch.undo()
    assert same_state(checkpoints.load(path), new)


def test_threads_may_save_and_load_at_once(path):
    families = [trained(small_flow()) for _ in range(3)]
    checkpoints.save(path, families[0])
    stop, errors = threading.Event(), []

    def save(family):
        try:
            while not stop.is_set():
                checkpoints.save(path, family)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(family,)) for family in families]
    for thread in threads:
        thread.start()
    try:
        states = [checkpoints.read(path)[0] for _ in range(300)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert all(any(same_state(state, family) for family in families) for state in states)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.slow
def test_processes_may_save_at_once(path):
    code = """
        import sys, torch
        from pyro_genmodels import Flow, MAF
        from pyro_genmodels.training import Checkpoint, checkpoints
        torch.set_num_threads(1)
        flow = Flow((2,), transform=MAF(transforms=1, hidden=(4,)))
        for p in flow.parameters():
            p.data.fill_(float(sys.argv[2]))
        for _ in range(100):
            checkpoints.save(sys.argv[1], flow)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    processes = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in (1, 2)]
    seen = set()
    try:
        while any(process.poll() is None for process in processes):
            with suppress(FileNotFoundError):
                state = torch.cat([p.flatten() for p in checkpoints.load(path).parameters()])
                assert len(state.unique()) == 1
                seen.add(state[0].item())
            time.sleep(0.01)
    finally:
        ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert ends == [("", 0), ("", 0)]
    assert seen <= {1.0, 2.0}
    checkpoints.load(path)
    assert len(list(path.parent.iterdir())) == 2


# Runs and their identity.


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


def fit_run(path, epochs, *, resume=False, notes=None, rate=1e-3, seed=0, x=X, **options):
    """Train a small flow on x."""
    pyro.set_rng_seed(seed)
    flow = small_flow()
    optim = partial(torch.optim.Adam, lr=rate)
    checkpoint = Checkpoint(path, resume=resume, notes=notes or {})
    train(flow, x, epochs=epochs, optim=optim, checkpoint=checkpoint, seed=seed, progress=False, **options)
    return flow


def history_of(path):
    return [epoch["train"] for epoch in checkpoints.read(path)[1]["history"]]


@pytest.mark.filterwarnings("ignore:.*holds another run")
def test_both_files_hold_the_identity_of_their_run(path):
    fit_run(path, 2, notes={"mine": 1})
    one, two = (checkpoints.read_record(p) for p in (path, path.with_name("family.training")))
    assert one["run"] == two["run"]
    assert one["run"]["settings"]["seed"] == 0
    assert one["run"]["settings"]["optim"][1]["lr"] == 1e-3
    assert (one["rows"], one["data"]) == (two["rows"], two["data"]) == (40, one["data"])
    fit_run(path, 3, resume=True)
    again = checkpoints.read_record(path)
    assert again["run"] == one["run"]
    assert again["notes"] == {"mine": 1}
    fit_run(path, 2)
    assert checkpoints.read_record(path)["run"]["id"] != one["run"]["id"]


def test_a_new_run_keeps_the_older_one_under_another_name_and_both_go_on(path):
    whole = fit_run(path.with_name("whole"), 5, rate=1e-3)
    fit_run(path, 3, rate=1e-3, notes={"which": "first"})
    with pytest.warns(UserWarning, match=r"family holds another run, which is called family\.\d{8}T.* once") as caught:
        fit_run(path, 2, rate=1e-2, notes={"which": "second"})
    assert caught[0].filename == __file__
    [old] = older_runs(path)
    assert old.name in str(caught[0].message)
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(old.name)}', resume=True"):
        checkpoints.load(old)
    with pytest.raises(FileNotFoundError, match=r"is a folder.* such as .*family\.safetensors\."):
        checkpoints.load(path.parent)
    fit_run(path, 4, rate=1e-2, resume=True)
    assert checkpoints.read_record(path)["notes"] == {"which": "second"}
    first = fit_run(old, 5, rate=1e-3, resume=True)
    assert same_state(first, whole)
    assert checkpoints.read_record(old)["notes"] == {"which": "first"}
    assert len(history_of(path)) == 4


def older_runs(path):
    """Paths, without suffix, of the older runs beside one, in order of time."""
    names = sorted(p.name for p in path.parent.iterdir() if re.search(r"family\..*Z.*\.training\.safetensors$", p.name))
    return [path.with_name(name.removesuffix(".training.safetensors")) for name in names]


@pytest.mark.filterwarnings("ignore:.*holds another run")
def test_no_run_overwrites_an_older_one(path):
    """The third run by a name replaced the first, in silence."""
    for rate in (1e-3, 2e-3, 3e-3, 4e-3):
        fit_run(path, 1, rate=rate, notes={"rate": rate})
    kept = [checkpoints.read_record(old.with_name(f"{old.name}.training"))["notes"]["rate"] for old in older_runs(path)]
    assert sorted(kept) == [1e-3, 2e-3, 3e-3]
    begun = checkpoints.read_record(path)["run"]["begun"]
    assert older_runs(path)[0].name[7:15] == begun[:10].replace("-", "")
    fit_run(older_runs(path)[0], 2, rate=kept[0], resume=True)


@pytest.mark.filterwarnings("ignore:.*holds another run")
def test_a_run_that_cannot_be_read_is_kept_by_the_time_of_its_file(path):
    fit_run(path, 1)
    run = path.with_name("family.training.safetensors")
    tensors, record = checkpoints.read(run)
    for damage in (b"damaged", None):
        if damage:
            run.write_bytes(damage)
        else:
            forged = {**record["run"], "id": "../../../elsewhere", "begun": "2026-01-31T23:59:00+00:00"}
            checkpoints.write(run, tensors, {**record, "run": forged}, readable=False)
        os.utime(run, (1_800_000_000, 1_800_000_000 + bool(damage)))
        fit_run(path, 1)
    assert [old.name for old in older_runs(path)][-2:] == ["family.20270115T080000Z", "family.20270115T080001Z"]


def test_a_run_of_before_0_2_says_so(path):
    fit_run(path, 1)
    run = path.with_name("family.training")
    tensors, record = checkpoints.read(run)
    del record["run"]
    checkpoints.write(run, tensors, record, readable=False)
    with pytest.raises(ValueError, match=r"written before 0\.2, which saved no identity of the run: start anew"):
        fit_run(path, 2, resume=True)


def test_a_run_is_resumed_by_a_version_with_another_option_unless_it_is_used(path):
    def run(*, direct, epochs, resume):
        made = Autoregressive((2,), hidden=(4,), direct=direct)
        train(made, X, epochs=epochs, checkpoint=Checkpoint(path, resume=resume), progress=False)

    run(direct=False, epochs=1, resume=False)
    tensors, record = checkpoints.read(path.with_name("family.training"))
    for part in (record, record["run"]["settings"]["fit"]):
        part.get("arguments", {}).pop("direct", None)
    checkpoints.write(path.with_name("family.training"), tensors, record, readable=False)
    with pytest.raises(ValueError, match="fit arguments direct was null and is true"):
        run(direct=True, epochs=2, resume=True)
    run(direct=False, epochs=2, resume=True)
    assert len(history_of(path)) == 2


def test_a_run_is_not_resumed_with_other_keyword_arguments_of_the_model(path):
    def run(scale, *, epochs, resume):
        pyro.clear_param_store()

        def model(x, scale):
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(2)), scale).to_event(1), obs=x)

        options = {"checkpoint": Checkpoint(path, resume=resume), "model_kwargs": {"scale": scale}, "progress": False}
        train((model, lambda x, scale: None), X, epochs=epochs, **options)

    run(torch.ones(2), epochs=1, resume=False)
    with pytest.raises(ValueError, match="another run than this one: model_kwargs was"):
        run(2 * torch.ones(2), epochs=2, resume=True)
    run(torch.ones(2), epochs=2, resume=True)
    assert len(history_of(path)) == 2


def test_a_refused_resume_changes_nothing(path):
    def flow():
        pyro.set_rng_seed(0)
        return Flow((2,), context=1, transform=NSF(transforms=1, hidden=(4,)), standardize=True)

    x = 100 + X
    data = (x, x[:, :1])
    train(flow(), data, epochs=1, checkpoint=path, progress=False)
    family = flow()
    before = {name: t.clone() for name, t in family.state_dict().items()}
    for options in ({"batch_size": 7}, {"objective": 3}):
        with pytest.raises((ValueError, TypeError), match=r"another run|Pyro loss"):
            train(family, data, epochs=2, checkpoint=Checkpoint(path, resume=True), progress=False, **options)
        assert all(torch.equal(t, before[name]) for name, t in family.state_dict().items())
    train(family, (x - 50, x[:, :1] - 50), epochs=1, progress=False)  # it is standardised by the data that train it
    assert family.loc.mean() == pytest.approx(50, abs=1)
    assert family.context.loc.item() == pytest.approx(50, abs=1)


class Killed(BaseException):
    pass


OTHER_RUNS = {"rate": {"rate": 1e-2}, "seed": {"seed": 1}, "data": {"x": X + 1}, "batch": {"batch_size": 7}}


@pytest.mark.filterwarnings("ignore:.*holds another run")
@pytest.mark.parametrize("other", OTHER_RUNS.values(), ids=OTHER_RUNS)
@pytest.mark.parametrize("at", ["before its first write", "after the parameters alone"])
def test_a_run_that_is_killed_is_not_resumed_from_another(at, other, path, monkeypatch):
    """The issue's case: the older run of another rate and seed went on in its place, with the notes of the new one."""
    fit_run(path, 3, notes={"which": "first"})
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    name = "write_best" if at == "before its first write" else "write"

    def killed(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunCheckpoint, name, killed)
        with pytest.raises(Killed):
            fit_run(path, 3, notes={"which": "second"}, **other)
    after = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    assert after["family.training.safetensors"] == before["family.training.safetensors"]
    assert (after == before) == (name == "write_best")
    with pytest.raises(ValueError, match=r"data|run that began at .*, which is another run than this one: ") as caught:
        fit_run(path, 6, resume=True, **other)
    for option, value in other.items():
        if option in ("seed", "batch_size"):
            assert f"{option} was " in str(caught.value)
            assert f"and is {value}" in str(caught.value)
    if name == "write":  # the parameters are of the second run
        with pytest.raises(ValueError, match=r"began at .*family\.safetensors is of the run that began at") as caught:
            fit_run(path, 6, resume=True)
        assert other.keys() & {"x"} or " was " in str(caught.value)
        file_of(path).unlink()
        after.pop(file_of(path).name)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == after
    fit_run(path, 4, resume=True)
    assert len(history_of(path)) == 4
    assert checkpoints.read_record(path)["notes"] == {"which": "first"}


def test_a_run_is_on_disk_after_its_first_epoch(path, monkeypatch):
    """The first epochs of an hour each are not lost."""
    calls = []

    def killed(self):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return write_best(self)

    write_best = runs.RunCheckpoint.write_best
    monkeypatch.setattr(runs.RunCheckpoint, "write_best", killed)
    with pytest.raises(Killed):
        fit_run(path, 3)
    monkeypatch.undo()
    whole = fit_run(path.with_name("whole"), 3)
    assert same_state(fit_run(path, 3, resume=True), whole)


def test_where_only_an_older_run_is_left_it_is_named(path):
    fit_run(path, 1)
    run = path.with_name("family.training.safetensors")
    names = ["family.20260131T235900Z-c0ffee", "family.20260201T000000Z"]
    for name in names:
        shutil.copy(run, path.with_name(f"{name}.training.safetensors"))
    shutil.copy(run, path.with_name("family.two.training.safetensors"))  # another checkpoint's
    run.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{', '.join(names)}\. Resume one of them by its path, such as .*/family\.20260201T000000Z\."
    ):
        fit_run(path, 2, resume=True)
    fit_run(path.with_name(names[0]), 2, resume=True)


def test_a_seed_need_not_be_said_again(path):
    fit_run(path, 1, seed=5)
    flow = small_flow()
    train(flow, X, epochs=2, optim=partial(torch.optim.Adam, lr=1e-3), checkpoint=Checkpoint(path, resume=True), progress=False)
    assert len(history_of(path)) == 2


def run_file(path):
    """The tensors and the record of a run that is whole."""
    fit_run(path, 2, ema_decay=0.9)
    return checkpoints.read(path.with_name("family.training"))


def value_at(value, way):
    for key in way:
        value = value.get(key) if isinstance(value, dict) else value[key] if len(value) > key else None
    return value


def set_in(value, way, new):
    value = copy.deepcopy(value)
    inside = value
    for key in way[:-1]:
        inside = inside[key]
    if new is KeyError:
        del inside[way[-1]]
    else:
        inside[way[-1]] = new
    return value


class Done(BaseException):
    pass


class Resumed:
    """A run that is resumed from forged files, again and again."""

    def __init__(self, path):
        self.path, self.place = path, path.with_name("family.training")
        self.tensors, self.record = run_file(path)
        self.files = {p: p.read_bytes() for p in path.parent.iterdir()}
        self.flow = small_flow()

    def is_refused(self, record, tensors):
        """Return True if the run is refused, in words that name it, and leaves the parameters as they were."""
        forge(self.place, record, tensors)
        before = [p.clone() for p in self.flow.parameters()]
        checkpoint, optim = Checkpoint(self.path, resume=True), partial(torch.optim.Adam, lr=1e-3)
        with pytest.raises((ValueError, FloatingPointError, Done)) as caught:  # noqa: PT012
            train(self.flow, X, epochs=2, optim=optim, ema_decay=0.9, checkpoint=checkpoint, seed=0, progress=False)
            raise Done
        if caught.type is Done:
            for file, raw in self.files.items():
                file.write_bytes(raw)
            return False
        assert "family" in str(caught.value) or caught.type is FloatingPointError  # of a run without a best epoch
        assert str(caught.value).isprintable()
        assert all(torch.equal(p, q) for p, q in zip(self.flow.parameters(), before, strict=True))
        return True


FREE = ("notes", "pyro_genmodels", "stopped", "format"), ("id", "begun")
"""Entries, and those of the run's identity, which may have any text."""
FLAGS = {"foreach", "fused", "amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"}
NUMBERS = {"lr", "eps", "weight_decay", "betas"}


@pytest.mark.parametrize("number", [40, pytest.param(None, marks=pytest.mark.slow)])
def test_a_record_of_a_run_changed_in_any_place_is_refused_and_nothing_is_changed(number, path):
    """Each entry is removed and replaced by values of other types; a few options of Adam may be other numbers or null."""
    run, outcomes = Resumed(path), {}
    ways = [way for way in places(run.record) if way and way[0] not in FREE[0] and way[-1] not in FREE[1]]
    changes = [(way, new) for way in ways for new in (KeyError, None, "x", -7, [], {}, float("nan"))]
    assert len(changes) > 400
    for way, new in changes if number is None else random.Random(0).sample(changes, number):
        changed = set_in(run.record, way, new)
        if new is KeyError and value_at(run.record, way) is False and way[0] == "run":
            continue  # an option that is missing was off, as in a run of a version without it
        if value_at(changed, way) != value_at(run.record, way):  # an entry that is missing is one of null
            outcomes[(*way, str(new))] = run.is_refused(changed, run.tensors)
    taken = [way for way, refused in outcomes.items() if not refused]
    for *way, new in taken:
        if way[:2] == ["options", "param_groups"]:
            assert way[3] in (FLAGS if new == "None" else NUMBERS)
        else:
            assert way[0] in ("history", "best", "units")
            assert new in ("nan", "-7", "{}", "<class 'KeyError'>", "x")


def test_a_tensor_of_a_run_changed_in_any_way_is_refused_and_nothing_is_changed(path):
    run = Resumed(path)
    for name, t in run.tensors.items():
        others = {n: other for n, other in run.tensors.items() if n != name}
        for new in (torch.zeros(3, 3), torch.zeros((), dtype=torch.int64), t.double()):
            assert run.is_refused(run.record, {**others, name: new}) or (new.shape, new.dtype) == (t.shape, t.dtype)
        assert run.is_refused(run.record, others)
    for name in ("optimiser.0", "optimiser.x.step", "optimiser.99.step", "optimiser.0.more", "live.99", "optimiser"):
        assert run.is_refused(run.record, {**run.tensors, name: torch.zeros(())})
    assert run.is_refused(run.record, {**run.tensors, "random": torch.zeros_like(run.tensors["random"])})
    assert not run.is_refused(run.record, run.tensors)
