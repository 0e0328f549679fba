"""Single files as people have them: each told by its header, loaded or refused with what to do; what a file says about
its prediction is followed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from sfumato import app
from sfumato.errors import BadInput, BadWeights, SfumatoError
from sfumato.models import Model, architectures, family_at, load, quiet
from sfumato.models.families import families
from sfumato.models.folder import LoadedOtherwise
from sfumato.models.kinds import kind_of_file
from sfumato.models.markers import Markers, read_markers
from sfumato.models.weights import TensorEntry
from sfumato.sampling import generate
from tests.checkpoints import original_layout
from tests.tiny import tiny_pipeline

PROMPT = "a red cube and a dog"
FAMILIES = sorted({family.name for family in families().values()})
LDM = "model.diffusion_model."
K = "attn2.to_k.weight"
SD = {f"{LDM}input_blocks.0.0.weight": (320, 4, 3, 3), "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
SDXL = {f"{LDM}label_emb.0.0.weight": (1280, 2816), "conditioner.embedders.1.model.positional_embedding": (77, 1280)}
FLUX = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)}


def inpaint(shapes: dict[str, tuple[int, ...]], channels: int = 9) -> dict[str, tuple[int, ...]]:
    return {**shapes, f"{LDM}input_blocks.0.0.weight": (320, channels, 3, 3)}


SD1 = {**SD, f"{LDM}input_blocks.1.1.transformer_blocks.0.{K}": (320, 768),
       "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,)}  # fmt: skip
SD2 = {**SD, f"{LDM}input_blocks.1.1.transformer_blocks.0.{K}": (320, 1024),
       "cond_stage_model.model.ln_final.weight": (1024,)}  # fmt: skip
XL = {**SD, **SDXL, f"{LDM}input_blocks.4.1.transformer_blocks.0.{K}": (640, 2048)}
SD3 = {f"{LDM}joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536), f"{LDM}pos_embed": (1, 36864, 1536)}

#: names and shapes in a header -> the kind of file
KINDS: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("sd1", SD1),
    ("sd1", {f"{LDM}input_blocks.0.0.weight": (320, 4, 3, 3)}),
    ("sd1-inpaint", inpaint(SD1)),
    ("sd1-other", inpaint(SD1, 8)),
    ("sd2", SD2),
    ("sd2-inpaint", inpaint(SD2)),
    ("sd2-other", inpaint(SD2, 5)),
    ("sdxl", XL),
    ("sdxl-other", inpaint(XL)),
    ("playground", {**XL, "edm_mean": (4,), "edm_std": (4,)}),
    ("cosxl", {**XL, "edm_vpred.sigma_max": ()}),
    ("sdxl-refiner", {**SD, f"{LDM}label_emb.0.0.weight": (1536, 2560),
                      "conditioner.embedders.0.model.text_projection": (1280, 1280)}),
    ("sd3", SD3),
    ("sd35-medium", {**SD3, f"{LDM}joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536)}),
    ("sd35-large", {**SD3, f"{LDM}joint_blocks.0.x_block.attn.ln_k.weight": (64,)}),
    ("flux-schnell", FLUX),
    ("flux-dev", {**FLUX, "guidance_in.in_layer.weight": (3072, 256)}),
    ("flux-dev", {LDM + name: shape for name, shape in {**FLUX, "guidance_in.in_layer.bias": (3072,)}.items()}),
    ("flux-fill", {**FLUX, "guidance_in.in_layer.weight": (3072, 256), "img_in.weight": (3072, 384)}),
    ("flux-other", {**FLUX, "guidance_in.in_layer.weight": (3072, 256), "img_in.weight": (3072, 128)}),
    ("flux2-klein", {"double_stream_modulation_img.lin.weight": (9, 9), "double_blocks.0.img_attn.qkv.weight": (9, 9)}),
    ("flux2", {"double_stream_modulation_img.lin.weight": (9, 9), "guidance_in.in_layer.weight": (9, 9)}),
    ("hidream", {"double_stream_blocks.0.block.adaLN_modulation.1.bias": (9,)}),
    ("lumina2", {"cap_embedder.0.weight": (9,), "layers.0.adaLN_modulation.1.weight": (9, 9)}),
    ("chroma", {**FLUX, "distilled_guidance_layer.in_proj.bias": (5120,)}),
    ("hunyuan-video", {**FLUX, "txt_in.individual_token_refiner.blocks.0.norm1.weight": (9,)}),
    ("auraflow", {"double_layers.0.attn.w1q.weight": (9, 9)}),
    ("sana", {"blocks.0.cross_attn.kv_linear.weight": (9, 9)}),
    ("sana", {"blocks.0.cross_attn.kv_linear.weight": (9, 9), "y_embedder.y_embedding": (300, 2304),
              "attention_y_norm.weight": (9,)}),
    ("pixart", {"blocks.0.cross_attn.kv_linear.weight": (9, 9), "y_embedder.y_embedding": (120, 4096)}),
    ("wan", {"blocks.0.self_attn.norm_q.weight": (9,), "head.modulation": (1, 2, 9)}),
    ("qwen-image", {"transformer_blocks.0.img_mod.1.weight": (9, 9), "transformer_blocks.0.attn.to_q.weight": (9, 9)}),
    ("ltx", {"patchify_proj.weight": (9, 9), "transformer_blocks.0.attn1.to_q.weight": (9, 9)}),
    ("z-image", {"layers.0.adaLN_modulation.0.weight": (9, 9)}),
    ("lora", {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}),
    ("lora", {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 320)}),
    ("lora", {"unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight": (4, 320)}),
    ("lora", {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (4, 320)}),
    ("lora", {"diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (9, 4)}),
    ("embedding", {"emb_params": (2, 768)}),
    ("embedding", {"<cat>": (768,)}),
    ("embedding", {"clip_l": (3, 768), "clip_g": (3, 1280)}),
    ("vae", {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}),
    ("vae", {"encoder.down.0.block.0.conv1.weight": (9, 9, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)}),
    ("vae", {"encoder.conv_in.weight": (9, 3, 3, 3), "decoder.up_blocks.0.resnets.0.conv1.weight": (9, 9, 3, 3)}),
    ("vae", {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)}),
    ("controlnet", {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3), "control_model.x": (9, 9)}),
    ("controlnet", {"controlnet_cond_embedding.conv_in.weight": (9, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3)}),
    ("ip-adapter", {"image_proj.latents": (1, 9, 9), "ip_adapter.1.to_k_ip.weight": (9, 9)}),
    ("motion", {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}),
    ("text encoder", {"text_model.embeddings.token_embedding.weight": (49408, 768)}),
    ("text encoder", {"encoder.block.0.layer.0.SelfAttention.q.weight": (9, 9), "shared.weight": (9, 9)}),
    ("text encoder", {"model.layers.0.self_attn.q_proj.weight": (9, 9)}),
    ("clip", {"text_model.final_layer_norm.weight": (9,), "vision_model.post_layernorm.weight": (9,)}),
    ("part", {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (9, 9, 3, 3)}),
    ("part", {"transformer_blocks.0.attn.to_q.weight": (9, 9), "single_transformer_blocks.0.attn.to_q.weight": (9, 9)}),
    ("quantized", {**FLUX, "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": (9,)}),
    ("upscaler", {"body.0.rdb1.conv1.weight": (9, 9, 3, 3)}),
    ("unknown", {"linear.weight": (3, 3)}),
    ("unknown", {}),
]  # fmt: skip


def entries(shapes: dict[str, tuple[int, ...]]) -> list[TensorEntry]:
    return [TensorEntry(name, "F16", shape, 0, 0) for name, shape in shapes.items()]


@pytest.mark.parametrize(("name", "shapes"), KINDS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(KINDS)])
def test_kinds_are_told_by_the_header(name: str, shapes: dict[str, tuple[int, ...]]):
    kind = kind_of_file(entries(shapes))
    assert kind.name == name
    assert bool(kind.family) != bool(kind.refusal)
    if kind.refusal:
        assert kind.refusal.endswith(".") and "\n" not in kind.refusal and len(kind.refusal) < 250


@pytest.mark.parametrize("name", sorted({name for name, _ in KINDS}))
def test_every_kind_is_refused_or_asks_for_what_is_missing(name: str, tmp_path: Path):
    """Of no kind does a file fall into the loader of another one."""
    shapes = next(shapes for each, shapes in KINDS if each == name)
    kind = kind_of_file(entries(shapes))
    path = tmp_path / "x.safetensors"
    save_file({key: torch.zeros(shape, dtype=torch.int8) for key, shape in shapes.items()}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoadedOtherwise)
        with pytest.raises(SfumatoError) as caught:
            load(path)
    message = str(caught.value)
    assert "\n" not in message and (kind.title in message)
    assert "give config=" in message if kind.family else kind.advice in message
    assert (family_at(path).name if kind.family else None) == (kind.family or None)


# --- shipped configurations -------------------------------------------------------------------------------------------

#: kind, part -> number of parameters of the released model
SIZES = {
    ("sd1", "unet"): 859_520_964,
    ("sd1", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "unet"): 865_910_724,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("flux-dev", "transformer"): 11_901_408_320,
    ("flux-dev", "text_encoder_2"): 4_762_310_656,
}


@pytest.mark.parametrize(("kind", "part"), SIZES)
def test_shipped_configurations_are_those_of_the_released_models(kind: str, part: str):
    import diffusers
    import transformers

    library, name = architectures.index_of(kind)[part]
    config = architectures.config_of(kind, part)
    with torch.device("meta"), no_init_weights(), quiet():
        if library == "diffusers":
            network = getattr(diffusers, name).from_config(config)
        else:
            cls = getattr(transformers, name)
            network = cls(cls.config_class(**config))
    # on no device T5's two names for its table of words are not one
    held = {name: each.numel() for name, each in network.named_parameters() if name != "encoder.embed_tokens.weight"}
    assert sum(held.values()) == SIZES[kind, part]


def test_shipped_indices_name_what_the_pipelines_want():
    import diffusers

    for kind in architectures.known():
        index = architectures.index_of(kind)
        pipeline = getattr(diffusers, index.pop("_class_name"))
        expected, _ = pipeline._get_signature_keys(pipeline)
        optional = {"safety_checker", "feature_extractor", "image_encoder", "transformer_2"}
        parts = {name for name, entry in index.items() if isinstance(entry, list)}
        assert set(expected) - optional == parts, kind


# --- loading ----------------------------------------------------------------------------------------------------------


def tiny_sdxl(kind: str) -> Any:
    """As in `tests.tiny`, with a second text encoder of another width, as released files have it."""
    pipe, width, told = tiny_pipeline(kind, fresh=True), {"sdxl": 48, "refiner": 32}[kind], 6 - (kind == "refiner")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {**pipe.text_encoder_2.config.to_dict(), "hidden_size": 32, "projection_dim": 32}
        pipe.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**settings)).eval().requires_grad_(False)
        unet = {"cross_attention_dim": width, "projection_class_embeddings_input_dim": told * 8 + 32}
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config, **unet).eval().requires_grad_(False)
    return pipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Any]]:
    """(single file, its folder without weights, pipeline) of a tiny model; read-only."""
    root = tmp_path_factory.mktemp("files")
    held: dict[str, Any] = {}

    def of(kind: str) -> tuple[Path, Path, Any]:
        if kind not in held:
            held[kind] = pipe = tiny_sdxl(kind) if kind in ("sdxl", "refiner") else tiny_pipeline(kind)
            save_file(original_layout(pipe), root / f"{kind}.safetensors", metadata={"format": "pt"})
            with quiet():
                pipe.save_pretrained(root / f"{kind}-whole")
            ignore = shutil.ignore_patterns("*.safetensors")
            shutil.copytree(root / f"{kind}-whole", root / kind, ignore=ignore)
        return root / f"{kind}.safetensors", root / kind, held[kind]

    return of


def marked(file: Path, target: Path, tensors: tuple[str, ...] = (), **metadata: str) -> Path:
    """A copy with markers."""
    from safetensors.torch import load_file

    extra = {name: torch.tensor([]) for name in tensors}
    save_file({**load_file(file), **extra}, target, metadata={"format": "pt", **metadata})
    return target


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "refiner"])
def test_the_same_pictures_as_the_folder(made: Any, kind: str):
    file, config, pipe = made(kind)
    model = load(file, config=config)
    for name, module in model.modules.items():
        expected = pipe.components[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    assert app.load(file, config=config).weight_hash == model.weight_hash


def shipped_as_tiny(monkeypatch: pytest.MonkeyPatch, kind: str, pipe: Any) -> None:
    """Let the shipped configurations be those of a tiny model, so that files of its size fit them."""
    name, parts = architectures._KNOWN[kind]
    own = {}
    for part, (library, cls, config) in parts.items():
        if not part.startswith("tokenizer") and part != "scheduler":
            held = pipe.components[part].config
            config = held.to_dict() if hasattr(held, "to_dict") else {k: v for k, v in held.items() if k[0] != "_"}
        own[part] = (library, cls, config)
    monkeypatch.setitem(architectures._KNOWN, kind, (name, own))


@pytest.mark.parametrize(("kind", "shipped"), [("sd", "sd1"), ("sdxl", "sdxl")])
def test_nothing_but_the_tokenizer_can_be_missing(made: Any, kind: str, shipped: str, tmp_path: Path, monkeypatch: Any):
    file, config, pipe = made(kind)
    shipped_as_tiny(monkeypatch, shipped, pipe)
    with pytest.raises(BadInput, match=r"its tokenizer \(CLIPTokenizer\) is not in the file .* give config=<folder"):
        load(file)
    shutil.copytree(config / "tokenizer", tmp_path / "tokenizer")
    model = load(file, config=tmp_path)  # one tokenizer serves both encoders; they pad otherwise
    names = [name for name in ("tokenizer", "tokenizer_2") if name in pipe.components]
    assert [getattr(model.pipe, n).pad_token for n in names] == [getattr(pipe, n).pad_token for n in names]
    given = {"steps": 2, "size": (32, 32), "scheduler": DDIMScheduler(), "decode": False}
    ours, peer = (generate(each, PROMPT, **given) for each in (model, load(file, config=config)))
    torch.testing.assert_close(ours.latents, peer.latents, rtol=0, atol=1e-5)


def test_a_tokenizer_in_the_cache_of_the_hub(made: Any, tmp_path: Path, monkeypatch: Any):
    import huggingface_hub

    file, config, pipe = made("sd")
    shipped_as_tiny(monkeypatch, "sd1", pipe)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--openai--clip-vit-large-patch14"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("a" * 40)
    shutil.copytree(config / "tokenizer", repo / "snapshots" / ("a" * 40))
    assert load(file).pipe.tokenizer.model_max_length == 77


def test_parts_that_a_file_lacks_come_from_the_folder(made: Any, tmp_path: Path):
    file, config, pipe = made("sd")
    from safetensors.torch import load_file

    save_file(
        {key: value for key, value in load_file(file).items() if key.startswith(LDM)}, tmp_path / "unet.safetensors"
    )
    model = load(tmp_path / "unet.safetensors", config=config.with_name("sd-whole"))
    ours = generate(model, PROMPT, steps=1, size=(32, 32))
    assert torch.equal(ours.pixels, generate(load(file, config=config), PROMPT, steps=1, size=(32, 32)).pixels)
    with pytest.raises(BadInput, match="without its text_encoder, vae; give config=<folder of a whole"):
        load(tmp_path / "unet.safetensors", config=config)
    with pytest.raises(BadWeights, match="is a Stable Diffusion 1 checkpoint and does not fit the StableDiffusionXL"):
        load(file, config=made("sdxl")[1])


# --- what a file says about its prediction ----------------------------------------------------------------------------

V, ZERO = "v_prediction", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
#: kind, tensors, metadata -> the settings of the scheduler
SAID: dict[str, tuple[str, tuple[str, ...], dict[str, str], dict[str, Any]]] = {
    "nothing": ("sd", (), {}, {"prediction_type": "epsilon"}),
    "tensor": ("sd", ("v_pred",), {}, {"prediction_type": V}),
    "tensors": ("sd", ("v_pred", "ztsnr"), {}, {"prediction_type": V, **ZERO}),
    "sdxl": ("sdxl", ("v_pred", "ztsnr"), {}, {"prediction_type": V, **ZERO, "_class": "EulerDiscreteScheduler"}),
    "specification": ("sd", (), {"modelspec.prediction_type": "v"}, {"prediction_type": V}),
    "in full": ("sdxl", (), {"modelspec.prediction_type": "V-Prediction"}, {"prediction_type": V}),
    "noise": ("sd2", (), {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
    "architecture": ("sd2", (), {"modelspec.architecture": "stable-diffusion-v2-512"}, {"prediction_type": "epsilon"}),
    "trainer": ("sd", ("v_pred",), {"ss_zero_terminal_snr": "True"}, {"prediction_type": V, **ZERO}),
}


@pytest.mark.parametrize("case", SAID)
def test_prediction_is_that_of_the_file(made: Any, case: str, tmp_path: Path):
    kind, tensors, metadata, expected = SAID[case]
    file, config, pipe = made(kind)
    path = marked(file, tmp_path / "x.safetensors", tensors, **metadata)
    before = pipe.scheduler.config
    differs = any(before.get(name) != value for name, value in expected.items() if name in ("prediction_type", *ZERO))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        model = load(path, config=config)
    told = [str(note.message) for note in notes if isinstance(note.message, LoadedOtherwise)]
    assert bool(told) == differs and all("is followed although" in each for each in told)
    own = model.pipe.scheduler
    assert {name: {**own.config, "_class": type(own).__name__}.get(name) for name in expected} == expected
    assert model.prediction() == expected["prediction_type"]


def test_zero_terminal_snr_makes_the_pictures_of_the_pipeline(made: Any, tmp_path: Path):
    file, config, pipe = made("sdxl")
    with pytest.warns(LoadedOtherwise, match="v_prediction at zero terminal"):
        model = load(marked(file, tmp_path / "x.safetensors", ("v_pred", "ztsnr")), config=config)
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type=V, **ZERO)
    peer = StableDiffusionXLPipeline(**{**pipe.components, "scheduler": scheduler}, add_watermarker=False)
    peer.set_progress_bar_config(disable=True)
    with quiet():
        theirs = peer(
            PROMPT, num_inference_steps=3, width=32, height=32, output_type="latent", guidance_rescale=0.7,
            generator=torch.Generator().manual_seed(3),
        ).images  # fmt: skip
    ours = generate(model, PROMPT, steps=3, seed=3, size=(32, 32), rescale=0.7, decode=False)
    torch.testing.assert_close(ours.latents, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


CONTRADICTIONS: list[tuple[tuple[str, ...], dict[str, str]]] = [
    (("v_pred",), {"modelspec.prediction_type": "epsilon"}),
    (("ztsnr",), {}),
    (("ztsnr",), {"modelspec.prediction_type": "epsilon"}),
    ((), {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-v2-512"}),
    ((), {"modelspec.prediction_type": "sideways"}),
    ((), {"modelspec.prediction_type": "rectified-flow"}),
    (("v_pred",), {"modelspec.prediction_type": "flow"}),
]


@pytest.mark.parametrize(("tensors", "metadata"), CONTRADICTIONS)
def test_a_file_that_contradicts_itself(
    made: Any, tensors: tuple[str, ...], metadata: dict[str, str], tmp_path: Path, monkeypatch: Any
):
    file, config, pipe = made("sd")
    shipped_as_tiny(monkeypatch, "sd1", pipe)
    path = marked(file, tmp_path / "x.safetensors", tensors, **metadata)
    shutil.copytree(config / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(BadWeights, match="contradicts itself: .*; give config=<folder of a diffusers model> whose"):
        load(path, config=tmp_path)
    assert load(path, config=config).prediction() == "epsilon"  # the scheduler that is given says so


def test_markers_that_agree():
    assert read_markers(["a"], {"format": "pt", "modelspec.architecture": "stable-diffusion-xl-v1-base"}) == Markers()
    said = {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-v2-768-v"}
    assert read_markers(["v_pred"], said) == Markers(V)


def test_a_configuration_beside_the_file(made: Any, tmp_path: Path):
    """As the web UIs have it: ``x.yaml`` for ``x.safetensors``."""
    file, config, _ = made("sd")
    path = Path(shutil.copyfile(file, tmp_path / "x.safetensors"))
    (tmp_path / "x.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    with pytest.warns(LoadedOtherwise, match="v_prediction, which is followed"):
        assert load(path, config=config).prediction() == V


def test_flow_models_are_not_asked_what_they_predict(tmp_path: Path):
    pipe = tiny_pipeline("qwenimage")
    said = {"modelspec.prediction_type": "rectified flow"}
    save_file({k: v.contiguous() for k, v in pipe.transformer.state_dict().items()}, tmp_path / "x.safetensors", said)
    with quiet():
        pipe.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole/transformer/diffusion_pytorch_model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoadedOtherwise)
        own = load(tmp_path / "x.safetensors", config=tmp_path / "whole").pipe.scheduler
    expected = {name: value for name, value in pipe.scheduler.config.items() if name[0] != "_"}
    assert {name: value for name, value in own.config.items() if name[0] != "_"} == expected


@pytest.mark.parametrize(("spread", "expected"), [(0.5, V), (0.01, "epsilon"), (None, V)])
def test_stable_diffusion_2_without_a_word(
    made: Any, spread: float | None, expected: str, tmp_path: Path, monkeypatch: Any
):
    from safetensors.torch import load_file

    file, config, pipe = made("sd2")
    for shipped in ("sd2", "sd2-v"):
        shipped_as_tiny(monkeypatch, shipped, pipe)
    tensors = load_file(file)
    name = f"{LDM}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if spread is not None:
        tensors[name] = spread * torch.linspace(-2, 2, 16)
    save_file(tensors, tmp_path / "x.safetensors")
    shutil.copytree(config / "tokenizer", tmp_path / "tokenizer")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        assert load(tmp_path / "x.safetensors", config=tmp_path).prediction() == expected
    assert any("v is taken" in str(note.message) for note in notes) == (spread is None)


# --- the command line -------------------------------------------------------------------------------------------------


def test_config_from_the_command_line(made: Any, tmp_path: Path):
    file, config, _ = made("sd")
    order = app.JobBatch([app.JobOptions(prompt=PROMPT, steps=1, size=(32, 32))], str(file), config=str(config))
    (paths,) = app.make_files(order, tmp_path / "x.png")
    assert [path.name for path in paths] == ["x.png"]
    with pytest.raises(BadInput, match="only applies to a single-file checkpoint"):
        app.JobBatch([], str(config.with_name("sd-whole")), config=str(config)).load()


# --- younger families: a file holds the transformer alone, whose shapes say how large it is ---------------------------


def blocks(count: int, name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name.format(i)}": (128,) for i in range(count)}


def flux2(width: int, text: int, doubles: int, singles: int) -> dict[str, tuple[int, ...]]:
    return {
        "img_in.weight": (width, 128), "txt_in.weight": (width, text), "double_stream_modulation_img.lin.weight": (9,),
        **blocks(doubles, "double_blocks.{}.img_attn.norm.query_norm.scale"), **blocks(singles, "single_blocks.{}.x"),
    }  # fmt: skip


def wan(width: int, feed: int, layers: int) -> dict[str, tuple[int, ...]]:
    return {
        "patch_embedding.weight": (width, 16, 1, 2, 2), "head.modulation": (1, 2, width),
        "head.head.weight": (64, width), "text_embedding.0.weight": (width, 4096),
        "blocks.0.ffn.0.weight": (feed, width),
        **blocks(layers, "blocks.{}.self_attn.norm_q.weight"),
    }  # fmt: skip


#: release, its transformer's class, a few of the shapes in its file -> number of parameters of the release
RELEASES: dict[str, tuple[str, dict[str, tuple[int, ...]], int]] = {
    "wan 1.3B": ("WanTransformer3DModel", wan(1536, 8960, 30), 1_418_996_800),
    "wan 14B": ("WanTransformer3DModel", wan(5120, 13824, 40), 14_288_491_584),
    "qwen": ("QwenImageTransformer2DModel", {
        "img_in.weight": (3072, 64), "txt_in.weight": (3072, 3584), "proj_out.weight": (64, 3072),
        **blocks(60, "transformer_blocks.{}.attn.norm_q.weight"), "transformer_blocks.0.img_mod.1.weight": (9, 9),
    }, 20_430_401_088),
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_shapes_tell_the_size_of_a_release(release: str):
    import diffusers

    name, shapes, parameters = RELEASES[release]
    kind = kind_of_file(entries(shapes))
    assert architectures.index_of(kind.name)["transformer"] == ["diffusers", name]
    with torch.device("meta"), no_init_weights(), quiet():
        network = getattr(diffusers, name).from_config(
            {**architectures.config_of(kind.name, "transformer"), **kind.settings}
        )
    assert sum(each.numel() for each in network.parameters()) == parameters


def released_names(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a tiny transformer under the names of the original release."""
    if kind == "qwenimage":
        return state
    found = {}
    for name, value in state.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            value = torch.cat([value, state[name.replace("to_q", "to_k")], state[name.replace("to_q", "to_v")]])
        for new, old in (("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer"),
                         ("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm"), ("to_q", "qkv")):  # fmt: skip
            name = name.replace(new, old)
        found[name] = value.clone()
    return found


