"""What errors about systems and their parameters say would help, helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from sfumato import masks
from sfumato.app import make
from sfumato.attention.tap import Tap
from sfumato.explain import daam
from sfumato.explain.concept_attention import ConceptAttention
from sfumato.explain.daam import DAAM
from sfumato.explain.shape_texture.dimensions import estimate
from sfumato.metrics import frechet, stats
from sfumato.models.layers import pooled
from sfumato.models.schedulers import make_scheduler
from sfumato.sampling.attached.texts import TextAxis
from sfumato.sampling.recording import Recorder
from tests.front_door.remedies import LEFT, PICTURE, draw, follow, method, named

HALF = [0, 0, 0.5, 1]
BOX = {"box": HALF}


def _shaped(**params):
    return method("shape_guided", **{"words": ["cube"], **params})


def _edit(**params):
    return method("prompt_to_prompt", **{"source": "a red cube and a red ball", **params})


def _mixture(**params):
    return method("conceptor", **{"word": "cube", "mixture": ["red=0.7"], **params})


def _grey(*shape):
    return np.full(shape, 255, np.uint8)


TABLE = {
    # --- parameters ---------------------------------------------------------------------------------------------------
    "drop stop_after": (
        None, lambda: Tap(edit_probs=lambda call: None, stop_after=True),
        lambda said: Tap(edit_probs=lambda call: None),
    ),
    "does nothing: give observe, ": (
        None, Tap,
        lambda said: [Tap(**{stage: lambda call: None}) for stage in
                      said.split("give ")[1].rstrip(".").replace(" or ", ", ").split(", ")],
    ),
    "put all changes into one edited prompt": (
        "sd3", lambda m: draw(m, by=[_edit(), _edit(source="a cube and a ball")]), lambda m, said: draw(m, by=_edit()),
    ),
    "give the seed, or the latents, of the recording": (
        "sd3", lambda m: draw(m, by=_edit(source=None, recording=_kept(m)), seed=4),
        lambda m, said: [draw(m, by=_edit(source=None, recording=_kept(m)), seed=0),
                         draw(m, by=_edit(source=None, recording=_kept(m)), latents=_kept(m).latents[0])],
    ),
    "give from_seed too": (
        None, lambda: method("pullback", from_prompt="a cube"),
        lambda said: method("pullback", from_prompt="a cube", **{named(r"give (\w+) too", said): 3}),
    ),
    "give mask (a picture, white there) or box=x0|y0|x1|y1": (
        "sd3", lambda m: draw(m, image=PICTURE, by=method("blend")),
        lambda m, said: [draw(m, image=PICTURE, by=method("blend", **given))
                         for given in (BOX, {"mask": [_grey(32, 32)]})],
    ),
    "give the run an image to begin from, or source": (
        "sd3", lambda m: draw(m, by=method("blend", **BOX)),
        lambda m, said: [draw(m, by=method("blend", **BOX), image=PICTURE),
                         draw(m, by=method("blend", **BOX, source="a red cube"))],
    ),
    "give names, each once": (
        "sd3", lambda m: draw(m, by=ConceptAttention(concepts=["cube", "cube"])),
        lambda m, said: draw(m, by=ConceptAttention(concepts=["cube", "ball"])),
    ),
    "such as the background, or set share=false": (
        "sd3", lambda m: draw(m, by=ConceptAttention(concepts=["cube"])),
        lambda m, said: [draw(m, by=ConceptAttention(concepts=["cube", "background"])),
                         draw(m, by=ConceptAttention(concepts=["cube"], share=False))],
    ),
    "give at least one word, such as red=0.7": (
        "sd3", lambda m: draw(m, by=_mixture(mixture=["red=0"])),
        lambda m, said: draw(m, by=_mixture(mixture=[named(r"such as (\S+?)\.$", said)])),
    ),
    "write word=weight, such as red=0.7": (
        "sd3", lambda m: draw(m, by=_mixture(mixture=["red"])),
        lambda m, said: draw(m, by=_mixture(mixture=[named(r"such as (\S+?)\.$", said)])),
    ),
    "give word and mixture, as word=cube": (
        "sd3", lambda m: draw(m, by=_mixture(word=None)),
        lambda m, said: draw(m, by=_mixture(word=named(r"as word=(\w+)", said))),
    ),
    "give conceptor once for each word": (
        "sd3", lambda m: draw(m, by=[_mixture(), _mixture(mixture=["blue=1"])]),
        lambda m, said: draw(m, by=[_mixture(), _mixture(word="ball", mixture=["blue=1"])]),
    ),
    "give one, and guidance above 1": (
        "sd3", lambda m: draw(m, by=DAAM(negative=True)),
        lambda m, said: draw(m, by=DAAM(negative=True), negative="a dog", guidance=1.5),
    ),
    "make at least two (n=2 or samples=2)": (
        "sd3", lambda m: draw(m, by=_geometry(samples=1)),
        lambda m, said: [draw(m, by=_geometry(samples=1), n=2), draw(m, by=_geometry(samples=2))],
    ),
    "prompts for 2 images; give one for all or one each": (
        "sd3", lambda m: _explained(m, ["a", "b", "c"]),
        lambda m, said: [_explained(m, "a"), _explained(m, ["a", "b"])],
    ),
    "give 3 or more rows each": (
        None, lambda: estimate({"shape": (torch.rand(2, 4), torch.rand(2, 4))}),
        lambda said: estimate({"shape": (torch.rand(3, 4), torch.rand(3, 4))}),
    ),
    "give a name such as red or a hex code such as #ff8000": (
        None, lambda: masks.label_regions(masks.read_labels(_grey(8, 8, 3)), ["reddish"]), lambda said: _colours(said),
    ),
    "compute them in float32 (dtype='float32')": (
        None, lambda: frechet.finite(np.full((2, 3), 7e4, np.float16) * np.float16(2)),
        lambda said: frechet.finite(np.full((2, 3), 7e4, np.float32) * 2),
    ),
    "name a statistic for": (
        None, lambda: stats.bootstrap([1.0, 2], [2.0, 3]),
        lambda said: stats.bootstrap([1.0, 2], [2.0, 3], statistic=lambda a, b: a.mean(1) - b.mean(1), draws=50),
    ),
    "use pool=flatten": (
        None, lambda: pooled(torch.rand(2, 3, 4, 5, 6)),
        lambda said: pooled(torch.rand(2, 3, 4, 5, 6), pool=named(r"pool=(\w+)", said)),
    ),
    "give a positive multiple of": (
        "sd3", lambda m: m.grid(33, 32), lambda m, said: m.grid(3 * int(named(r"multiple of (\d+)", said)), 32),
    ),
    "give 1 to ": (
        "animatediff", lambda m: draw(m, frames=99, steps=1),
        lambda m, said: draw(m, frames=int(named(r"give (\d+) to", said)), steps=1),
    ),
    "give frames (f h w 3) or a list of pictures": (
        "animatediff", lambda m: draw(m, image=PICTURE),
        lambda m, said: draw(m, image=[PICTURE] * 4),
    ),
    "texts for 1 prompts; give one for all or one each": (
        "sd3", lambda m: draw(m, negative=["a", "b"]), lambda m, said: draw(m, negative=["a"]),
    ),
    "rows for 1 samples; give one for all, or one per sample": (
        "sd3", lambda m: draw(m, latents=torch.randn(2, 4, 16, 16)),
        lambda m, said: draw(m, latents=torch.randn(1, 4, 16, 16)),
    ),
    "; resize it first": (
        "sd3", lambda m: draw(m, image=torch.zeros(1, 3, 48, 48), size=(32, 32)),
        lambda m, said: draw(m, image=torch.zeros(1, 3, 32, 32), size=(32, 32)),
    ),
    "name words of it. Its words: ": (
        "sd3", lambda m: draw(m, "and of", by=method("attend_excite")),
        lambda m, said: draw(m, "and of", by=method("attend_excite", words=[named(r"Its words: (\w+)", said)])),
    ),
    "has no noun that is recognised; name words of it": (
        "sd3", lambda m: draw(m, "and of", by=_ntlb()),
        lambda m, said: draw(m, "and of", by=_ntlb(words=[named(r"Its words: (\w+)", said)])),
    ),
    "leave one of them out or give them different windows": (
        "sd3", lambda m: draw(m, "a red cube and a blue ball", by=[_edit(), method("attend_excite", words=["ball"])]),
        lambda m, said: [draw(m, by=method("attend_excite", words=["ball"])), draw(m, by=_edit())],
    ),
    "give each mask, then each box, its phrase": (
        "sd3", lambda m: draw(m, by=_ntlb(phrases=["red cube", "blue ball"], **LEFT)),
        lambda m, said: draw(m, by=_ntlb(phrases=["red cube"], **LEFT)),
    ),
    "give one all regions, with a word for each": (
        "sd3", lambda m: draw(m, by=[_shaped(**BOX), _shaped(words=["ball"], box=[0.5, 0, 1, 1])]),
        lambda m, said: draw(m, by=_shaped(words=["cube", "ball"], box=[[0, 0, 0.4, 1], [0.6, 0, 1, 1]])),
    ),
    "shape_guided needs a silhouette: give mask (a picture, white there) or box=x0|y0|x1|y1": (
        "sd3", lambda m: draw(m, by=_shaped()),
        lambda m, said: [draw(m, by=_shaped(**BOX)),
                         draw(m, by=_shaped(mask=[np.pad(_grey(32, 16), ((0, 0), (0, 16)))]))],
    ),
    "give one phrase per region": (
        "sd3", lambda m: draw(m, by=_shaped(box=[[0, 0, 0.4, 1], [0.6, 0, 1, 1]])),
        lambda m, said: draw(m, by=_shaped(words=["cube", "ball"], box=[[0, 0, 0.4, 1], [0.6, 0, 1, 1]])),
    ),
    "give one per region": (
        "sd", lambda m: draw(m, by=_shaped(source=["a", "b"], **BOX), **_walk()),
        lambda m, said: draw(m, by=_shaped(source=["a"], **BOX), **_walk()),
    ),
    "shape_guided on a picture needs source: what do the regions show now?": (
        "sd", lambda m: draw(m, by=_shaped(**BOX), **_walk()),
        lambda m, said: draw(m, by=_shaped(source=["a"], **BOX), **_walk()),
    ),
    "so the run needs scheduler ": (
        "sd", lambda m: draw(m, by=_shaped(source=["a"], **BOX), **_walk(scheduler="euler")),
        lambda m, said: draw(m, by=_shaped(source=["a"], **BOX), **_walk(scheduler=named(r"scheduler '?(\w+)", said))),
    ),
    "give strength 1 to the run": (
        "sd", lambda m: draw(m, by=_shaped(source=["a"], fresh=0.5, **BOX), **_walk(strength=0.5)),
        lambda m, said: draw(m, by=_shaped(source=["a"], fresh=0.5, **BOX), **_walk(strength=1.0)),
    ),
    "give mask or box for several": (
        "sd", lambda m: draw(m, n=2, by=_shaped(source=["a"]), **_walk(image=[PICTURE, PICTURE])),
        lambda m, said: draw(m, n=2, by=_shaped(source=["a"], **BOX), **_walk(image=[PICTURE, PICTURE])),
    ),
    "give each region words of its own": (
        "sd3", lambda m: draw(m, by=_shaped(words=["red cube", "cube"], box=[[0, 0, 0.4, 1], [0.6, 0, 1, 1]])),
        lambda m, said: draw(m, by=_shaped(words=["red cube", "ball"], box=[[0, 0, 0.4, 1], [0.6, 0, 1, 1]])),
    ),
    "name the phrases of both in one": (
        "sd", lambda m: draw(m, by=[_apart("red cube"), _apart("blue ball")]),
        lambda m, said: draw(m, by=_apart("red cube", "blue ball")),
    ),
    "structured_guidance differs in mode=conjunction only; set that too": (
        None, lambda: method("structured_guidance", reference=True),
        lambda said: method("structured_guidance", reference=True, mode=named(r"mode=(\w+)", said)),
    ),
    "intervals for 2 models; give one each": (
        None, lambda: method("experts", models=["a", "b"], timesteps=[[0, 500]]),
        lambda said: method("experts", models=["a", "b"], timesteps=[[0, 500], [500, 1000]]),
    ),
    "lower its strength": (
        "sd3", lambda m: draw(m, by=_clip(strength=1e25), steps=3), lambda m, said: draw(m, by=_clip(), steps=3),
    ),
    "choose one": (
        "sd", lambda m: draw(m, by=_apart("red cube"), compose=[("a dog", 1.0)]),
        lambda m, said: [draw(m, by=_apart("red cube")), draw(m, compose=[("a dog", 1.0)])],
    ),
    "make a second one if both are meant": (
        "sd3", lambda m: draw(m, by=[system := DAAM(), system]), lambda m, said: draw(m, by=[DAAM(), DAAM()]),
    ),
    "use ddim": (
        "sd", lambda m: draw(m, by=method("inject_fusion", content="a dog", boost=0.5), scheduler="euler"),
        lambda m, said: draw(m, by=method("inject_fusion", content="a dog", boost=0.5),
                             scheduler=named(r"; use (\w+)\.$", said)),
    ),
    # --- prompts of other programs ------------------------------------------------------------------------------------
    "where no adapter is read; write it in the prompt": (
        "sd", lambda m: _made(m, "a cube", negative="ugly <lora:x:1>"), lambda m, said: _lora(m, "<lora:example:1>"),
    ),
    "write it as 'and', or join texts by commas": (
        "sd3", lambda m: draw(m, negative="ugly AND blurred"),
        lambda m, said: [draw(m, negative="ugly and blurred"), draw(m, negative="ugly, blurred")],
    ),
    "which reads LoHa and LoKr, too": (
        "sd", lambda m: _made(m, "a cube <lyco:example>"),
        lambda m, said: _lora(m, named(r"write (<lora:[^>]+>)", said)),
    ),
    "write a number, as in <lora:NAME:0.8>": (
        "sd", lambda m: _made(m, "a cube <lora:example:much>"),
        lambda m, said: _lora(m, named(r"as in (<.*?>)", said).replace("NAME", "example")),
    ),
    "only one scale, of text encoder and denoiser alike, is read": (
        "sd", lambda m: _made(m, "a cube <lora:example:te=0.5:unet=1>"),
        lambda m, said: _lora(m, named(r"read: (<.*?>)", said).replace("NAME", "example")),
    ),
    "hypernetworks are not supported; leave it out": (
        "sd3", lambda m: _made(m, "a cube <hypernet:x:1>"), lambda m, said: draw(m, "a cube"),
    ),
    "give a file by --with lora:file=PATH instead": (
        "sd", lambda m: _made(m, "a cube <lora:../x:1>"), lambda m, said: _lora(m, "", "lora:file=example"),
    ),
    "give them one by one": (
        "sd", lambda m: _made(m, ["a cube <lora:example:1>", "a ball"]),
        lambda m, said: [_made(m, each) for each in ("a cube <lora:example:1>", "a ball")],
    ),
    "add up to zero; change one of them": (
        None, lambda: method("mgad", texts=["a cube:1", "a ball:-1"]),
        lambda said: method("mgad", texts=["a cube:1", "a ball:-0.5"]),
    ),
    # --- schedules ----------------------------------------------------------------------------------------------------
    "timesteps and sigmas are both given; one of them says the schedule": (
        "sd", lambda m: draw(m, timesteps=[900, 100], sigmas=[5.0, 1.0], scheduler="euler", steps=None),
        lambda m, said: draw(m, timesteps=[900, 100], scheduler="euler", steps=None),
    ),
    "given make 2; leave it out": (
        "sd", lambda m: draw(m, timesteps=[900, 100], steps=5, scheduler="euler"),
        lambda m, said: draw(m, timesteps=[900, 100], steps=None, scheduler="euler"),
    ),
    "give sigmas, from 1 down": (
        "sd3", lambda m: draw(m, timesteps=[900, 100], steps=None),
        lambda m, said: draw(m, sigmas=[1.0, 0.5], steps=None),
    ),
    # --- attached to pipelines-----------------------------------------------------------------------------------------
    "is no place among the keys; write it as ": (
        None, lambda: _places("the first"),
        lambda said: [_places(each) for each in ("first 512", "last 77", "64:141") if f"'{each}'" in said],
    ),
    "give at least one text": ("sd3", lambda m: draw(m, []), lambda m, said: draw(m, ["a cube"])),
    "generators has 1 entries for 2 images; give one for each": (
        "sd3", lambda m: m.encode_image(torch.zeros(2, 3, 32, 32), [torch.Generator()]),
        lambda m, said: m.encode_image(torch.zeros(2, 3, 32, 32), [torch.Generator(), torch.Generator()]),
    ),
    "each side encoded by itself already; leave one of them out": (
        "sd", lambda m: draw(m, by=[_shaped(**BOX), _apart("red cube")]),
        lambda m, said: [draw(m, by=_shaped(**BOX)), draw(m, by=_apart("red cube"))],
    ),
    "with which this model was trained; use one of: ": (
        "sd3", lambda m: _zero(m, "heun"),
        lambda m, said: [_zero(m, name) for name in named(r"one of: (.*)\.$", said).split(", ")],
    ),
}  # fmt: skip


def _kept(model):
    recorder = Recorder(lambda site, progress: True)
    draw(model, "a red cube and a red ball", by=recorder, seed=0)
    return recorder.recording


def _geometry(**params):
    return method("latent_geometry", curve=2, rank=1, iterations=1, at=[0.5], **params)


def _explained(model, prompts):
    return daam.explain_images(model, [PICTURE, PICTURE], prompts, steps=1, size=(32, 32))


def _colours(said):
    painted = masks.read_labels(np.full((8, 8, 3), (255, 0, 0), np.uint8))
    other = masks.read_labels(np.full((8, 8, 3), (255, 128, 0), np.uint8))
    name, code = said.split("a name such as ")[1].rstrip(".").split(" or a hex code such as ")
    return masks.label_regions(painted, [name]), masks.label_regions(other, [code])


def _ntlb(**params):
    return method("no_token_left_behind", clip="toy-clip", cutouts=1, **params)


def _clip(**params):
    return method("clip_guidance", clip="toy-clip", **params)


def _zero(model, name):
    config = {**model.pipe.scheduler.config, "rescale_betas_zero_snr": True}
    return make_scheduler(DDIMScheduler.from_config(config), name)


def _walk(**options):
    return {"image": PICTURE, "strength": 1.0, "scheduler": "ddim", **options}


def _apart(*phrases):
    return method("structured_guidance", phrases=list(phrases))


def _made(model, prompt, **options):
    return make(prompt, model=model, steps=1, **options)


def _lora(model, tag, *with_):
    return _made(model, f"a red cube {tag}".strip(), with_=list(with_))


def _places(text):
    return TextAxis.read(text)


@pytest.fixture(autouse=True)
def adapters(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    (tmp_path / "adapters").mkdir()
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    save_file(state, tmp_path / "adapters" / "example.safetensors")


@pytest.mark.parametrize("fragment", TABLE)
def test_systems(fragment):
    follow(TABLE, fragment)
