"""A TorchScript file whose weights were made constants does not tell its device and dtype."""

import pytest
import torch
from torch import nn

from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.extractors import open_extractor


@pytest.mark.parametrize("convention", [None, InputConvention(4, 4)], ids=["unnamed", "named"])
def test_a_frozen_file_is_refused_with_the_way_out(tmp_path, convention):
    network = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval())
    torch.jit.freeze(network).save(str(tmp_path / "frozen.pt"))
    with pytest.raises(ValueError, match=r"frozen.pt has no parameters.*save the module before it is frozen"):
        open_extractor(str(tmp_path / "frozen.pt"), input=convention)
