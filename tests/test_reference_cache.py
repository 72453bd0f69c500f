"""Cached features of real images belong to the images, the weights and what the weights are shown."""

import torch
from torch import nn

from diffdistill.data.image_set import ImageSet
from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.extractors import module_extractor
from diffdistill.evaluation.metrics import build_reference


def test_the_same_weights_with_another_input_convention_have_a_reference_of_their_own(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 4, 4), generator=generator, dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(6, dtype=torch.int64), num_classes=0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    for convention in (InputConvention(4, 4), InputConvention(4, 4, low=0.0)):
        extractor = module_extractor(network, name="linear", input=convention)
        found = build_reference(data, extractor, cache=tmp_path)
        torch.testing.assert_close(found.features, extractor(data.select(torch.arange(6))[0])[0])
