"""The inpainting fine-tune: what the widened network starts as, what its batches hold, its loss, its export."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

from sfumato.models import load
from sfumato.sampling import generate
from sfumato.toybox import COLORS, SHAPES, Scene, Toy, ToyboxDataset
from sfumato.training.draw import Draw
from sfumato.training.objective import build_objective
from sfumato.training.recipe import Recipe
from sfumato.zoo.objectives import inpaint, latent

SHAPE = {"channels": [16, 16], "heads": [2, 2], "attention": [True, False], "text_width": 32}


def build(objective: str, loss: dict | None = None, batch: int = 6, **model):
    values = {"name": "x", "objective": objective, "model": model, "loss": loss or {}}
    made = build_objective(Recipe(**values, data={"train": 24, "val": 8}, train={"steps": 1, "batch": batch}))
    made.setup(torch.device("cpu"))
    return made


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def parts(home: Path) -> dict[str, str]:
    small = {"vae": {"channels": [8, 8, 16]}}
    small["clip"] = {"text_width": 32, "text_layers": 2, "vision_layers": 1, "projection": 32}
    for name, options in small.items():
        (home / name).mkdir()
        with torch.no_grad():
            build(name, **options).export(home / name)
    return {"vae": str(home / "vae"), "text": str(home / "clip")}


@pytest.fixture(scope="module")
def start(home: Path, parts):
    """An ordinary diffusion model whose every weight matters, exported."""
    made = build("diffusion", **SHAPE, **parts)
    with torch.no_grad():
        for n, p in enumerate(made.unet.parameters()):
            if not p.any():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
        (home / "start").mkdir()
        made.export(home / "start")
    return made, home / "start"


@pytest.fixture(scope="module")
def wide(home: Path, parts) -> dict[str, str]:
    """Parts whose latents have another number of channels than those of Stable Diffusion."""
    with torch.no_grad():
        (home / "wide").mkdir()
        build("vae", channels=[8, 8, 16], latent_channels=7).export(home / "wide")
    return {**parts, "vae": str(home / "wide")}


@pytest.fixture
def objective(parts, start):
    made = build("inpaint", **SHAPE, **parts)
    made.load(start[1])
    return made


@torch.no_grad()
def test_it_starts_as_the_model_it_starts_from(objective, start) -> None:
    assert objective.unet.config.in_channels == 9 and objective.unet.conv_in.weight.shape[1] == 9
    x, more, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16, 16), torch.randn(2, 7, 32)
    other = UNet2DConditionModel.from_pretrained(start[1] / "unet")
    for t in (3, 700):
        got = objective.unet(torch.cat([x, more], 1), t, text).sample
        torch.testing.assert_close(got, other(x, t, text).sample, rtol=1e-4, atol=1e-5)


def test_an_inpainting_model_goes_on_from_its_own_weights(objective, home, tmp_path, parts) -> None:
    with torch.no_grad():
        objective.unet.conv_in.weight[:, 4:].normal_()
        objective.export(tmp_path)
    again = build("inpaint", **SHAPE, **parts)
    again.load(tmp_path)
    torch.testing.assert_close(again.unet.conv_in.weight, objective.unet.conv_in.weight, rtol=1e-3, atol=1e-3)


def test_the_batch_is_the_diffusion_batch_with_holes(objective, start) -> None:
    draw = Draw(3, 5)
    batch, plain = objective.batch(draw), start[0].batch(draw)
    assert torch.equal(batch["x0"], plain["x0"]) and torch.equal(batch["noise"], plain["noise"])
    indices = draw.indices(24, 6)
    holes = objective.holes(objective.train_data, indices, draw)
    assert torch.equal(holes, objective.holes(objective.train_data, indices, draw))
    pictures = torch.from_numpy(objective.train_data.images[indices.numpy()]).permute(0, 3, 1, 2) / 127.5 - 1
    inside = (holes > 0)[:, None].expand(-1, 3, -1, -1)
    assert (batch["erased"][inside] == 0).all()
    torch.testing.assert_close(batch["erased"][~inside], pictures[~inside])
    # by hand: a cell is in the hole when half of its 16 pixels are
    cells = holes.reshape(6, 16, 4, 16, 4).mean((2, 4)) >= 0.5
    assert torch.equal(batch["hole"][:, 0] > 0, cells)
    signal = torch.linspace(0, 1, 6)
    weight = (1 + 2 * signal.view(6, 1, 1, 1) * batch["toys"]) * (1 + 2 * cells[:, None])
    torch.testing.assert_close(objective.place_weights(batch, signal), weight / weight.mean())


def test_holes_are_of_every_kind(objective) -> None:
    indices, masks = torch.arange(24), objective.train_data.masks
    kinds = {"rectangle": 0, "toy": 0, "stranger": 0, "all": 0}
    for kind in kinds:
        shares = {name: float(name == kind) for name in kinds} | {"grow": 0}
        objective.loss_options = inpaint.InpaintLoss(**shares)
        for hole, toys, other in zip(
            objective.holes(objective.train_data, indices, Draw(0, 1)), masks, np.roll(masks, -1, 0), strict=True
        ):
            rows, columns = hole.numpy().any(1), hole.numpy().any(0)
            box = hole.numpy()[np.ix_(rows, columns)]
            if kind in ("all", "rectangle"):
                assert box.all() and (kind == "rectangle" or box.size == 64 * 64)
            else:  # the silhouette or the box of one toy, of this picture or of the next
                whose = toys if kind == "toy" else other
                fits = []
                for i in range(whose.max() + 1):
                    y, x = np.nonzero(whose == i)
                    if len(y):
                        boxed = np.zeros((64, 64), bool)
                        boxed[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
                        fits += [(hole.numpy() > 0) == (whose == i), (hole.numpy() > 0) == boxed]
                assert any(fit.all() for fit in fits)


def test_holes_of_background_hold_no_toy_and_latents_touched_by_a_hole_can_be_drawn_anew(objective) -> None:
    shares = {"rectangle": 0, "toy": 0, "stranger": 0, "all": 0, "background": 1}
    objective.loss_options = inpaint.InpaintLoss(**shares, coverage=0.01)
    indices, draw = torch.arange(24), Draw(0, 1)
    holes, toys = objective.holes(objective.train_data, indices, draw), objective.train_data.masks >= 0
    assert not (holes.numpy() * toys).any() and (holes.flatten(1).sum(1) > 0).float().mean() > 0.9
    whole = np.ones((64, 64), bool)
    assert not inpaint.empty_hole(whole, np.random.default_rng(0)).any()
    batch = objective.draw_latents(objective.train_data, objective.train_latents, indices, draw)
    touched = holes.reshape(24, 16, 4, 16, 4).amax((2, 4)) > 0
    assert torch.equal(batch["hole"][:, 0] > 0, touched)


def test_captions_tell_what_lies_in_the_hole(objective) -> None:
    scene = Scene((Toy("ball", "red", x=-0.8), Toy("cube", "blue", x=0.8)), "sand")
    toys = np.full((64, 64), -1)
    toys[20:30, 5:15], toys[20:30, 40:50] = 0, 1
    hole = np.zeros((64, 64), np.float32)
    assert inpaint.inside(scene, toys, hole).toys == ()
    hole[:, 38:] = 1
    assert inpaint.inside(scene, toys, hole).toys == scene.toys[1:]
    hole[:, 12:] = 1  # three of the ball's ten columns: not more than the bar
    assert inpaint.inside(scene, toys, hole).toys == scene.toys[1:]
    hole[:, 11:] = 1
    assert inpaint.inside(scene, toys, hole).toys == scene.toys

    indices = torch.arange(24)
    objective.loss_options = inpaint.InpaintLoss(told=1.0)
    for text, hole, i in zip(
        objective.captions(objective.train_data, indices, Draw(0, 2)),
        objective.holes(objective.train_data, indices, Draw(0, 2)),
        range(24),
        strict=True,
    ):
        told = inpaint.inside(objective.train_data.scenes[i], objective.train_data.masks[i], hole.numpy())
        assert sum(text.replace(",", " ").split().count(shape) for shape in SHAPES) == len(told.toys)
    objective.loss_options = inpaint.InpaintLoss(told=0.5, colorless=1.0)
    texts = objective.captions(objective.train_data, indices, Draw(0, 2))
    assert not any(color in text.split() for text in texts for color in COLORS)


@torch.no_grad()
def test_the_loss_is_its_formula(objective) -> None:
    draw = Draw(1, 2)
    batch = objective.batch(draw)
    objective.unet.conv_in.weight[:, 4:].normal_(std=0.1)
    loss, _ = objective.loss(batch, draw)
    u = torch.rand(6, generator=draw.generator("time"))
    t = ((torch.randperm(6, generator=draw.generator("order")) + u) / 6 * 1000).long()
    alpha = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().mul(-1).add(1).cumprod(0)[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch["x0"] + (1 - alpha).sqrt() * batch["noise"]
    known = objective.vae.encode(batch["erased"]).latent_dist.mean * objective.vae.config.scaling_factor
    text = objective.text.text_model(batch["tokens"]).last_hidden_state
    guess = objective.unet(torch.cat([noisy, batch["hole"], known], 1), t, text).sample
    error = (objective.place_weights(batch, alpha) * (guess - batch["noise"]).square()).mean((1, 2, 3))
    snr = (alpha / (1 - alpha)).flatten()
    torch.testing.assert_close(loss, (error * snr.clamp(max=5.0) / snr).mean(), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_export_is_a_genuine_inpainting_pipeline(objective, tmp_path, monkeypatch) -> None:
    few = functools.partial(latent.vital_signs, scenes=2, pictures=1, steps=2)  # test_vital_signs.py looks at these
    monkeypatch.setattr(latent, "vital_signs", few)
    extra = objective.export(tmp_path)
    assert extra["sampling"]["steps"] == 25
    pipe = StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    assert pipe.unet.config.in_channels == 9
    model = load(tmp_path)
    assert model.family.takes_mask and model.latent_shape(64, 64) == (4, 16, 16)
    grey = objective.sample(["a red ball"])
    assert grey.shape == (1, 3, 64, 64)
    assert set(objective.measure(2)) == {"held_out_loss", "toy_in_hole_right"}
    assert objective.grid().size[0] == 8 * 128


def test_what_is_asked_of_a_hole_is_the_same_at_any_size(objective, tmp_path) -> None:
    small, large = (inpaint.recolourings(ToyboxDataset("val", 40, size=side, cache=tmp_path), 12) for side in (64, 128))
    assert len(small) == 12 and [(i, text) for i, _, text, _ in small] == [(i, text) for i, _, text, _ in large]
    for (_, hole, _, _), (_, finer, _, _) in zip(small, large, strict=True):
        assert finer.shape == (128, 128) and 0.8 < float(hole.mean() / finer.mean()) < 1.25
    with torch.no_grad():
        (tmp_path / "x").mkdir()
        assert "torch.zeros(1, 3, 64, 64)" in objective.export(tmp_path / "x")["plain"]


@torch.no_grad()
def test_latents_may_have_any_number_of_channels(wide, tmp_path, monkeypatch) -> None:
    """Pipelines of diffusers run inpainting U-Nets of nine input channels alone: training ended at its first grid."""
    few = functools.partial(latent.vital_signs, scenes=2, pictures=1, steps=2)
    monkeypatch.setattr(latent, "vital_signs", few)
    made = build("inpaint", **SHAPE, **wide)
    assert made.unet.config.in_channels == 15
    monkeypatch.setattr(type(made), "sampling", {**made.sampling, "steps": 2})
    assert made.grid().size[0] == 8 * 128 and set(made.measure(2)) == {"held_out_loss", "toy_in_hole_right"}
    plain = made.export(tmp_path)["plain"].replace('from_pretrained("x"', f"from_pretrained({str(tmp_path)!r}")
    found: dict = {}
    torch.manual_seed(0)
    exec(plain, found)
    assert found["picture"].shape == (1, 3, 64, 64)
    torch.manual_seed(0)
    noise = torch.randn_like(found["known"])
    ours = generate(load(tmp_path), "a blue ball", latents=noise, steps=2, guidance=5.0, scheduler="ddim").pixels
    torch.testing.assert_close(ours.clamp(-1, 1), found["picture"], rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_what_is_filled_leaves_the_rest_to_the_network(objective, monkeypatch) -> None:
    """Every picture is shown around its own hole, also in several batches."""
    monkeypatch.setattr(type(objective), "sampling", {**objective.sampling, "steps": 2})
    objective.unet.conv_in.weight[:, 4:].normal_(generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    holes = torch.zeros(3, 1, 64, 64)
    for i in range(3):
        holes[i, :, 8 * i : 8 * i + 32] = 1
    together = objective.fill(pictures, holes, ["a red ball"] * 3)
    for i in range(3):
        alone = objective.fill(pictures[i : i + 1], holes[i : i + 1], ["a red ball"], seed=i)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)
        other = objective.fill(pictures[i : i + 1], holes[i - 1 : i or None], ["a red ball"], seed=i)
        assert (other[0] - together[i]).abs().max() > 1e-2
