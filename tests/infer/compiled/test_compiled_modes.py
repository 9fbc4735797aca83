"""Everything that takes a mode refuses what is none, and says what is wanted."""

from functools import partial

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, CompiledSVI, capture, captured_target

MAKERS = {
    "CompiledSVI": partial(CompiledSVI, print, print, pyro.optim.Adam({}), Trace_ELBO()),
    "CapturedLoss": partial(CapturedLoss, print, print, Trace_ELBO()),
    "capture": partial(capture, lambda x: (x,), torch.zeros(2)),
    "captured_target": partial(captured_target, lambda x: -x.square().sum(-1), torch.zeros(3, 2)),
}


@pytest.mark.parametrize("owner", MAKERS)
@pytest.mark.parametrize(("mode", "found"), [("captured", "'captured'"), (Captured, "the class Captured; call it")])
def test_what_is_no_mode_is_refused(owner, mode, found):
    with pytest.raises(
        TypeError, match=rf"{owner} wants Compiled\(\), Captured\(\) or Eager\(\) as mode, or None, but found {found}\."
    ):
        MAKERS[owner](mode=mode)
