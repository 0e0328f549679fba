"""Latent geometry: what it records is what the pieces give, it comes back from its file, and it draws its plots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.edit.pullback import Pullback
from sfumato.errors import BadInput, Conflict
from sfumato.explain.latent_geometry import Geometry, LatentGeometry, explain_image
from sfumato.hspace import Directions, Encoder, layer_of, local_basis
from sfumato.hspace import basis as basis_module
from sfumato.metrics.geometry import frechet_mean, geodesic_distance, spectrum
from sfumato.sampling import generate, invert
from tests.tiny import tiny_model

POWER = {"iterations": 2, "tolerance": 1e-3}
FEW = {"rank": 2, "samples": 1, **POWER}


@pytest.fixture(scope="module", autouse=True)
def rough():
    """Bases need not be exact here, only the same ones (tests/hspace looks at how exact they are)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(basis_module, "OVERSAMPLING", 1)
        yield


@pytest.fixture(scope="module")
def looked():
    model, seen = tiny_model("sd"), {}
    look = LatentGeometry(at=[0.5, 0.0], prompts=["a yellow dog", "a blue ball", "a red cube"], curve=1, **FEW)
    given = {"steps": 4, "scheduler": "ddim", "seed": 7, "guidance": 2.0}
    result = generate(model, "a red cube", n=2, interventions=look, on_step=lambda s: seen.update({s.i: s.x}), **given)
    return model, look.maps[0], seen, result


@torch.no_grad()
def test_spaces_are_the_local_bases(looked):
    model, found, seen, result = looked
    assert found.points == (0.0, 0.5) and found.u.shape == (2, 2, 2, 32 * 8 * 8) and found.s.shape == (2, 2, 2)
    schedule = model.make_scheduler("ddim")
    t = model.timesteps(schedule, 4, 32, 32)[2]
    told = model.encode_text(["a red cube"], None, False)
    basis = local_basis(Encoder(model, layer_of(model, None), t, told), seen[1][1:], 2, **POWER)
    assert geodesic_distance(basis.u, found.u[1, 1]) < 0.02
    assert torch.allclose(found.power[1, 1], spectrum(basis.v), atol=1e-3)
    assert found.between_samples(1) == [geodesic_distance(*found.u[1])]
    times = found.between_times()
    assert torch.equal(times, times.T) and times[0, 0] == 0
    each = [geodesic_distance(found.u[0, i], found.u[1, i]) for i in range(2)]
    assert float(times[0, 1]) == pytest.approx(sum(each) / 2, rel=1e-4)
    rings = torch.arange(found.power.shape[-1])
    assert torch.allclose(found.centroids[0, 0], (found.power[0, 0] * rings).sum(-1).mean().to(found.centroids))
    assert found.directions.facts["at"] == 0.5 and torch.allclose(
        found.directions.u, frechet_mean(list(found.u[1])), atol=1e-4
    )
    assert result.coverage["latent_geometry"]["cost"] > 10


def test_prompts_are_compared_at_the_same_latents(looked):
    model, found, seen, _ = looked
    assert found.prompts == ("a red cube", "a yellow dog", "a blue ball")  # itself once only
    pairs = found.between_prompts(1)
    assert len(pairs) == 3 and pairs[0][0] == pytest.approx(float(found.similarity[0, 1]))
    assert pairs[0][1] == geodesic_distance(found.by_prompt[1, 0], found.by_prompt[1, 1])
    assert torch.equal(found.by_prompt[:, 0], found.u[:, 0])
    assert (
        torch.allclose(found.similarity.diagonal(), torch.ones(3), atol=1e-5) and float(found.similarity[0, 1]) < 0.99
    )
    assert set(found.curved) == {"line", "sphere"} and all(each >= 0.99 for each in found.curved.values())


def test_file_and_plots(looked, tmp_path):
    model, found, _, result = looked
    path = found.save(tmp_path / "g.safetensors")
    again = Geometry.load(path)
    assert torch.equal(again.u, found.u) and again.prompts == found.prompts and again.curved == found.curved
    plots = again.grid(result.images[0])
    assert np.array_equal(np.asarray(plots), np.asarray(found.plots())) and plots.width > 3 * plots.height
    assert torch.equal(Directions.load(path).u, found.directions.u)
    system = Pullback(directions=str(path), at=0.25, rank=2, repeats=2)
    moved = generate(model, "a red cube", steps=4, seed=3, interventions=system, decode=False).latents
    assert torch.isfinite(moved).all()
    directions = found.directions.save(tmp_path / "d.safetensors")
    with pytest.raises(BadInput, match="directions only"):
        Geometry.load(directions)


def test_a_picture_that_exists_is_inverted():
    model = tiny_model("sd")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = explain_image(model, image, "a red cube", steps=3, at=[0.0], **FEW)
    x = invert(model, image, "a red cube", steps=3).noise
    told = model.encode_text(["a red cube"], None, False)
    t = model.timesteps(model.make_scheduler("ddim"), 3, 32, 32)[0]
    with torch.no_grad():
        basis = local_basis(Encoder(model, layer_of(model, None), t, told), x, 2, **POWER)
    assert geodesic_distance(basis.u, found.u[0, 0]) < 0.02
    assert found.plots().width < 1000  # one sample and one prompt: nothing to compare


def test_further_samples_are_drawn_as_the_run_would():
    model, given = tiny_model("sd"), {"steps": 2, "seed": 7, "guidance": 2.0, "decode": False}
    look = LatentGeometry(at=[0.5], **FEW | {"samples": 2})
    result = generate(model, "a red cube", interventions=look, **given)
    together = LatentGeometry(at=[0.5], **FEW)
    generate(model, "a red cube", n=2, interventions=together, **given)
    assert len(look.maps) == 1 and look.maps[0].u.shape == together.maps[0].u.shape
    for a, b in zip(look.maps[0].u[0], together.maps[0].u[0], strict=True):
        assert geodesic_distance(a, b) < 0.05
    assert torch.equal(result.latents, generate(model, "a red cube", **given).latents)


def test_refusals():
    model = tiny_model("sd")
    for given, said in (({"at": [1.0]}, "fraction of progress"), ({"at": []}, "at"), ({"rank": 0}, "rank")):
        with pytest.raises(BadInput, match=said):
            LatentGeometry(**given)
    with pytest.raises(BadInput, match="at least two"):
        generate(model, "a red cube", steps=2, interventions=LatentGeometry(curve=2, **FEW))
    with pytest.raises(Conflict, match="couples"):
        generate(model, "a red cube", n=2, steps=2, batch_size=1, interventions=LatentGeometry(**FEW))
