"""Makes every picture that the README and the pages under docs/ show: ``python docs/pictures.py [NAME...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sfumato.toybox import Scene, Toy, render, sample_scene, to_uint8

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


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "toybox": toybox,
    "toybox-truth": toybox_truth,
    "toybox-edits": toybox_edits,
}


def main(names: list[str]) -> None:
    HERE.mkdir(exist_ok=True)
    for name in names or PICTURES:
        PICTURES[name]().save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
