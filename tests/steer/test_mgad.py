"""MGAD: the loss by hand, targets and their weights, what the model is told, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sfumato.cards import build, from_recipe, to_recipe
from sfumato.errors import BadInput, NoMatch, NotSupported, UnknownName
from sfumato.models import load
from sfumato.models.readers import load_clip
from sfumato.rng import stream
from sfumato.sampling import generate
from sfumato.steer.mgad import MGAD
from sfumato.toybox import Scene, Toy, render, to_uint8
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
CLIP = {"clip": "toy-clip", "cutouts": 2}


@pytest.fixture(scope="module")
def reference():
    scene = Scene((Toy("cone", "green"),), "sand", "sunset")
    return Image.fromarray(to_uint8(render(scene, 64).image)[0].permute(1, 2, 0).numpy())


def made(model, system=(), prompt=PROMPT, **options):
    given = {"steps": 3, "guidance": 3.0, "seed": 4, "decode": False, **options}
    return generate(model, prompt, interventions=system, **given)


def test_the_loss_by_hand(reference):
    clip = load_clip("toy-clip")
    both = MGAD(texts=["a red ball:3"], images=[reference], smooth=0.2, in_range=0.5, **CLIP)
    seen = {}

    class Watch(MGAD):
        def _loss(self, step, pixels):
            total = super()._loss(step, pixels)
            seen.setdefault(step.i, (pixels.detach(), total.detach(), step.run.seeds))
            return total

    watch = Watch(**both.params.model_dump())
    made(tiny_model("sd"), watch, n=2, steps=2, scheduler="ddim")
    picture = torch.from_numpy(np.array(reference)).permute(2, 0, 1).float() / 127.5 - 1
    boxes = watch_boxes(2, (64, 64), stream("mgad.crops", 0, -1))
    wanted_crops = [clip.pictures(picture[None, :, t : t + s, left : left + s]) for t, left, s in boxes]
    text = clip.text(["a red ball"])
    for i, (pixels, totals, seeds) in seen.items():
        for row, seed in enumerate(seeds):
            crops = [
                clip.pictures(pixels[row][None, :, t : t + s, left : left + s])
                for t, left, s in watch_boxes(2, pixels.shape[-2:], stream("mgad.crops", seed, i))
            ]
            to_text = np.mean([half_square_angle(crop, text) for crop in crops])
            to_image = np.mean([half_square_angle(crop, other) for crop in crops for other in wanted_crops])
            right, down = pixels[row].diff(dim=-1).square().mean(), pixels[row].diff(dim=-2).square().mean()
            over = (pixels[row].abs() - 1).clamp_min(0).square().mean()
            loss = 0.75 * to_text + 0.25 * to_image + 0.2 * float(right + down) + 0.5 * float(over)
            assert float(totals[row]) == pytest.approx(loss, rel=1e-3)
            assert watch.distances["image 1"][i][row] == pytest.approx(to_image, rel=1e-3)


def watch_boxes(n, size, generator):
    boxes = []
    for a, b, c in torch.rand(n, 3, generator=generator, dtype=torch.float64).tolist():
        short = min(size)
        side = int(math.sqrt(a) * (short - short // 2) + short // 2)
        boxes.append((int(b * (size[0] - side + 1)), int(c * (size[1] - side + 1)), side))
    return boxes


def half_square_angle(x, y):
    return math.acos(min(1.0, float(F.cosine_similarity(x, y)))) ** 2 / 2


def test_each_target_pulls_to_itself(reference):
    model = tiny_model("sd")
    ends = {}
    for name, given in {
        "none": {"texts": ["a red ball"], "images": [reference], "strength": 1e-6},
        "text": {"texts": ["a red ball:1", "nothing:0"], "images": [f"{_stored(reference)}:0.001"]},
        "image": {"texts": ["a red ball:0.001"], "images": [reference]},
    }.items():
        settings = {"strength": 0.4, "step": "relative"} | given
        system = MGAD(**settings, clip="toy-clip", cutouts=2)
        made(model, system, steps=4, guidance=1.0)
        ends[name] = {label: steps[-1][0] for label, steps in system.distances.items()}
    assert ends["text"]["a red ball"] < ends["none"]["a red ball"]
    assert ends["image"]["image 1"] < ends["none"]["image 1"]
    assert ends["image"]["image 1"] < ends["text"]["image 1"]


@pytest.mark.parametrize("name", ["toy-sd", "toy-sd3"])
def test_a_noise_aware_clip_sees_texts_and_references_noised_alike(reference, name):
    model, clip = load(name), load_clip("toy-clip-noisy")
    seen = []

    class Watch(MGAD):
        def _loss_of_noised(self, step, x, alpha, sigma):
            total = super()._loss_of_noised(step, x, alpha, sigma)
            seen.append((step.i, x.detach(), alpha, sigma, total.detach(), step.run.seeds))
            return total

    watch = Watch(texts=["a red ball:3"], images=[reference], prompted=False, strength=300.0)
    given = {"steps": 4, "guidance": 1.0, "n": 2}
    latents = made(model, watch, **given).latents
    cut = reference.resize((128, 128), Image.Resampling.LANCZOS)
    with torch.no_grad():
        clean = model.encode_image(torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1)
        text = clip.text(["a red ball"])
        for i, x, alpha, sigma, totals, seeds in seen:
            for row, seed in enumerate(seeds):
                noise = torch.randn(clean.shape, generator=stream("mgad.noise", seed, 1, i))
                other = clip.latents(alpha * clean + sigma * noise, alpha, sigma)
                own = clip.latents(x[row : row + 1], alpha, sigma)
                to_text, to_image = half_square_angle(own, text), half_square_angle(own, other)
                assert float(totals[row]) == pytest.approx(0.75 * to_text + 0.25 * to_image, rel=1e-3)
                assert watch.distances["image 1"][i][row] == pytest.approx(to_image, rel=1e-3)
    assert len(seen) >= 3  # but for pure noise
    alone = made(model, MGAD(**watch.params.model_dump()), **given | {"n": 1}).latents
    torch.testing.assert_close(latents[:1], alone, atol=2e-4, rtol=1e-3)


def test_a_noise_aware_clip_pulls_to_its_targets(reference):
    model, ends = load("toy-sd"), {}
    for strength in (1e-6, 1000.0):
        system = MGAD(texts=["a red ball"], images=[reference], prompted=False, strength=strength)
        made(model, system, steps=6, guidance=1.0)
        ends[strength] = {label: steps[-1][0] for label, steps in system.distances.items()}
    assert all(ends[1000.0][label] < ends[1e-6][label] for label in ("a red ball", "image 1"))


def _stored(picture):
    return MGAD(images=[picture]).params.images[0]


def test_a_model_that_is_told_nothing():
    model = tiny_model("sd")
    untold = made(model, MGAD(texts=["a red ball"], prompted=False, **CLIP), guidance=1.0).latents
    empty = made(model, MGAD(texts=["a red ball"], **CLIP), prompt="", guidance=1.0).latents
    assert torch.equal(untold, empty)
    assert not torch.equal(untold, made(model, MGAD(texts=["a red ball"], **CLIP), guidance=1.0).latents)


def test_without_targets_the_prompt_is_the_target():
    model = tiny_model("sd")
    assert torch.equal(made(model, MGAD(**CLIP)).latents, made(model, MGAD(texts=[PROMPT], **CLIP)).latents)


def test_pictures_are_kept_in_recipes_and_read_from_files(reference, tmp_path):
    path = tmp_path / "a:b.png"
    reference.save(path)
    from_file = build(f"mgad:images=[{path}:0.5],texts=[a red ball],cutouts=2,clip=toy-clip")
    assert from_file.params.images == [f"{path}:0.5"]
    embedded = MGAD(images=[np.array(reference)], texts=["a red ball:2"], **CLIP)
    again = from_recipe(to_recipe(embedded))
    model = tiny_model("sd")
    latents = made(model, embedded).latents
    assert torch.equal(latents, made(model, again).latents)
    assert torch.equal(latents, made(model, from_file).latents)  # 0.5 to 1 is 1 to 2
    shown = from_file.pictures(made(model, from_file, decode=True), 0)["references"]
    assert shown.size == (32 + 4 + 32, 32)


def test_pictures_of_all_kinds_are_accepted(reference, tmp_path):
    for name, picture in {
        "cmyk.jpg": reference.convert("CMYK"),
        "grey.png": reference.convert("L"),
        "alpha.png": reference.convert("RGBA"),
        "odd.png": reference.resize((51, 37)),
    }.items():
        picture.save(tmp_path / name)
        assert torch.isfinite(
            made(tiny_model("sd"), MGAD(images=[str(tmp_path / name)], **CLIP), steps=1).latents
        ).all()


def test_bad_input(reference, tmp_path):
    model = tiny_model("sd")
    with pytest.raises(BadInput, match="no file"):
        MGAD(images=[str(tmp_path / "missing.png")])
    reference.save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput) as caught:
        MGAD(images=[str(tmp_path / "cut.jpg")])
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="add up to zero"):
        MGAD(texts=["a ball:1", "a cube:-1"])
    with pytest.raises(BadInput, match="finite"):
        MGAD(texts=["a ball:inf"])
    with pytest.raises(BadInput, match="empty"):
        MGAD(texts=[""])
    with pytest.raises(BadInput, match="cutouts"):
        MGAD(cutouts=0)
    with pytest.raises(NoMatch, match="says nothing"):
        made(model, MGAD(**CLIP), prompt="")
    with pytest.raises(NotSupported, match="clip=FOLDER"):
        made(model, MGAD())
    with pytest.raises(UnknownName):
        made(model, MGAD(clip="toy-clop"))
