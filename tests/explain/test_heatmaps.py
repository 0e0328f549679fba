"""HeatMaps on maps made by hand: word maps, scales, masks, overlaps, files and pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from sfumato.attention import Site
from sfumato.attention.accumulate import LayerMaps
from sfumato.errors import BadInput, NoMatch, UnknownName
from sfumato.explain import heat_overlays
from sfumato.explain.heatmaps import HeatMaps
from sfumato.models.families import TextStream
from sfumato.text import Words
from tests.tiny import clip_tokenizer

PROMPT = "a red cube on a cube"  # positions: 0 start, 1 a, 2 red, 3 cube, 4 on, 5 a, 6 cube, 7 end


def layer(block, grid, steps=1, heads=1, seed=0):
    maps = torch.rand(steps, heads, 8, *grid, generator=torch.Generator().manual_seed(seed))
    site = Site(f"{block}.attn2", "cross", grid, (0, 77), (0, grid[0] * grid[1]), heads, block, seed)
    return LayerMaps(site, maps, heads, (2,) * steps, tuple(range(steps)) if steps > 1 else ())


def heatmaps(**changes):
    reading = Words([TextStream(clip_tokenizer(), "clip", 0, 77, str)]).read(PROMPT)
    layers = (layer("down.0", (6, 4), seed=1), layer("up.1", (3, 2), seed=2))
    words = tuple(span.label for span in reading.all())
    return HeatMaps(
        **{**dict(reading=reading, layers=layers, positions=tuple(range(8)), size=(48, 32), words=words), **changes}
    )


def up(maps, size):
    return F.interpolate(maps[None], size=size, mode="bicubic")[0].clamp(min=0)


def test_a_word_map_is_the_mean_over_layers_and_sub_tokens():
    maps = heatmaps()
    assert maps.words == ("a#1", "red", "cube#1", "on", "a#2", "cube#2") and maps.resolution == (6, 4)
    tokens = (maps.layers[0].maps[0, 0] + up(maps.layers[1].maps[0, 0], (6, 4))) / 2
    torch.testing.assert_close(maps.tokens(), tokens)
    torch.testing.assert_close(maps.map("red", size=(6, 4)), tokens[2])
    torch.testing.assert_close(maps.map("red cube", size=(6, 4)), tokens[[2, 3]].mean(0))
    torch.testing.assert_close(maps.map("red cube"), up(tokens[[2, 3]].mean(0, keepdim=True), (48, 32))[0])
    torch.testing.assert_close(maps.map(maps.reading.span(2, 10), size=(6, 4)), tokens[[2, 3]].mean(0))
    torch.testing.assert_close(maps.map("<end>", size=(6, 4)), tokens[7])
    torch.testing.assert_close(
        maps.map("red", layers=["up"], size=(6, 4)), up(maps.layers[1].maps[0, 0, 2:3], (6, 4))[0]
    )


def test_repeated_words_are_told_apart_or_merged_on_request():
    maps = heatmaps()
    with pytest.raises(BadInput, match="'cube' occurs 2 times.*'cube#1' or 'cube#2'"):
        maps.map("cube")
    both = (maps.map("cube#1", size=(6, 4)) + maps.map("cube#2", size=(6, 4))) / 2
    torch.testing.assert_close(maps.map("cube", merge=True, size=(6, 4)), both)
    torch.testing.assert_close(heatmaps(reference=True, layers=maps.layers[:1]).map("cube", size=(6, 4)),
                               2 * maps.layers[0].maps[0, 0, [3, 6]].mean(0))  # fmt: skip


def test_the_reference_scale_sums_calls_and_weighs_heads_alike():
    layers = (layer("down.0", (6, 4), heads=3, seed=1), layer("up.1", (3, 2), heads=2, seed=2))
    maps = heatmaps(layers=layers, reference=True)
    every_head = [2 * m for each in layers for m in each.maps[0]]
    expected = torch.stack([up(m, (6, 4)) for m in every_head]).mean(0)
    torch.testing.assert_close(maps.tokens(), expected)
    ours = heatmaps(layers=layers)
    torch.testing.assert_close(ours.tokens(), torch.stack([up(e.maps[0].mean(0), (6, 4)) for e in layers]).mean(0))


def test_scales():
    maps = heatmaps()
    raw = maps.map("red")
    unit, peak = maps.normalized("minmax").map("red"), maps.normalized("max").map("red")
    torch.testing.assert_close(unit, (raw - raw.min()) / (raw.max() - raw.min()))
    torch.testing.assert_close(peak, raw / raw.max())
    share = maps.normalized("tokens").map("red", size=(6, 4))
    torch.testing.assert_close(share, maps.tokens()[2] / (maps.tokens()[1:7].sum(0) + 1e-6))
    assert torch.equal(maps.map("red"), raw) and torch.equal(maps.normalized("max").normalized("raw").map("red"), raw)
    with pytest.raises(UnknownName, match="unknown normalization 'maxx'. Did you mean 'max'"):
        maps.normalized("maxx")
    flat = heatmaps(layers=(LayerMaps(maps.layers[0].site, torch.ones(1, 1, 8, 6, 4), 1, (1,)),))
    assert (flat.normalized("minmax").map("red") == 0).all() and not flat.mask("red").any()


def test_masks_and_overlaps():
    maps = heatmaps()
    raw = maps.map("red")
    expected = (raw - raw.min()) / (raw.max() - raw.min()) > 0.4
    assert torch.equal(maps.mask("red"), expected)
    assert torch.equal(maps.normalized("max").mask("red", 0.7), raw / raw.max() > 0.7)
    other = maps.mask("on", 0.5)
    a = maps.mask("red", 0.5)
    assert maps.iou("red", "on", 0.5) == pytest.approx(((a & other).sum() / (a | other).sum()).item())
    assert maps.iou("red", "red") == 1 and maps.iou("red", torch.zeros(48, 32)) == 0
    with pytest.raises(BadInput, match="the mask has shape .3, 3.; the picture's is .48, 32."):
        maps.iou("red", np.zeros((3, 3)))
    with pytest.raises(BadInput, match="tau=1.5"):
        maps.mask("red", 1.5)


def test_what_is_not_there():
    maps = heatmaps()
    with pytest.raises(NoMatch, match="'cone' is not in the prompt. Did you mean 'on'"):
        maps.map("cone")
    with pytest.raises(NoMatch, match="'<pad>' was not recorded; its maps need padding=True"):
        maps.map("<pad>")
    with pytest.raises(UnknownName, match="unknown text encoder 't5'"):
        maps.map("red", stream="t5")
    with pytest.raises(NoMatch, match="match none of the recorded ones: down.0, up.1"):
        maps.map("red", layers=["mid"])


def test_saved_and_loaded_maps_are_the_same(tmp_path):
    layers = (layer("down.0", (6, 4), steps=3, heads=2, seed=1),)
    maps = heatmaps(layers=layers, facts={"model": "tiny", "seed": 3}).normalized("tokens")
    path = maps.save(tmp_path / "maps.safetensors")
    again = HeatMaps.load(path)
    assert again.words == maps.words and again.facts == maps.facts and again.normalization == "tokens"
    for options in ({}, {"steps": [2], "heads": [0]}):
        assert torch.equal(again.map("red cube", **options), maps.map("red cube", **options))
    assert again.reading == maps.reading and again.layers[0].site == layers[0].site
    assert [p.name for p in tmp_path.iterdir()] == ["maps.safetensors"]


def test_other_files_are_refused(tmp_path):
    path = heatmaps().save(tmp_path / "maps.safetensors")
    whole = path.read_bytes()
    for broken in (b"", b"PK\x03\x04", whole[:100], whole[:-7]):
        path.write_bytes(broken)
        with pytest.raises(BadInput, match="holds no heat maps, or it is damaged"):
            HeatMaps.load(path)
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(BadInput, match="no heat maps of this version"):
        HeatMaps.load(path)
    for told in ("{", "[]", json.dumps({"layers": []})):
        metadata = {"format": "sfumato.heatmaps.1", "heatmaps": told}
        path.write_bytes(safetensors.torch.save({"0": torch.zeros(1)}, metadata))
        with pytest.raises(BadInput, match="damaged"):
            HeatMaps.load(path)
    with pytest.raises(OSError):
        HeatMaps.load(tmp_path / "none.safetensors")


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_small_pictures_are_shown_enlarged_by_whole_factors():
    assert heat_overlays.enlarged_size((64, 64)) == (256, 256) and heat_overlays.enlarged_size((48, 32)) == (240, 160)
    assert heat_overlays.enlarged_size((512, 768)) == (512, 768)


def test_colours_follow_the_table():
    from matplotlib import colormaps

    ramp = torch.linspace(0, 1, 5)[None]
    expected = (np.array(colormaps["magma"](ramp.numpy())[..., :3]) * 255).round()
    assert np.abs(heat_overlays.colour(ramp, "magma").astype(int) - expected).max() <= 1
    with pytest.raises(BadInput, match="colours='nope' is not a matplotlib colour map"):
        heat_overlays.colour(ramp, "nope")


def test_an_overlay_glows_where_the_map_is_hot_and_keeps_the_shapes_of_the_picture():
    image = Image.new("RGB", (32, 48), (0, 200, 0))
    image.paste((0, 40, 0), (0, 0, 16, 48))  # left half darker
    warm = torch.zeros(48, 32)
    warm[:24] = 1
    shown = np.asarray(heat_overlays.overlay(image, warm), dtype=float)
    assert shown.shape == (48, 32, 3)
    for x in (5, 25):
        assert shown[5, x].sum() > 2 * shown[40, x].sum()  # hot is bright whatever lies below
    for y in (5, 40):
        assert shown[y, 25].sum() > shown[y, 5].sum() + 30  # and the picture shows through everywhere
    maps = heatmaps()
    assert maps.overlay(image, "red").size == (160, 240)


def test_the_grid_holds_the_picture_and_every_word():
    maps, image = heatmaps(), Image.new("RGB", (32, 48), (0, 200, 0))
    sheet = np.asarray(maps.grid(image))
    assert sheet.shape[1] == 3 * (160 + 8) + 8 and sheet.shape[0] > 3 * 240
    cells = [maps.overlay(image, word) for word in ("red", "on")]
    found = maps.grid(image, ["red", "on"])
    for cell, x in zip(cells, (8 + 168, 8 + 2 * 168), strict=True):
        column = np.asarray(found)[-8 - 240 : -8, x : x + 160]
        assert np.array_equal(column, np.asarray(cell))
