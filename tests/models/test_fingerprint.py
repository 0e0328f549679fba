"""The detach test's own instrument notices every kind of trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sfumato.models import Model
from tests.helpers import fingerprint
from tests.tiny import tiny_model


class OtherProcessor:
    """Stands in for a processor left behind."""


def scheduler_config(model: Model) -> None:
    model.pipe.scheduler.register_to_config(beta_end=0.5)


TRACES: dict[str, Callable[[Model], object]] = {
    "weight": lambda model: model.denoiser.conv_in.weight.data.view(-1)[3].add_(1e-7),
    "other storage": lambda model: setattr(
        model.denoiser.conv_in.weight, "data", model.denoiser.conv_in.weight.clone()
    ),
    "buffer": lambda model: model.pipe.text_encoder.register_buffer("left", torch.zeros(1)),
    "hook": lambda model: model.denoiser.mid_block.register_forward_hook(lambda *_: None),
    "pre-hook": lambda model: model.pipe.vae.register_forward_pre_hook(lambda *_: None),
    "processor": lambda model: setattr(
        model.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1, "processor", OtherProcessor()
    ),
    "patched forward": lambda model: setattr(model.denoiser.conv_in, "forward", lambda x: x),
    "mode": lambda model: model.denoiser.mid_block.train(),
    "requires_grad": lambda model: model.denoiser.conv_in.requires_grad_(True),
    "new module": lambda model: model.denoiser.add_module("adapter", torch.nn.Identity()),
    "replaced module": lambda model: setattr(model.denoiser, "conv_in", torch.nn.Identity()),
    "random state": lambda model: torch.rand(1),
    "gradient mode": lambda model: torch.set_grad_enabled(True),
    "scheduler": scheduler_config,
}


@pytest.mark.parametrize("trace", TRACES)
def test_notices(trace: str) -> None:
    model = tiny_model("sd", fresh=True)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.random.fork_rng(devices=[]):
        TRACES[trace](model)
        assert fingerprint(model) != before


def test_a_prediction_leaves_no_trace() -> None:
    model = tiny_model("sd")
    before = fingerprint(model)
    scheduler = model.make_scheduler("euler")
    model.timesteps(scheduler, 3)
    condition = model.encode_text("a red cube")
    model.decode(model.predict(torch.zeros(1, 4, 16, 16), 500, condition, "cond"))
    assert fingerprint(model) == before
