"""Folders as people have them: variants and shards in every spelling, other autoencoders, schedulers and pipeline
classes, offloading, and an autoencoder that overflows in half precision."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato import cards
from sfumato.errors import BadInput, BadWeights, NotFinite, NotSupported
from sfumato.models import Model, codec, load, quiet
from sfumato.models.families import UNSUPPORTED, siblings
from sfumato.models.folder import UNUSED, LoadedOtherwise, load_part, pipeline_of
from sfumato.models.weights import hash_modules
from sfumato.sampling import Path as NoisePath
from sfumato.sampling import generate, invert
from sfumato.sampling.noise import LEAST_DATA
from tests.tiny import tiny_model, tiny_pipeline

PROMPT = "a red cube and a dog"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("kept")

    def saved(kind: str) -> Path:
        if not (root / kind).exists():
            with quiet():
                tiny_pipeline(kind).save_pretrained(root / kind)
        return root / kind

    return saved


@pytest.fixture
def folder(kept: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a saved model that a test may change."""
    return lambda kind: Path(shutil.copytree(kept(kind), tmp_path / kind))


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file; None takes a key away."""
    held = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def theirs(pipe: Any, **given: Any) -> torch.Tensor:
    """What a pipeline of diffusers makes at 32x32, as pixels in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    given.setdefault("num_inference_steps", 2)
    with quiet():
        return pipe(PROMPT, generator=torch.Generator().manual_seed(3), output_type="pt", **given).images


def ours(model: Model, **given: Any) -> torch.Tensor:
    result = generate(model, PROMPT, seed=3, **{"steps": 2, "size": (32, 32), **given})
    return (result.pixels / 2 + 0.5).clamp(0, 1)


# --- weights ----------------------------------------------------------------------------------------------------------

#: how a part's two shards and their index are named
SPELLINGS = {
    "diffusers": ("{}-0000{}-of-00002.fp16.safetensors", "{}.safetensors.index.fp16.json"),
    "older": ("{}.fp16-0000{}-of-00002.safetensors", "{}.safetensors.index.fp16.json"),
    "index before": ("{}.fp16-0000{}-of-00002.safetensors", "{}.fp16.safetensors.index.json"),
    "index between": ("{}-0000{}-of-00002.fp16.safetensors", "{}.safetensors.fp16.index.json"),
    "no index": ("{}-0000{}-of-00002.fp16.safetensors", None),
    "no variant": ("{}-0000{}-of-00002.safetensors", "{}.safetensors.index.json"),
}


def shard(part: Path, stem: str, spelling: str) -> None:
    """Cut a part's one weight file into two, named in this way."""
    (single,) = part.glob("*.safetensors")
    tensors = load_file(single)
    single.unlink()
    name, index = SPELLINGS[spelling]
    shards = {name.format(stem, i + 1): list(tensors)[i::2] for i in range(2)}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, part / file, metadata={"format": "pt"})
    if index is not None:
        held = {
            "metadata": {"total_size": 1},
            "weight_map": {key: file for file, keys in shards.items() for key in keys},
        }
        (part / index.format(stem)).write_text(json.dumps(held))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_shards_in_every_spelling(folder: Callable[[str], Path], spelling: str):
    path = folder("sd")
    shard(path / "unet", "diffusion_pytorch_model", spelling)
    shard(path / "text_encoder", "model", spelling)
    for name, entry in (
        ("unet", ["diffusers", "UNet2DConditionModel"]),
        ("text_encoder", ["transformers", "CLIPTextModel"]),
    ):
        part, files = load_part(path / name, entry, torch.float32)
        expected, found = tiny_pipeline("sd").components[name].state_dict(), part.state_dict()
        assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in found)
        assert len(files) == 2


def test_a_part_named_by_the_other_library(folder: Callable[[str], Path]):
    path = folder("sd")
    (path / "unet/diffusion_pytorch_model.safetensors").rename(path / "unet/model.fp16.safetensors")
    assert torch.equal(ours(load(path)), ours(tiny_model("sd")))


