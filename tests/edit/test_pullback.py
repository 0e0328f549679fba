"""Pullback: the two moves against their equations, directions carried from sample to sample, and refusals."""

from __future__ import annotations

import pytest
import torch

from sfumato.edit.pullback import Pullback
from sfumato.errors import BadInput, UnknownName
from sfumato.hspace import Directions, Encoder, layer_of, local_basis
from sfumato.sampling import generate
from tests.tiny import tiny_model

PROMPT = "a red cube"
POWER = {"iterations": 3, "tolerance": 1e-3}
FEW = {"rank": 2, "repeats": 2, **POWER}
LONG = {"iterations": 15, "tolerance": 1e-3}  # until it has converged: from different starts to the same basis


def latents_at(model, i, systems=(), prompt=PROMPT, **given):
    """What step ``i`` predicts from, after all edits; and the timestep."""
    seen = {}
    given = {"steps": 4, "seed": 7, "guidance": 2.0, "decode": False, **given}

    from sfumato.sampling import Intervention

    class Look(Intervention):
        def before_predict(self, step):
            seen[step.i] = (step.x.clone(), step.t, step.path)
            self.mark(step)

    result = generate(model, prompt, interventions=[systems, Look()] if systems else Look(), **given)
    return (*seen[i], result)


def encoder(model, t, prompt=PROMPT, layer=None):
    told = model.encode_text([prompt], None, False, 3.5)
    return Encoder(model, layer_of(model, layer), t, told)


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3"])
@torch.no_grad()
def test_x_space_guidance(kind):
    model = tiny_model(kind)
    x, t, path, _ = latents_at(model, 1)
    system = Pullback(at=0.25, strength=0.5, delta=0.7, **FEW)
    got, *_, result = latents_at(model, 1, system)
    f, scale = encoder(model, t), path.scale(t)
    unit = x / scale
    v = local_basis(f, unit, 2, **POWER).v[0]
    assert torch.allclose(v, system.bases[0].v[0], atol=1e-5)
    told = f.condition

    def eps(unit):
        return path.to_eps(scale * unit, model.predict(unit, t, told, "cond"), t)

    for _ in range(2):
        unit = unit + 0.5 * (eps(unit + 0.7 * v) - eps(unit))
    assert (got - scale * unit).abs().max() < 1e-3 * (got - x).abs().max() + 1e-6
    assert result.coverage["pullback"]["steps"] == [1] and result.coverage["pullback"]["cost"] > 4


@torch.no_grad()
def test_geodesic_shooting_stays_in_the_local_bases():
    model = tiny_model("sd")
    x, t, _, _ = latents_at(model, 1)
    system = Pullback(at=0.25, move="geodesic", strength=2.0, **FEW | LONG)
    got, *_ = latents_at(model, 1, system)
    first = local_basis(encoder(model, t), x, 2, **LONG)
    there = x + 2.0 * first.v[0]
    second = local_basis(encoder(model, t), there, 2, **LONG)
    assert torch.allclose(got, there + 2.0 * second.projected(first.v[0]), atol=2e-2)
    back, *_ = latents_at(
        model, 1, Pullback(at=0.25, move="geodesic", strength=2.0, reverse=True, **FEW | LONG | {"repeats": 1})
    )
    assert torch.allclose(back, x - 2.0 * first.v[0], atol=1e-4)


@torch.no_grad()
def test_the_prompt_decides_on_the_direction():
    model = tiny_model("sd")
    x, t, _, _ = latents_at(model, 1)
    system = Pullback(at=0.25, prompt="a yellow dog", **FEW)
    latents_at(model, 1, system)
    other = local_basis(encoder(model, t, "a yellow dog"), x, 2, **POWER)
    assert torch.allclose(system.bases[0].v, other.v, atol=1e-4)


def test_carried_over_from_itself_and_from_another():
    model = tiny_model("sd")
    plain, *_ = latents_at(model, 1, Pullback(at=0.25, **FEW))
    itself, *_ = latents_at(model, 1, Pullback(at=0.25, from_seed=7, **FEW))
    assert torch.allclose(plain, itself, atol=1e-3)
    system = Pullback(at=0.25, from_seed=8, from_prompt="a blue ball", **FEW)
    moved, *_ = latents_at(model, 1, system)
    source = Pullback(at=0.25, **FEW)
    latents_at(model, 1, source, prompt="a blue ball", seed=8)
    file_like = source.bases[0].u
    expected = system.bases[0].carried(file_like[0])
    x, t, _, _ = latents_at(model, 1)
    told = encoder(model, t).condition

    def eps(x):
        with torch.no_grad():
            return model.predict(x, t, told, "cond")

    for _ in range(2):
        x = x + eps(x + expected) - eps(x)
    assert torch.allclose(moved, x, atol=1e-3)


def test_directions_from_a_file(tmp_path):
    model = tiny_model("sd")
    source = Pullback(at=0.25, **FEW)
    plain, *_ = latents_at(model, 1, source)
    path = str(Directions(source.bases[0].u, "mid").save(tmp_path / "d.safetensors"))
    got, *_ = latents_at(model, 1, Pullback(at=0.25, directions=path, **FEW))
    assert torch.allclose(got, plain, atol=1e-3)
    with pytest.raises(BadInput, match="holds 2"):
        Pullback(directions=path, direction=3)
    with pytest.raises(BadInput, match="same model, layer and picture size"):
        latents_at(model, 1, Pullback(directions=path, **FEW), size=(48, 32))


def test_refusals_are_one_line():
    model = tiny_model("sd")
    cases = (
        (BadInput, "give one of them", {"from_seed": 1, "directions": "x"}),
        (BadInput, "give from_seed too", {"from_prompt": "a dog"}),
        (BadInput, "cannot be read", {"directions": "nowhere.safetensors"}),
        (BadInput, "at of pullback", {"at": 1.0}),
        (UnknownName, "gamma", {"gamma": 1}),
    )
    for error, said, given in cases:
        with pytest.raises(error) as caught:
            Pullback(**given)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnknownName, match="mid"):
        latents_at(model, 1, Pullback(layer="middle"))
    with pytest.raises(BadInput, match="it must be from 1 to"):
        latents_at(model, 1, Pullback(rank=1000), size=(16, 16))
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(BadInput, match="this run begins at 0.5"):
        latents_at(model, 3, Pullback(at=0.25, **FEW), image=image, strength=0.5, scheduler="ddim")