SETTINGS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "klein 4B": (flux2(3072, 7680, 5, 20), {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False,
    }),
    "klein 9B": (flux2(4096, 12288, 8, 24), {
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
    }),
    "dev": ({**flux2(6144, 15360, 8, 48), "guidance_in.in_layer.weight": (6144, 256)}, {
        "num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360,
    }),
    "hunyuan": (
        {**blocks(20, "double_blocks.{}.img_mod.linear.bias"), **blocks(40, "single_blocks.{}.linear1.bias"),
         "txt_in.individual_token_refiner.blocks.0.norm1.weight": (9,), "guidance_in.mlp.0.bias": (9,)},
        {"num_layers": 20, "num_single_layers": 40, "guidance_embeds": True},
    ),
    "auraflow": (
        {**blocks(4, "double_layers.{}.attn.w1q.weight"), **blocks(32, "single_layers.{}.attn.w1q.weight"),
         "positional_encoding": (1, 9216, 3072)},
        {"num_mmdit_layers": 4, "num_single_dit_layers": 32, "pos_embed_max_size": 9216},
    ),
    "sana": (
        {**blocks(28, "blocks.{}.cross_attn.kv_linear.weight"), "x_embedder.proj.weight": (1152, 32, 1, 1),
         "attention_y_norm.weight": (1152,), "y_embedder.y_proj.fc1.weight": (1152, 2304)},
        {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
         "caption_channels": 2304},
    ),
    "hidream": (
        {**blocks(16, "double_stream_blocks.{}.block.x"), **blocks(32, "single_stream_blocks.{}.block.x")},
        {"num_layers": 16, "num_single_layers": 32, "caption_channels": [4096, 4096],
         "llama_layers": [*range(32), *[31] * 16]},
    ),
    "ltx 13B": (
        {"patchify_proj.weight": (4096, 128), "caption_projection.linear_1.weight": (4096, 4096),
         **blocks(48, "transformer_blocks.{}.attn1.to_q.weight")},
        {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096, "caption_channels": 4096},
    ),
    "flux lite": (
        {**FLUX, **blocks(8, "double_blocks.{}.img_attn.norm.query_norm.scale"), **blocks(38, "single_blocks.{}.x")},
        {"num_layers": 8, "num_single_layers": 38, "num_attention_heads": 24},
    ),
}  # fmt: skip


