"""What an error says would help, helps: every case fails, and then does what its message says, word for word where the
words can be carried out. `test_advice.py` sees to it that there is a case for every advice."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from sfumato import cards
from sfumato.bench.folder import Folder
from sfumato.explain.daam import DAAM
from sfumato.relevance.lrp import lrp
from sfumato.sampling.recording import Recorder
from sfumato.text.align import align
from sfumato.text.weights import encode_weighted
from sfumato.text.words import Words
from tests.examples import write_adapters
from tests.front_door.remedies import LEFT, PICTURE, draw, follow, follows, fresh, message
from tests.tiny import tiny_model


def words(*found, **options):
    return lambda **more: cards.method(found[0])(**{**options, **more})


# --- attention that cannot be seen ----------------------------------------------------------------------------------


def _default_processor(model):
    model.denoiser.set_default_attn_processor()
    model.denoiser.set_attn_processor(AttnProcessor())


@pytest.mark.parametrize("spoil", [_default_processor, lambda model: model.pipe.enable_attention_slicing(1)])
@follows("ran without calling scaled_dot_product_attention, so nothing of it can be seen; ")
def test_processors_that_hide_attention(spoil):
    model = fresh("sd")
    spoil(model)
    said = message(lambda: draw(model, by=DAAM()))
    call = re.search(r"call (model\.denoiser\.\S+\(\)\)) of diffusers, or load the model again", said)[1]
    eval(call, {"model": model, "AttnProcessor2_0": AttnProcessor2_0})
    assert draw(model, by=DAAM()).coverage["daam"]["calls"]


@follows(
    "use its _orig_mod",
    "load the model again",
    "call model.denoiser.disable_cache()",
    "set_attention_backend('native')",
)
def test_compiled_blocks_caches_and_backends():
    model = fresh("sd")
    net = model.pipe.unet
    model.pipe.unet = torch.compile(net, backend="eager")
    assert "use its _orig_mod" in message(lambda: draw(model, by=DAAM()))
    model.pipe.unet = model.pipe.unet._orig_mod
    assert draw(model, by=DAAM()).coverage["daam"]["calls"]
    net.mid_block.compile(backend="eager")
    assert "load the model again" in message(lambda: draw(model, by=DAAM()))

    from diffusers import FirstBlockCacheConfig

    flux = fresh("flux")
    flux.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    said = message(lambda: draw(flux, by=DAAM()))
    eval(re.search(r"call (model\.denoiser\.\S+\(\))", said)[1], {"model": flux})
    assert draw(flux, by=DAAM()).coverage["daam"]["calls"]
    flux.denoiser.transformer_blocks[0].attn.processor._attention_backend = "flash"
    said = message(lambda: draw(flux, by=DAAM()))
    eval(re.search(r"call (model\.denoiser\.\S+\('native'\))", said)[1], {"model": flux})
    assert draw(flux, by=DAAM()).coverage["daam"]["calls"]


@follows("call its set_attn_implementation('sdpa')")
def test_eager_attention_of_transformers():
    from sfumato.attention.sites import find_sites
    from tests.tiny import _clip

    encoder, tokenizer = _clip()
    encoder.set_attn_implementation("eager")
    run = lambda: encoder(**tokenizer("a cube", return_tensors="pt"))  # noqa: E731
    call = re.search(r"call its (\S+\('sdpa'\))", message(lambda: find_sites(encoder, run)))[1]
    eval(f"encoder.{call}", {"encoder": encoder})
    assert find_sites(encoder, run)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 7, 49])
@pytest.mark.parametrize("kind", ["sd", "amused"])
@follows("leaves no step out of")
def test_a_strength_that_leaves_no_step(steps, kind):
    model = tiny_model(kind)
    given = {"image": PICTURE, "size": (32, 32), "steps": steps}
    said = message(lambda: draw(model, **given, strength=0.001))
    strength = float(re.search(r"give at least ([\d.e-]+)\.$", said)[1])
    seen = []
    draw(model, **given, strength=strength, on_step=seen.append)
    assert len(seen) >= 1 and strength < 1.001 / steps + 1e-6


@follows("set rescale_betas_zero_snr=False in its configuration, or use euler or dpm++")
def test_a_signal_to_noise_ratio_of_zero():
    model = fresh("sd")
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    model.pipe.scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, **zero)
    assert torch.isfinite(draw(model, image=PICTURE, strength=0.5).latents).all()  # begins where there is a signal
    said = message(lambda: draw(model))
    for name in re.search(r"use (\S+) or (\S+), which begin", said).groups():
        assert torch.isfinite(draw(model, scheduler=name).latents).all()
    option, value = re.search(r"set (\w+)=(\w+) in its configuration", said).groups()
    model.pipe.scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, **{option: value == "True"})
    assert torch.isfinite(draw(model).latents).all()


@follows("latents stopped being finite at step")
def test_numbers_that_run_away():
    model = tiny_model("sd")
    said = message(lambda: draw(model, guidance=1e38))
    assert said.endswith("; lower the guidance.")  # float32 already, and nobody else acts
    draw(model, guidance=7.5)
    runs_away = words("attend_excite", words=["cube"], thresholds=[])
    said = message(lambda: draw(model, by=runs_away(strength=1e38)))
    assert said.endswith("; lower the strength of attend_excite.")
    draw(model, by=runs_away(strength=1.0))
    damaged = fresh("sd")
    with torch.no_grad():
        damaged.denoiser.conv_in.weight[0, 0, 0, 0] = torch.nan
    assert "its weights are damaged; get them again" in message(lambda: draw(damaged))
    said = message(lambda: draw(fresh("sd").to(dtype=torch.float16), guidance=1e30))
    assert "use dtype float32" in said


@follows("but EulerDiscreteScheduler adds no noise by eta; ")
def test_eta():
    model = tiny_model("sd")
    said = message(lambda: draw(model, eta=0.5, scheduler="euler"))
    draw(model, eta=0.5, scheduler=re.search(r"use scheduler '(\w+)'", said)[1])
    flow = tiny_model("sd3")
    assert "leave it out" in message(lambda: draw(flow, eta=0.5))
    draw(flow)


@follows("call it outside of torch.inference_mode()", "use the uncompiled module", "use model.float()")
def test_half_precision_and_inference_mode():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    net = ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        assert "outside of torch.inference_mode()" in message(lambda: lrp(net, x))
    assert lrp(net, x).shape == (1, 5)
    compiled = torch.compile(net, backend="eager")
    assert "use the uncompiled module" in message(lambda: lrp(compiled, x))
    net.half()
    assert "use model.float()" in message(lambda: lrp(net, x))
    assert lrp(net.float(), x).shape == (1, 5)


# --- options and systems: a call that fails, and the same one changed as the message says ---------------------------


def _resized(model, said):
    w, h = map(int, re.search(r"Nearest: (\d+)x(\d+)", said).groups())
    return draw(model, size=(w, h))


TABLE = {
    "sides must be multiples of": ("sd", lambda m: draw(m, size=(33, 30)), _resized),
    "negative has no effect without classifier-free guidance; give guidance": (
        "sd",
        lambda m: draw(m, negative="ugly", guidance=1.0),
        lambda m, said: draw(m, negative="ugly", **{re.search(r"give (\w+) above 1", said)[1]: 1.5}),
    ),
    "negative has no effect without classifier-free guidance; give true_guidance": (
        "flux",
        lambda m: draw(m, negative="ugly"),
        lambda m, said: draw(m, negative="ugly", **{re.search(r"give (\w+) above 1", said)[1]: 1.5}),
    ),
    "Did you mean": (
        "sd",
        lambda m: draw(m, scheduler="dpmpp"),
        lambda m, said: draw(m, scheduler=re.search(r"Did you mean '([^']+)'", said)[1]),
    ),
    "is not in the prompt. Did you mean": (
        "sd",
        lambda m: draw(m, by=DAAM(words=["cubes"])),
        lambda m, said: draw(m, by=DAAM(words=[re.search(r"Did you mean '(\w+)'", said)[1]])),
    ),
    "times in the prompt; say which: ": (
        "sd",
        lambda m: Words(m).one("a cube and a cube", "cube"),
        lambda m, said: [
            Words(m).one("a cube and a cube", each) for each in re.search(r"which: '(.*)' or '(.*)'\.", said).groups()
        ],
    ),
    "; use refine": (
        "sd",
        lambda m: align(Words(m), "a cube", "a green cube", "replace", 77),
        lambda m, said: align(Words(m), "a cube", "a green cube", re.search(r"use (\w+)\.$", said)[1], 77),
    ),
    "with cross_replace=0 and no blend": (
        "sd",
        lambda m: draw(m, by=[cards.method("prompt_to_prompt")(source="a red cube and a red ball"),
                              cards.method("shape_guided")(words=["cube"], box=[0, 0, 0.5, 1])]),
        lambda m, said: draw(m, by=[
            cards.method("prompt_to_prompt")(
                source="a red cube and a red ball", cross_replace=[float(re.search(r"cross_replace=(\d)", said)[1])]
            ),
            cards.method("shape_guided")(words=["cube"], box=[0, 0, 0.5, 1]),
        ]),
    ),
    "give a lighter mask or a lower level": (
        "sd",
        lambda m: draw(m, image=PICTURE, by=_blend(0.3)),
        lambda m, said: [draw(m, image=PICTURE, by=_blend(0.9)), draw(m, image=PICTURE, by=_blend(0.3, level=0.2))],
    ),
    "which HeunDiscreteScheduler cannot; use ": (
        "sd",
        lambda m: draw(m, image=PICTURE, scheduler="heun", by=_blend(1.0, resample=2)),
        lambda m, said: [
            draw(m, image=PICTURE, scheduler=name, by=_blend(1.0, resample=2))
            for name in re.search(r"use (\w+) or (\w+)\.", said).groups()
        ],
    ),
    "resample of blend goes back by whole steps": (
        "sd3",
        lambda m: draw(m, image=PICTURE, scheduler="flow_heun", by=_blend(1.0, resample=2)),
        lambda m, said: draw(
            m, image=PICTURE, scheduler=re.search(r"use (\w+)\.", said)[1], by=_blend(1.0, resample=2)
        ),
    ),
    "use weighting=comfyui": (
        "klein",
        lambda m: encode_weighted(m, ["a (red:0.5) cube"], guidance=False, weighting="compel"),
        lambda m, said: encode_weighted(
            m, ["a (red:0.5) cube"], guidance=False, weighting=re.search(r"use weighting=(\w+)", said)[1]
        ),
    ),
    "but one side of it is empty in": (
        "sd",
        lambda m: draw(m, "salt AND "),
        lambda m, said: draw(m, f"salt {re.search(r'write it as .(and)', said)[1]} pepper"),
    ),
    "couples the samples of a batch, so batch_size must be at least": (
        "sd",
        lambda m: draw(m, n=3, batch_size=1, by=Recorder()),
        lambda m, said: draw(m, n=3, batch_size=int(re.search(r"at least (\d)", said)[1]), by=Recorder()),
    ),
    "give them to separate calls": (
        "sd",
        lambda m: draw(m, ["a cube", "a BREAK cube"], by=Recorder()),
        lambda m, said: [draw(m, each, by=Recorder()) for each in ("a cube", "a BREAK cube")],
    ),
    "shorten the prompt, or give source": (
        "sd",
        lambda m: draw(m, "a cube BREAK a ball", by=cards.method("prompt_to_prompt")(recording=_recorded(m))),
        lambda m, said: [
            draw(m, "a cube", by=cards.method("prompt_to_prompt")(recording=_recorded(m))),
            draw(m, "a cube BREAK a ball", by=cards.method("prompt_to_prompt")(source="a ball")),
        ],
    ),
    "record fewer sites or a shorter window, make a smaller picture, or raise the limit": (
        "sd",
        lambda m: draw(m, by=Recorder(lambda site, progress: True, limit=1e-6)),
        lambda m, said: draw(m, by=Recorder(lambda site, progress: True, limit=_limit(said))),
    ),
    "its maps need padding=True while recording": (
        "sd",
        lambda m: _heat(m).map("<pad>"),
        lambda m, said: _heat(m, padding=re.search(r"need padding=(True)", said)[1] == "True").map("<pad>"),
    ),
    "is not a matplotlib colour map; try ": (
        "sd",
        lambda m: _heat(m, decode=True).overlay(PICTURE, "cube", colours="infernal"),
        lambda m, said: [
            _heat(m).overlay(PICTURE, "cube", colours=name) for name in re.findall(r"'(\w+)'", said.split("try")[1])
        ],
    ),
    "besides itself; name phrases of it": (
        "sd",
        lambda m: draw(m, "cube", by=cards.method("structured_guidance")()),
        lambda m, said: draw(m, "cube", by=cards.method("structured_guidance")(
            phrases=[re.search(r"Its words: (\w+)", said)[1]]
        )),
    ),
    "give each region (masks, then map colours, then boxes) its phrase": (
        "sd",
        lambda m: draw(m, by=cards.method("paint_with_words")(phrases=["red cube", "blue ball"], **LEFT)),
        lambda m, said: draw(m, by=cards.method("paint_with_words")(phrases=["red cube"], **LEFT)),
    ),
}  # fmt: skip


def _recorded(model):
    recorder = Recorder(lambda site, progress: True)
    draw(model, "a ball", by=recorder)
    return recorder.recording


def _limit(said):
    return float(re.search(r"the limit of (\S+);.*raise the limit", said)[1]) * 1e6


def _blend(grey, **options):
    return cards.method("blend")(mask=[np.full((32, 32), int(255 * grey), np.uint8)], **options)


def _heat(model, decode=False, **options):
    system = DAAM(**options)
    draw(model, by=system)
    return system.maps[0]


@pytest.mark.parametrize("case", TABLE)
def test_options_and_systems(case):
    follow(TABLE, case)


# --- files ----------------------------------------------------------------------------------------------------------


@follows("no adapter file", "leave hash out to take this one", "Write it into the prompt")
def test_adapters(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    write_adapters(tmp_path)
    model = tiny_model("sd")
    name = re.search(r"Did you mean '(.*?)'", message(lambda: cards.build("lora:file=example-lor")))[1]
    said = message(lambda: draw(model, by=cards.build(f"lora:file={name}")))
    draw(model, by=cards.build(f"lora:file={name},{re.search(r'Give (partial=true)', said)[1]}"))
    assert "leave hash out" in message(lambda: cards.build(f"lora:file={name},hash=00"))
    said = message(lambda: draw(model, by=cards.build("word:file=example-word")))
    word = re.search(r"(\S+) of ", said)[1]
    assert "Write it into the prompt" in said
    draw(model, f"a {word}", by=cards.build("word:file=example-word"))


@follows("holds no picture (")
def test_pictures_in_subfolders(tmp_path):
    for name in ("one", "two/deep"):
        (tmp_path / name).mkdir(parents=True)
        PICTURE.save(tmp_path / name / "x.png")
    (tmp_path / "empty").mkdir()
    said = message(lambda: Folder(tmp_path))
    named = re.search(r"name (\S+) or (\S+)\.$", said).groups()
    assert len(Folder(named[0])) == 1
    PICTURE.save(tmp_path / "y.png")
    assert Folder(tmp_path).subfolders == ["one", "two"]
