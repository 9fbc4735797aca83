"""Random numbers drawn aside change none that are drawn afterwards, on any number of devices."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from pyro_genmodels.utils.rng import forked_rng


@pytest.mark.parametrize("seed", [None, 7])
def test_the_random_state_is_restored_also_after_an_error(seed):
    before = torch.get_rng_state()
    inside = []
    with pytest.raises(ZeroDivisionError), forked_rng(seed):
        inside.append(torch.rand(3)) or 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), inside[0]) == (seed == 7)


class Device:
    """A module of torch for an accelerator of several devices."""

    def __init__(self, *, is_used):
        self.is_used, self.states = is_used, {0: "a", 1: "b"}

    def device_count(self):
        return 2

    def is_initialized(self):
        return self.is_used

    def get_rng_state(self, device):
        return self.states[device]

    def set_rng_state(self, state, device):
        self.states[device] = state


@pytest.mark.parametrize("is_used", [True, False])
def test_several_devices_are_restored_without_a_warning_and_not_started(is_used, monkeypatch):
    device = Device(is_used=is_used)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with forked_rng():
            device.states = {0: "c", 1: "d"}
    assert device.states == ({0: "a", 1: "b"} if is_used else {0: "c", 1: "d"})


def test_a_seed_inside_does_not_seed_cuda_that_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it seeds all devices"))
    with forked_rng(3):
        first = torch.rand(())
    with forked_rng(3):
        assert torch.rand(()) == first
