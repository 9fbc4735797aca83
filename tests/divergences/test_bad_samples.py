"""What is no two sets of samples is refused, by every figure of samples alike, and what is one is taken in every form."""

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

from pyro_genmodels.divergences import divergence_table, mmd, sliced_wasserstein, wasserstein
from pyro_genmodels.divergences.kernels import Kernel
from pyro_genmodels.evaluation import c2st, coverage, mmd_test, mode_coverage

FIGURES = {
    "mmd": mmd,
    "wasserstein": wasserstein,
    "sliced_wasserstein": lambda x, y: sliced_wasserstein(x, y, num_projections=5, seed=1),
    "coverage": coverage,
    "mode_coverage": lambda x, y: mode_coverage(x, y, 1.0),
    "mmd_test": lambda x, y: mmd_test(x, y, num_permutations=5),
    "c2st": lambda x, y: c2st(x, y, folds=2, hidden=(2,)),
}
GOOD = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))


def holed(value, rows=(3, 7)):
    x = GOOD.clone()
    x[list(rows), 0] = value
    return x


BAD = {  # name -> (x, y, error, its message)
    "NaN": (holed(torch.nan), GOOD, ValueError, "2 of the 20 samples of .* hold NaN or infinity, the first at 3"),
    "infinity": (GOOD, holed(-torch.inf), ValueError, "2 of the 20 samples of .* hold NaN or infinity, the first at 3"),
    "NaN in an array": (GOOD, holed(torch.nan).numpy(), ValueError, "2 of the 20 samples"),
    "1e200": (holed(1e30).double() * 1e170, GOOD, ValueError, "holds a number of magnitude 1.0e.200. Divide both sets"),
    "no samples": (GOOD[:0], GOOD, ValueError, r"at least \d+ samples in each set.*has shape \(0, 2\)"),
    "a number": (torch.tensor(1.0), GOOD, ValueError, r"has shape \(\)"),
    "other events": (GOOD, torch.randn(20, 3), ValueError, r"\(20, 2\) and .* \(20, 3\)"),
    "(n,) and (n, 1)": (GOOD[:, 0], GOOD[:, :1], ValueError, r"\(20,\) and .* \(20, 1\).*the same in both"),
    "no numbers in an event": (GOOD[:, :0], GOOD[:, :0], ValueError, r"\(20, 0\)"),
    "complex": (GOOD.to(torch.complex64), GOOD, ValueError, "real numbers, but .* torch.complex64"),
    "a distribution": (dist.Normal(0.0, 1.0), GOOD, TypeError, r"wants samples, but .* is a Normal. Pass samples of it"),
    "a name": ("moons", GOOD, TypeError, "wants numbers, as a tensor, a numpy array"),
    "nothing": (None, GOOD, TypeError, "but found NoneType"),
    "text": (GOOD, pd.DataFrame({"a": [1.0] * 20, "b": ["Ada"] * 20}), TypeError, "the column 'b' holds str"),
}


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_set_of_samples_is_refused(figure, case):
    x, y, error, match = BAD[case]
    with pytest.raises(error, match=f"^{figure}.*{match}"):
        FIGURES[figure](x, y)


@pytest.mark.parametrize("figure", [name for name in FIGURES if name != "mode_coverage"])
def test_one_row_is_no_set(figure):
    with pytest.raises(ValueError, match=rf"{figure} wants at least \d+ samples in each set.*\(1, 2\)"):
        FIGURES[figure](GOOD[:1], GOOD)


@pytest.mark.parametrize("figure", FIGURES)
def test_arrays_frames_and_lists_are_samples(figure):
    x, y = GOOD.double(), GOOD.flip(0).double() + 0.1
    torch.manual_seed(1)
    truth = str(FIGURES[figure](x, y))
    for form in (lambda t: t.numpy(), lambda t: pd.DataFrame(t.numpy()), lambda t: t.tolist(), lambda t: t.float().double()):
        torch.manual_seed(1)
        assert str(FIGURES[figure](form(x), form(y))) == truth


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16])
def test_every_real_dtype_is_taken_as_numbers(figure, dtype):
    x, y = (torch.randint(0, 2, (20, 2)).to(dtype) for _ in range(2))
    assert str(FIGURES[figure](x, y)) == str(FIGURES[figure](x.float(), y.float()))


@pytest.mark.parametrize("figure", FIGURES)
def test_numbers_need_no_dimension_and_dtypes_may_differ(figure):
    x, y = GOOD[:, 0], GOOD[:, 1]
    assert str(FIGURES[figure](x, y)) == str(FIGURES[figure](x[:, None], y[:, None]))
    FIGURES[figure](x.double(), y)
    FIGURES[figure](pd.Series(x.numpy()), np.arange(20, dtype=np.int32))


class Broken(Kernel):
    def __call__(self, x, y):
        return (x @ y.T).sqrt()


@pytest.mark.parametrize("figure", [mmd, mmd_test])
def test_a_kernel_that_returns_nan_is_refused(figure):
    with pytest.raises(ValueError, match=r"wants a kernel with finite values, but .*Broken"):
        figure(GOOD, GOOD + 1, kernel=Broken())


@pytest.mark.parametrize("other", [GOOD, dist.Normal(torch.zeros(2), 1.0).to_event(1)], ids=["samples", "distribution"])
def test_a_table_of_samples_with_nan_is_refused(other):
    """It was empty."""
    with pytest.raises(ValueError, match="divergence_table wants finite samples, but 2 of the 20 samples of q hold NaN"):
        divergence_table(other, holed(torch.nan))


@pytest.mark.parametrize("figure", FIGURES)
def test_integers_that_doubles_round_are_refused(figure):
    """The distance of 2**60 + (0, ..., 99) from 2**60 + (50, ..., 149) was 117 instead of 50."""
    x, y = 2**60 + torch.arange(100)[:, None], 2**60 + torch.arange(50, 150)[:, None]
    with pytest.raises(ValueError, match=r"computes in doubles, but .* holds integers of magnitude 1.2e.18"):
        FIGURES[figure](x, y)
    assert wasserstein(x - 2**60, y - 2**60).value == 50
    FIGURES[figure](2**58 * torch.arange(20), 2**58 * torch.arange(1, 21))  # which doubles hold
