"""The objectives against slow references, and their exports through plain diffusers and transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from sfumato import load
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.readers import load_clip
from sfumato.models.readers.noised import codec_hash, noised_input
from sfumato.toybox import COLORS, render, sample_scene
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective, build_objective
from sfumato.training.optim import build_optimizer
from sfumato.training.recipe import Recipe, TrainOptions
from sfumato.zoo.objectives import sinks
from sfumato.zoo.objectives.clip import hard_negative, mirrored
from sfumato.zoo.objectives.coarse_first import coarse_first
from sfumato.zoo.objectives.foreign_context import mixed, other_words
from sfumato.zoo.objectives.latent import LatentObjective
from sfumato.zoo.objectives.repa import repa_loss
from sfumato.zoo.objectives.silent_channels import without_silent
from sfumato.zoo.objectives.sinks import sink_loss, text_sites, word_shares

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(folder))
        yield folder


def build(objective: str, batch: int = 4, loss: dict | None = None, size: int = 64, **model) -> Objective:
    values = {"name": "x", "objective": objective, "model": model, "loss": loss or {}}
    scenes = {"train": 24, "val": 8, "size": size}
    made = build_objective(Recipe(**values, data=scenes, train={"steps": 1, "batch": batch}))
    made.setup(CPU)
    return made


@pytest.fixture(scope="module")
def parts(home: Path) -> dict[str, str]:
    """A tiny untrained autoencoder and CLIP, exported."""
    vae, clip = (
        build("vae", channels=[8, 8, 16]),
        build("clip", text_width=32, text_layers=2, vision_layers=1, projection=32),
    )
    for name, objective in {"vae": vae, "clip": clip}.items():
        with torch.no_grad():
            (home / name).mkdir()
            objective.export(home / name)
    return {"vae": str(home / "vae"), "text": str(home / "clip")}


def latent(
    kind: str,
    parts: dict[str, str],
    text_rate: float = 0.0,
    model: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
    **loss,
) -> LatentObjective:
    shape = (
        {"channels": [16, 16], "heads": [2, 2], "attention": [True, False], **(model or {})}
        if kind == "diffusion"
        else {"layers": 2, "heads": 2}
    )
    made = build(kind, 6, loss, **shape, text_width=32, text_rate=text_rate, **parts, **(own or {}))
    with torch.no_grad():  # training starts from zero outputs, which would hide mistakes
        for n, p in enumerate(next(iter(made.modules.values())).parameters()):
            if not p.any():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
    return made


def weights_by_hand(toys: torch.Tensor, signals: list[float]) -> torch.Tensor:
    """Places under a toy weigh 1 + 2 times the share of signal in their picture; all are then made 1 in the mean."""
    weights = torch.ones_like(toys)
    for i, signal in enumerate(signals):
        weights[i][toys[i] > 0] += 2 * signal
    return weights / weights.mean()


# data -----------------------------------------------------------------------------------------------------------------
def test_pictures_and_weights_are_those_of_the_dataset() -> None:
    source = build("vae", channels=[8, 8, 16]).train_data
    x, weight = data.pictures(source, torch.tensor([3])), data.toy_weights(source, torch.tensor([3]), 4.0)
    np.testing.assert_allclose(x[0].permute(1, 2, 0).numpy(), source.images[3] / 127.5 - 1, atol=1e-6)
    toys = source.masks[3] >= 0
    ratio = weight[0, 0].numpy() / weight[0, 0].numpy()[~toys][0]
    assert (
        (ratio[toys] == pytest.approx(4.0))
        and (ratio[~toys] == pytest.approx(1.0))
        and float(weight.mean()) == pytest.approx(1)
    )
    cells = data.toy_cells(source, torch.tensor([3]), 16)[0, 0]
    assert (cells.numpy() == toys.reshape(16, 4, 16, 4).any((1, 3))).all()


# autoencoder ----------------------------------------------------------------------------------------------------------
def test_vae_batch_crops_pictures_and_weights_together_and_loss_is_its_formula() -> None:
    vae = build("vae", loss={"crop": 32, "l1": 0.7, "l2": 0.3, "edge": 0.2, "kl": 0.1}, channels=[8, 8, 16])
    batch = vae.batch(Draw(0, 1))
    assert (
        batch["x"].shape == (4, 3, 32, 32)
        and batch["weight"].shape == (4, 1, 32, 32)
        and batch["noise"].shape == (4, 4, 8, 8)
    )
    loss, _ = vae.loss(batch, Draw(0, 1))
    posterior = vae.vae.encode(batch["x"]).latent_dist
    y = vae.vae.decode(posterior.mean + (0.5 * posterior.logvar).exp() * batch["noise"]).sample
    e, w = (y - batch["x"]).double(), batch["weight"].double()
    edge = (w[..., 1:] * (e[..., 1:] - e[..., :-1]).abs()).mean() + (
        w[:, :, 1:] * (e[:, :, 1:] - e[:, :, :-1]).abs()
    ).mean()
    mean, logvar = posterior.mean.double(), posterior.logvar.double()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    expected = 0.7 * (w * e.abs()).mean() + 0.3 * (w * e**2).mean() + 0.2 * edge + 0.1 * kl
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_vae_reads_halved_latents_as_the_halved_picture() -> None:
    vae = build("vae", loss={"scale": 0.3, "l1": 0.7, "l2": 0.2}, channels=[8, 8, 16])
    batch = vae.batch(Draw(0, 1))
    total, logs = vae.loss(batch, Draw(0, 1))
    plain, _ = build("vae", loss={"l1": 0.7, "l2": 0.2}, channels=[8, 8, 16]).loss(batch, Draw(0, 1))
    posterior = vae.vae.encode(batch["x"]).latent_dist
    z = posterior.mean + posterior.std * batch["noise"]
    half = lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear")  # noqa: E731 - the mean of four
    error = (vae.vae.decode(half(z)).sample - half(batch["x"])).double()
    expected = float((half(batch["weight"]) * (0.7 * error.abs() + 0.2 * error.square())).mean())
    assert float(logs["scale"]) == pytest.approx(expected, rel=1e-4)
    assert float(total) == pytest.approx(float(plain) + 0.3 * expected, rel=1e-5)


@torch.no_grad()
def test_exported_vae_has_standard_latents_and_the_same_reconstructions(tmp_path: Path) -> None:
    vae = build("vae", channels=[8, 8, 16])
    x = data.pictures(vae.train_data, torch.arange(24))
    before, kept = vae.reconstruct(x), vae.vae.quant_conv.weight.clone()
    vae.export(tmp_path)
    assert torch.equal(kept, vae.vae.quant_conv.weight)  # training goes on as if nothing had been exported
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    posterior = loaded.encode(x).latent_dist
    # the file holds float16, whose steps are a two-thousandth
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(4), atol=5e-3, rtol=0)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(4), atol=5e-3, rtol=0)
    assert float((loaded.decode(posterior.mean).sample.clamp(-1, 1) - before).abs().mean()) < 2e-3
    scale = posterior.std / vae.vae.encode(x).latent_dist.std
    torch.testing.assert_close(scale, scale[:1, :, :1, :1].expand_as(scale), rtol=1e-2, atol=1e-5)
    val = data.pictures(vae.val_data, torch.arange(8))
    error = (vae.reconstruct(val) - val).square().mean((1, 2, 3)) / 4
    assert vae.evaluate()["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-4)


def test_channels_that_neighbours_share_come_first() -> None:
    rng = torch.Generator().manual_seed(0)
    smooth = torch.randn(40, 2, 4, 4, generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3)
    rough = torch.randn(40, 3, 16, 16, generator=rng)
    mixing = torch.linalg.qr(torch.randn(5, 5, generator=rng)).Q
    z = torch.einsum("ij,bjhw->bihw", mixing, torch.cat([smooth + 0.1 * rough[:, :2], 0.7 * rough], 1))
    z = z - z.mean((0, 2, 3), keepdim=True)
    turn, first = coarse_first(z, 2.0, 0.5)
    assert first == 2
    turned = torch.einsum("ij,bjhw->bihw", turn.float(), z)
    covariance = torch.cov(turned.transpose(0, 1).flatten(1), correction=0)
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([4, 4, 0.25, 0.25, 0.25])), atol=1e-4, rtol=1e-4)
    back = turned.transpose(0, 1).flatten(1) @ smooth.transpose(0, 1).flatten(1).T / smooth[:, 0].numel()
    assert (back[:2].square().sum(1) > 3.8).all() and back[2:].abs().max() < 0.1  # the smooth ones, and no others
    odd, again = coarse_first(z[..., :15, :15], 2.0, 0.5)
    assert again == 2 and odd.shape == (5, 5)
    with pytest.raises(BadInput, match="model.strengths"):
        coarse_first(torch.cat([z, z[:, :1]], 1), 2.0, 0.5)


@torch.no_grad()
def test_exported_vae_orders_its_channels_and_loses_nothing(tmp_path: Path) -> None:
    vae = build("vae", channels=[8, 8, 16], strengths=[1.5, 0.6])
    x = data.pictures(vae.train_data, torch.arange(24))
    before, uncertain = vae.reconstruct(x), vae.vae.encode(x).latent_dist
    made = vae.export(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    posterior = loaded.encode(x).latent_dist
    first = made["latents_before_standardising"]["coarse"]
    expected = torch.tensor([1.5] * first + [0.6] * (4 - first))
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), expected, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(4), atol=5e-3, rtol=0)
    correlations = torch.corrcoef(posterior.mean.transpose(0, 1).flatten(1))
    torch.testing.assert_close(correlations, torch.eye(4), atol=0.02, rtol=0)
    assert float((loaded.decode(posterior.mean).sample.clamp(-1, 1) - before).abs().mean()) < 2e-3
    # a sample of the turned posterior costs the pictures about what one of the learnt posterior does
    noise = torch.randn(uncertain.mean.shape, generator=torch.Generator().manual_seed(0))
    costs = [
        float((net.decode(p.mean + p.std * noise).sample - net.decode(p.mean).sample).square().mean())
        for net, p in ((vae.vae, uncertain), (loaded, posterior))
    ]
    assert 0.3 < costs[1] / costs[0] < 3


@torch.no_grad()
@pytest.mark.parametrize("strengths", [None, [1.5, 0.6]])
def test_channels_that_say_nothing_are_left_out(tmp_path: Path, strengths) -> None:
    vae = build("vae", channels=[8, 8, 16], strengths=strengths)
    inner, outer = vae.vae.quant_conv, vae.vae.post_quant_conv
    for silent in (1, 3):  # a trace of a mean, the prior's deviation, a decoder that hardly listens
        inner.weight[[silent, 4 + silent]] *= torch.tensor([1e-2, 0.0])[:, None, None, None]
        inner.bias[4 + silent] = 0.0
        outer.weight[:, silent] *= 1e-2
    outer.bias.zero_()  # what no kept channel carries is padded otherwise at the border
    x = data.pictures(vae.train_data, torch.arange(24))
    before, learnt = vae.reconstruct(x), vae.vae.state_dict()
    learnt = {key: value.clone() for key, value in learnt.items()}
    made = vae.export(tmp_path)
    assert made["latents_before_standardising"]["silent"] == 2
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config.latent_channels == 2
    posterior = loaded.encode(x).latent_dist
    first = made["latents_before_standardising"].get("coarse")
    expected = [1.0, 1.0] if first is None else [1.5] * first + [0.6] * (2 - first)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.tensor(expected), atol=5e-3, rtol=5e-3)
    assert float((loaded.decode(posterior.mean).sample.clamp(-1, 1) - before).abs().mean()) < 2e-3
    assert all(torch.equal(value, learnt[key]) for key, value in vae.vae.state_dict().items())


@torch.no_grad()
def test_what_silent_channels_add_to_the_decoder_stays() -> None:
    vae = build("vae", channels=[8, 8, 16]).vae
    vae.post_quant_conv.bias += torch.randn(4, generator=torch.Generator().manual_seed(1))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    keep, mean = torch.tensor([True, False, True, True]), torch.tensor([0.0, 0.7, 0.0, 0.0])
    z[:, 1] = 0.7
    narrow = without_silent(vae, keep, mean)
    conv_ours = narrow.decoder.conv_in(narrow.post_quant_conv(z[:, keep]))
    conv_theirs = vae.decoder.conv_in(vae.post_quant_conv(z))
    torch.testing.assert_close(conv_ours[..., 1:-1, 1:-1], conv_theirs[..., 1:-1, 1:-1], atol=1e-5, rtol=1e-4)
    every = without_silent(vae, torch.ones(4, dtype=torch.bool), mean)
    torch.testing.assert_close(every.decode(z).sample, vae.decode(z).sample, atol=1e-4, rtol=1e-4)


# CLIP -----------------------------------------------------------------------------------------------------------------
def test_hard_negatives_change_one_thing() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        scene = sample_scene(rng, 2)
        changed = hard_negative(scene, rng)
        edits = [
            (i, field)
            for i, (a, b) in enumerate(zip(scene.toys, changed.toys, strict=True))
            for field in ("shape", "color", "pattern", "size", "x", "z", "yaw", "gloss")
            if getattr(a, field) != getattr(b, field)
        ]
        swapped = {field for _, field in edits} == {"color"} and len(edits) == 2
        if swapped:
            assert [t.color for t in changed.toys] == [t.color for t in reversed(scene.toys)]
        assert swapped or (len(edits) == 1 and edits[0][1] in ("shape", "color", "pattern"))
        assert changed.replace(ground=scene.ground) == changed and changed.sky == scene.sky
        kinds.add("swap" if swapped else edits[0][1])
    assert kinds == {"swap", "shape", "color", "pattern"}


def test_hard_negatives_change_what_they_are_told_to() -> None:
    rng = np.random.default_rng(0)
    for kind, field in (("swap", "color"), ("swap_shape", "shape"), ("swap_pattern", "pattern")):
        seen = set()
        for _ in range(40):
            scene = sample_scene(rng, 2)
            changed = hard_negative(scene, rng, {kind: 1.0})
            old, new = ([getattr(toy, field) for toy in one.toys] for one in (scene, changed))
            swapped = old[0] != old[1]  # where there is nothing to swap one of them is replaced
            assert new == old[::-1] if swapped else sum(a != b for a, b in zip(old, new, strict=True)) == 1
            rest = [changed.replace(i, **{field: old[i]}) for i in range(2)]
            assert rest[0].toys[0] == scene.toys[0] and rest[1].toys[1] == scene.toys[1]
            seen.add(swapped)
        assert True in seen
    with pytest.raises(BadInput, match="add to 1"):
        build("clip", loss={"changes": {"swap": 0.5}})
    with pytest.raises(BadInput, match="swap_shape"):
        build("clip", loss={"changes": {"colour": 1.0}})


def test_a_mirrored_scene_is_what_the_flipped_picture_shows() -> None:
    rng = np.random.default_rng(1)
    for _ in range(4):
        scene = sample_scene(rng, 2)
        here, there = render(scene, 64), render(mirrored(scene), 64)
        assert (here.mask.flip(-1) == there.mask).float().mean() > 0.99
        assert mirrored(mirrored(scene)) == scene
        sides = {"left of": "right of", "right of": "left of"}
        relation = scene.relation(0, 1)
        assert mirrored(scene).relation(0, 1) == sides.get(relation, relation)
    clip = build("clip", batch=24, loss={"mirror": 0.5, "places": 0.5}, text_width=32, vision_layers=1, projection=16)
    plain = build("clip", batch=24, loss={"places": 0.5}, text_width=32, vision_layers=1, projection=16)
    mine, other = clip.batch(Draw(0, 0)), plain.batch(Draw(0, 0))
    flipped = [not torch.equal(a, b) for a, b in zip(mine["pixels"], other["pixels"], strict=True)]
    assert 4 < sum(flipped) < 20
    for row, yes in enumerate(flipped):
        for key in ("pixels", "places"):
            assert torch.equal(mine[key][row], other[key][row].flip(-1) if yes else other[key][row])


def test_clip_loss_is_the_two_way_cross_entropy_with_extra_captions() -> None:
    clip = build("clip", text_width=32, text_layers=1, vision_layers=1, projection=16, loss={"negatives": 2})
    batch = clip.batch(Draw(0, 3))
    assert batch["tokens"].shape[0] == 12 and batch["same"].shape == (4, 12)
    loss, _ = clip.loss(batch, Draw(0, 3))
    image = clip.clip.get_image_features(pixel_values=batch["pixels"]).pooler_output.double()
    text = clip.clip.get_text_features(input_ids=batch["tokens"]).pooler_output.double()
    total, scale = 0.0, float(clip.clip.logit_scale.exp())

    def score(i: int, j: int) -> float:
        return math.exp(scale * float(torch.cosine_similarity(image[i], text[j], dim=0)))

    for i in range(4):
        texts = [j for j in range(12) if j == i or not batch["same"][i, j]]
        images = [k for k in range(4) if k == i or not batch["same"][k, i]]
        total -= math.log(score(i, i) / sum(score(i, j) for j in texts))
        total -= math.log(score(i, i) / sum(score(k, i) for k in images))
    assert float(loss) == pytest.approx(total / 8, rel=1e-4)


def test_scenes_told_twice_are_contrasted_as_pictures_are_and_alone_at_first() -> None:
    small = {"text_width": 32, "text_layers": 1, "vision_layers": 1, "projection": 16}
    loss = {"negatives": 2, "hard": 0.5}
    clip = build("clip", **small, loss={**loss, "paraphrases": 0.7, "tellings": 5, "text_first": 3})
    plain = build("clip", **small, loss=loss)
    alone, batch = clip.batch(Draw(0, 2)), clip.batch(Draw(0, 3))
    assert set(alone) == {"paraphrases", "paraphrases_same"} and set(batch) == {*alone, *plain.batch(Draw(0, 3))}
    for draw, given in ((Draw(0, 2), alone), (Draw(0, 3), batch)):
        first, changed, again = (
            part.split(5)[0] for part in (given["paraphrases"], given["paraphrases"][5:], given["paraphrases"][10:])
        )
        assert all(sorted(a.tolist()) == sorted(c.tolist()) for a, c in zip(first, changed, strict=True))
        assert not any(torch.equal(a, c) for a, c in zip(first, changed, strict=True))
        assert any(not torch.equal(a, c) for a, c in zip(first, again, strict=True))
        text = clip.features(tokens=given["paraphrases"]).double()
        scores = float(clip.clip.logit_scale.exp()) * text[10:] @ text[:10].T
        expected = 0.0
        for i in range(5):
            rows = [j for j in range(10) if j == i or not given["paraphrases_same"][i, j]]
            columns = [k for k in range(5) if k == i or not given["paraphrases_same"][k, i]]
            expected += float(scores[i, rows].logsumexp(0) + scores[columns, i].logsumexp(0) - 2 * scores[i, i]) / 10
            expected += 0.5 * float(torch.stack([scores[i, i], scores[i, 5 + i]]).logsumexp(0) - scores[i, i]) / 5
        rest = 0.0 if given is alone else float(plain.loss(plain.batch(draw), draw)[0])
        total, _ = clip.loss(given, draw)
        assert float(total) == pytest.approx(rest + 0.7 * expected, rel=1e-4)


@torch.no_grad()
def test_exported_clip_is_read_by_transformers(parts: dict[str, str], tmp_path: Path) -> None:
    clip = build("clip", text_width=32, text_layers=2, vision_layers=1, projection=32)
    loaded, processor = CLIPModel.from_pretrained(parts["text"]), CLIPProcessor.from_pretrained(parts["text"])
    clip.load(Path(parts["text"]))
    from PIL import Image

    pictures = [Image.fromarray(np.asarray(clip.val_data.images[i])) for i in range(3)]
    texts = [clip.val_data.caption(i).text for i in range(3)]
    out = loaded(**processor(images=pictures, text=texts, return_tensors="pt", padding=True))
    ours = (
        clip.features(pixels=data.pictures(clip.val_data, torch.arange(3))) @ clip.features(tokens=clip.tokens(texts)).T
    )
    torch.testing.assert_close(out.logits_per_image, loaded.logit_scale.exp() * ours, atol=2e-4, rtol=1e-4)


# latent models --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("prediction", "beta_end"), [("epsilon", 0.012), ("epsilon", 0.02), ("v_prediction", 0.02)])
def test_diffusion_loss_is_the_weighted_error(prediction: str, beta_end: float, parts: dict[str, str]) -> None:
    model = {"prediction": prediction, "beta_end": beta_end}
    made = latent("diffusion", parts, model=model, min_snr=5.0, structure=0.5, empty=0.5)
    batch, draw = made.batch(Draw(0, 0)), Draw(0, 0)
    loss, _ = made.loss(batch, draw)
    u = torch.rand(6, generator=draw.generator("time"))
    t = ((torch.randperm(6, generator=draw.generator("order")) + u) / 6 * 1000).long()
    assert (t // (1000 / 6)).unique().numel() == 6  # one of each sixth
    beta = torch.linspace(0.00085**0.5, beta_end**0.5, 1000, dtype=torch.float64) ** 2
    scheduler = made.pipeline().scheduler
    assert torch.allclose(scheduler.betas.double(), beta) and scheduler.config.prediction_type == prediction
    places = weights_by_hand(batch["toys"], [float((1 - beta)[: each + 1].prod()) for each in t])
    total = 0.0
    for i in range(6):
        alpha = float((1 - beta)[: t[i] + 1].prod())
        x0, noise = batch["x0"][i : i + 1], batch["noise"][i : i + 1]
        x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
        context = made.text.text_model(batch["tokens"][i : i + 1]).last_hidden_state
        guess = made.unet(x, t[i : i + 1], context).sample
        snr = alpha / (1 - alpha)
        if prediction == "epsilon":
            weight, target = min(1, 5 / snr) + 0.5 / max(snr, 0.05), noise
        else:  # the same errors of noise and picture, as errors of the velocity
            weight = min(1, 5 / snr) * alpha + 0.5 * (1 - alpha)
            target = alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0
        total += weight * float((places[i] * (guess[0] - target[0]) ** 2).mean())
    assert float(loss) == pytest.approx(total / 6, rel=1e-4)
    assert set(made.unet.state_dict()) == set(dict(made.unet.named_parameters()))


def test_dropped_skips_silence_one_level_for_some_samples_in_training_only(parts: dict[str, str]) -> None:
    made = latent("diffusion", parts, skip_dropout=[0.0, 0.5])
    kept: dict[int, list[torch.Tensor]] = {}
    for level, block in enumerate(reversed(made.unet.up_blocks)):
        block.resnets[0].register_forward_pre_hook(
            lambda _, args, level=level: kept.setdefault(level, []).append(args[0])
        )
    whole = latent("diffusion", parts)
    batch, draw = made.batch(Draw(0, 0)), Draw(0, 0)
    silent = torch.rand(6, generator=draw.generator("skips1")) < 0.5
    assert 0 < silent.sum() < 6
    made.unet.eval(), whole.unet.eval()
    assert torch.equal(made.loss(batch, draw)[0], whole.loss(batch, draw)[0])
    made.unet.train()
    first, again = (made.loss(batch, draw)[0] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, whole.loss(batch, draw)[0])
    skip = {level: seen[1][:, -16:] for level, seen in kept.items()}  # behind the features from below
    assert (skip[1].flatten(1).abs().sum(1) == 0).tolist() == silent.tolist()
    assert (skip[0].flatten(1).abs().sum(1) > 0).all()
    assert not any(block._forward_pre_hooks for block in made.unet.up_blocks)


@torch.no_grad()
def test_skips_are_dropped_from_a_noise_level_on(parts: dict[str, str]) -> None:
    made = latent("diffusion", parts, skip_dropout=[0.5], skip_dropout_from=0.6)
    batch, draw = made.batch(Draw(0, 0)), Draw(0, 0)
    silent = torch.rand(6, generator=draw.generator("skips0")) < 0.5
    times = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.7, 0.5])
    seen: list[torch.Tensor] = []
    block = made.unet.up_blocks[-1].resnets[0]
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -16:]))  # behind the features from below
    made.unet.train()
    with made.dropping(draw, times):
        made.unet(batch["x0"], 500, made.text.text_model(batch["tokens"]).last_hidden_state)
    made.unet(batch["x0"], 500, made.text.text_model(batch["tokens"]).last_hidden_state)
    gone = seen[0].flatten(1).abs().sum(1) == 0
    assert gone.tolist() == (silent & (times >= 0.6)).tolist() and 0 < gone.sum() < silent.sum()
    assert (seen[1].flatten(1).abs().sum(1) > 0).all()


def test_sites_that_read_no_word_learn_to(parts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = latent("diffusion", parts, sink=0.5)
    batch, draw = made.batch(Draw(0, 0)), Draw(0, 0)
    batch["tokens"][1] = made.tokens([""])[0]
    context = made.text.text_model(batch["tokens"]).last_hidden_state
    words = ~torch.isin(batch["tokens"], torch.tensor(made.tokenizer.all_special_ids))
    sites = text_sites(made.unet)
    assert len(sites) == sum(name.endswith("attn2") for name, _ in made.unet.named_modules()) > 2
    inputs: list[tuple] = []  # in the order of the calls
    hooks = [
        s.register_forward_pre_hook(lambda s, args, kw: inputs.append((s, args[0])), with_kwargs=True) for s in sites
    ]
    with word_shares(sites, words) as shares:
        made.unet(batch["x0"], 500, context)
    for hook in hooks:
        hook.remove()
    for (site, hidden), share in zip(inputs, shares, strict=True):  # as diffusers computes probabilities
        query, key = (site.head_to_batch_dim(each) for each in (site.to_q(hidden), site.to_k(context)))
        probs = site.get_attention_scores(query, key).unflatten(0, (len(words), site.heads)).mean((1, 2))
        torch.testing.assert_close(share.exp(), (probs * words).sum(1)[words.any(1)], rtol=1e-4, atol=1e-6)
    assert not any(site._forward_pre_hooks for site in sites)

    with torch.no_grad():  # a sink: all queries alike, along the start's key
        for site in sites:
            start, rest = site.to_k(context)[0, :2]
            site.to_q.weight.zero_()
            site.to_q.weight[:, 0] = 300 * (start - rest) / float((start - rest).norm() ** 2)
    optimizer = torch.optim.Adam(made.unet.parameters(), lr=0.02)
    with word_shares(sites, words) as before:
        made.unet(batch["x0"], 500, context)
    first = sink_loss(before)
    first.backward()
    moved = {name.rpartition(".attn2.")[2] for name, p in made.unet.named_parameters() if p.grad is not None}
    assert moved <= {"to_q.weight", "to_k.weight"} and moved
    for _ in range(30):
        optimizer.zero_grad()
        with word_shares(sites, words) as now:
            made.unet(batch["x0"], 500, context)
        if not sink_loss(now).requires_grad:
            break
        sink_loss(now).backward()
        optimizer.step()
    assert float(sink_loss(now)) < 0.2 * float(first.detach())
    monkeypatch.setattr(sinks, "LEAST", 1e-9)  # where enough is heard, nothing is prepared for a gradient
    with word_shares(sites, words) as now:
        made.unet(batch["x0"], 500, context)
    assert not any(share.requires_grad for share in now) and float(sink_loss(now)) == 0.0
    monkeypatch.undo()
    with word_shares(sites, torch.zeros_like(words)) as nothing:
        made.unet(batch["x0"], 500, context)
    assert float(sink_loss(nothing)) == 0.0
    optimizer.zero_grad()
    loss, logs = made.loss(batch, draw)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in made.unet.parameters() if p.grad is not None)
    assert set(logs) >= {"sink"} and "sink" not in latent("diffusion", parts).loss(batch, draw)[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_foreign_context_leaves_a_word_its_own_and_takes_the_rest_from_another_caption(
    kind: str, parts: dict[str, str]
) -> None:
    made, plain = latent(kind, parts, foreign_context=1.0), latent(kind, parts)
    texts = ["a red ball on the grass", "", "a white cone to the right of a black cube", "a red cube and a red ring"]
    tokens = made.tokens(texts)
    colors = [made.tokenizer(word, add_special_tokens=False).input_ids[0] for word in COLORS]
    seen = set()
    for seed in range(40):
        foreign = other_words(tokens, made.kinds, 1.0, np.random.default_rng(seed))
        assert torch.equal(foreign[1], tokens[1])  # nothing is said there
        for own, other in zip(tokens.tolist(), foreign.tolist(), strict=True):
            told = [(a, b) for a, b in zip(own, other, strict=True) if a != b]
            assert all(any(a in kind and b in kind for kind in made.kinds) for a, b in told)
            assert not {b for a, b in told if a in colors} & set(own)  # no colour that the caption names
            assert len(set(told)) == len({a for a, _ in told}) == len({b for _, b in told})
        seen |= {(row, int(i)) for row, i in (foreign != tokens).nonzero().tolist()}
    nouns = {(0, 3), (2, 3), (2, 10), (3, 3), (3, 7)}
    assert nouns <= seen and (0, 2) in seen and (0, 1) not in seen
    assert torch.equal(other_words(tokens, made.kinds, 0.0, np.random.default_rng(0)), tokens)
    own, other = torch.randn(2, *tokens.shape, 8)
    taken = mixed(tokens, foreign, own, other)
    assert torch.equal(taken[tokens != foreign], own[tokens != foreign])
    assert torch.equal(taken[tokens == foreign], other[tokens == foreign])
    batch, draw = made.batch(Draw(0, 1)), Draw(0, 1)
    assert (batch["foreign"] != batch["tokens"]).any()
    own_batch = plain.batch(Draw(0, 1))
    assert torch.equal(batch["tokens"], own_batch["tokens"]) and "foreign" not in own_batch
    one, two = (next(iter(each.modules.values())) for each in (made, plain))
    assert not torch.equal(made.loss(batch, draw)[0], plain.loss(own_batch, draw)[0])
    one.eval(), two.eval()  # what is held out is read as it is
    assert torch.equal(made.loss(batch, draw)[0], plain.loss(own_batch, draw)[0])


def test_silent_skips_have_no_weights_and_get_none(parts: dict[str, str]) -> None:
    shape = {"channels": [24, 48], "heads": [2, 2], "attention": [True, True], "groups": 12, "text_width": 32, **parts}
    made = build("diffusion", 6, {"skip_dropout": [0.0, 1.0]}, **shape)
    with torch.no_grad():
        made.unet.conv_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    options = TrainOptions(steps=1, batch=1, optimizer="muon", lr=0.01, muon_lr=0.1)
    optimizer = build_optimizer(made.modules, options, made.takes_muon)
    for step in range(2):
        made.loss(made.batch(Draw(0, step)), Draw(0, step))[0].backward()
        optimizer.step(), optimizer.zero_grad()
    coarse, fine = made.unet.up_blocks
    for resnet in coarse.resnets:
        for layer in (resnet.conv1, resnet.conv_shortcut):
            assert not layer.weight[:, 48:].any() and layer.weight[:, :48].any()
    assert all(resnet.conv1.weight[:, -24:].any() for resnet in fine.resnets)
    batch, draw = made.batch(Draw(0, 5)), Draw(0, 5)
    trained = float(made.loss(batch, draw)[0])
    made.unet.eval()  # the skip connections are there, and nobody reads them
    assert float(made.loss(batch, draw)[0]) == pytest.approx(trained, rel=1e-5)
    with pytest.raises(BadInput, match="do not part after 48"):
        build("diffusion", 6, {"skip_dropout": [0.0, 1.0]}, **{**shape, "groups": 8})


def test_latents_have_the_shape_that_the_autoencoder_makes(home: Path) -> None:
    vae = build("vae", channels=[8, 8, 8, 16], latent_channels=6)
    with torch.no_grad():
        vae.export(home / "deep")
    small = {"vae": str(home / "deep"), "text_width": 128}
    unet = build("diffusion", channels=[16, 16], layers=[1, 2], heads=[2, 2], attention=[True, True], **small)
    assert unet.batch(Draw(0, 0))["x0"].shape[1:] == (6, 8, 8) == (unet.unet.config.in_channels, 8, 8)
    assert [len(block.resnets) for block in unet.unet.down_blocks] == [1, 2] and unet.unet.config.sample_size == 8
    flow = build("flow", layers=1, heads=2, **small)
    assert flow.transformer.config.in_channels == flow.transformer.config.out_channels == 6
    for made in (unet, flow):
        assert math.isfinite(float(made.loss(made.batch(Draw(0, 0)), Draw(0, 0))[0]))


def test_measuring_a_generator_puts_its_vital_signs_on_the_card(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = latent("diffusion", parts)
    assert "vital_signs" not in made.export(tmp_path / "before")
    monkeypatch.setattr("sfumato.zoo.objectives.latent.vital_signs", lambda model, judge: {"of": model.family.name})
    monkeypatch.setattr(made, "sample", lambda prompts, *_, **__: torch.zeros(len(prompts), 3, 64, 64))
    assert set(made.measure(n=2)) >= {
        "held_out_loss", "two_toys_right", "colorless_toy_right", "right_number",
    }  # fmt: skip
    assert made.export(tmp_path / "after")["vital_signs"] == {"of": "sd"}


def test_flow_loss_is_the_weighted_velocity_error(parts: dict[str, str]) -> None:
    made = latent("flow", parts)
    batch, draw = made.batch(Draw(0, 0)), Draw(0, 0)
    loss, _ = made.loss(batch, draw)
    u = (torch.randperm(6, generator=(draw.generator("order"))) + torch.rand(6, generator=draw.generator("time"))) / 6
    times = torch.distributions.Normal(0.0, 1.0).icdf(u).sigmoid().tolist()
    places = weights_by_hand(batch["toys"], [(1 - t) ** 2 / ((1 - t) ** 2 + t**2) for t in times])
    total = 0.0
    for i, t in enumerate(times):
        told = made.text(batch["tokens"][i : i + 1], output_hidden_states=True)
        context, pooled = told.hidden_states[-2].repeat(1, 1, 2), told.text_embeds.repeat(1, 2)
        x = (1 - t) * batch["x0"][i : i + 1] + t * batch["noise"][i : i + 1]
        guess = made.transformer(x, context, pooled, torch.tensor([1000 * t])).sample
        total += float((places[i] * (guess[0] - (batch["noise"] - batch["x0"])[i]) ** 2).mean())
    assert float(loss) == pytest.approx(total / 6, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "pipeline"), [("diffusion", StableDiffusionPipeline), ("flow", StableDiffusion3Pipeline)]
)
def test_exported_pipeline_is_loaded_by_plain_diffusers_and_draws_the_same(
    kind: str, pipeline: type, parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = latent(kind, parts)
    next(iter(made.modules.values())).half().float()  # the export rounds to half precision
    monkeypatch.setattr(type(made), "sampling", {**made.sampling, "steps": 3, "guidance": 2.5})
    expected = made.sample(["a red ball on the grass", ""])
    assert "num_inference_steps=3, guidance_scale=2.5" in made.export(tmp_path)["plain"]
    # without its T5, diffusers wants to hear so
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "flow" else {}
    pipe = pipeline.from_pretrained(tmp_path, **absent)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    extra = {"max_sequence_length": 0} if kind == "flow" else {}
    images = pipe(
        ["a red ball on the grass", ""],
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=generators,
        output_type="pt",
        **extra,
    ).images
    assert torch.equal(images * 2 - 1, expected)
    if kind == "diffusion":
        assert isinstance(pipe.scheduler, DDIMScheduler) and not pipe.scheduler.config.clip_sample
        assert pipe.scheduler.config.steps_offset == 1 and not pipe.scheduler.config.set_alpha_to_one
    again = latent(kind, parts)
    again.load(tmp_path)
    ours, theirs = (next(iter(one.modules.values())).parameters() for one in (made, again))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_drawing_by_a_flow_is_shifted_as_its_recipe_says(parts: dict[str, str], tmp_path: Path) -> None:
    made = latent("flow", parts, own={"shift": 3.0})
    with torch.no_grad():
        made.export(tmp_path)
    model = load(tmp_path)
    scheduler = model.make_scheduler("flow_euler")
    scheduler.set_timesteps(4)
    even = torch.linspace(1000, 1, 1000)[[0, 333, 666, 999]] / 1000  # diffusers shifts the last of 1000 steps too
    low = 3 * even.min() / (1 + 2 * even.min())
    even = torch.linspace(1, float(low), 4)
    torch.testing.assert_close(scheduler.timesteps, 1000 * 3 * even / (1 + 2 * even), rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_latents_are_encoded_once_and_read_back(parts: dict[str, str], home: Path) -> None:
    made = latent("flow", parts)
    x = data.pictures(made.val_data, torch.arange(8))
    expected = made.vae.encode(x).latent_dist.mean.half().numpy()
    assert (np.asarray(made.val_latents) == expected).all() and made.val_latents.dtype == np.float16
    stored = sorted((home / "latents").glob(f"*val*{made.key}.npy"))
    assert len(stored) == 1
    before = stored[0].stat().st_mtime_ns
    latent("flow", parts)
    assert stored[0].stat().st_mtime_ns == before


def test_a_folder_serves_in_the_toyboxs_place(parts: dict[str, str], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for i in range(4):
        Image.fromarray(noise[i]).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"grey number {i}")
    shape = {"layers": 2, "heads": 2, "text_width": 32, **parts}
    values = {"name": "x", "objective": "flow", "data": {"folder": str(tmp_path)}, "train": {"steps": 1, "batch": 3}}
    made = build_objective(Recipe(**values, model=shape, loss={"empty": 0.0}))
    made.setup(CPU)
    batch = made.batch(Draw(0, 0))
    rows = [made.train_data.rows[i] for i in Draw(0, 0).indices(3, 3).tolist()]
    assert torch.equal(batch["tokens"], made.tokens([f"grey number {i}" for i in rows]))
    x = torch.from_numpy(noise[rows]).permute(0, 3, 1, 2) / 127.5 - 1
    expected = made.vae.encode(x).latent_dist.mean * made.vae.config.scaling_factor
    torch.testing.assert_close(batch["x0"], expected, atol=2e-3, rtol=2e-3)
    assert set(made.measure()) == {"held_out_loss"}  # the judge knows toys only
    for loss, why in (({"align": 1.0}, "what the toybox knows"), ({"colorless": 0.1}, "captions of the toybox")):
        asks = build_objective(Recipe(**values, model=shape, loss=loss))
        asks.setup(CPU)
        with pytest.raises(NotSupported, match=why):
            asks.batch(Draw(0, 0))


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_colours_are_left_out_of_training_captions(kind: str, parts: dict[str, str]) -> None:
    told, bare = latent(kind, parts), latent(kind, parts, colorless=1.0)
    indices = torch.arange(4)
    texts = [made.captions(made.train_data, indices, Draw(0, 1)) for made in (told, bare)]
    assert all(any(color in text.split() for color in COLORS) for text in texts[0])
    assert not any(color in text.split() for text in texts[1] for color in COLORS)


def test_empty_prompts_have_their_share_and_unknown_parts_are_refused(parts: dict[str, str]) -> None:
    never, always = latent("flow", parts, empty=0.0), latent("flow", parts, empty=1.0)
    nothing = never.tokens([""])
    assert (always.batch(Draw(0, 0))["tokens"] == nothing).all()
    assert not (never.batch(Draw(0, 0))["tokens"] == nothing).all(1).any()
    with pytest.raises(UnknownName, match="built-in model or folder 'toy-vea'"):
        latent("flow", {**parts, "vae": "toy-vea"})


def test_training_the_decoder_alone_leaves_the_latents(tmp_path: Path) -> None:
    vae = build("vae", loss={"decoder_only": True}, channels=[8, 8, 16])
    loss, _ = vae.loss(vae.batch(Draw(0, 0)), Draw(0, 0))
    loss.backward()
    moved = {name.split(".")[0] for name, p in vae.vae.named_parameters() if p.grad is not None}
    assert moved == {"decoder", "post_quant_conv"}
    vae.export(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert all(torch.equal(a, b.half().float()) for a, b in zip(loaded.parameters(), vae.vae.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_text_tower_learns_at_its_own_rate_and_is_exported(kind: str, parts: dict[str, str], tmp_path: Path) -> None:
    frozen, made = latent(kind, parts), latent(kind, parts, text_rate=0.5)
    assert not any(p.requires_grad for p in frozen.text.parameters()) and "text" not in frozen.modules
    options = TrainOptions(steps=1, batch=1, optimizer="muon", lr=0.01, muon_lr=0.1)
    optimizer = build_optimizer(made.modules, options, made.takes_muon, made.rates)
    peaks = {id(p): (group["muon"], group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    text = made.text.text_model
    assert peaks[id(text.embeddings.token_embedding.weight)] == (False, 0.005)
    assert peaks[id(text.encoder.layers[0].mlp.fc1.weight)] == (True, 0.05)
    assert {peak for muon, peak in peaks.values() if not muon} == {0.005, 0.01}
    loss, _ = made.loss(made.batch(Draw(0, 0)), Draw(0, 0))
    loss.backward()
    assert all(p.grad is not None for module in made.modules.values() for p in module.parameters())
    with torch.no_grad():
        text.embeddings.token_embedding.weight.add_(1.0)
        made.export(tmp_path)
    again = latent(kind, parts)
    again.load(tmp_path)
    taken, taught = (tower.embeddings.token_embedding.weight for tower in (again.text.text_model, text))
    assert torch.equal(taken, taught.half().float())


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
@pytest.mark.parametrize(("term", "readout"), [("align", "readout"), ("repa", "repa_readout")])
def test_alignment_adds_to_the_loss_and_leaves_no_trace_in_the_export(
    kind: str, term: str, readout: str, parts: dict[str, str], tmp_path: Path
) -> None:
    teacher = {"teacher": parts["text"]} if term == "repa" else {}
    plain, aligned = latent(kind, parts), latent(kind, parts, own=teacher, **{term: 0.5})
    assert readout in aligned.modules and readout not in plain.modules
    loss, logs = aligned.loss(aligned.batch(Draw(0, 1)), Draw(0, 1))
    bare, _ = plain.loss(plain.batch(Draw(0, 1)), Draw(0, 1))
    assert float(logs["denoise"]) == pytest.approx(float(bare), rel=1e-6)
    assert float(loss) == pytest.approx(float(logs["denoise"] + 0.5 * logs[term]), rel=1e-6)
    loss.backward()
    assert aligned.modules[readout].weight.grad.abs().sum() > 0
    with torch.no_grad():
        aligned.export(tmp_path / "a")
    assert not [path for path in (tmp_path / "a").rglob("*") if "readout" in path.name]
    net = "unet" if kind == "diffusion" else "transformer"
    assert not any(module._forward_hooks for module in aligned.modules[net].modules())


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_what_noise_hides_weighs_nothing_more(kind: str, parts: dict[str, str]) -> None:
    """A weight that knows what is to be foretold moves the mean: of a place that is 1 in half of all pictures, and then
    weighs 3, the best guess by the weighted square would be 3 / 4."""
    made = latent(kind, parts)
    batch = made.batch(Draw(0, 1))
    toys = batch["toys"]
    hidden, seen = (made.place_weights(batch, torch.full((len(toys),), signal)) for signal in (0.0, 1.0))
    assert (hidden == 1).all()
    torch.testing.assert_close(seen / seen.min(), 1 + 2 * toys)
    known = {**batch, "toys": torch.tensor([0.0, 1.0]).repeat(3)[:, None, None, None].expand_as(toys)}
    for signal, best in ((0.0, 0.5), (1.0, 0.75)):
        weight = made.place_weights(known, torch.full((6,), signal))
        assert float((weight * known["toys"]).sum() / weight.sum()) == pytest.approx(best)
    signals: list[float] = []
    made.place_weights = lambda batch, signal: signals.extend(signal.tolist()) or torch.ones_like(toys)
    with torch.no_grad():
        made.loss(batch, Draw(0, 1))
    assert len(signals) == len(toys) and 0 < min(signals) < 0.2 and 0.8 < max(signals) < 1


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_two_alignments_at_once_are_refused(kind: str, parts: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="loss.align and loss.repa .* give one"):
        latent(kind, parts, own={"teacher": parts["text"]}, align=0.1, repa=0.5)
    with pytest.raises(UnknownName, match="built-in model or folder 'toy-clap'.*toy-clip"):
        latent(kind, parts, own={"teacher": "toy-clap"}, repa=0.5)


@pytest.mark.parametrize(
    ("objective", "section", "key", "value"),
    [
        ("vae", "model", "strengths", [0.0, 1.0]),
        ("diffusion", "loss", "timesteps", [0.4, 0.0]),
        ("flow", "model", "shift", 0),
    ],
)
def test_deviations_and_shifts_that_are_none_are_refused(objective: str, section: str, key: str, value: Any) -> None:
    values = {"name": "x", "objective": objective, "model": {}, "loss": {}}
    values[section] = {key: value}
    with pytest.raises(BadInput, match=f"recipe key {section}.{key}"):
        build_objective(Recipe(**values, data={"train": 24, "val": 8}, train={"steps": 1, "batch": 2}))


def test_repa_draws_the_middle_to_the_teachers_patches(parts: dict[str, str]) -> None:
    made = latent("diffusion", parts, own={"teacher": parts["text"]}, repa=1.0)
    indices = torch.arange(6)
    pixels = data.pictures(made.train_data, indices)
    tower = CLIPModel.from_pretrained(parts["text"]).vision_model.eval()
    with torch.no_grad():  # 64 pixels, as the tower takes; its mean and deviation are 0.5
        every = tower(data.pictures(made.train_data, torch.arange(24))).last_hidden_state[:, 1:].flatten(0, 1)
        patches = (tower(pixels).last_hidden_state[:, 1:] - every.mean(0)) / every.std(0)
    batch = made.draw_latents(made.train_data, made.train_latents, indices, Draw(0, 1))
    torch.testing.assert_close(batch["teacher"], patches.unflatten(1, (8, 8)), atol=4e-3, rtol=1e-3)  # kept as halves
    made.repa_teacher.tower = None  # every picture is looked at once
    again = made.draw_latents(made.train_data, made.train_latents, indices, Draw(0, 1))
    assert torch.equal(again["teacher"], batch["teacher"])

    weight = torch.rand(6, 1, 16, 16)
    weight = weight / weight.mean()
    assert float(repa_loss(3 * batch["teacher"], batch["teacher"], weight)) == pytest.approx(0, abs=1e-5)
    assert float(repa_loss(-batch["teacher"], batch["teacher"], weight)) == pytest.approx(2, rel=1e-5)
    finer = batch["teacher"].repeat_interleave(2, 1).repeat_interleave(2, 2)  # features at the size of the latents
    assert float(repa_loss(finer, batch["teacher"], weight)) == pytest.approx(0, abs=1e-5)
    once = torch.zeros(6, 8, 8, batch["teacher"].shape[-1])
    once[:] = batch["teacher"]
    once[:, 0, 0] *= -1  # one place is wrong, and counts as much as it weighs
    share = float(F.adaptive_avg_pool2d(weight, 8)[:, 0, 0, 0].mean()) / 64
    assert float(repa_loss(once, batch["teacher"], weight)) == pytest.approx(2 * share, rel=1e-4)

    made.loss(batch, Draw(0, 1))[0].backward()
    grown = {name for name, p in made.unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("mid_block") for name in grown)
    made.unet.zero_grad()
    with made.watching(made.aligned_block()) as outputs:
        made.loss(batch, Draw(0, 1))
    places = made.place_weights(batch, torch.ones(6))
    made.repa(outputs[0].permute(0, 2, 3, 1), batch, places).backward()
    # REPA alone reaches what leads to the middle, no more
    grown = {name.partition(".")[0] for name, p in made.unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"mid_block", "down_blocks"} <= grown and "up_blocks" not in grown


# experts --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_an_expert_sees_its_share_of_the_noise_and_no_other(kind: str, parts: dict[str, str]) -> None:
    """Timesteps that reach the network, by hand from the quantiles; the whole interval gives the bits it gave."""
    seen: list[torch.Tensor] = []
    low, high = {"diffusion": (250.0, 500.0), "flow": (1000 / (1 + math.exp(0.6744898)), 500.0)}[kind]
    for interval in ((0.0, 1.0), (0.25, 0.5)):
        made = latent(kind, parts, interval=interval)
        net = next(iter(made.modules.values()))
        place = 1 if kind == "diffusion" else 3
        handle = net.register_forward_pre_hook(lambda _, args, place=place: seen.append(args[place]))
        made.loss(made.batch(Draw(0, 0)), Draw(0, 0))
        handle.remove()
    whole, part = (times.double() for times in seen)
    assert whole.min() < low and whole.max() > high
    assert (part >= low - 1e-3).all() and (part < high + 1e-3).all() and len(set(part.tolist())) == 6
    if kind == "diffusion":
        assert (part - (250 + whole * 0.25)).abs().max() <= 1.25  # whole numbers
    else:

        def quantile(t: torch.Tensor) -> torch.Tensor:
            return torch.special.ndtr(torch.logit(t / 1000))

        torch.testing.assert_close(quantile(part), 0.25 + 0.25 * quantile(whole), rtol=0, atol=1e-5)


@torch.no_grad()
def test_timesteps_of_diffusion_are_drawn_where_they_are_asked_for(parts: dict[str, str]) -> None:
    seen: list[torch.Tensor] = []
    even, more = latent("diffusion", parts), latent("diffusion", parts, timesteps=[0.4, 0.5])
    for made in (even, more):
        made.unet.register_forward_pre_hook(lambda _, args: seen.append(args[1].double()))
        made.loss(made.batch(Draw(0, 0)), Draw(0, 0))
    quantiles = (seen[0] + 0.5) / 1000
    expected = 1000 * torch.sigmoid(0.4 + 0.5 * torch.special.ndtri(quantiles))
    assert (seen[1] - expected).abs().max() < 2.5  # whole numbers
    assert more.timestep(0.5) == pytest.approx(1000 / (1 + math.exp(-0.4))) and more.timestep(1.0) == 1000
    assert even.timestep(0.25) == 250


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_the_card_of_an_expert_says_whose_it_is_and_when(kind: str, parts: dict[str, str], tmp_path: Path) -> None:
    made = latent(kind, parts, interval=(0.25, 1.0))
    assert made.export(tmp_path / "e")["expert"] == {
        "of": None, "timesteps": [{"diffusion": 250.0, "flow": 337.492}[kind], 1000.0],
    }  # fmt: skip
    assert made.grid() is None and set(made.measure()) == {"held_out_loss"}
    assert "expert" not in latent(kind, parts).export(tmp_path / "w")


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_an_interval_that_is_none_is_refused(interval: tuple[float, float], parts: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="a start below an end"):
        latent("diffusion", parts, interval=interval)


@pytest.fixture(scope="module")
def deeper(home: Path) -> str:
    """An untrained codec of factor 8: it has as many latents of 128 pixels as one of factor 4 of 64."""
    (home / "deeper").mkdir()
    with torch.no_grad():
        build("vae", channels=[8, 8, 8, 16], size=128).export(home / "deeper")
    return str(home / "deeper")


@pytest.mark.parametrize("size", [64, 128])
def test_noisy_clip_begins_as_the_clip_it_comes_from(size, parts, deeper):
    """At no noise the patch embedding is what least squares makes of latents; the text tower is frozen. The clip is
    shown pictures of its own size, 64."""
    objective = build("noisy_clip", vae={64: parts["vae"], 128: deeper}[size], clip=parts["text"], size=size)
    seen = objective.clip.config.vision_config
    assert (seen.image_size, seen.patch_size) == (16, 2)
    teacher = objective.teacher.vision_model.embeddings.patch_embedding
    student = objective.clip.vision_model.embeddings.patch_embedding
    x = torch.from_numpy(objective.train_latents[:].astype(np.float32))
    level = torch.zeros(len(x))
    pictures = data.pictures(objective.train_data, torch.arange(len(x)))
    wanted = teacher(F.interpolate(pictures, (64, 64), mode="bicubic", antialias=True))
    got = student(noised_input(x, level))
    patches = F.unfold(noised_input(x, level), 2, stride=2).transpose(1, 2).flatten(0, 1)
    targets = wanted.flatten(2).transpose(1, 2).flatten(0, 1).detach()
    best = torch.linalg.lstsq(patches.double(), targets.double(), driver="gelsd").solution
    least = (patches.double() @ best - targets).square().mean()
    assert least <= (got - wanted).square().mean() < 1.05 * least
    draw = Draw(0, 0)
    batch = objective.batch(draw)
    assert (batch["level"].sort().values.diff() - 1 / len(batch["level"])).abs().max() < 1e-6  # evenly spread
    loss, logs = objective.loss(batch, draw)
    loss.backward()
    assert all(p.grad is None for p in objective.clip.text_model.parameters())
    assert student.weight.grad.abs().max() > 0 and 0 <= float(logs["right"]) <= 1
    assert torch.isfinite(objective._decoded(batch["x0"], batch["noise"], batch["level"])).all()


def test_noisy_clip_refuses_latents_of_other_places_than_its_clip_has(parts, deeper):
    with pytest.raises(BadInput, match=r"model.patch: 8 x 8 latents in patches of 2 are not the 8 x 8 places of"):
        build("noisy_clip", vae=deeper, clip=parts["text"])


def test_noisy_clip_loss_by_hand(parts):
    objective = build("noisy_clip", vae=parts["vae"], clip=parts["text"], loss={"places": 0.0, "negatives": 1})
    batch = objective.batch(Draw(0, 3))
    b = len(batch["x0"])
    with torch.no_grad():
        loss, _ = objective.loss(batch, Draw(0, 3))
        total = 0.0
        text = objective.read(batch["tokens"])
        scale = objective.clip.logit_scale.exp()
        rows = []
        for i in range(b):
            u = float(batch["level"][i]) * math.pi / 2
            x = math.cos(u) * batch["x0"][i] + math.sin(u) * batch["noise"][i]
            planes = torch.tensor([math.cos(2 * u * k) for k in range(8)]).view(8, 1, 1).expand(8, *x.shape[1:])
            out = objective.clip.get_image_features(pixel_values=torch.cat([x, planes])[None])
            image = getattr(out, "pooler_output", out)[0]
            rows.append(scale * text @ (image / image.norm()))
        logits = torch.stack(rows).masked_fill(batch["same"] & ~torch.eye(b, len(text)).bool(), -1e4)
        for i in range(b):
            total -= 0.5 * float(logits[i].log_softmax(0)[i] + logits[:, i].log_softmax(0)[i]) / b
            total -= 0.5 * float(torch.stack([logits[i, i], logits[i, b + i]]).log_softmax(0)[0]) / b
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_noisy_clip_exports_a_plain_clip(parts, tmp_path):
    objective = build("noisy_clip", vae=parts["vae"], clip=parts["text"])
    card = objective.export(tmp_path)
    clip = load_clip(tmp_path)
    assert clip.reads_noise and clip.codec == codec_hash(objective.vae) and card["latents_of"] == parts["vae"]
    x0, noise = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen, _ = objective.image_features(x0, noise, torch.full((3,), 0.5))
        half = math.sqrt(0.5)
        ours = clip.latents(0.5 * x0 + 0.5 * noise, 0.5, 0.5)  # of a flow, at the same ratio
        torch.testing.assert_close(clip.latents(half * (x0 + noise), half, half), ours, rtol=1e-3, atol=1e-4)
        assert F.cosine_similarity(ours, seen).min() > 0.999
        wide = clip.latents(torch.randn(1, 4, 8, 24), 0.6, 0.8)
    assert wide.shape == (1, 32) and torch.isfinite(wide).all()
    assert set(objective.measure()) == set(objective.evaluate()) == set()  # fewer than 64 held-out scenes