@pytest.mark.parametrize("release", SETTINGS)
def test_shapes_tell_the_settings_of_a_release(release: str):
    shapes, expected = SETTINGS[release]
    found = kind_of_file(entries(shapes)).settings
    assert {name: found.get(name) for name in expected} == expected


#: what is read off the shapes of a tiny transformer; the rest is what all releases of its class have in common
SIZED = {
    "qwenimage": {"num_layers", "in_channels", "joint_attention_dim", "out_channels", "num_attention_heads",
                  "attention_head_dim"},
    "z_image": {"n_layers", "n_refiner_layers", "dim", "cap_feat_dim", "n_heads", "n_kv_heads"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "shipped"), [("qwenimage", "qwen-image"), ("z_image", "z-image")])
def test_a_transformer_needs_no_configuration(kind: str, shipped: str, tmp_path: Path, monkeypatch: Any):
    pipe = tiny_pipeline(kind)
    name, parts = architectures._KNOWN[shipped]
    unlike = {key: value for key, value in pipe.transformer.config.items() if key[0] != "_" and key not in SIZED[kind]}
    library, cls, _ = parts["transformer"]
    monkeypatch.setitem(architectures._KNOWN, shipped, (name, {**parts, "transformer": (library, cls, unlike)}))
    state = {name: value.contiguous() for name, value in pipe.transformer.state_dict().items()}
    save_file(released_names(kind, state), tmp_path / "x.safetensors")
    with quiet():
        pipe.save_pretrained(tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/transformer")
    (tmp_path / "parts/model_index.json").unlink()
    model = load(tmp_path / "x.safetensors", config=tmp_path / "parts")
    assert all(torch.equal(value, state[name]) for name, value in model.pipe.transformer.state_dict().items())
    ours = generate(model, PROMPT, steps=1, size=(32, 32), decode=False).latents
    peer = generate(Model(pipe, name="tiny"), PROMPT, steps=1, size=(32, 32), decode=False).latents
    assert torch.equal(ours, peer)
    shutil.rmtree(tmp_path / "parts/scheduler")
    shutil.rmtree(tmp_path / "parts/vae")
    with pytest.raises(BadInput, match=r"without its scheduler, vae; give config="):
        load(tmp_path / "x.safetensors", config=tmp_path / "parts")
    with pytest.raises(BadInput, match=r"without its scheduler, text_encoder, vae, tokenizer; give config="):
        load(tmp_path / "x.safetensors")


def test_one_file_serves_families_that_no_tensor_tells_apart():
    qwen, flux = kind_of_file(entries(RELEASES["qwen"][1])), kind_of_file(entries(FLUX))
    assert [name for name in FAMILIES if qwen.serves(name)] == ["qwenimage", "qwenimage-edit", "qwenimage-edit-plus"]
    assert [name for name in FAMILIES if flux.serves(name)] == ["flux", "flux-kontext"]
    assert not any(kind_of_file(entries({"emb_params": (2, 768)})).serves(name) for name in (*FAMILIES, ""))


def test_flags_take_config():
    from typer.testing import CliRunner

    from sfumato.app.cli import app as cli

    for command in ("make", "explain", "edit", "segment"):
        shown = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"}).output
        assert "--config" in shown
