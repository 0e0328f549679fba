"""DAAM on every family against attention by hand in float64; batches, sizes, selections, refusals, no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode

from sfumato.attention import Tap
from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.explain.daam import DAAM, explain_image, explain_images
from sfumato.explain.heatmaps import HeatMaps
from sfumato.models.quiet import quiet
from sfumato.sampling import Intervention, Path, generate
from sfumato.text.words import Words
from tests.helpers import fingerprint
from tests.tiny import tiny_model

PROMPTS = ["a red cube on a dog", "a small green ball and a big red cube"]
KINDS = ["sd", "sd2", "sdxl", "sd3", "sd35", "sd3clip", "flux", "pixart"]


def guided(model, scale=3.0):
    return {} if model.embeds_guidance else {"guidance": scale}


class Witness(TorchFunctionMode):
    """Every attention probability of a run, materialised, independently of the seam."""

    def __init__(self):
        super().__init__()
        self.probs = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            scores = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
            mask = kwargs.get("attn_mask")
            self.probs.append((scores if mask is None else scores + mask.double()).softmax(-1))
        return func(*args, **kwargs)


def expected_map(model, sites, probs, rows, positions, grid):
    """Mean over steps and layers of the head-averaged maps of some text positions, upscaled and clamped."""
    per_layer = {}
    for site, each in zip(sites * (len(probs) // len(sites)), probs, strict=True):
        per_layer.setdefault(site.path, (site, []))[1].append(each)
    layers = []
    for site, calls in per_layer.values():
        if site.text is None:
            continue
        columns = [site.text[0] + p for p in positions]
        block = torch.stack(calls).mean(0)[rows].mean(0)[slice(*site.image)][:, columns]
        maps = block.T.reshape(1, len(columns), *site.grid).float()
        layers.append(F.interpolate(maps, size=grid, mode="bicubic")[0].clamp(min=0))
    return torch.stack(layers).mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_word_maps_equal_attention_by_hand_and_the_picture_keeps_its_bits(kind):
    model = tiny_model(kind)
    size = (48, 32)  # wide: 24 by 16 latents
    options = dict(steps=2, seed=3, size=size, decode=False, **guided(model))
    options |= {"scheduler": "ddim"} if kind == "sd" else {}  # its own takes the first step twice
    plain = generate(model, PROMPTS, **options)
    daam = DAAM(coarsest=100)
    result = generate(model, PROMPTS, interventions=daam, **options)
    assert torch.equal(plain.latents, result.latents)

    witness, sites = Witness(), model.sites(size[1], size[0])
    with quiet(), witness:
        generate(model, PROMPTS, **options)
    probs = witness.probs[-2 * len(sites) :]  # those of the denoiser come after those of the text encoders
    rows_from = 0 if model.embeds_guidance else 2
    words = Words(model)
    for sample, prompt in enumerate(PROMPTS):
        maps = daam.maps[sample]
        assert maps.size == (32, 48) and maps.resolution[1] / maps.resolution[0] == 1.5
        span = words.one(prompt, "red cube")
        expected = torch.zeros(maps.resolution)
        for positions in {tuple(p) for p in span.tokens.values()}:
            rows = rows_from + sample
            expected += expected_map(model, sites, probs, rows, positions, maps.resolution).mean(0)
        torch.testing.assert_close(maps.map("red cube", size=maps.resolution), expected, rtol=1e-4, atol=1e-7)
        assert maps.map("red cube").shape == (32, 48) and maps.map("red cube").dtype == torch.float32


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_maps_of_a_sample_do_not_depend_on_its_neighbours(kind):
    model = tiny_model(kind)
    options = dict(steps=2, guidance=3.0, decode=False)
    together = DAAM()
    generate(model, PROMPTS, n=2, seed=5, interventions=together, **options)
    assert [m.prompt for m in together.maps] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    in_two = DAAM()
    generate(model, PROMPTS, n=2, seed=5, batch_size=3, interventions=in_two, **options)
    alone = DAAM()
    generate(model, PROMPTS[1], seed=7, interventions=alone, **options)
    for word in ("red cube", "green", "<start>"):
        expected = alone.maps[0].map(word)
        torch.testing.assert_close(together.maps[2].map(word), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(in_two.maps[2].map(word), expected, rtol=1e-4, atol=1e-7)
    assert (together.maps[0].map("dog") - together.maps[1].map("dog")).abs().max() > 1e-6  # another seed
    generate(model, PROMPTS[0], interventions=alone, **options)
    assert len(alone.maps) == 1 and alone.maps[0].prompt == PROMPTS[0]  # a new run starts anew


def test_without_guidance_all_rows_are_conditional():
    model = tiny_model("sd")
    on, off = DAAM(), DAAM()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    generate(model, PROMPTS[0], steps=1, guidance=7.0, latents=noise, interventions=on, decode=False)
    generate(model, PROMPTS[0], steps=1, guidance=1.0, latents=noise, interventions=off, decode=False)
    torch.testing.assert_close(on.maps[0].map("cube"), off.maps[0].map("cube"), rtol=1e-4, atol=1e-7)


def test_negative_prompts_have_maps_too():
    model = tiny_model("sd")
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    daam, plain = DAAM(negative=True), DAAM()
    generate(model, PROMPTS[0], negative="a blue ball", steps=1, guidance=3, latents=noise, interventions=daam)
    generate(model, "a blue ball", steps=1, guidance=1, latents=noise, interventions=plain)
    assert daam.maps[0].words == ("a", "blue", "ball")
    torch.testing.assert_close(daam.maps[0].map("ball"), plain.maps[0].map("ball"), rtol=1e-4, atol=1e-7)
    with pytest.raises(BadInput, match="no negative prompt"):
        generate(model, PROMPTS[0], steps=1, interventions=DAAM(negative=True))


def test_guided_flux_runs_its_branches_one_by_one():
    model = tiny_model("flux")
    noise = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    options = dict(steps=1, latents=noise, decode=False)
    both, cond = DAAM(), DAAM()
    generate(model, PROMPTS[0], negative="a dog", true_guidance=2.0, interventions=both, **options)
    generate(model, PROMPTS[0], interventions=cond, **options)
    assert torch.equal(both.maps[0].map("cube"), cond.maps[0].map("cube"))


def test_two_text_encoders_in_one_sequence_are_summed_and_reported_apart():
    model = tiny_model("sd3")
    daam = DAAM()
    generate(model, PROMPTS[0], steps=2, guidance=3.0, interventions=daam, decode=False)
    maps = daam.maps[0]
    parts = [maps.map("cube", stream=name, size=maps.resolution) for name in ("clip", "t5")]
    assert torch.equal(maps.map("cube", stream="clip"), maps.map("cube", stream="clip2"))
    torch.testing.assert_close(maps.map("cube", size=maps.resolution), sum(parts))
    assert (parts[0] - parts[1]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_share_of_everything_or_of_the_text(kind):
    model = tiny_model(kind)
    share = {}
    for over in ("all", "text"):
        daam = DAAM(over=over, padding=True)
        generate(model, PROMPTS[0], steps=1, interventions=daam, decode=False, **guided(model))
        share[over] = daam.maps[0]
    everything = {over: maps.tokens() for over, maps in share.items()}
    assert len(share["text"].positions) == model.text_length
    torch.testing.assert_close(everything["text"].sum(0), torch.ones(share["text"].resolution), rtol=0, atol=1e-5)
    assert (everything["all"].sum(0) < 0.99).all()
    for site_all, site_text in zip(share["all"].layers, share["text"].layers, strict=True):
        raw, ours = site_all.maps, site_text.maps  # mean over heads of shares is not the share of means, so compare one
        assert raw.shape == ours.shape and (ours >= raw).all()


def test_scale_does_not_depend_on_the_number_of_steps_or_calls():
    model = tiny_model("sd")
    total = {}
    for steps, scheduler in ((2, "ddim"), (5, "ddim"), (3, "heun")):
        daam = DAAM(padding=True)
        generate(model, PROMPTS[0], steps=steps, scheduler=scheduler, interventions=daam, decode=False)
        total[steps] = daam.maps[0].tokens().sum(0)
        torch.testing.assert_close(total[steps], torch.ones(16, 16), rtol=0, atol=1e-4)
    assert daam.maps[0].layers[0].calls == (5,)  # Heun calls the network twice per step but the last


def test_kept_heads_and_steps_equal_those_recorded_alone():
    model = tiny_model("sd")
    options = dict(steps=3, guidance=3.0, scheduler="ddim", decode=False)
    kept, one_head, late, up = (
        DAAM(per_head=True, per_step=True),
        DAAM(heads=[1]),
        DAAM(window=(0.6, 1.0)),
        DAAM(layers=["up"]),
    )
    generate(model, PROMPTS[0], interventions=[kept, one_head, late, up], **options)
    maps = kept.maps[0]
    everything = DAAM()
    generate(model, PROMPTS[0], interventions=everything, **options)
    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(maps.map("cube"), everything.maps[0].map("cube"), **close)
    torch.testing.assert_close(maps.map("cube", heads=[1]), one_head.maps[0].map("cube"), **close)
    torch.testing.assert_close(maps.map("cube", steps=[2]), late.maps[0].map("cube"), **close)
    torch.testing.assert_close(maps.map("cube", layers=["up"]), up.maps[0].map("cube"), **close)
    assert {layer.site.block.split(".")[0] for layer in up.maps[0].layers} == {"up"}
    by_path = maps.layers[0].site.path
    assert maps.map("cube", layers=[by_path]).shape == (32, 32)
    with pytest.raises(NoMatch, match="its heads were averaged"):
        everything.maps[0].map("cube", heads=[0])
    with pytest.raises(NoMatch, match="layers=.'side'. match none of the recorded ones: down.0"):
        maps.map("cube", layers="side")


def test_the_coarsest_maps_are_left_out_unless_named():
    model = tiny_model("sd")  # 16x16 and 8x8
    fine, coarse = DAAM(coarsest=1), DAAM(layers=["mid"])
    generate(model, PROMPTS[0], steps=1, interventions=[fine, coarse], decode=False)
    assert {layer.site.grid for layer in fine.maps[0].layers} == {(16, 16)}
    assert {layer.site.grid for layer in coarse.maps[0].layers} == {(8, 8)} and coarse.maps[0].resolution == (8, 8)


def test_maps_kept_do_not_grow_with_the_steps():
    model, sizes = tiny_model("sd"), []
    for steps in (2, 6):
        daam, seen = DAAM(), []

        def measure(step, daam=daam, seen=seen):
            seen.append(sum(t.numel() for sums in daam._store._sums.values() for t in sums.values()))

        generate(model, PROMPTS[0], steps=steps, scheduler="ddim", interventions=daam, on_step=measure, decode=False)
        sizes += seen
    assert len(sizes) == 8 and len(set(sizes)) == 1


class Silence(Intervention):
    """Takes all attention away from one column of the text."""

    role = "editor"

    def __init__(self, column):
        self.column = column

    def taps(self):
        return [Tap(lambda site: site.kind == "cross", edit_scores=self.edit)]

    def edit(self, call):
        self.mark(call.step)
        scores = call.scores().clone()
        scores[..., self.column] = -torch.inf
        return scores


def test_an_observer_sees_what_an_editor_made():
    model, daam = tiny_model("sd"), DAAM()
    generate(model, PROMPTS[0], steps=2, interventions=[daam, Silence(3)], decode=False)
    assert (daam.maps[0].map("cube") == 0).all() and daam.maps[0].map("red").max() > 0


# -- existing pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_an_existing_picture_is_noised_to_every_level(kind):
    model = tiny_model(kind)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = explain_image(model, image, PROMPTS[0], steps=3, seed=11, coarsest=100)
    # by hand: the same noise, the denoiser called directly, all probabilities materialised
    generator = torch.Generator().manual_seed(11)
    scheduler = model.make_scheduler("flow_euler" if model.flow else "ddim")
    model.timesteps(scheduler, 3, 32, 48)
    path, witness, sites = Path(scheduler), Witness(), model.sites(32, 48)
    with torch.no_grad(), quiet():
        clean = model.encode_image(image)
        guidance = {"embedded_guidance": model.defaults["guidance"]} if model.embeds_guidance else {}
        condition = model.encode_text(PROMPTS[0], guidance=False, **guidance)
        with witness:
            for t in scheduler.timesteps:
                noise = torch.randn(clean.shape, generator=generator)
                model.predict(path.add_noise(clean, noise, t), t, condition)
    assert found.facts["timesteps"] == [float(t) for t in scheduler.timesteps] and found.size == (32, 48)
    span = Words(model).one(PROMPTS[0], "dog")
    expected = torch.zeros(found.resolution)
    for positions in {tuple(p) for p in span.tokens.values()}:
        expected += expected_map(model, sites, witness.probs, 0, positions, found.resolution).mean(0)
    torch.testing.assert_close(found.map("dog", size=found.resolution), expected, rtol=1e-4, atol=1e-7)


def test_existing_pictures_in_a_batch_are_independent_of_each_other():
    model = tiny_model("sd")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    together = explain_images(model, images, texts, ["red cube"], steps=2, seed=4)
    alone = explain_image(model, images[1:2], PROMPTS[1], "red cube", steps=2, seed=5)
    torch.testing.assert_close(together[1].map("red cube"), alone.map("red cube"), rtol=1e-4, atol=1e-7)
    assert alone.words == ("red cube",) and [m.prompt for m in together] == texts


def test_any_schedule_gives_the_same_maps_at_the_same_noise_level():
    model = tiny_model("sd")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = {}
    for scheduler in ("ddim", "euler"):  # Euler carries latents in another scaling
        kind = type(model.make_scheduler(scheduler))
        made = kind.from_config(model.pipe.scheduler.config, timestep_spacing="trailing")
        maps[scheduler] = explain_image(model, image, PROMPTS[0], steps=3, scheduler=made)
    assert maps["ddim"].facts["timesteps"] == maps["euler"].facts["timesteps"]
    torch.testing.assert_close(maps["ddim"].map("cube"), maps["euler"].map("cube"), rtol=1e-3, atol=1e-6)


def test_explaining_stops_after_the_last_layer_that_is_read():
    model = tiny_model("sd")
    image, ran = torch.zeros(1, 3, 32, 32), []
    handle = model.denoiser.conv_out.register_forward_hook(lambda *_: ran.append(1))
    try:
        explain_image(model, image, PROMPTS[0], steps=2)
    finally:
        handle.remove()
    assert ran == []


def test_bad_input_to_explain():
    from PIL import Image

    model = tiny_model("sd")
    image = Image.new("RGB", (33, 32))
    with pytest.raises(BadInput, match="multiples"):
        explain_image(model, image, PROMPTS[0], steps=1)
    assert explain_image(model, image, PROMPTS[0], steps=1, size=(32, 32)).size == (32, 32)
    with pytest.raises(BadInput, match="2 prompts for 1 images"):
        explain_images(model, image, PROMPTS, steps=1, size=(32, 32))
    with pytest.raises(NoMatch, match="'cone' is not in the prompt"):
        explain_image(model, image, PROMPTS[0], ["cone"], steps=1, size=(32, 32))
    with pytest.raises(BadInput, match="explain_images takes several"):
        explain_image(model, [image, image], PROMPTS[0], steps=1, size=(32, 32))


# -- refusals and traces -----------------------------------------------------------------------------------------------


def test_unknown_words_layers_heads_and_windows():
    model = tiny_model("sd")

    def run(**params):
        generate(model, PROMPTS, steps=1, interventions=DAAM(**params), decode=False)

    with pytest.raises(NoMatch, match="'cub' is not in the prompt. Did you mean 'cube'"):
        run(words=["red cube", "cub"])
    with pytest.raises(NoMatch, match="layers=.'side'. of daam match none of tiny-sd's: down.0, mid, up.1"):
        run(layers=["side"])
    with pytest.raises(BadInput, match="heads=.99. of daam: .* has . heads, numbered from 0"):
        run(heads=[99])
    with pytest.raises(BadInput, match="window of daam"):
        run(window=(0.5, 0.2))
    with pytest.raises(NotSupported, match="reference=True"):
        generate(tiny_model("sd3"), PROMPTS, steps=1, interventions=DAAM(reference=True))
    with pytest.raises(NoMatch, match="daam did nothing.*progress 0.1 to 0.2"):
        run(window=(0.1, 0.2))  # between the steps


def test_a_word_of_one_prompt_need_not_be_in_the_others():
    daam = DAAM(words=["dog", "red cube", "<end>"])
    generate(tiny_model("sd"), PROMPTS, steps=1, interventions=daam, decode=False)
    assert [m.words for m in daam.maps] == [("dog", "red cube", "<end>"), ("red cube", "<end>")]
    assert daam.coverage()["tokens"] == ["dog", "red cube", "<end>"]


def test_an_empty_prompt_has_special_tokens_only():
    daam = DAAM()
    generate(tiny_model("sd"), "", steps=1, interventions=daam, decode=False)
    assert daam.maps[0].words == () and daam.maps[0].map("<start>").shape == (32, 32)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_no_trace_is_left_also_after_failure(kind):
    model = tiny_model(kind)
    before = fingerprint(model)
    generate(model, PROMPTS[0], steps=1, interventions=DAAM(), decode=False)
    assert fingerprint(model) == before

    def fail(step):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, PROMPTS[0], steps=2, interventions=DAAM(), on_step=fail, decode=False)
    assert fingerprint(model) == before
    explain_image(model, torch.zeros(1, 3, 32, 32), PROMPTS[0], steps=1)
    assert fingerprint(model) == before


def test_gradients_of_a_run_are_the_same_with_and_without():
    model, grads = tiny_model("sd"), []
    for parts in ([], [DAAM()]):
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        options = dict(steps=1, guidance=3.0, latents=noise, interventions=parts, grad=True, decode=False)
        result = generate(model, PROMPTS[0], **options)
        grads += torch.autograd.grad(result.latents.square().sum(), noise)
    assert torch.equal(*grads)


def test_half_precision_keeps_bits_and_maps():
    model = tiny_model("sd", fresh=True).to(dtype=torch.bfloat16)
    daam, options = DAAM(), dict(steps=1, guidance=3.0, decode=False)
    plain = generate(model, PROMPTS[0], **options)
    assert torch.equal(generate(model, PROMPTS[0], interventions=daam, **options).latents, plain.latents)
    full = DAAM()
    generate(tiny_model("sd"), PROMPTS[0], interventions=full, **options)
    ours, theirs = daam.maps[0].map("cube"), full.maps[0].map("cube")
    assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 0.05 * theirs.max()


# -- clips ------------------------------------------------------------------------------------------------------------


def test_maps_of_a_clip_are_those_of_its_frames_by_hand():
    """Frames are folded into the batch inside AnimateDiff: rows (b f), samples first."""
    model, frames, size = tiny_model("animatediff"), 3, (48, 32)
    options = dict(steps=2, seed=3, size=size, frames=frames, guidance=3.0, decode=False)
    plain = generate(model, PROMPTS, **options)
    daam = DAAM(coarsest=100)
    assert torch.equal(generate(model, PROMPTS, interventions=daam, **options).latents, plain.latents)

    witness, sites = Witness(), model.sites(size[1], size[0], frames=frames)
    with quiet(), witness:
        generate(model, PROMPTS, **options)
    probs = witness.probs[-2 * len(sites) :]
    words = Words(model)
    for sample, prompt in enumerate(PROMPTS):
        maps = daam.maps[sample]
        (positions,) = {tuple(p) for p in words.one(prompt, "red cube").tokens.values()}
        assert maps.frames == frames and maps.map("red cube").shape == (frames, 32, 48)
        expected = []
        for frame in range(frames):
            row = (2 + sample) * frames + frame
            per_layer = {}
            for site, each in zip(sites * 2, probs, strict=True):
                if site.kind == "cross":
                    columns = each[row].mean(0)[:, list(positions)].T.unflatten(-1, site.grid)
                    per_layer.setdefault(site.path, []).append(columns)
            layers = [torch.stack(calls).mean(0).float()[None] for calls in per_layer.values()]
            layers = [F.interpolate(one, size=maps.resolution, mode="bicubic")[0].clamp(min=0) for one in layers]
            expected.append(torch.stack(layers).mean((0, 1)))
        found = maps.map("red cube", size=maps.resolution)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-7)
        assert (found[0] - found[1]).abs().max() > 1e-6  # frames are told apart


def test_tokens_of_every_frame_sum_to_one():
    model = tiny_model("animatediff")
    daam = DAAM(padding=True, layers=["up.1"])
    generate(model, PROMPTS[0], steps=1, frames=2, interventions=daam, decode=False)
    maps = daam.maps[0]
    assert len(maps.positions) == 77
    for layer in maps.layers:
        assert layer.maps.shape == (1, 1, 77, 2, *layer.site.grid)
        torch.testing.assert_close(layer.maps.sum(2), torch.ones(1, 1, 2, *layer.site.grid), rtol=1e-5, atol=1e-5)


def test_a_clip_does_not_depend_on_its_neighbours_and_leaves_no_trace():
    model = tiny_model("animatediff")
    before = fingerprint(model)
    options = dict(steps=2, guidance=3.0, frames=3, decode=False)
    together, alone = DAAM(), DAAM()
    generate(model, PROMPTS, seed=5, interventions=together, **options)
    generate(model, PROMPTS[1], seed=6, interventions=alone, **options)
    expected = alone.maps[0].map("red cube")
    torch.testing.assert_close(together.maps[1].map("red cube"), expected, rtol=1e-4, atol=1e-7)
    assert fingerprint(model) == before


def test_heat_of_a_clip_is_drawn_frame_by_frame_and_kept(tmp_path):
    model = tiny_model("animatediff")
    daam = DAAM(words=["cube", "red"])
    result = generate(model, PROMPTS[0], steps=1, frames=3, interventions=daam)
    maps, clip = daam.maps[0], result.clips[0]
    picture = daam.pictures(result, 0)["heat"]
    assert picture.width > 3 * 256 and picture.height > 3 * 256  # frames in columns, clip and words in rows
    painted = maps.overlays(clip, "cube")
    assert painted.shape == (3, 256, 256, 3) and painted.dtype == np.uint8
    assert np.array_equal(np.asarray(maps.overlay(Image.fromarray(clip[2]), "cube", frame=2)), painted[2])
    assert maps.mask("cube").shape == (3, 32, 32) and maps.iou("cube", maps.mask("cube")) == 1
    assert float(maps.normalized("minmax").map("cube").max()) == 1  # over all frames together
    again = HeatMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert torch.equal(again.map("cube"), maps.map("cube")) and again.frames == 3
    with pytest.raises(BadInput, match="the clip has 2 frames; the maps are of 3"):
        maps.grid(clip[:2])
