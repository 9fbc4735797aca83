"""Markov chains over captured log densities: the same chains as by autograd, whatever the block."""

import pytest
import torch
from torch import nn

from pyro_genmodels import DenseEnergy, EnergyModel
from pyro_genmodels.infer.compiled import Captured, Compiled, captured_target
from pyro_genmodels.samplers import Hamiltonian, Langevin, ParallelTempering, run, sample_chains
from pyro_genmodels.samplers.target import check_target, value_and_score


def network():
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))


def positions(target, x, sampler, steps=20):
    torch.manual_seed(1)
    return run(sampler, target, x, steps, rate=0.1).x


@pytest.mark.parametrize("mode", [Captured(), pytest.param(Compiled(), marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", [Langevin(0.05), Langevin(0.05, adjusted=False), Hamiltonian(0.1)])
def test_chains_are_those_by_autograd(sampler, mode):
    net, x = network(), torch.randn(10, 3)
    wanted = positions(check_target(net, 1), x, sampler)
    assert not wanted.allclose(x)
    torch.testing.assert_close(positions(captured_target(net, x, mode=mode), x, sampler), wanted)


@pytest.mark.parametrize("block", [1, 4, 10, 100])
def test_blocks_change_nothing(block):
    net, x = network(), torch.randn(10, 3)
    target = captured_target(net, x, block=block, mode=Captured())
    torch.testing.assert_close(value_and_score(target, x, 0.5), value_and_score(check_target(net, 1), x, 0.5))
    assert len(target.scored.graphs) == (2 if block == 4 else 1)


def test_temperatures_have_a_graph_of_their_own():
    net, x = network()[:-1], torch.randn(6, 3)
    sampler = ParallelTempering(Langevin(0.05), temperatures=3)

    def density(x):
        return net(x).squeeze(-1)

    target = captured_target(density, x, block=4, mode=Captured())
    chains = sampler.replicate(x)
    wanted = positions(check_target(density, 1), chains, sampler, steps=5)
    torch.testing.assert_close(positions(target, chains, sampler, steps=5), wanted)


def test_trained_parameters_are_seen():
    net, x = network(), torch.randn(5, 3)
    target = captured_target(net, x, mode=Captured())
    value_and_score(target, x, 1.0)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    torch.testing.assert_close(value_and_score(target, x, 1.0), value_and_score(check_target(net, 1), x, 1.0))


def test_an_energy_model_is_sampled():
    energy, x = EnergyModel((2,), energy=DenseEnergy((8,))), torch.randn(20, 2)
    draws = []
    for target in (energy(), captured_target(energy(), x, mode=Captured())):
        torch.manual_seed(1)
        draws.append(sample_chains(target, x, num_samples=5, warmup=5, progress=False).draws)
    torch.testing.assert_close(*draws)


def test_what_cannot_be_cut_into_blocks_is_refused():
    x = torch.randn(4, 2)
    conditional = EnergyModel((2,), context=1, energy=DenseEnergy((8,)))(torch.randn(4, 1))
    with pytest.raises(ValueError, match="a context for each chain"):
        captured_target(conditional, x, block=2)
    with pytest.raises(ValueError, match="block"):
        captured_target(network(), x, block=0)
    with pytest.raises(TypeError, match="unnormalised log density"):
        captured_target(3, x)
    wanted = value_and_score(conditional.target(), x, 1.0)
    torch.testing.assert_close(value_and_score(captured_target(conditional, x, mode=Captured()), x, 1.0), wanted)


def test_few_graphs_are_kept():
    net, target = network(), None
    target = captured_target(net, torch.randn(1, 3), mode=Captured(script=False))
    for n in range(1, 19):
        value_and_score(target, torch.randn(n, 3), 1.0)
    assert len(target.scored.graphs) == 16
