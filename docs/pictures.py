"""Makes every picture that the README and the pages under docs/ show: ``python docs/pictures.py [NAME...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sfumato
from sfumato import masks
from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.judge.segmentation import normalise
from sfumato.sampling.request import as_pictures
from sfumato.steer.paint_with_words import PaintWithWords
from sfumato.steer.shape_guided import ShapeGuided
from sfumato.toybox import Scene, Toy, caption, render, sample_scene, to_uint8
from sfumato.toybox.dataset import draw_scene

HERE = Path(__file__).parent / "images"


def sheet(pixels: torch.Tensor, columns: int, gap: int = 4, scale: int = 1) -> Image.Image:
    """Pictures (b, 3, h, w) in [-1, 1] in rows of ``columns`` with white gaps."""
    tiles = to_uint8(pixels).permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)
    b, h, w, _ = tiles.shape
    rows = -(-b // columns)
    out = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        out[y : y + h, x : x + w] = tile
    return Image.fromarray(out)


def toybox() -> Image.Image:
    rng = np.random.default_rng(11)
    return sheet(render([sample_scene(rng) for _ in range(24)], size=128).image, 8)


def toybox_truth() -> Image.Image:
    """One scene: picture, instance mask, depth, normals."""
    frames = render(sample_scene(np.random.default_rng(4), toys=3), size=192, supersample=3)
    colors = torch.tensor([[0.85, 0.85, 0.85], [0.89, 0.29, 0.2], [0.2, 0.54, 0.74], [0.55, 0.74, 0.22]])
    mask = colors[frames.mask.long() + 1].permute(0, 3, 1, 2) * 2 - 1
    near = (1 / frames.depth.clamp_max(60))[:, None]
    depth = (near / near.max() * 2 - 1).expand_as(mask)
    return sheet(torch.cat((frames.image, mask, depth, frames.normal)), 4)


def toybox_edits() -> Image.Image:
    """One scene and five counterfactuals: the same scene with one thing changed."""
    scene = Scene((Toy("ball", "red", "striped", x=-0.7), Toy("cube", "green", size="small", x=0.7, yaw=25)), "tiles")
    edits = [
        scene,
        scene.replace(object="red ball", color="blue"),
        scene.replace(object="cube", shape="ring", pattern="dotted"),
        scene.remove("cube"),
        scene.add(Toy("cone", "yellow", size="small", x=0.05, z=0.9)),
        scene.replace(ground="snow", sky="sunset"),
    ]
    return sheet(render(edits, size=144, supersample=3).image, 6)


def demo() -> Image.Image:
    """What ``make demo`` makes: a picture and where each word of its prompt went."""
    found = sfumato.explain("a red cube and a blue ball on the grass", seed=3)
    return found.maps[0].grid(found.images[0])


def _held_out(n: int) -> list[str]:
    return [caption(draw_scene("test", 99, i)).text for i in range(n)]


def zoo() -> Image.Image:
    """toy-sd above, toy-sd3 below: the same 10 captions of scenes that neither has seen, first try, nothing chosen."""
    rows = [sfumato.make(_held_out(10), model=name, seed=0).pixels for name in ("toy-sd", "toy-sd3")]
    return sheet(torch.cat([row.detach() for row in rows]), 10, scale=2)


def _heat(what: Any, prompt: str | None, words: list[str], model: str, **options: Any) -> Image.Image:
    found = sfumato.explain(what, prompt, words=words, model=model, **options)
    return found.maps[0].grid(found.images[0])


def daam_sd3() -> Image.Image:
    return _heat(
        "a yellow cone and a red ring on the snow", None, ["yellow cone", "red ring", "snow"], "toy-sd3", seed=1
    )


def daam_existing() -> Image.Image:
    """A render, which no model made, and where the words of its caption are in it."""
    scene = Scene((Toy("ball", "red", "striped", x=-0.8), Toy("cube", "green", size="small", x=0.8)), "sand", "day")
    words = ["red striped ball", "green cube", "sand", "day"]
    return _heat(render(scene).pil(), caption(scene, style="full").text, words, "toy-sd", seed=0)


def _with_and_without(system: str, prompts: list[str]) -> Image.Image:
    """Above plain, below with a system: the same prompts and seeds, nothing chosen."""
    rows = [sfumato.make(prompts, n=4, seed=0, with_=with_).pixels for with_ in ([], [system])]
    return sheet(torch.cat([row.detach() for row in rows]), 4 * len(prompts), scale=2)


def attend_excite() -> Image.Image:
    return _with_and_without(
        "attend_excite",
        ["a red ball and a blue cone", "a green cube and a yellow ring", "a white cylinder and a purple cross"],
    )


def structured_guidance() -> Image.Image:
    return _with_and_without(
        "structured_guidance",
        ["a red cube and a blue ball", "a yellow cone and a green cylinder", "a purple ring and an orange cube"],
    )


def prompt_to_prompt() -> Image.Image:
    """Above: a picture, another prompt from the same seed, and the edit. Below: one word turned down and up."""
    old, new = "a red cube and a blue ball on the grass", "a green cube and a blue ball on the grass"

    def made(prompt: str, **params: Any) -> torch.Tensor:
        with_ = [{"method": "prompt_to_prompt", "params": {"source": old, **params}}] if params else []
        return sfumato.make(prompt, seed=3, with_=with_).pixels.detach()

    window = {"cross_replace": [0.8], "self_replace": [0.4]}
    above = [made(old), made(new), made(new, **window)]
    below = [made(old, reweight=[f"red={factor}"], cross_replace=[1.0]) for factor in (-2, 1, 4)]
    return sheet(torch.cat([*above, *below]), 3, scale=3)


def sad_pad() -> Image.Image:
    """Toys with too many red ones among them: what SaD says, attribute by attribute."""
    from sfumato.judge.features import clip_net
    from sfumato.judge.sad_pad import SadPad, plots

    clip, rng = clip_net(), np.random.default_rng(21)
    names = ["red", "green", "blue", "cube", "ball", "ring"]

    def features(n: int, red: float) -> np.ndarray:
        scenes = []
        for _ in range(n):
            color = rng.choice(["red", "green", "blue"], p=(red, (1 - red) / 2, (1 - red) / 2))
            shape = rng.choice(["cube", "ball", "ring"])
            scene = sample_scene(rng, 1, "any")
            scenes.append(scene.replace(object=0, color=str(color), shape=str(shape), pattern="plain", size="large"))
        frames = [render(scenes[start : start + 64]) for start in range(0, n, 64)]
        return np.concatenate([clip.features([part.pil(i) for i in range(len(part))]) for part in frames])

    system = SadPad(template="a {}")
    scores = system.scores(clip, names, features(400, 1 / 3), features(400, 0.6))
    return plots(system.compare(names, *scores))["attributes"]


def _toy() -> tuple[Scene, torch.Tensor, torch.Tensor]:
    """A scene of one toy, its picture (1, 3, h, w) and the toy's mask (h, w)."""
    scene = Scene((Toy("ball", "red", x=0.1, yaw=20),), "grass")
    frames = render(scene, 64)
    return scene, frames.image, (frames.mask[0] == 0).float()


