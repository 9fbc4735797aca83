"""Modes of a mixture that samples cover, counted by hand."""

import pytest
import torch

from pyro_genmodels.evaluation import mode_coverage


def test_modes_are_counted_by_their_high_quality_samples():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    samples = torch.cat([centres[:1].repeat(3, 1), centres[1:2], torch.full((4, 2), 2.5)])
    found = mode_coverage(samples, centres, 0.1)
    assert found.counts.tolist() == [3, 1, 0]
    assert (found.covered, found.high_quality, found.num_samples) == (2, 0.5, 8)
    share = torch.tensor([0.75, 0.25])
    assert found.reverse_kl == pytest.approx((share * (3 * share).log()).sum().item())
    with pytest.raises(ValueError, match="positive scale"):
        mode_coverage(samples, centres, 0.0)
