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
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from sfumato import app
from sfumato.errors import BadInput, BadWeights, SfumatoError
from sfumato.models import architectures, family_at, load, quiet
from sfumato.models.folder import LoadedOtherwise
from sfumato.models.kinds import kind_of_file
from sfumato.models.markers import Markers, read_markers
from sfumato.models.weights import TensorEntry
from sfumato.sampling import generate
from tests.checkpoints import original_layout
from tests.tiny import tiny_pipeline

PROMPT = "a red cube and a dog"
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
    ("hidream", {"double_stream_blocks.0.block.attn1.to_q.weight": (9, 9)}),
    ("chroma", {**FLUX, "distilled_guidance_layer.in_proj.bias": (5120,)}),
    ("hunyuan-video", {**FLUX, "txt_in.individual_token_refiner.blocks.0.norm1.weight": (9,)}),
    ("auraflow", {"double_layers.0.attn.w1q.weight": (9, 9)}),
    ("sana", {"blocks.0.cross_attn.kv_linear.weight": (9, 9)}),
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
        optional = {"safety_checker", "feature_extractor", "image_encoder"}
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
    ours = generate(model, PROMPT, steps=2, size=(32, 32), decode=False)
    peer = generate(load(file, config=config), PROMPT, steps=2, size=(32, 32), decode=False)
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


def test_flags_take_config():
    from typer.testing import CliRunner

    from sfumato.app.cli import app as cli

    for command in ("make", "explain", "edit", "segment"):
        shown = CliRunner().invoke(cli, [command, "--help"], env={"COLUMNS": "200"}).output
        assert "--config" in shown