def _masked(mask: torch.Tensor) -> torch.Tensor:
    return (mask * 2 - 1).expand(1, 3, -1, -1)


def blend() -> Image.Image:
    """A render, the region, and four pictures in which only the region was drawn anew."""
    _, image, mask = _toy()
    region = masks.dilate(mask, 2)
    made = sfumato.make(
        "a blue cube on the grass", image=image, strength=1.0, n=4, scheduler="ddim", with_=[Blend(mask=region)]
    )
    return sheet(torch.cat([image, _masked(region), made.pixels]), 6, scale=2)


def inpaint() -> Image.Image:
    """A render, the hole, the hole filled with three other toys and with the ground alone."""
    _, image, mask = _toy()
    hole = torch.zeros_like(mask)
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    hole[rows[0] - 2 : rows[-1] + 7, columns[0] - 7 : columns[-1] + 4] = 1  # the shadow too
    prompts = [
        "a blue cube on the grass",
        "a yellow cone on the grass",
        "a white striped ball on the grass",
        "the grass",
    ]
    filled = sfumato.make(
        prompts, model="toy-sd-inpaint", image=image, strength=1.0, seed=1, with_=[Inpaint(mask=hole)]
    ).pixels
    return sheet(torch.cat([image, image * (1 - hole), filled]), 6, scale=2)


