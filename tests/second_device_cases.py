"""Every system on a second device, a pretended one: a tensor made in the wrong place fails here, not at a user's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sfumato
from sfumato.cards import build
from sfumato.explain.daam import DAAM
from sfumato.models import Model
from sfumato.sampling import generate
from tests.contract.systems import PAIRS, SYSTEMS
from tests.examples import write_adapters
from tests.experts import write_expert
from tests.pipelines import PROMPT, assert_same_maps
from tests.second_device import NAME, Device, DeviceGenerator, OnDevice, WrongDevice, pretending
from tests.tiny import tiny_model, tiny_pipeline

#: a U-Net, joint attention, a clip, masked tokens
KINDS = ("sd", "flux", "animatediff", "amused")
#: on the others the systems whose work hardly depends on the network do the same again, and cost what they cost there
EVERYWHERE = {"daam": KINDS, "prompt_to_prompt": ("sd",)}
TRIED = [(key, next(kind for kind in ("flux", "sd", "inpaint") if (key, kind) in PAIRS)) for key in SYSTEMS] + [
    (key, kind) for key, kind in PAIRS if kind in EVERYWHERE.get(key, ()) and kind != "flux"
]
"""Every system on the cheapest network that offers what it needs, some on a network of each kind."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: Any) -> Any:
    folder = write_adapters(tmp_path_factory.mktemp("examples"))
    for i, ends in enumerate(((0, 500), (500, 1000))):
        write_expert(folder, "flux", f"tiny-flux-expert-1-{i}", ends, i)
    return folder


@pytest.fixture
def device(cache: Any, monkeypatch: Any) -> Iterator[Device]:
    monkeypatch.setenv("SFUMATO_CACHE", str(cache))
    with pretending(watched="/src/sfumato/") as device, sdpa_kernel(SDPBackend.MATH):
        yield device


@functools.cache
def there(kind: str) -> Model:
    """The tiny model, on the device."""
    model = tiny_model(kind, fresh=True)
    for module in model.modules.values():
        module.to(NAME)
    return model


@pytest.mark.parametrize(("key", "kind"), TRIED)
def test_systems(key: str, kind: str, device: Device):
    given = {"steps": 1, "guidance": 3.0, "seed": 5, "decode": False}
    system, own = build(SYSTEMS[key].example), build(SYSTEMS[key].example)
    made = generate(there(kind), PROMPT, interventions=system, **given)
    assert isinstance(made.latents, OnDevice) and device.operations > 250
    expected = generate(tiny_model(kind), PROMPT, interventions=own, **given)
    assert made.coverage == expected.coverage
    torch.testing.assert_close(made.latents.cpu(), expected.latents, atol=1e-4, rtol=1e-4)
    assert not device.doubles, f"float64, which not every accelerator has, at {sorted(device.doubles)}"
    if key == "daam":
        assert_same_maps(own.maps, system.maps)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_picture(kind: str, device: Device):
    given = {"steps": 1, "guidance": 3.0, "seed": 5}
    made, expected = generate(there(kind), PROMPT, **given), generate(tiny_model(kind), PROMPT, **given)
    assert torch.equal(made.latents.cpu(), expected.latents)
    for one, other in zip(made.images, expected.images, strict=True):
        assert one.tobytes() == other.tobytes()


def test_attached_to_a_pipeline(device: Device):
    pipe = there("sd").pipe
    for place in (NAME, "cpu"):  # an own generator, and one of the CPU, which diffusers moves
        generator = DeviceGenerator() if place == NAME else torch.Generator()
        with sfumato.attached(pipe, "daam:words=[cube]") as run:
            pipe(PROMPT, num_inference_steps=1, height=32, width=32, generator=generator.manual_seed(1))
        assert run.maps[0].map("cube").sum() > 0 and not device.doubles


# --- what the pretence is worth ---------------------------------------------------------------------------------------


