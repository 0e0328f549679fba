"""The objectives against slow references, and their exports through plain diffusers and transformers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.readers import load_clip
from sfumato.models.readers.noised import codec_mark, noised_input
from sfumato.toybox import sample_scene
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective, build_objective
from sfumato.training.optim import build_optimizer
from sfumato.training.recipe import Recipe, TrainOptions
from sfumato.zoo.objectives.clip import hard_negative
from sfumato.zoo.objectives.latent import LatentObjective

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(folder))
        yield folder


def build(objective: str, batch: int = 4, loss: dict | None = None, **model) -> Objective:
    values = {"name": "x", "objective": objective, "model": model, "loss": loss or {}}
    made = build_objective(Recipe(**values, data={"train": 24, "val": 8}, train={"steps": 1, "batch": batch}))
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


def latent(kind: str, parts: dict[str, str], text_rate: float = 0.0, **loss) -> LatentObjective:
    shape = (
        {"channels": [16, 16], "heads": [2, 2], "attention": [True, False]}
        if kind == "diffusion"
        else {"layers": 2, "heads": 2}
    )
    made = build(kind, 6, loss, **shape, text_width=32, text_rate=text_rate, **parts)
    with torch.no_grad():  # training starts from zero outputs, which would hide mistakes
        for n, p in enumerate(next(iter(made.modules.values())).parameters()):
            if not p.any():
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(n))
    return made


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
    coarse = data.toy_weights(source, torch.tensor([3]), 4.0, 16)[0, 0]
    touched = toys.reshape(16, 4, 16, 4).any((1, 3))
    assert ((coarse > coarse.min()).numpy() == touched).all()


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
def test_diffusion_loss_is_the_weighted_noise_error(parts: dict[str, str]) -> None:
    made = latent("diffusion", parts, min_snr=5.0, structure=0.5, empty=0.5)
    batch, draw = made.batch(Draw(0, 0)), Draw(0, 0)
    loss, _ = made.loss(batch, draw)
    u = torch.rand(6, generator=draw.generator("time"))
    t = ((torch.randperm(6, generator=draw.generator("order")) + u) / 6 * 1000).long()
    assert (t // (1000 / 6)).unique().numel() == 6  # one of each sixth
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    total = 0.0
    for i in range(6):
        alpha = float((1 - beta)[: t[i] + 1].prod())
        x = alpha**0.5 * batch["x0"][i : i + 1] + (1 - alpha) ** 0.5 * batch["noise"][i : i + 1]
        context = made.text.text_model(batch["tokens"][i : i + 1]).last_hidden_state
        guess = made.unet(x, t[i : i + 1], context).sample
        snr = alpha / (1 - alpha)
        weight = min(1, 5 / snr) + 0.5 / max(snr, 0.05)
        total += weight * float((batch["weight"][i] * (guess[0] - batch["noise"][i]) ** 2).mean())
    assert float(loss) == pytest.approx(total / 6, rel=1e-4)
    assert set(made.unet.state_dict()) == set(dict(made.unet.named_parameters()))


def test_flow_loss_is_the_weighted_velocity_error(parts: dict[str, str]) -> None:
    made = latent("flow", parts)
    batch, draw = made.batch(Draw(0, 0)), Draw(0, 0)
    loss, _ = made.loss(batch, draw)
    u = (torch.randperm(6, generator=(draw.generator("order"))) + torch.rand(6, generator=draw.generator("time"))) / 6
    normal = torch.distributions.Normal(0.0, 1.0)
    total = 0.0
    for i in range(6):
        t = float(torch.sigmoid(normal.icdf(u[i])))
        told = made.text(batch["tokens"][i : i + 1], output_hidden_states=True)
        context, pooled = told.hidden_states[-2].repeat(1, 1, 2), told.text_embeds.repeat(1, 2)
        x = (1 - t) * batch["x0"][i : i + 1] + t * batch["noise"][i : i + 1]
        guess = made.transformer(x, context, pooled, torch.tensor([1000 * t])).sample
        total += float((batch["weight"][i] * (guess[0] - (batch["noise"] - batch["x0"])[i]) ** 2).mean())
    assert float(loss) == pytest.approx(total / 6, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "pipeline"), [("diffusion", StableDiffusionPipeline), ("flow", StableDiffusion3Pipeline)]
)
def test_exported_pipeline_is_loaded_by_plain_diffusers_and_draws_the_same(
    kind: str, pipeline: type, parts: dict[str, str], tmp_path: Path
) -> None:
    made = latent(kind, parts)
    next(iter(made.modules.values())).half().float()  # the export rounds the denoiser to half precision
    expected = made.sample(["a red ball on the grass", ""], 3, 2.0)
    made.export(tmp_path)
    # without its T5, diffusers wants to hear so
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "flow" else {}
    pipe = pipeline.from_pretrained(tmp_path, **absent)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    extra = {"max_sequence_length": 0} if kind == "flow" else {}
    images = pipe(
        ["a red ball on the grass", ""],
        num_inference_steps=3,
        guidance_scale=2.0,
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


@torch.no_grad()
def test_latents_are_encoded_once_and_read_back(parts: dict[str, str], home: Path) -> None:
    made = latent("flow", parts)
    x = data.pictures(made.val_data, torch.arange(8))
    expected = made.vae.encode(x).latent_dist.mean.half().numpy()
    assert (np.asarray(made.val_latents) == expected).all() and made.val_latents.dtype == np.float16
    stored = sorted((home / "latents").glob("*val*.npy"))
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
    aligned = build_objective(Recipe(**values, model=shape, loss={"align": 1.0}))
    aligned.setup(CPU)
    with pytest.raises(NotSupported, match="what the toybox knows"):
        aligned.batch(Draw(0, 0))


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
    assert torch.equal(again.text.text_model.embeddings.token_embedding.weight, text.embeddings.token_embedding.weight)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_alignment_adds_to_the_loss_and_leaves_no_trace_in_the_export(
    kind: str, parts: dict[str, str], tmp_path: Path
) -> None:
    plain, aligned = latent(kind, parts), latent(kind, parts, align=0.5)
    assert "readout" in aligned.modules and "readout" not in plain.modules
    loss, logs = aligned.loss(aligned.batch(Draw(0, 1)), Draw(0, 1))
    bare, _ = plain.loss(plain.batch(Draw(0, 1)), Draw(0, 1))
    assert float(logs["denoise"]) == pytest.approx(float(bare), rel=1e-6)
    assert float(loss) == pytest.approx(float(logs["denoise"] + 0.5 * logs["align"]), rel=1e-6)
    loss.backward()
    assert aligned.modules["readout"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        aligned.export(tmp_path / "a")
    assert not [path for path in (tmp_path / "a").rglob("*") if "readout" in path.name]
    net = "unet" if kind == "diffusion" else "transformer"
    assert not any(module._forward_hooks for module in aligned.modules[net].modules())


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


def test_noisy_clip_begins_as_the_clip_it_comes_from(parts):
    """At no noise the patch embedding is what least squares makes of latents; the text tower is frozen."""
    objective = build("noisy_clip", vae=parts["vae"], clip=parts["text"])
    teacher = objective.teacher.vision_model.embeddings.patch_embedding
    student = objective.clip.vision_model.embeddings.patch_embedding
    x = torch.from_numpy(objective.train_latents[:].astype(np.float32))
    level = torch.zeros(len(x))
    wanted = teacher(data.pictures(objective.train_data, torch.arange(len(x))))
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
    assert clip.reads_noise and clip.codec == codec_mark(objective.vae) and card["latents_of"] == parts["vae"]
    x0, noise = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen, _ = objective.seen(x0, noise, torch.full((3,), 0.5))
        half = math.sqrt(0.5)
        ours = clip.latents(0.5 * x0 + 0.5 * noise, 0.5, 0.5)  # of a flow, at the same ratio
        torch.testing.assert_close(clip.latents(half * (x0 + noise), half, half), ours, rtol=1e-3, atol=1e-4)
        assert F.cosine_similarity(ours, seen).min() > 0.999
        wide = clip.latents(torch.randn(1, 4, 8, 24), 0.6, 0.8)
    assert wide.shape == (1, 32) and torch.isfinite(wide).all()
    assert set(objective.measure()) == set(objective.evaluate()) == set()  # fewer than 64 held-out scenes
