"""Relevance propagation against captum's LRP, on layers that both know."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sfumato.relevance.lrp import traced
from sfumato.relevance.propagation_rules import Rules


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, stride=2, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Linear(32, 10, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 4, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


def network() -> Network:
    torch.manual_seed(3)
    return Network().eval()


@pytest.mark.parametrize("ours, theirs", [("alpha_beta", "Alpha1_Beta0_Rule"), ("epsilon", "EpsilonRule")])
def test_agrees_with_captum(ours: str, theirs: str) -> None:
    captum = pytest.importorskip("captum.attr")
    rule = getattr(pytest.importorskip("captum.attr._utils.lrp_rules"), theirs)
    net = network()
    x = torch.rand(3, 3, 16, 16)  # captum's alpha-1 beta-0 rule is made for inputs that are not negative
    peer = copy.deepcopy(net)
    for part in peer.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.rule = rule()
    want = captum.LRP(peer).attribute(x.clone().requires_grad_(), target=2).detach()
    score = net(x)[:, 2].detach()
    found = traced(net, x, 2, Rules(linear=ours, bounds=None), gradients=False, to_inputs=True, attention=False)
    got = found.inputs * score[:, None, None, None]  # captum starts at the score, relevance here at 1
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert want.abs().max() > 0