def test_an_index_of_shards_that_were_not_downloaded(folder: Callable[[str], Path]):
    path = folder("sd")
    shard(path / "unet", "diffusion_pytorch_model", "diffusers")
    index = json.loads((path / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").read_text())
    index["weight_map"] = {key: name.replace(".fp16", "") for key, name in index["weight_map"].items()}
    (path / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert load(path).family.name == "sd"
    next((path / "unet").glob("*-00002-of-00002*")).unlink()
    with pytest.raises(BadWeights, match="names shards that are not there"):
        load(path)


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stated", "lengths"),
    [
        ("sd", None, [77]),
        ("sd", 8192, [77]),
        ("sdxl", None, [77, 77]),
        ("sd3", None, [77, 77, 512]),
        ("flux", None, [77, 512]),
    ],
)
def test_tokenizers_that_state_no_length(
    folder: Callable[[str], Path], kind: str, stated: int | None, lengths: list[int]
):
    path = folder(kind)
    for config in path.glob("tokenizer*/tokenizer_config.json"):
        edit(config, model_max_length=stated)
    model = load(path)
    names = [name for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if getattr(model.pipe, name, None)]
    assert [getattr(model.pipe, name).model_max_length for name in names] == lengths
    assert model.text_length == tiny_model(kind, own_length=True).text_length
    if kind == "sd":
        made = generate(model, PROMPT, steps=1, size=(32, 32), decode=False)
        assert torch.equal(
            made.latents, generate(tiny_model(kind), PROMPT, steps=1, size=(32, 32), decode=False).latents
        )


def test_tokenizers_that_do_not_say_how_they_pad(folder: Callable[[str], Path]):
    path = folder("sd3")
    says = path / "tokenizer_2" / "tokenizer_config.json"
    own = says.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (says.parent / name).unlink(missing_ok=True)
    with pytest.raises(BadInput, match="tokenizer_2 does not say how texts are padded; put tokenizer_config"):
        load(path)
    says.write_text(own, encoding="utf-8")
    assert load(path).pipe.tokenizer_2.pad_token == tiny_pipeline("sd3").tokenizer_2.pad_token == "!"


# --- autoencoders -----------------------------------------------------------------------------------------------------


def with_vae(kind: str, vae: Any) -> Any:
    """A pipeline with another autoencoder."""
    pipe = tiny_pipeline(kind)
    vae.eval().requires_grad_(False)
    return type(pipe)(**{**pipe.components, "vae": vae}, **({"requires_safety_checker": False} if kind == "sd" else {}))


def tiny_autoencoder() -> AutoencoderTiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
        )  # fmt: skip


def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((32, 32))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_tiny_autoencoder(kind: str):
    pipe = with_vae(kind, tiny_autoencoder())
    model = Model(pipe, name="tiny")
    size = {"width": 32, "height": 32}
    assert torch.equal(ours(model, guidance=2.0), theirs(pipe, guidance_scale=2.0, **size))
    img2img = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    shape = size if kind in ("sd3", "flux") else {}
    made = theirs(img2img, image=picture(), strength=0.5, guidance_scale=2.0, num_inference_steps=4, **shape)
    again = ours(model, image=picture(), strength=0.5, guidance=2.0, steps=4)
    # the pipeline's array of the picture may lie otherwise in memory, which rounds otherwise
    torch.testing.assert_close(again, made, rtol=0, atol=1e-5)


def test_tiny_autoencoder_loads_and_inverts(tmp_path: Path):
    with quiet():
        with_vae("sd", tiny_autoencoder()).save_pretrained(tmp_path)
    model = load(tmp_path)
    found = invert(model, picture(), PROMPT, steps=2)
    pixels = model.pipe.image_processor.preprocess(picture())
    assert torch.equal(found.latents[-1], model.pipe.vae.encode(pixels).latents)
    back = generate(model, PROMPT, guidance=1.0, **found.settings, decode=False)
    assert len(found.latents) == 3 and back.latents.isfinite().all()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart", "auraflow", "sd3", "flux", "chroma"])
def test_a_shift_counts_where_the_pipeline_adds_it(kind: str):
    vae = AutoencoderKL.from_config(tiny_pipeline(kind).vae.config, shift_factor=0.3)
    pipe = with_vae(kind, vae)
    extra = {"use_resolution_binning": False, "clean_caption": False} if kind == "pixart" else {}
    model = Model(pipe, name="tiny")
    assert torch.equal(ours(model, guidance=1.0), theirs(pipe, guidance_scale=1.0, width=32, height=32, **extra))


def overflowing(kind: str, force_upcast: bool) -> Any:
    """A pipeline in float16 whose decoder exceeds float16 inside, and in float32 makes ordinary pictures."""
    pipe = tiny_pipeline(kind, fresh=True)
    pipe.vae = AutoencoderKL.from_config(pipe.vae.config, force_upcast=force_upcast)
    for part in (pipe.vae.decoder, pipe.vae.encoder):
        part.conv_in.weight.data *= 20000 / part.conv_in.weight.abs().max()
        part.conv_in.bias.data.fill_(60000)
    pipe.vae.eval().requires_grad_(False)
    return pipe.to(dtype=torch.float16)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_an_autoencoder_that_overflows(kind: str):
    model = Model(overflowing(kind, False), name="tiny")
    before = {key: value.clone() for key, value in model.pipe.vae.state_dict().items()}
    with pytest.warns(
        codec.Overflow, match="autoencoder of tiny overflows in float16; it decoded once more in float32"
    ):
        result = generate(model, PROMPT, steps=1, size=(32, 32))
    assert result.images[0].getextrema()[0][1] > 0  # not black
    with codec.in_float32(model.pipe.vae):
        expected = model.family.decode(result.latents)
    assert torch.equal(result.pixels, expected.half())
    after = model.pipe.vae.state_dict()
    assert all(after[key].dtype == torch.float16 and torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_an_autoencoder_that_asks_for_float32(kind: str):
    model = Model(overflowing(kind, True), name="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error", codec.Overflow)
        result = generate(model, PROMPT, steps=1, size=(32, 32))
    assert result.pixels.isfinite().all() and model.pipe.vae.dtype == torch.float16


def test_encoding_that_overflows_draws_the_same_again():
    model = Model(overflowing("sd", False), name="tiny")
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with pytest.warns(codec.Overflow, match="encoded once more"):
        found = model.encode_image(images, [torch.Generator().manual_seed(1)])
    with codec.in_float32(model.pipe.vae):
        expected = model.family.encode_image(images, [torch.Generator().manual_seed(1)])
    assert torch.equal(found, expected.half()) and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_autoencoder_that_no_precision_helps(dtype: torch.dtype):
    pipe = tiny_pipeline("sd", fresh=True).to(dtype=dtype)
    pipe.vae.decoder.conv_in.bias.data.fill_(float("inf"))
    with pytest.raises(NotFinite, match="not finite"):
        generate(Model(pipe, name="tiny"), PROMPT, steps=1, size=(32, 32))


# --- schedulers -------------------------------------------------------------------------------------------------------

EDM: dict[str, tuple[str, dict[str, Any]]] = {
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpm++": ("EDMDPMSolverMultistepScheduler", {}),  # Playground v2.5
    "cosxl": (
        "EDMEulerScheduler",
        {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_schedule": "exponential"},
    ),
}


@pytest.mark.parametrize("case", EDM)
def test_schedulers_in_edm_scaling(case: str, tmp_path: Path):
    name, settings = EDM[case]
    pipe = type(tiny_pipeline("sdxl"))(
        **{**tiny_pipeline("sdxl").components, "scheduler": getattr(diffusers, name)(**settings)}, add_watermarker=False
    )
    with quiet():
        pipe.save_pretrained(tmp_path)
    edit(tmp_path / "vae/config.json", latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    model = load(tmp_path)
    try:
        peer = theirs(pipe, guidance_scale=3.0, num_inference_steps=3, width=32, height=32)
    finally:
        pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    assert torch.equal(ours(model, guidance=3.0, steps=3), peer)
    heard = []
    generate(
        model,
        PROMPT,
        steps=2,
        guidance=1.0,
        decode=False,
        seed=3,
        size=(32, 32),
        on_step=lambda step: heard.append((step.x0, step.x)),
    )
    torch.testing.assert_close(heard[-1][0], heard[-1][1])  # the last step ends where its x0 is
    assert set(model.schedulers) == {"edm_euler", "edm_dpm++"}
    with pytest.raises(NotSupported, match="'ddim' does not fit a model in EDM's scaling; use one of: edm_euler"):
        generate(model, PROMPT, scheduler="ddim")
    same = {"steps": 2, "seed": 3, "decode": False, "size": (32, 32)}
    by_name = [generate(model, PROMPT, scheduler=name, **same).latents for name in ("euler", "edm_euler")]
    assert torch.equal(*by_name)  # as other programs call it
    with pytest.raises(NotSupported, match="EDM's"):
        invert(model, picture(), PROMPT)


@pytest.mark.parametrize("case", EDM)
def test_edm_path_is_that_of_the_scheduler(case: str):
    name, settings = EDM[case]
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(5)
    path = NoisePath(scheduler)
    x0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        x = path.add_noise(x0, eps, t)
        torch.testing.assert_close(x, x0 + sigma * eps)
        out = path.from_x0(x, x0, t)
        torch.testing.assert_close(scheduler.precondition_outputs(x, out, sigma), x0, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(path.to_eps(x, out, t), eps, rtol=1e-3, atol=2e-3)
        less = path.with_less_noise(out, 0.1 * eps, t)
        alpha, level = path.alpha_sigma(t)
        expected = 0.1 * eps * level / max(alpha, LEAST_DATA)
        torch.testing.assert_close(path.to_x0(x, less, t) - path.to_x0(x, out, t), expected, rtol=1e-3, atol=1e-4)


def test_zero_snr_is_kept_or_refused():
    pipe = tiny_pipeline("sd2", fresh=True)
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    model = Model(pipe, name="tiny")
    assert generate(model, PROMPT, steps=2, size=(32, 32), scheduler="euler").pixels.isfinite().all()
    with pytest.raises(NotSupported, match="'heun' does not know zero terminal .*; use one of: ddim, "):
        generate(model, PROMPT, scheduler="heun")


# --- pipeline classes -------------------------------------------------------------------------------------------------

LOADS = {
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusion3Img2ImgPipeline": "sd3",
    "StableDiffusion3InpaintPipeline": "sd3",
    "FluxImg2ImgPipeline": "flux",
    "FluxInpaintPipeline": "flux",
    "FluxKontextInpaintPipeline": "kontext",
    "ChromaImg2ImgPipeline": "chroma",
    "AmusedImg2ImgPipeline": "amused",
    "AnimateDiffVideoToVideoPipeline": "animatediff",
    "FluxControlNetPipeline": "flux",
    "StableDiffusionPAGPipeline": "sd",
    "ZImageInpaintPipeline": "z_image",
}


@pytest.mark.parametrize("name", LOADS)
def test_other_pipelines_of_the_same_parts(name: str, folder: Callable[[str], Path]):
    path = folder(LOADS[name])
    edit(path / "model_index.json", _class_name=name)
    lost = siblings()[name][1]
    with pytest.warns(LoadedOtherwise, match=lost) if lost else nullcontext():
        model = load(path)
    own = tiny_pipeline(LOADS[name])
    assert type(model.pipe) is type(own)
    for part, module in model.modules.items():
        expected = own.components[part].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    if hasattr(diffusers, name):
        with pytest.raises(NotSupported, match=re.escape(f"Model({type(model.pipe).__name__}.from_pipe(pipe))")):
            Model(object.__new__(getattr(diffusers, name)))


@pytest.mark.parametrize("name", siblings())
def test_what_is_loaded_as_another_has_its_parts(name: str):
    own, base = (inspect.signature(getattr(diffusers, each)).parameters for each in (name, siblings()[name][0]))
    for part, parameter in base.items():
        if part in own and part not in UNUSED and "scheduler" not in part and "tokenizer" not in part:
            assert network(own[part]) == network(parameter), part
        assert part in own or parameter.default is not parameter.empty, part


def network(parameter: inspect.Parameter) -> str:
    """The class of a part, the first where several will do."""
    kind = (get_args(parameter.annotation) or (parameter.annotation,))[0]
    return getattr(kind, "__name__", str(kind))


@pytest.mark.parametrize("name", [*UNSUPPORTED, "DiffusersHasNoSuchPipeline"])
def test_classes_that_no_family_serves_say_why(name: str):
    reason = UNSUPPORTED.get(name, "known: Amused")
    with pytest.raises(NotSupported, match=f"{name}'? is not supported.*{re.escape(reason)}"):
        pipeline_of({"_class_name": name}, Path("model"))


def lcm() -> Any:
    """Tiny Stable Diffusion with a guidance embedding, as latent consistency models have it."""
    parts = dict(tiny_pipeline("sd").components)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["unet"] = type(parts["unet"]).from_config(parts["unet"].config, time_cond_proj_dim=8).eval()
    parts["unet"].requires_grad_(False)
    parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    return diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


@pytest.mark.parametrize("name", ["LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"])
def test_latent_consistency_models(name: str, tmp_path: Path):
    pipe = lcm()
    with quiet():
        pipe.save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", _class_name=name)
    model = load(tmp_path)
    assert (model.defaults["steps"], model.defaults["guidance"]) == (4, 8.5)
    peer = theirs(diffusers.LatentConsistencyModelPipeline(**model.pipe.components), num_inference_steps=4)
    assert torch.equal(ours(model, steps=None), peer)


def further(kind: str, part: str, name: str, channels: int, root: Path) -> Path:
    """A saved model whose denoiser reads so many channels."""
    pipe = tiny_pipeline(kind, fresh=True)
    denoiser = getattr(pipe, part)
    outputs = {"out_channels": 16} if kind == "flux" else {}
    setattr(pipe, part, type(denoiser).from_config(denoiser.config, in_channels=channels, **outputs))
    with quiet():
        pipe.save_pretrained(root)
    edit(root / "model_index.json", _class_name=name)
    return root


@pytest.mark.parametrize(
    ("kind", "part", "name", "channels", "way_out"),
    [
        ("sd", "unet", "StableDiffusionPipeline", 9, "say StableDiffusionInpaintPipeline as _class_name"),
        ("sdxl", "unet", "StableDiffusionXLInpaintPipeline", 9, "StableDiffusionXLPipeline does not give it.*blend"),
        ("flux", "transformer", "FluxFillPipeline", 96, "reads 20 channels beside the latents.*blend"),
        ("flux", "transformer", "FluxPipeline", 48, "say FluxFillPipeline as _class_name"),
    ],
)
def test_denoisers_that_read_more(kind: str, part: str, name: str, channels: int, way_out: str, tmp_path: Path):
    path = further(kind, part, name, channels, tmp_path)
    with pytest.raises(NotSupported, match=way_out):
        load(path)
    if "_class_name" in way_out:
        edit(path / "model_index.json", _class_name=way_out.split()[1])
        assert load(path).family.takes_mask


# --- offloading -------------------------------------------------------------------------------------------------------


def test_offloaded_weights_rest_elsewhere():
    from accelerate import cpu_offload

    pipe = tiny_pipeline("sd", fresh=True)
    expected = ours(Model(tiny_pipeline("sd", fresh=True), name="tiny"), image=picture(), strength=0.7, steps=3)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, torch.device("cpu"))
    assert next(pipe.unet.parameters()).device.type == "meta"
    model = Model(pipe, name="tiny")
    assert model.device == torch.device("cpu")
    assert torch.equal(ours(model, image=picture(), strength=0.7, steps=3), expected)


def offloaded(*names: str) -> Model:
    from accelerate import cpu_offload

    pipe = tiny_pipeline("sd", fresh=True)
    for name in names:
        cpu_offload(getattr(pipe, name), torch.device("cpu"))
    return Model(pipe, name="tiny")


TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FACTORS = {f"{TO_Q}.lora_A.weight": torch.ones(2, 32), f"{TO_Q}.lora_B.weight": torch.full((32, 2), 0.1)}


def adapter(path: Path, **more: torch.Tensor) -> Any:
    save_file({**FACTORS, **{f"{TO_Q}.{name}": each for name, each in more.items()}}, path / "x.safetensors")
    return cards.method("lora")(file=str(path / "x.safetensors"))


@pytest.mark.parametrize("key", ["none", "daam", "attend_excite", "lora"])
def test_systems_on_offloaded_weights(key: str, tmp_path: Path):
    made = []
    for model in (offloaded("unet", "vae", "text_encoder"), offloaded()):
        given = {"attend_excite": {"words": ["cube"], "thresholds": []}}.get(key, {})
        system = () if key == "none" else adapter(tmp_path) if key == "lora" else cards.method(key)(**given)
        made.append(generate(model, PROMPT, steps=2, seed=3, size=(32, 32), interventions=system))
    there, here = made
    assert torch.equal(there.pixels, here.pixels) and there.recipe == here.recipe  # with the hash of the weights
    assert next(there.model.pipe.unet.parameters()).is_meta


def test_what_needs_offloaded_weights_at_hand_says_so(tmp_path: Path):
    model = offloaded("unet")
    with pytest.raises(NotSupported, match="is offloaded, so no other weights can take its place"):
        adapter(tmp_path).merge(model)
    with pytest.raises(NotSupported, match="is offloaded, and DoRA needs its weights"):
        generate(model, PROMPT, steps=1, interventions=adapter(tmp_path, lora_magnitude_vector=torch.ones(32)))
    assert adapter(tmp_path).merge(offloaded()).undo() is None  # without offloading
    with pytest.raises(BadWeights, match="on the meta device"), torch.device("meta"):
        hash_modules({"unet": torch.nn.Linear(2, 2)})


def test_edm_begins_from_a_picture():
    """As the pipeline of diffusers for that does; its array of the picture may lie otherwise in memory."""
    parts = {**tiny_pipeline("sdxl").components, "scheduler": diffusers.EDMDPMSolverMultistepScheduler()}
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    peer = theirs(pipe, image=picture(), strength=0.5, guidance_scale=2.0, num_inference_steps=4)
    model = Model(diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False), name="tiny")
    again = ours(model, image=picture(), strength=0.5, guidance=2.0, steps=4)
    torch.testing.assert_close(again, peer, rtol=0, atol=1e-5)
