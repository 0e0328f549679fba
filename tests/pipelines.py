"""Pipelines that no loop of ours replaces, tiny and randomly initialised: the networks of `tests.tiny`, driven by other
classes of diffusers, and by classes that a user might write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import tiny_pipeline

PROMPT = "a red cube and a blue ball"
SIZE = 32


def picture(colour: tuple[int, int, int] = (90, 120, 60)) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), colour)
    image.paste((200, 30, 30), (4, 4, 20, 20))
    return image


def mask() -> Image.Image:
    image = Image.new("L", (SIZE, SIZE), 0)
    image.paste(255, (0, 0, 16, 32))
    return image


def _seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    @functools.wraps(make)
    def made(*args: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return make(*args)

    return made


def _of(kind: str, cls: Any, **parts: Any) -> Any:
    """A pipeline of another class with the parts of a tiny one, and some of its own."""
    own = tiny_pipeline(kind, fresh=True).components
    wanted = set(cls.__init__.__annotations__) | set(cls._get_signature_types())
    flags = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    given = {name: part for name, part in own.items() if name in wanted} | flags | parts
    pipe = cls(**given)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def _pndm() -> Any:
    return diffusers.PNDMScheduler.from_config(tiny_pipeline("sd").scheduler.config, skip_prk_steps=True)


def _unet(kind: str, **changes: Any) -> Any:
    config = {**tiny_pipeline(kind).unet.config, **changes}
    return diffusers.UNet2DConditionModel.from_config(config)


def _controlnet(kind: str) -> Any:
    net = diffusers.ControlNetModel.from_unet(tiny_pipeline(kind).unet, conditioning_embedding_out_channels=(8, 16))
    return net


def _t2i(kind: str) -> Any:
    channels = list(tiny_pipeline(kind).unet.config.block_out_channels)
    xl = kind == "sdxl"  # its first level ends with half the side
    return diffusers.T2IAdapter(
        in_channels=3,
        channels=channels + [32, 32] * xl,
        num_res_blocks=1,
        downscale_factor=4 if xl else 2,
        adapter_type="full_adapter_xl" if xl else "full_adapter",
    )


def _latent_upscaler() -> Any:
    """Of Katherine Crowson's blocks, told the noise and the pooled text."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=8,
        out_channels=5,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        block_out_channels=(32, 64, 64),
        act_fn="gelu",
        norm_num_groups=None,
        attention_head_dim=8,
        cross_attention_dim=16,
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        time_cond_proj_dim=128 + 16,
    )
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    return _of("sd", diffusers.StableDiffusionLatentUpscalePipeline, unet=unet, scheduler=scheduler)


