"""Processes that turn data into noise, checked by automatic differentiation."""

from dataclasses import FrozenInstanceError
from math import exp, log, pi

import pytest
import torch
from torch.testing import assert_close

from pyro_genmodels import VariancePreserving
from pyro_genmodels.dynamics.processes import along, stratified
from pyro_genmodels.families import CosineVariancePreserving, Karras, SubVariancePreserving, VarianceExploding

PROCESSES = [
    VariancePreserving(), VariancePreserving(0.5, 10.0), SubVariancePreserving(), CosineVariancePreserving(),
    CosineVariancePreserving(0.05), VarianceExploding(), VarianceExploding(0.01, 5.0), Karras(), Karras(0.05, 20.0),
]  # fmt: skip
every = pytest.mark.parametrize("process", PROCESSES, ids=repr)


def times(process, n=201):
    """Return times from start to end, denser near the data."""
    t = process.start * (process.end / process.start) ** torch.linspace(0, 1, n)
    return torch.cat([t[:1] * 0 + process.start, t[1:-1], t[:1] * 0 + process.end])


def slope(function, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0] if function(t).requires_grad else torch.zeros_like(t)


@every
def test_the_drift_is_the_slope_of_log_alpha(process, float64):
    t = times(process)
    assert_close(process.drift(t), slope(lambda t: process.alpha(t).log(), t), rtol=1e-8, atol=1e-8)


@every
def test_the_squared_diffusion_makes_up_for_what_the_drift_takes(process, float64):
    t = times(process)
    wanted = slope(lambda t: process.sigma(t).square(), t) - 2 * process.drift(t) * process.sigma(t).square()
    assert_close(process.squared_diffusion(t), wanted, rtol=1e-7, atol=1e-9)


@every
def test_the_log_of_signal_to_noise_falls_at_half_the_rate_of_noise(process, float64):
    """dlambda/dt = -g^2 / (2 sigma^2), by which `LikelihoodWeighting` counts."""
    t = times(process)
    assert_close(slope(process.log_snr, t), -process.squared_diffusion(t) / (2 * process.sigma(t).square()), rtol=1e-7, atol=0)


@every
def test_the_time_of_a_signal_to_noise_ratio_is_its_inverse(process, float64):
    t = times(process)
    assert_close(process.time(process.log_snr(t)), t, rtol=1e-9, atol=1e-11)
    low, high = process.log_snr_range
    log_snr = torch.linspace(low, high, 50)
    assert_close(process.log_snr(process.time(log_snr)), log_snr, rtol=1e-9, atol=1e-9)


@every
def test_single_precision_keeps_the_signal_to_noise_ratio_and_the_time(process):
    t = times(process).float()
    exact = process.log_snr(t.double())
    assert_close(process.log_snr(t).double(), exact, rtol=1e-3, atol=1e-3)
    assert_close(process.time(exact.float()).double(), t.double(), rtol=1e-4, atol=1e-6)
    assert process.alpha(t).dtype == process.sigma(t).dtype == process.time(t).dtype == torch.float32


@every
def test_noise_grows_from_nearly_none_to_nearly_all(process, float64):
    t = times(process)
    low, high = process.log_snr_range
    assert 0 < process.start < process.end
    assert_close(torch.tensor([high, low]), process.log_snr(t)[[0, -1]])
    assert (process.log_snr(t).diff() < 0).all()
    assert (process.sigma(t) > 0).all()
    assert (process.alpha(t) > 0).all()
    assert (process.squared_diffusion(t) > 0).all()
    assert low < -1.5
    assert high > 2.5


def test_defaults_leave_little_noise_and_little_of_the_data():
    for process in (VariancePreserving(), SubVariancePreserving(), CosineVariancePreserving(), VarianceExploding(), Karras()):
        low, high = process.log_snr_range
        assert exp(low) < 0.013
        assert exp(-high) < 0.013