class Mistaken(torch.autograd.Function):
    """Right on the way forth, wrong on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient + torch.ones(3, 4)


def _write_into(out: Tensor, x: Tensor) -> Tensor:
    return torch.add(x, 1, out=out)


MISTAKES = {
    "noise of the CPU is added": lambda x: x + torch.randn(3, 4),
    "one row of the CPU is added": lambda x: x + torch.ones(4),
    "into a tensor of the CPU": lambda x: _write_into(torch.empty(3, 4), x),
    "added in place to a number of the CPU": lambda x: torch.zeros(()).add_(x.sum()),
    "joined": lambda x: torch.cat([x, torch.zeros(1, 4)]),
    "a number of the CPU in a stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "weights of the CPU": lambda x: nn.Linear(4, 2)(x),
    "a mask of the CPU where elements are chosen": lambda x: torch.where(torch.ones(3, 4).bool(), x, x),
    "an index of the device into the CPU": lambda x: torch.zeros(3)[torch.arange(2, device=NAME)],
    "gathered by an index of the CPU": lambda x: x.gather(1, torch.zeros(3, 1).long()),
    "values of the CPU are put": lambda x: x.index_put_((torch.tensor([0, 1]),), torch.ones(2, 4)),
    "a generator of the CPU": lambda x: torch.randn(3, device=NAME, generator=torch.Generator()),
    "a generator of the CPU, in place": lambda x: x.normal_(generator=torch.Generator()),
    "the gradient": lambda x: torch.autograd.grad(Mistaken.apply(x.requires_grad_()).sum(), x),
    "the data of a parameter": lambda x: setattr(nn.Parameter(x), "data", torch.zeros(3, 4)),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_refused(what: str, device: Device):
    with pytest.raises(RuntimeError, match=f"same device|{NAME}|of the CPU"):
        MISTAKES[what](torch.ones(3, 4, device=NAME))
    assert issubclass(WrongDevice, RuntimeError)


def test_numpy_reads_nothing_of_the_device(device: Device):
    x = torch.ones(3, device=NAME)
    for read in (lambda: x.numpy(), lambda: np.asarray(x), lambda: np.array(x), lambda: np.add(x, 1)):
        with pytest.raises(TypeError, match="Use Tensor.cpu"):
            read()
    assert x.cpu().numpy().tolist() == x.tolist() == [1, 1, 1] and float(x[0]) == x[0].item() == 1


def test_what_a_real_device_allows_is_allowed(device: Device):
    x = torch.arange(12.0, device=NAME).view(3, 4)
    for given in (torch.tensor([0, 2]), [0, 2], torch.tensor([True, False, True]), torch.tensor([0, 2], device=NAME)):
        assert x[given].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert (x * torch.tensor(2.0)).device.type == torch.full_like(x, 1).device.type == NAME
    assert x.new_tensor([1.0]).device.type == torch.tensor([1.0], device=NAME).device.type == NAME
    x[:, 1:3].mul_(0)
    x.masked_fill_(x > 8, torch.tensor(7.0))
    assert x.tolist() == [[0, 0, 0, 3], [4, 0, 0, 7], [8, 0, 0, 7]]
    assert torch.zeros(3).copy_(x[:, 0]).tolist() == x[:, 0].to("cpu").tolist() == [0, 4, 8]
    drawn = torch.randn(5, device=NAME, generator=DeviceGenerator().manual_seed(3))
    assert torch.equal(drawn.cpu(), torch.randn(5, generator=torch.Generator().manual_seed(3)))
    assert not torch.accelerator.is_available()


def test_gradients_of_gradients_are_those_of_the_cpu(device: Device):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2))
    x, found = torch.randn(2, 3, 4, 4), []
    for place in ("cpu", NAME):
        net.to(place)
        at = x.to(place).requires_grad_()
        (slope,) = torch.autograd.grad(net(at).square().sum(), at, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [at, *net.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other.cpu(), one, atol=1e-6, rtol=1e-5)


def test_weights_that_are_one_stay_one(device: Device):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    net = nn.Sequential(first, second).to(NAME)
    assert net[0].weight is net[1].weight and isinstance(net[0].weight, nn.Parameter)
    assert net[0].weight.device.type == NAME and net.to("cpu")[0].weight is net[1].weight


def test_float64_is_noticed_in_our_code_alone():
    with pretending(watched="/tests/") as device:
        torch.ones(2, device=NAME).double()
        assert device.doubles and all(Path(__file__).name in line for line in device.doubles)
    with pretending(watched="/elsewhere/") as device:
        torch.ones(2, device=NAME).double()
    assert not device.doubles


# --- weights that rest elsewhere --------------------------------------------------------------------------------------


def _mapped(pipe: Any) -> None:
    from accelerate import dispatch_model

    dispatch_model(pipe.unet, {"": NAME}, force_hooks=True)
    pipe.vae.to(NAME)
    pipe.text_encoder.to(NAME)


OFFLOADED = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device=NAME),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device=NAME),
    "device_map": _mapped,
}


@pytest.mark.parametrize("how", OFFLOADED)
def test_weights_that_rest_elsewhere(how: str, device: Device, monkeypatch: Any):
    """Our loop and a pipeline's own show the same as where all weights stay."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    own, given = DAAM(words=["cube"]), {"steps": 1, "guidance": 3.0, "seed": 5, "decode": False}
    expected = generate(tiny_model("sd"), PROMPT, interventions=own, **given)
    pipe = tiny_pipeline("sd", fresh=True)
    OFFLOADED[how](pipe)
    model, daam = Model(pipe, card=tiny_model("sd").card), DAAM(words=["cube"])
    made = generate(model, PROMPT, interventions=daam, **given)
    assert isinstance(made.latents, OnDevice) and torch.equal(made.latents.cpu(), expected.latents)
    assert_same_maps(own.maps, daam.maps)
    with sfumato.attached(pipe, "daam:words=[cube]") as run:
        pipe(PROMPT, num_inference_steps=1, height=32, width=32, output_type="latent")
    assert run.maps[0].map("cube").sum() > 0
