"""Plates without a size: Pyro gives them -1 rows, and `measure_plates` those of their sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from pyro_genmodels._pyro.plates import UNKNOWN_SIZE, measure_plates, plates_around


def sizes(trace):
    """Return the sizes of the plates around each site, by name."""
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}
    return {name: {f.name: f.size for f in site["cond_indep_stack"]} for name, site in sites.items()}


def test_pyro_marks_a_plate_without_a_size():
    def model():
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))

    trace = poutine.trace(model).get_trace()
    assert sizes(trace) == {"x": {"data": UNKNOWN_SIZE}}
    measure_plates(trace)
    assert sizes(trace) == {"x": {"data": 3}}


@pytest.mark.parametrize("obs", [None, torch.zeros(2, 5)], ids=["sampled", "observed"])
def test_all_sites_of_a_plate_tell_its_size(obs):
    """A site may have one row for all, and a plate of a known size keeps it."""

    def model():
        with pyro.plate("rows"), pyro.plate("columns", 2, dim=-2):
            pyro.sample("shared", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(5) if obs is None else torch.zeros(()), 1.0), obs=obs)

    trace = poutine.trace(model).get_trace()
    measure_plates(trace)
    assert sizes(trace) == {name: {"rows": 5, "columns": 2} for name in ("shared", "x")}


def test_model_and_guide_are_measured_together():
    """Their frames are compared, so that they must not differ."""

    def fn(scale):
        with pyro.plate("data"):
            pyro.sample("x", dist.Normal(0.0, scale))

    one, four = (poutine.trace(fn).get_trace(torch.ones(n)) for n in (1, 4))
    measure_plates(one, four)
    assert sizes(one) == sizes(four) == {"x": {"data": 4}}


def test_plates_around_a_call_take_dimensions():
    with pyro.plate("rows", 2), poutine.block(), pyro.plate("columns", 3):
        for _ in pyro.plate("one by one", 1):
            assert plates_around() == ["rows", "columns"]
        with pyro.plate("inner", 4) as inner:
            assert len(inner) == 4
            assert plates_around()[-1] == "inner"
    assert plates_around() == []
