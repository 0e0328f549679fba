"""Distances, crops and weights in CLIP's space by hand; how noise paths are brought to one form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sfumato.clip import (
    PLANES,
    Cutouts,
    codec_mark,
    cosine,
    load_clip,
    log_probability,
    noise_level,
    noised_input,
    out_of_range,
    shares,
    total_variation,
    weighted,
)
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from tests.tiny import tiny_pipeline


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_cosine_by_hand():
    x, y = 3 * unit(4, 6), unit(2, 6, seed=2)
    for i in range(4):
        for j in range(2):
            assert cosine(x, y)[i, j].item() == pytest.approx(float(x[i] @ y[j]) / 3)


def test_log_probability_is_the_cross_entropy_of_the_own_class():
    seen, own, rivals = unit(3, 6), unit(3, 6, seed=1), unit(4, 6, seed=2)
    for i, value in enumerate(log_probability(seen, own, rivals, 7.0)):
        logits = torch.stack([seen[i] @ own[i], *(seen[i] @ rival for rival in rivals)]) * 7
        assert float(-F.cross_entropy(logits[None], torch.tensor([0]))) == pytest.approx(float(value))


def test_total_variation_and_range_by_hand():
    pixels = torch.tensor([[[[0.0, 2.0], [0.5, -1.5]]] * 3])
    right, down = (2.0**2 + 2.0**2) / 2, (0.5**2 + 3.5**2) / 2
    assert float(total_variation(pixels)) == pytest.approx(right + down)
    assert float(out_of_range(pixels)) == pytest.approx((1.0 + 0.25) / 4)


@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_cutouts_lie_inside_and_favour_large_ones(size):
    boxes = Cutouts(2000, power=0.5, smallest=0.5).draw(size, torch.Generator().manual_seed(0))
    sides = torch.tensor([side for _, _, side in boxes]).double() / min(size)
    assert (
        all(0 <= top <= size[0] - side and 0 <= left <= size[1] - side for top, left, side in boxes)
        and sides.min() >= 0.5
    )
    # the mean of u^power is 1 / (power + 1); sides are rounded down to pixels
    assert sides.mean().item() == pytest.approx(0.5 + 0.5 * 2 / 3, abs=0.03)
    tops = torch.tensor([top / (size[0] - side) for top, _, side in boxes if side < size[0]])
    assert tops.mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_cutout_of_the_right_size_is_the_picture_itself():
    picture = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    crops = Cutouts(2).cut(picture, [(3, 5, 8), (0, 0, 20)], 8)
    assert crops.shape == (2, 3, 8, 8) and torch.equal(crops[0], picture[:, 3:11, 5:13])


def test_weights_are_read_and_shared():
    assert weighted("a red ball:0.5") == ("a red ball", 0.5)
    assert weighted("a scale of 1:x") == ("a scale of 1:x", 1.0)
    assert weighted("C:/art/x.png:-2") == ("C:/art/x.png", -2.0)
    assert shares([1.0, 3.0], "t") == [0.25, 0.75] and shares([1.0, -3.0], "t") == [0.5, -1.5]
    for bad in ("a ball:nan", "a ball:inf", "", "  "):
        with pytest.raises(BadInput):
            weighted(bad)
    with pytest.raises(BadInput, match="add up to zero"):
        shares([1.0, -1.0], "t")


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
    mark = codec_mark(vae)
    assert codec_mark(vae.half()) == mark and codec_mark(vae.float().bfloat16()) == mark
    with torch.no_grad():
        vae.decoder.conv_out.weight[0, 0, 0, 0] += 1
    assert codec_mark(vae) != mark


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


def test_a_picture_of_another_size_is_seen_like_its_own():
    clip = load_clip("toy-clip")
    smooth = F.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, (128, 128), mode="bicubic").clamp(-1, 1)
    small = F.interpolate(smooth, (64, 64), mode="bicubic", antialias=True)
    assert cosine(clip.pictures(smooth), clip.pictures(small)) > 0.999
