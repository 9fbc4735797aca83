"""A block of torch code ends before it takes more memory or more calls than it may, and is otherwise left alone."""

import pytest
import torch
from cases import CASES
from torch import nn

from pyro_genmodels.training.allocation import LimitError, limited

BOMBS = {
    "a factory": lambda: torch.zeros(10**12),
    "a factory by an integer": lambda: torch.arange(10**12),
    "like another": lambda: torch.ones(1).new_empty(10**6, 10**6),
    "a square": lambda: torch.eye(10**6),
    "a product": lambda: (a := torch.ones(10_000))[:, None] * a.expand(10**4, 10**4)[:, :, None],
    "a comparison": lambda: torch.arange(100_000)[:, None] >= torch.arange(100_000),
    "a repetition": lambda: torch.ones(3).repeat(10**12),
    "an expansion that is copied": lambda: torch.ones(1).expand(10**12).contiguous(),
    "a layer": lambda: nn.Linear(10**6, 10**6),
    "an embedding": lambda: nn.Embedding(10**12, 1),
    "a convolution": lambda: nn.Conv2d(10**4, 10**4, 99),
    "random numbers": lambda: torch.randn(10**12),
    "many pieces": lambda: [torch.ones(10**5) for _ in range(10**5)],
}


@pytest.mark.parametrize("kind", BOMBS)
def test_memory_is_refused_before_it_is_taken(kind):
    with pytest.raises(LimitError, match="takes more than 10,000,000 bytes"), limited(max_bytes=10**7, max_operations=10**6):
        BOMBS[kind]()


def test_calls_are_counted():
    with pytest.raises(LimitError, match="takes more than 20 operations"), limited(max_bytes=10**7, max_operations=20):
        nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**9)))


def test_results_and_random_numbers_are_those_without_a_limit():
    for case in CASES[::6]:
        states = []
        for _ in range(2):
            torch.manual_seed(0)
            with limited(max_bytes=10**8, max_operations=10**5) if states else torch.no_grad():
                states.append(case.build().state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.ones(10**6).sum() == 10**6  # after the block there is no limit


def test_an_error_in_the_block_is_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot"), limited(max_bytes=10**7, max_operations=10):
        torch.ones(100, 100) @ torch.ones(99, 100)
