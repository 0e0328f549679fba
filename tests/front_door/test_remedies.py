"""What an error says would help, helps: every case fails, and then does what its message says, word for word where the
words can be carried out."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image

from sfumato import cards
from sfumato.bench.folder import Folder
from sfumato.errors import SfumatoError
from sfumato.explain.daam import DAAM
from sfumato.models import Model
from sfumato.relevance.lrp import lrp
from sfumato.sampling import generate
from sfumato.sampling.recording import Recorder
from sfumato.text.align import align
from sfumato.text.weights import encode_weighted
from sfumato.text.words import Words
from tests.examples import write_adapters
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
LEFT = {"box": [[0.0, 0.0, 0.5, 1.0]]}


def draw(model, prompt=PROMPT, **options):
    system = options.pop("by", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(model, prompt, **{"steps": 2, "decode": False, **options}, interventions=system or ())


def message(call) -> str:
    with pytest.raises(SfumatoError) as caught:
        call()
    return str(caught.value)


def fresh(kind: str) -> Model:
    return tiny_model(kind, fresh=True)


def words(*found, **options):
    return lambda **more: cards.method(found[0])(**{**options, **more})


# --- attention that cannot be seen ----------------------------------------------------------------------------------


def _default_processor(model):
    model.denoiser.set_default_attn_processor()
    model.denoiser.set_attn_processor(AttnProcessor())


@pytest.mark.parametrize("spoil", [_default_processor, lambda model: model.pipe.enable_attention_slicing(1)])
def test_processors_that_hide_attention(spoil):
    model = fresh("sd")
    spoil(model)
    said = message(lambda: draw(model, by=DAAM()))
    call = re.search(r"call (model\.denoiser\.\S+\(\)\)) of diffusers, or load the model again", said)[1]
    eval(call, {"model": model, "AttnProcessor2_0": AttnProcessor2_0})
    assert draw(model, by=DAAM()).coverage["daam"]["calls"]


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
def test_a_strength_that_leaves_no_step(steps, kind):
    model = tiny_model(kind)
    given = {"image": PICTURE, "size": (32, 32), "steps": steps}
    said = message(lambda: draw(model, **given, strength=0.001))
    strength = float(re.search(r"give at least ([\d.e-]+)\.$", said)[1])
    seen = []
    draw(model, **given, strength=strength, on_step=seen.append)
    assert len(seen) >= 1 and strength < 1.001 / steps + 1e-6


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


def test_eta():
    model = tiny_model("sd")
    said = message(lambda: draw(model, eta=0.5, scheduler="euler"))
    draw(model, eta=0.5, scheduler=re.search(r"use scheduler '(\w+)'", said)[1])
    flow = tiny_model("sd3")
    assert "leave it out" in message(lambda: draw(flow, eta=0.5))
    draw(flow)


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
    "a size": ("sd", lambda m: draw(m, size=(33, 30)), _resized),
    "a negative without guidance": (
        "sd",
        lambda m: draw(m, negative="ugly", guidance=1.0),
        lambda m, said: draw(m, negative="ugly", **{re.search(r"give (\w+) above 1", said)[1]: 1.5}),
    ),
    "a negative of a distilled model": (
        "flux",
        lambda m: draw(m, negative="ugly"),
        lambda m, said: draw(m, negative="ugly", **{re.search(r"give (\w+) above 1", said)[1]: 1.5}),
    ),
    "a scheduler's name": (
        "sd",
        lambda m: draw(m, scheduler="dpmpp"),
        lambda m, said: draw(m, scheduler=re.search(r"Did you mean '([^']+)'", said)[1]),
    ),
    "a word that is not there": (
        "sd",
        lambda m: draw(m, by=DAAM(words=["cubes"])),
        lambda m, said: draw(m, by=DAAM(words=[re.search(r"Did you mean '(\w+)'", said)[1]])),
    ),
    "a word that is there twice": (
        "sd",
        lambda m: Words(m).one("a cube and a cube", "cube"),
        lambda m, said: [
            Words(m).one("a cube and a cube", each) for each in re.search(r"which: '(.*)' or '(.*)'\.", said).groups()
        ],
    ),
    "prompts of unequal length": (
        "sd",
        lambda m: align(Words(m), "a cube", "a green cube", "replace", 77),
        lambda m, said: align(Words(m), "a cube", "a green cube", re.search(r"use (\w+)\.$", said)[1], 77),
    ),
    "one system against another": (
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
    "a mask of grey": (
        "sd",
        lambda m: draw(m, image=PICTURE, by=_blend(0.3)),
        lambda m, said: [draw(m, image=PICTURE, by=_blend(0.9)), draw(m, image=PICTURE, by=_blend(0.3, level=0.2))],
    ),
    "going back with a scheduler that cannot": (
        "sd",
        lambda m: draw(m, image=PICTURE, scheduler="heun", by=_blend(1.0, resample=2)),
        lambda m, said: [
            draw(m, image=PICTURE, scheduler=name, by=_blend(1.0, resample=2))
            for name in re.search(r"use (\w+) or (\w+)\.", said).groups()
        ],
    ),
    "going back with a scheduler that cannot, flow": (
        "sd3",
        lambda m: draw(m, image=PICTURE, scheduler="flow_heun", by=_blend(1.0, resample=2)),
        lambda m, said: draw(
            m, image=PICTURE, scheduler=re.search(r"use (\w+)\.", said)[1], by=_blend(1.0, resample=2)
        ),
    ),
    "weights inside a template": (
        "klein",
        lambda m: encode_weighted(m, ["a (red:0.5) cube"], guidance=False, weighting="compel"),
        lambda m, said: encode_weighted(
            m, ["a (red:0.5) cube"], guidance=False, weighting=re.search(r"use weighting=(\w+)", said)[1]
        ),
    ),
    "AND that composes nothing": (
        "sd",
        lambda m: draw(m, "salt AND "),
        lambda m, said: draw(m, f"salt {re.search(r'write it as .(and)', said)[1]} pepper"),
    ),
    "samples that a system couples": (
        "sd",
        lambda m: draw(m, n=3, batch_size=1, by=Recorder()),
        lambda m, said: draw(m, n=3, batch_size=int(re.search(r"at least (\d)", said)[1]), by=Recorder()),
    ),
    "samples that a system couples, of unequal length": (
        "sd",
        lambda m: draw(m, ["a cube", "a BREAK cube"], by=Recorder()),
        lambda m, said: [draw(m, each, by=Recorder()) for each in ("a cube", "a BREAK cube")],
    ),
    "an edit of more chunks than its recording": (
        "sd",
        lambda m: draw(m, "a cube BREAK a ball", by=cards.method("prompt_to_prompt")(recording=_recorded(m))),
        lambda m, said: [
            draw(m, "a cube", by=cards.method("prompt_to_prompt")(recording=_recorded(m))),
            draw(m, "a cube BREAK a ball", by=cards.method("prompt_to_prompt")(source="a ball")),
        ],
    ),
    "a recording that is too large": (
        "sd",
        lambda m: draw(m, by=Recorder(lambda site, progress: True, limit=1e-6)),
        lambda m, said: draw(m, by=Recorder(lambda site, progress: True, limit=_limit(said))),
    ),
    "nothing but padding": (
        "sd",
        lambda m: _heat(m).map("<pad>"),
        lambda m, said: _heat(m, padding=re.search(r"need padding=(True)", said)[1] == "True").map("<pad>"),
    ),
    "colours": (
        "sd",
        lambda m: _heat(m, decode=True).overlay(PICTURE, "cube", colours="infernal"),
        lambda m, said: [
            _heat(m).overlay(PICTURE, "cube", colours=name) for name in re.findall(r"'(\w+)'", said.split("try")[1])
        ],
    ),
    "no phrase to encode by itself": (
        "sd",
        lambda m: draw(m, "cube", by=cards.method("structured_guidance")()),
        lambda m, said: draw(m, "cube", by=cards.method("structured_guidance")(
            phrases=[re.search(r"Its words: (\w+)", said)[1]]
        )),
    ),
    "phrases and regions": (
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
    kind, fails, helps = TABLE[case]
    model = tiny_model(kind)
    helps(model, message(lambda: fails(model)))


# --- files ----------------------------------------------------------------------------------------------------------


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
