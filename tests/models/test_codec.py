"""Pictures and latents: the same as the pipeline's own decoding, and back."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

from sfumato.errors import BadInput
from sfumato.models import Model, quiet
from tests.tiny import tiny_model, tiny_pipeline

CODECS = ["sd", "sdxl", "sd3", "flux", "pixart", "pixart_alpha"]


def pictures(b: int = 2) -> torch.Tensor:
    return torch.rand(b, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", CODECS)
def test_decode_is_the_pipelines(kind: str) -> None:
    model = tiny_model(kind)
    call = dict(prompt=["a red cube"] * 2, height=32, width=48, num_inference_steps=2)
    if kind.startswith("pixart"):
        call["use_resolution_binning"] = False

    def run(output_type: str) -> torch.Tensor:
        with quiet():
            return model.pipe(**call, generator=torch.Generator().manual_seed(0), output_type=output_type).images

    latents = run("latent")
    if kind == "flux":
        latents = model.pipe._unpack_latents(latents, 32, 48, model.pipe.vae_scale_factor)
    assert torch.equal((model.decode(latents) * 0.5 + 0.5).clamp(0, 1), run("pt"))


IMG2IMG = {
    "sd": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
}


@pytest.mark.parametrize("kind", IMG2IMG)
def test_encode_is_the_img2img_pipelines(kind: str) -> None:
    """With the noise set to nothing, ``prepare_latents`` of the image-to-image pipeline is the encoding alone."""
    model = tiny_model(kind)
    extra = {"requires_safety_checker": False} if kind == "sd" else {}
    with quiet():
        pipe = IMG2IMG[kind](**model.pipe.components, **extra)
    pipe.scheduler = NoNoise()

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(2)]

    settings = dict(dtype=torch.float32, device=torch.device("cpu"), generator=generators())
    with quiet():
        theirs = pipe.prepare_latents(pictures(), torch.tensor([500]), 2, 1, **settings)
    assert torch.equal(model.encode_image(pictures(), generators()), theirs)


class NoNoise:
    """A scheduler that leaves the picture's latents as they are."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latents

    scale_noise = add_noise


@pytest.mark.parametrize("kind", CODECS)
def test_encode_undoes_the_scaling_of_decode(kind: str) -> None:
    """decode(latents) hands the decoder what encode_image would turn back into the latents."""
    model = tiny_model(kind)
    vae = model.pipe.vae
    posterior_mean = vae.encode(pictures(1)).latent_dist.mode()
    encoded = model.encode_image(pictures(1))
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    assert torch.allclose(encoded, (posterior_mean - shift) * scaling, atol=1e-6)
    assert torch.allclose(model.decode(encoded), vae.decode(posterior_mean).sample, atol=1e-4)


def test_mean_is_deterministic_and_a_draw_follows_its_own_generator() -> None:
    model = tiny_model("sd")
    images = pictures()
    assert torch.equal(model.encode_image(images), model.encode_image(images))
    pair = model.encode_image(images, [torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)])
    alone = model.encode_image(images[1:], [torch.Generator().manual_seed(8)])
    assert torch.equal(pair[1:], alone)


def test_sdxl_latent_statistics() -> None:
    pipe = tiny_pipeline("sdxl", fresh=True)
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std)
    model = Model(pipe)
    latents = model.encode_image(pictures(1))
    raw = pipe.vae.encode(pictures(1)).latent_dist.mode()
    standard = (raw - torch.tensor(mean).view(1, 4, 1, 1)) / torch.tensor(std).view(1, 4, 1, 1)
    assert torch.allclose(latents, standard * pipe.vae.config.scaling_factor, atol=1e-6)
    assert torch.allclose(model.decode(latents), pipe.vae.decode(raw).sample, atol=1e-4)


def test_float16_autoencoder_of_sdxl_is_lifted_and_put_back() -> None:
    pipe = tiny_pipeline("sdxl", fresh=True)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    seen = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    Model(pipe).decode(torch.zeros(1, 4, 16, 16))
    handle.remove()
    assert seen == [torch.float32]
    after = pipe.vae.state_dict()
    assert all(value.dtype == torch.float16 and torch.equal(value, before[name]) for name, value in after.items())


def test_gradients_flow_through_the_codec_and_not_into_weights() -> None:
    model = tiny_model("sd")
    with torch.enable_grad():
        latents = torch.zeros(1, 4, 16, 16, requires_grad=True)
        model.decode(latents).square().mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.pipe.vae.parameters())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"images have shape \(3, 32, 32\); expected \(b 3 H W\)"),
        (torch.zeros(1, 1, 32, 32), "expected"),
        (torch.zeros(1, 3, 30, 32), "height=30 does not fit"),
    ],
)
def test_encode_refuses(images: torch.Tensor, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tiny_model("sd").encode_image(images)
    with pytest.raises(BadInput, match="generators has 1 entries for 2 images"):
        tiny_model("sd").encode_image(torch.zeros(2, 3, 32, 32), [torch.Generator()])