def _ip_adapter(pipe: Any) -> Any:
    """With an image prompt of four tokens of its own beside the text, in every cross-attention."""
    width, seen = pipe.unet.config.cross_attention_dim, 12
    names = [name for name in pipe.unet.attn_processors if "attn2" in name]
    ip = {}
    for i, name in enumerate(names):
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in "kv":
            ip[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(hidden, width)
    proj = {"proj.weight": torch.randn(4 * width, seen), "proj.bias": torch.zeros(4 * width)}
    proj |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": proj, "ip_adapter": ip}])
    return pipe


BUILDERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    # stable diffusion 1
    "sd controlnet": (
        lambda: _of("sd", diffusers.StableDiffusionControlNetPipeline, controlnet=_controlnet("sd")),
        {"image": picture()},
    ),
    "sd img2img": (  # with the scheduler of the first Stable Diffusion, which says its second timestep twice
        lambda: _of("sd", diffusers.StableDiffusionImg2ImgPipeline, scheduler=_pndm()),
        {"image": picture(), "strength": 0.7},
    ),
    "sd t2i": (lambda: _of("sd", diffusers.StableDiffusionAdapterPipeline, adapter=_t2i("sd")), {"image": picture()}),
    "sd upscale": (
        lambda: _of(
            "sd",
            diffusers.StableDiffusionUpscalePipeline,
            unet=_unet("sd", in_channels=7, num_class_embeds=1000),
            low_res_scheduler=diffusers.DDPMScheduler(),
        ),
        {"image": picture()},
    ),
    "sd latent upscale": (_latent_upscaler, {"image": picture()}),
    "sd pix2pix": (
        lambda: _of("sd", diffusers.StableDiffusionInstructPix2PixPipeline, unet=_unet("sd", in_channels=8)),
        {"image": picture(), "image_guidance_scale": 1.5},
    ),
    "sd ip-adapter": (
        lambda: _ip_adapter(_of("sd", diffusers.StableDiffusionPipeline)),
        {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 24).reshape(2, 1, 12)]},
    ),
    "sd pag": (lambda: _of("sd", diffusers.StableDiffusionPAGPipeline), {"pag_scale": 2.0}),
    # sdxl
    "sdxl controlnet": (
        lambda: _of("sdxl", diffusers.StableDiffusionXLControlNetPipeline, controlnet=_controlnet("sdxl")),
        {"image": picture()},
    ),
    "sdxl inpaint": (
        lambda: _of("sdxl", diffusers.StableDiffusionXLInpaintPipeline),
        {"image": picture(), "mask_image": mask(), "strength": 0.9},
    ),
    "sdxl img2img": (
        lambda: _of("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline),
        {"image": picture(), "strength": 0.7},
    ),
    "sdxl t2i": (
        lambda: _of("sdxl", diffusers.StableDiffusionXLAdapterPipeline, adapter=_t2i("sdxl")),
        {"image": picture()},
    ),
    # sd3
    "sd3 controlnet": (
        lambda: _of(
            "sd3",
            diffusers.StableDiffusion3ControlNetPipeline,
            controlnet=diffusers.SD3ControlNetModel.from_transformer(
                tiny_pipeline("sd3", fresh=True).transformer, num_layers=1, num_extra_conditioning_channels=0
            ),
        ),
        {"control_image": picture()},
    ),
    "sd3 img2img": (
        lambda: _of("sd3", diffusers.StableDiffusion3Img2ImgPipeline),
        {"image": picture(), "strength": 0.7},
    ),
    # flux
    "flux kontext": (
        lambda: _of("flux", diffusers.FluxKontextPipeline),
        {"image": picture(), "_auto_resize": False, "max_area": SIZE * SIZE},
    ),
    "flux controlnet": (
        lambda: _of(
            "flux",
            diffusers.FluxControlNetPipeline,
            controlnet=diffusers.FluxControlNetModel.from_transformer(
                tiny_pipeline("flux", fresh=True).transformer,  # it writes into the config that it reads
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
            ),
        ),
        {"control_image": picture()},
    ),
    "flux img2img": (lambda: _of("flux", diffusers.FluxImg2ImgPipeline), {"image": picture(), "strength": 0.7}),
    "flux inpaint": (
        lambda: _of("flux", diffusers.FluxInpaintPipeline),
        {"image": picture(), "mask_image": mask(), "strength": 0.9},
    ),
}


@_seeded
def pipeline_of(kind: str) -> Any:
    return BUILDERS[kind][0]()


def draw(pipe: Any, kind: str = "", steps: int = 1, **changes: Any) -> Tensor:
    """The latents that a call of the pipeline makes."""
    own = BUILDERS[kind][1] if kind else {}
    sized = {} if kind.startswith("sd") and "image" in own and "sd3" not in kind else {"height": SIZE, "width": SIZE}
    given = {"num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(1)}
    return torch.as_tensor(pipe(**{"prompt": PROMPT, **given, **sized, **own, **changes})[0])


class Mine(diffusers.DiffusionPipeline):
    """A pipeline that a user might write: one CLIP, a joint-attention transformer, a loop of its own, guidance in one
    batch, no ``encode_prompt``."""

    def __init__(self, transformer: Any, text_encoder: Any, tokenizer: Any, scheduler: Any):
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.template, self.wide, self.guided = "{}", True, False

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int = 2, generator: Any = None, **_: Any) -> tuple[Tensor]:
        texts = [self.template.format(prompt)] if not self.guided else ["", self.template.format(prompt)]
        ids = self.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        text = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        if self.wide:
            text = torch.nn.functional.pad(text, (0, self.transformer.config.joint_attention_dim - text.shape[-1]))
        x = torch.randn(1, 4, 16, 12, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            given = {"timestep": t[None], "encoder_hidden_states": text, "pooled_projections": torch.zeros(1, 40)}
            shown = x if len(text) == 1 else torch.cat([x, x])
            out = self.transformer(hidden_states=shown, return_dict=False, **given)[0]
            x = self.scheduler.step(out[-1:], t, x).prev_sample
        return (x,)


class Renamed(diffusers.StableDiffusionPipeline):
    """A user's subclass of a pipeline that is known."""


def mine(**changes: Any) -> Mine:
    own = tiny_pipeline("sd3", fresh=True)
    pipe = Mine(own.transformer, own.text_encoder, own.tokenizer, own.scheduler)
    pipe.set_progress_bar_config(disable=True)
    for name, value in changes.items():
        object.__setattr__(pipe, name, value)
    return pipe


def assert_same_maps(ours: list[Any], theirs: list[Any]) -> None:
    """Heat maps of the same texts, words and sites, bit for bit."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.prompt, a.words, a.size, a.positions) == (b.prompt, b.words, b.size, b.positions)
        for one, other in zip(a.layers, b.layers, strict=True):
            assert one.site == other.site and torch.equal(one.maps, other.maps)
