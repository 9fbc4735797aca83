"""Contexts: labels are one-hot vectors, and families that were pickled before 0.2 go on as they were."""

import copy
import pickle

import pyro
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_genmodels import Flow, Labels, RealNVP, train
from pyro_genmodels.families.context import VectorContext


def old_context(size):
    """Return a context as it was before 0.2: without mean and deviation."""
    context = VectorContext.__new__(VectorContext)
    nn.Module.__init__(context)
    context.out_features = size
    return context


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_family_that_was_pickled_before_0_2_goes_on_as_it_was(dtype):
    x, context = torch.randn(2, 20, 2, dtype=dtype)
    own = Flow((2,), context=2, transform=RealNVP(2, (8,)), standardize_context=False).to(dtype).eval()
    wanted = own(context).log_prob(x)
    own._modules["context"] = old_context(2)
    del own._data_check
    old = pickle.loads(pickle.dumps(own.eval()))
    assert_close(old(context).log_prob(x), wanted)
    assert_close(copy.deepcopy(old)(context).log_prob(x), wanted)
    train(old, (x, 3 + context), epochs=1, progress=False)
    assert old.context.loc.tolist() == [0, 0]
    old.load_state_dict(old.state_dict())


def test_labels_that_were_pickled_before_0_2_are_as_they_were():
    labels = Labels(3).double()
    labels.one_hot = labels._buffers["one_hot"] = torch.eye(3, dtype=torch.float64)
    del labels.one
    old = pickle.loads(pickle.dumps(labels))
    assert_close(old([2, 0]), torch.eye(3, dtype=torch.float64)[[2, 0]])
    assert [name for name, _ in old.named_buffers()] == ["one"]


# Labels.


def test_labels_take_no_more_memory_than_their_vectors():
    """A matrix of all one-hot vectors, of 4 TB for a million classes, was held."""
    labels = Labels(10**6)
    assert sum(buffer.numel() for buffer in labels.buffers()) == 1
    assert labels(torch.tensor([5, 7])).nonzero().tolist() == [[0, 5], [1, 7]]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_labels_are_one_hot_vectors_wherever_they_are_called(shape, dtype):
    labels, k = Labels(4).double(), torch.randint(4, shape).to(dtype)
    wanted = torch.eye(4, dtype=torch.float64)[k.long()]
    assert_close(labels(k), wanted)
    with pyro.validation_enabled(False):
        assert_close(make_fx(labels)(k)(k), wanted)
        if shape and len(k):
            assert_close(torch.vmap(labels)(k), wanted)
        with pytest.raises(RuntimeError, match="out of bounds"):
            labels(torch.tensor([4]))
