"""CLIP as a guide: texts, pictures and noised latents as unit vectors; how noise paths are brought to one form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sfumato import registry
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.models.readers import load_clip
from sfumato.models.readers.clip import NOISED, PLAIN, clip_for
from sfumato.models.readers.noised import PLANES, codec_hash, noise_level, noised_input
from tests.tiny import tiny_model, tiny_pipeline


def test_flow_and_diffusion_look_the_same_at_the_same_ratio():
    x0, eps = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    for flow_sigma in (0.0, 0.3, 0.5, 0.9, 1.0):
        norm = math.hypot(1 - flow_sigma, flow_sigma)
        alpha, sigma = (1 - flow_sigma) / norm, flow_sigma / norm
        level = noise_level(alpha, sigma)
        assert level.item() == pytest.approx(noise_level(1 - flow_sigma, flow_sigma).item(), abs=1e-6)
        diffused = noised_input(alpha * x0 + sigma * eps, level.expand(2))
        flowed = noised_input(((1 - flow_sigma) * x0 + flow_sigma * eps) / norm, level.expand(2))
        torch.testing.assert_close(diffused, flowed)
        assert diffused.shape == (2, 4 + PLANES, 16, 16)
        for k in range(PLANES):
            assert (diffused[0, 4 + k] == diffused[0, 4 + k, 0, 0]).all()
            assert diffused[0, 4 + k, 0, 0].item() == pytest.approx(math.cos(math.pi * k * level.item()), abs=1e-5)
    assert noise_level(1.0, 0.0) == 0 and noise_level(0.0, 1.0) == 1


def test_codec_mark_sees_weights_and_not_precision():
    vae = tiny_pipeline("sd", fresh=True).vae
    with torch.no_grad():
        for weight in vae.parameters():
            weight.copy_(weight.half().float())
    mark = codec_hash(vae)
    assert codec_hash(vae.half()) == mark and codec_hash(vae.float().bfloat16()) == mark
    with torch.no_grad():
        vae.decoder.conv_out.weight[0, 0, 0, 0] += 1
    assert codec_hash(vae) != mark


def test_text_templates_are_averaged():
    clip = load_clip("toy-clip")
    one, other = clip.text(["a red ball"]), clip.text(["a photo of a red ball"])
    both = clip.text(["a red ball"], ["{}", "a photo of {}"])
    torch.testing.assert_close(both, F.normalize((one + other) / 2, dim=-1))
    with pytest.raises(BadInput, match="lacks"):
        clip.text(["a red ball"], ["a photo"])


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(UnknownName, match="toy-clip"):
        load_clip("toy-clipp")
    with pytest.raises(BadWeights):
        load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(BadWeights, match="pickle"):
        load_clip(tmp_path)
    with pytest.raises(NotSupported, match="reads pictures"):
        load_clip("toy-clip").latents(torch.zeros(1, 4, 16, 16), 1.0, 0.0)
    for shape in ((1, 3, 16, 16), (1, 99, 16, 16), (16, 16)):
        with pytest.raises(BadInput, match=rf"reads latents \(b, \d+, h, w\), got \({shape[0]}, "):
            load_clip("toy-clip-noisy").latents(torch.zeros(*shape), 1.0, 0.0)


def test_a_picture_of_another_size_is_seen_like_its_own():
    clip = load_clip("toy-clip")
    smooth = F.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, (128, 128), mode="bicubic").clamp(-1, 1)
    small = F.interpolate(smooth, (64, 64), mode="bicubic", antialias=True)
    assert F.cosine_similarity(clip.pictures(smooth), clip.pictures(small)) > 0.999


def test_a_model_with_any_built_in_autoencoder_is_guided_by_a_built_in_clip():
    from diffusers import AutoencoderKL

    for name in ("toy-vae", "toy-vae-128"):
        model = tiny_model("sd", fresh=True)
        model.pipe.vae = AutoencoderKL.from_pretrained(registry.find(name))
        reads = load_clip(NOISED).fits(model)
        assert clip_for(model, None, "x").name == (NOISED if reads else PLAIN)
        assert clip_for(model, None, "x", noised=False).name == PLAIN
    with pytest.raises(NotSupported, match="clip=FOLDER"):
        clip_for(tiny_model("sd"), None, "x")
