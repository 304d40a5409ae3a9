"""What tests of several distillers need."""

import pytest
import torch


class Given(torch.nn.Module):
    """A network of these pooled features. Those of an untrained one are much alike: a loss between images is near 0."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = torch.nn.Parameter(pooled)

    def forward(self, images, return_features=False):
        return self.pooled, {"pooled": self.pooled}


@pytest.fixture
def network_of():
    return Given