def text_to_segmentation() -> Image.Image:
    """From above: pictures that show a ball, raw attention, the ball removed, refined masks, the segmenter's."""
    scenes = (draw_scene("test", 31, i, 1) for i in range(1000))
    told = [scene for scene in scenes if scene.toys[0].shape == "ball"][:72]
    images = torch.cat([render(told[i : i + 36], 64).image for i in (0, 36)])
    found = sfumato.segment("ball", as_pictures(images), steps=15, iterations=300)
    level = normalise(found.maps)
    rows = [images, _grey(level), found.removed]
    rows += [_grey(each.float()) for each in (found.refined, found.final())]
    return sheet(torch.cat([row[:10] for row in rows]), 10, scale=2)


def _grey(maps: torch.Tensor) -> torch.Tensor:
    """Maps (n, h, w) in [0, 1] as pictures."""
    return (maps * 2 - 1)[:, None].expand(-1, 3, -1, -1)


def shape_guided() -> Image.Image:
    """A render, a silhouette, toys drawn inside it from noise, and the render's toy in other colours."""
    _, image, mask = _toy()
    prompts = [f"a {color} ball on the grass" for color in ("blue", "yellow")]
    drawn = [
        sfumato.make(text, seed=1, guidance=4.5, with_=[ShapeGuided(words=["ball"], mask=mask)]).pixels
        for text in prompts
    ]
    edit = {"source": ["a red ball"], "words": ["ball"], "mask": mask}
    given = {"image": image, "strength": 1.0, "guidance": 4.5, "scheduler": "ddim"}
    edited = [sfumato.make(text, with_=[ShapeGuided(**edit)], **given).pixels for text in prompts]
    return sheet(torch.cat([_masked(mask), *drawn, image, *edited]), 6, scale=2)


def paint_with_words() -> Image.Image:
    """Left the painting, then the prompt alone and painted; below with the colours exchanged."""
    left, right = [0.03, 0.35, 0.45, 0.9], [0.55, 0.35, 0.97, 0.9]
    rows = []
    for red, blue in ((left, right), (right, left)):
        paint = torch.stack([masks.box_mask(red, (64, 64)), torch.zeros(64, 64), masks.box_mask(blue, (64, 64))])
        given = {"prompt": "a red cube and a blue ball", "n": 3, "seed": 0}
        painted = PaintWithWords(phrases=["red cube", "blue ball"], box=[red, blue], strength=0.4)
        rows += [paint[None] * 2 - 1, sfumato.make(**given).pixels, sfumato.make(**given, with_=[painted]).pixels]
    return sheet(torch.cat(rows), 7, scale=2)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "toybox": toybox,
    "toybox-truth": toybox_truth,
    "toybox-edits": toybox_edits,
    "demo": demo,
    "zoo": zoo,
    "daam-sd3": daam_sd3,
    "daam-existing": daam_existing,
    "attend-excite": attend_excite,
    "structured-guidance": structured_guidance,
    "prompt-to-prompt": prompt_to_prompt,
    "sad-pad": sad_pad,
    "blend": blend,
    "inpaint": inpaint,
    "text-to-segmentation": text_to_segmentation,
    "shape-guided": shape_guided,
    "paint-with-words": paint_with_words,
}


def main(names: list[str]) -> None:
    HERE.mkdir(exist_ok=True)
    for name in names or PICTURES:
        PICTURES[name]().save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