@pytest.mark.parametrize("process", [VariancePreserving(), VariancePreserving(0.5, 10.0), CosineVariancePreserving()], ids=repr)
def test_variance_is_kept(process, float64):
    t = times(process)
    assert_close(process.alpha(t).square() + process.sigma(t).square(), torch.ones(201), rtol=0, atol=1e-12)


def test_closed_forms(float64):
    t = times(VariancePreserving())
    alpha = (-0.5 * (0.1 * t + 0.5 * 19.9 * t**2)).exp()
    for process in (VariancePreserving(), SubVariancePreserving()):
        assert_close(process.alpha(t), alpha)
    assert_close(SubVariancePreserving().sigma(t), 1 - alpha**2, rtol=1e-9, atol=0)
    t = times(CosineVariancePreserving())
    assert_close(
        CosineVariancePreserving().alpha(t),
        torch.cos((t + 0.008) / 1.008 * pi / 2) / torch.cos(torch.tensor(0.008 / 1.008 * pi / 2)),
    )
    assert_close(VarianceExploding(0.01, 5.0).sigma(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.01, 0.05**0.5, 5.0]))
    assert VarianceExploding(0.01, 5.0).log_snr_range == pytest.approx((-log(5.0), -log(0.01) - 1e-5 * log(500)))
    assert Karras(0.05, 20.0).log_snr_range == pytest.approx((-log(20.0), log(20.0)))


@every
def test_noisy_data_are_a_sum_of_data_and_noise_at_the_times_of_their_rows(process, float64):
    x, noise, t = torch.randn(4, 2, 3), torch.randn(4, 2, 3), times(process)[[3, 50, 120, 199]]
    noisy = process.noised(x, t, noise)
    for i in range(4):
        assert_close(noisy[i], process.alpha(t[i]) * x[i] + process.sigma(t[i]) * noise[i])


def test_values_broadcast_along_rows():
    x = torch.randn(3, 2, 2)
    assert along(torch.ones(3), x).shape == (3, 1, 1)
    assert along(torch.tensor(2.0), x).shape == ()
    assert along(torch.ones(3), torch.randn(3)).shape == (3,)


@pytest.mark.parametrize("shape", [(), (8,), (2, 4)])
def test_stratified_numbers_fall_one_into_each_part(shape, float64):
    u = stratified(shape, torch.zeros(()))
    assert u.shape == shape
    assert u.dtype == torch.float64
    n = u.numel()
    assert (u.flatten() * n).floor().sort().values.tolist() == list(range(n))
    assert not stratified(shape, u).equal(u)


def test_each_stratified_number_is_uniform(float64):
    """Kolmogorov's test of each of four, over 4000 calls: false alarms once in 1e6."""
    u = torch.stack([stratified((4,), torch.zeros(())) for _ in range(4000)]).sort(0).values
    gap = (u - (torch.arange(4000) / 4000).unsqueeze(1)).abs().max()
    assert gap < (log(2 / 1e-6 * 4) / 2 / 4000) ** 0.5 + 1 / 4000


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: VariancePreserving(0.0), "beta_min.: 0.0"), (lambda: VariancePreserving(20.0, 0.1), "beta_min < beta_max"),
        (lambda: SubVariancePreserving(1.0, 1.0), "beta_min < beta_max"), (lambda: CosineVariancePreserving(-0.1), "offset"),
        (lambda: CosineVariancePreserving(float("nan")), "offset"),
        (lambda: VarianceExploding(sigma_max=float("inf")), "sigma_max"),
        (lambda: VarianceExploding(1.0, 0.5), "sigma_min < sigma_max"), (lambda: Karras(-1.0), "sigma_min"),
        (lambda: Karras(90.0), "sigma_min < sigma_max"), (lambda: Karras("small"), "sigma_min.: 'small'"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(build, found):
    with pytest.raises(ValueError, match=f"wants .*{found}"):
        build()


def test_processes_are_values():
    assert VariancePreserving() == VariancePreserving(0.1, 20.0)
    assert Karras() != Karras(0.01)
    with pytest.raises(FrozenInstanceError):
        Karras().sigma_min = 1.0
