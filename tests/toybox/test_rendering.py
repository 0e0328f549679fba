"""The renderer against an independent slow reference: march along each ray and ask, point by point, who is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sfumato.errors import BadInput
from sfumato.toybox import COLORS, SHAPES, Camera, Light, Scene, Toy, render, sample_scene
from sfumato.toybox.scene import DISTANCE, LOOK_HEIGHT, VIEW_WIDTH


def inside(shape: str, p: np.ndarray) -> np.ndarray:
    """Whether local points (..., 3) lie in a unit shape: written from what the words mean."""
    x, y, z = np.moveaxis(p, -1, 0)
    match shape:
        case "ball":
            return x**2 + (y - 0.5) ** 2 + z**2 < 0.25
        case "cube":
            return (abs(x) < 0.42) & (y > 0) & (y < 0.84) & (abs(z) < 0.42)
        case "cylinder":
            return (np.hypot(x, z) < 0.38) & (y > 0) & (y < 1)
        case "cone":
            return (np.hypot(x, z) < 0.52 * (1 - y / 1.05)) & (y > 0)
        case "ring":
            r = np.hypot(x, y - 0.5)
            return (r < 0.5) & (r > 0.25) & (abs(z) < 0.17)
        case "cross":
            upright = (abs(x) < 0.17) & (y > 0) & (y < 1)
            return (abs(z) < 0.17) & (upright | ((abs(x) < 0.5) & (abs(y - 0.5) < 0.17)))
    raise AssertionError(shape)


def march(scene: Scene, h: int, w: int, step: float = 0.004) -> tuple[np.ndarray, np.ndarray]:
    """Nearest toy (h, w; -1 none) and its depth along the viewing axis, by brute force in float64."""
    a, e = math.radians(scene.camera.azimuth), math.radians(scene.camera.elevation)
    forward = np.array([math.sin(a) * math.cos(e), -math.sin(e), math.cos(a) * math.cos(e)])
    right = np.array([math.cos(a), 0, -math.sin(a)])
    up = np.cross(forward, right)
    eye = np.array([0, LOOK_HEIGHT, 0]) - DISTANCE * forward
    owner, depth = np.full((h, w), -1), np.full((h, w), np.inf)
    t = np.arange(3.0, 9.0, step)
    for i in range(h):
        for j in range(w):
            u = ((j + 0.5) / w * 2 - 1) * VIEW_WIDTH / 2 / DISTANCE / scene.camera.zoom
            v = (1 - (i + 0.5) / h * 2) * h / w * VIEW_WIDTH / 2 / DISTANCE / scene.camera.zoom
            ray = forward + u * right + v * up
            ray /= np.linalg.norm(ray)
            points = eye + t[:, None] * ray
            for k, toy in enumerate(scene.toys):
                turn = math.radians(toy.yaw)
                q = points - [toy.x, 0, toy.z]
                local = np.stack(
                    (
                        math.cos(turn) * q[:, 0] - math.sin(turn) * q[:, 2],
                        q[:, 1],
                        math.sin(turn) * q[:, 0] + math.cos(turn) * q[:, 2],
                    ),
                    -1,
                )
                hit = inside(toy.shape, local / toy.scale)
                if hit.any():
                    z = t[hit.argmax()] * (ray @ forward)
                    if z < depth[i, j]:
                        owner[i, j], depth[i, j] = k, z
    return owner, depth


@pytest.mark.parametrize("seed", range(3))
def test_mask_and_depth_belong_to_the_rays_nearest_toy(seed):
    scene = sample_scene(np.random.default_rng(seed), toys=3)
    frames = render(scene, size=(24, 32))
    owner, depth = march(scene, 24, 32)
    mask = frames.mask[0].numpy()
    # A ray that grazes an edge by less than the marching step may be missed by the reference.
    assert (mask != owner).mean() < 0.01
    both = (mask == owner) & (owner >= 0)
    assert np.quantile(abs(frames.depth[0].numpy()[both] - depth[both]), 0.98) < 0.008


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_alone(shape):
    scene = Scene((Toy(shape, "red", size="large", x=0.2, z=-0.3, yaw=33.0),), camera=Camera(20.0, 12.0, 1.1))
    owner, depth = march(scene, 28, 28)
    frames = render(scene, size=28)
    assert (owner >= 0).sum() > 40
    assert (frames.mask[0].numpy() != owner).mean() < 0.01


def test_normals_are_unit_and_agree_with_depth():
    scene = Scene((Toy("ball", "blue"),), camera=Camera(elevation=15.0))
    frames = render(scene, size=128)
    ball = frames.mask[0] == 0
    n, z = frames.normal[0], frames.depth[0]
    assert torch.allclose(n.norm(dim=0)[ball], torch.ones(int(ball.sum())), atol=1e-4)
    # Points rebuilt from depth through the pinhole, their differences crossed, give the same normal.
    t = VIEW_WIDTH / 2 / DISTANCE
    grid = (torch.arange(128) + 0.5) / 64 - 1
    p = torch.stack((grid[None] * t * z, -grid[:, None] * t * z, -z))
    across, down = p[:, 1:-1, 2:] - p[:, 1:-1, :-2], p[:, 2:, 1:-1] - p[:, :-2, 1:-1]
    rebuilt = torch.nn.functional.normalize(torch.cross(down, across, dim=0), dim=0)
    inner = torch.nn.functional.max_pool2d((~ball)[None, None].float(), 5, 1, 2)[0, 0, 1:-1, 1:-1] == 0
    cosine = (rebuilt * n[:, 1:-1, 1:-1]).sum(0)[inner]
    assert cosine.min() > 0.99


def test_boxes_enclose_masks_tightly():
    rng = np.random.default_rng(0)
    frames = render([sample_scene(rng) for _ in range(12)])
    for mask, boxes in zip(frames.mask, frames.boxes, strict=True):
        for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            ys, xs = np.nonzero(mask.numpy() == i)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)


def test_unseen_toy_has_no_box():
    scene = Scene((Toy("cube", "red", size="large", z=-1.0), Toy("ball", "blue", size="small", z=1.5)))
    frames = render(scene)
    assert (frames.mask[0] != 1).all() and frames.boxes[0][1].isnan().all()


def test_relations_agree_with_the_picture():
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, toys=2) for _ in range(60)]
    frames = render(scenes)
    seen = 0
    for scene, mask, depth in zip(scenes, frames.mask, frames.depth, strict=True):
        areas = [(mask == i) for i in range(2)]
        if min(int(a.sum()) for a in areas) < 30:
            continue
        x = [a.nonzero()[:, 1].float().mean() for a in areas]
        z = [depth[a].mean() for a in areas]
        relation = scene.relation(0, 1)
        seen += 1
        match relation:
            case "left of":
                assert x[0] < x[1]
            case "right of":
                assert x[0] > x[1]
            case "in front of":
                assert z[0] < z[1]
            case "behind":
                assert z[0] > z[1]
        mirror = {"left of": "right of", "in front of": "behind"}
        mirror |= {v: k for k, v in mirror.items()} | {"next to": "next to"}
        assert scene.relation(1, 0) == mirror[relation]
    assert seen > 40


def test_counterfactual_color_changes_only_what_it_should():
    scene = Scene((Toy("ball", "red", x=-0.8), Toy("cube", "green", x=0.8)), ground="snow")
    before, after = render([scene, scene.replace(object="red ball", color="blue")]).image
    changed = (before != after).any(0)
    ball = render(scene).mask[0] == 0
    # Supersampled edges reach half a pixel beyond the centre ray's mask.
    near = torch.nn.functional.max_pool2d(ball[None, None].float(), 3, 1, 1)[0, 0] > 0
    assert changed[ball].all() and not changed[~near].any()


def test_shadow_falls_away_from_the_light():
    ball = Toy("ball", "white", size="large")
    left, right = (Scene((ball,), "snow", "day", light=Light(azimuth=a, elevation=40.0)) for a in (-70.0, 70.0))
    bare = [render(s.remove(0)).image[0].mean(0) for s in (left, right)]
    full = render([left, right])
    for i, side in enumerate(("right", "left")):
        darker = (bare[i] - full.image[i].mean(0) > 0.15) & (full.mask[i] < 0)
        x = darker.nonzero()[:, 1].float().mean()
        centre = (full.mask[i] == 0).nonzero()[:, 1].float().mean()
        assert (x > centre) if side == "right" else (x < centre)


def test_soft_shadows_have_a_penumbra_and_gloss_a_highlight():
    scene = Scene((Toy("cube", "red"),), "snow", light=Light(60.0, 35.0))
    hard, soft = render(scene, size=128, supersample=1).image[0], render(scene, size=128, supersample=4).image[0]
    assert len(torch.unique((soft * 100).round())) > len(torch.unique((hard * 100).round()))
    dull, shiny = (render(Scene((Toy("ball", "black", gloss=g),)), size=96).image[0] for g in (0.0, 1.0))
    ball = render(Scene((Toy("ball", "black"),)), size=96).mask[0] == 0
    assert shiny[:, ball].max() > dull[:, ball].max() + 0.5


def test_batches_sizes_and_chunks_do_not_change_a_picture():
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng) for _ in range(5)]
    together = render(scenes, size=(40, 56))
    assert together.image.shape == (5, 3, 40, 56)
    alone = render(scenes[3], size=(40, 56))
    assert torch.allclose(together.image[3], alone.image[0], atol=1e-4)
    assert torch.equal(together.mask[3], alone.mask[0])
    assert torch.allclose(render(scenes, size=(40, 56), chunk=2).image, together.image, atol=1e-4)


def test_empty_scene_and_all_colors():
    assert (render(Scene(())).mask == -1).all()
    means = {}
    for color in COLORS:
        frames = render(Scene((Toy("ball", color),), "tiles"))
        means[color] = frames.image[0][:, frames.mask[0] == 0].mean(1)
    names = list(means)
    gaps = [float((means[a] - means[b]).norm()) for i, a in enumerate(names) for b in names[:i]]
    assert min(gaps) > 0.2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"size": 4}, "size"), ({"size": (64, 9999)}, "size"), ({"supersample": 0}, "supersample")],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(BadInput, match=word):
        render(Scene(()), **arguments)
    with pytest.raises(BadInput, match="at least one scene"):
        render([])
