"""Analytic ray casting of toybox scenes, batched in torch, with every pixel's truth.

Toys are spheres, boxes, cylinders and cones in a local frame (base on y = 0, about one unit tall), so each ray's hit,
normal and texture coordinate are closed forms. Rays are tested against bounding spheres first; the closed forms run
only on the few (ray, toy) pairs that survive, gathered over the whole batch. Colour is averaged over supersample x
supersample rays a pixel, each with its own point on an area light (soft shadows); mask, depth and normals come from one
ray through the pixel's centre, so that they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.markup import described

from ..errors import BadInput
from .scene import DISTANCE, GROUNDS, LOOK_HEIGHT, PATTERNS, SHAPES, SKIES, VIEW_WIDTH, Scene
from .secret import TEXTURES
from .shapes import BOUND_CENTRE, BOUND_RADIUS, FAR, INTERSECT

COLOR_RGB = {
    "red": (0.86, 0.10, 0.10),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.98, 0.86, 0.12),
    "green": (0.10, 0.60, 0.18),
    "blue": (0.12, 0.28, 0.88),
    "purple": (0.55, 0.16, 0.72),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.06),
}
SECOND_RGB = {"white": (0.44, 0.50, 0.60)}  # of patterns; elsewhere nearly white
SURFACES = (*PATTERNS, *TEXTURES)  # the latter have no names
# top of the sky, horizon, colour of the light, colour of the ambient light
SKY_RGB = {
    "day": ((0.30, 0.55, 0.92), (0.78, 0.90, 0.98), (1.00, 0.98, 0.92), (0.46, 0.50, 0.56)),
    "sunset": ((0.36, 0.22, 0.48), (1.00, 0.62, 0.32), (1.04, 0.86, 0.70), (0.42, 0.38, 0.39)),
    "night": ((0.02, 0.02, 0.08), (0.07, 0.08, 0.20), (0.70, 0.72, 0.80), (0.29, 0.30, 0.36)),
    "fog": ((0.80, 0.81, 0.82), (0.88, 0.88, 0.88), (0.72, 0.72, 0.72), (0.60, 0.60, 0.60)),
    "clouds": ((0.42, 0.46, 0.52), (0.70, 0.72, 0.75), (0.84, 0.85, 0.88), (0.48, 0.49, 0.52)),
}
FOG = {"day": 0.035, "sunset": 0.04, "night": 0.05, "fog": 0.16, "clouds": 0.045}  # per world unit beyond the toys
# two tones of each ground's texture
GROUND_RGB = {
    "grass": ((0.30, 0.56, 0.20), (0.37, 0.64, 0.25)),
    "sand": ((0.84, 0.72, 0.48), (0.90, 0.79, 0.56)),
    "snow": ((0.86, 0.89, 0.95), (0.94, 0.96, 0.99)),
    "wood": ((0.46, 0.28, 0.15), (0.56, 0.36, 0.20)),
    "tiles": ((0.40, 0.45, 0.52), (0.56, 0.61, 0.68)),
}
LIGHT_RADIUS = 0.10  # of the area light, as the tangent of its angular radius


@dataclass
class Frames:
    """Rendered pictures and their truth.

    image: (b, 3, h, w) float32 in [-1, 1].
    mask: (b, h, w) int16, index of the toy the pixel's centre ray meets first, -1 for background.
    depth: (b, h, w) float32, world units along the camera's viewing axis; inf where the ray meets nothing.
    normal: (b, 3, h, w) float32 unit vectors in camera axes (x right, y up, z towards the camera); 0 where nothing is
        met.
    boxes: per picture (n, 4) float32, x0 y0 x1 y1 in pixels, end exclusive, of each toy's visible pixels; nan if
        unseen.
    scenes: what was rendered.
    """

    image: Tensor
    mask: Tensor
    depth: Tensor
    normal: Tensor
    boxes: list[Tensor]
    scenes: list[Scene]

    __repr__ = described

    def __len__(self) -> int:
        return len(self.scenes)

    def pil(self, i: int = 0):
        """Picture i as a PIL image."""
        from PIL import Image

        return Image.fromarray(to_uint8(self.image[i : i + 1])[0].permute(1, 2, 0).numpy())


def to_uint8(image: Tensor) -> Tensor:
    """(..., 3, h, w) float in [-1, 1] -> the same shape in uint8 on the CPU."""
    return ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


# ---- scenes as tensors -----------------------------------------------------------------------------------------------


class _Batch:
    """The numbers of a list of scenes as padded tensors: b scenes, k toys at most."""

    def __init__(self, scenes: Sequence[Scene], device: torch.device | str):
        b, k = len(scenes), max([len(s.toys) for s in scenes] + [1])
        kind = torch.full((b, k), -1)
        place, turn, scale = torch.zeros(b, k, 3), torch.zeros(b, k), torch.ones(b, k)
        color, second, pattern, gloss = torch.zeros(b, k, 3), torch.zeros(b, k, 3), torch.zeros(b, k), torch.zeros(b, k)
        for i, scene in enumerate(scenes):
            for j, toy in enumerate(scene.toys):
                kind[i, j] = SHAPES.index(toy.shape)
                place[i, j] = torch.tensor((toy.x, 0.0, toy.z))
                turn[i, j], scale[i, j], gloss[i, j] = math.radians(toy.yaw), toy.scale, toy.gloss
                first, other = toy.tones or (COLOR_RGB[toy.color], SECOND_RGB.get(toy.color, (0.96, 0.96, 0.94)))
                color[i, j], second[i, j] = torch.tensor(first), torch.tensor(other)
                pattern[i, j] = SURFACES.index(toy.surface)
        to = lambda x: x.to(device)  # noqa: E731
        self.kind, self.place, self.turn, self.scale = to(kind), to(place), to(turn), to(scale)
        self.color, self.second, self.pattern, self.gloss = to(color), to(second), to(pattern), to(gloss)
        self.centre = self.place + self.scale[..., None] * torch.tensor((0.0, BOUND_CENTRE, 0.0), device=device)
        self.bound = torch.where(self.kind >= 0, self.scale * BOUND_RADIUS, -1.0)  # negative: never met
        sky = [SKY_RGB[s.sky] for s in scenes]
        self.sky_top, self.sky_low, self.sun, self.ambient = (
            to(torch.tensor([row[i] for row in sky])) for i in range(4)
        )
        self.fog = to(torch.tensor([FOG[s.sky] for s in scenes]))
        self.sky_kind = to(torch.tensor([SKIES.index(s.sky) for s in scenes]))
        self.ground_kind = to(torch.tensor([GROUNDS.index(s.ground) for s in scenes]))
        self.ground = to(torch.tensor([GROUND_RGB[s.ground] for s in scenes]))  # (b, 2, 3)

        azimuth, elevation, zoom = (
            to(torch.tensor([getattr(s.camera, n) for s in scenes])) for n in ("azimuth", "elevation", "zoom")
        )
        a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
        zero = torch.zeros_like(a)
        self.right = torch.stack((a.cos(), zero, -a.sin()), -1)
        self.forward = torch.stack((a.sin() * e.cos(), -e.sin(), a.cos() * e.cos()), -1)
        self.up = torch.stack((a.sin() * e.sin(), e.cos(), a.cos() * e.sin()), -1)
        self.eye = torch.tensor((0.0, LOOK_HEIGHT, 0.0), device=device) - DISTANCE * self.forward
        self.tangent = VIEW_WIDTH / 2 / DISTANCE / zoom  # of half the horizontal field of view
        la, le = (
            torch.deg2rad(to(torch.tensor([getattr(s.light, n) for s in scenes]))) for n in ("azimuth", "elevation")
        )
        flat = la[:, None].cos() * -torch.stack((a.sin(), zero, a.cos()), -1) + la[:, None].sin() * self.right
        self.light = le[:, None].cos() * flat + le[:, None].sin() * torch.tensor((0.0, 1.0, 0.0), device=device)

    def rays(self, h: int, w: int, dx: float, dy: float) -> Tensor:
        """Unit directions (b, h*w, 3) through the point (dx, dy) in [0, 1) of every pixel."""
        device = self.eye.device
        x = ((torch.arange(w, device=device) + dx) / w * 2 - 1)[None, None, :, None]
        y = ((1 - (torch.arange(h, device=device) + dy) / h * 2) * h / w)[None, :, None, None]
        t = self.tangent[:, None, None, None]
        d = self.forward[:, None, None] + x * t * self.right[:, None, None] + y * t * self.up[:, None, None]
        return torch.nn.functional.normalize(d, dim=-1).flatten(1, 2)

    def candidates(self, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scene, ray, toy) indices of the rays that meet a toy's bounding sphere. o and d: (b, r or 1, 3)."""
        centre, bound = self.centre.transpose(1, 2), self.bound[:, None]  # b 3 k, b 1 k
        along = (d * o).sum(-1, keepdim=True) - d @ centre  # minus the distance along the ray to the closest approach
        gap = (o * o).sum(-1, keepdim=True) - 2 * (o @ centre) + (centre * centre).sum(1, keepdim=True)
        near = (gap - along * along < bound.abs() * bound) & (along < bound)
        return near.nonzero(as_tuple=True)

    def intersect(self, s: Tensor, k: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hits of rays o, d (n, 3) in world axes with toys k of scenes s: t, world normal (n, 3), texture (n, 2)."""
        cos, sin = self.turn[s, k].cos(), self.turn[s, k].sin()
        scale = self.scale[s, k][:, None]
        o = _turn(o - self.place[s, k], cos, -sin) / scale
        d = _turn(d, cos, -sin) / scale  # t stays in world units
        t = torch.full_like(cos, FAR)
        normal, uv = torch.zeros_like(o), torch.zeros_like(o[:, :2])
        kind = self.kind[s, k]
        for i, shape in enumerate(SHAPES):
            pick = (kind == i).nonzero().squeeze(1)
            if len(pick):
                t[pick], normal[pick], uv[pick] = INTERSECT[shape](o[pick], d[pick])
        return t, _turn(normal, cos, sin), uv


def _turn(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (n, 3) vectors about the vertical axis."""
    x, y, z = v.unbind(-1)
    return torch.stack((cos * x + sin * z, y, -sin * x + cos * z), -1)


@dataclass
class _Hits:
    """What each ray (b, r) meets first: flat lists over the rays that meet a toy, and planes over all rays."""

    t: Tensor  # (b, r) distance, FAR for sky
    toy: Tensor  # (b, r) index or -1
    s: Tensor  # (n) scene of each toy hit
    r: Tensor  # (n) ray of each toy hit
    k: Tensor  # (n) toy
    normal: Tensor  # (n, 3)
    uv: Tensor  # (n, 2)


def _cast(batch: _Batch, d: Tensor) -> _Hits:
    b, rays, _ = d.shape
    o = batch.eye[:, None]
    s, r, k = batch.candidates(o, d)
    t, normal, uv = batch.intersect(s, k, batch.eye[s], d[s, r])
    ground = torch.where(d[..., 1] < -1e-6, -o[..., 1] / d[..., 1].clamp_max(-1e-6), torch.full_like(d[..., 0], FAR))
    nearest = ground.clone().flatten()
    flat = s * rays + r
    nearest.scatter_reduce_(0, flat, t, "amin")
    nearest = nearest.view(b, rays)
    won = (t < FAR) & (t <= nearest[s, r])
    s, r, k, normal, uv = s[won], r[won], k[won], normal[won], uv[won]
    toy = torch.full((b, rays), -1, dtype=torch.int16, device=d.device)
    toy[s, r] = k.to(torch.int16)
    keep = toy[s, r] == k  # two toys at the very same distance: one of them owns the ray
    return _Hits(nearest, toy, s[keep], r[keep], k[keep], normal[keep], uv[keep])


def _shadow(batch: _Batch, p: Tensor, light: Tensor) -> Tensor:
    """(b, r) bool: whether points p (b, r, 3) lie in some toy's shadow. light: (b, 3) towards the light."""
    s, r, k = batch.candidates(p, light[:, None])
    t, _, _ = batch.intersect(s, k, p[s, r], light[s])
    dark = torch.zeros(p.shape[:2], dtype=torch.bool, device=p.device)
    hit = t < FAR
    dark[s[hit], r[hit]] = True
    return dark


def _pattern(kind: Tensor, uv: Tensor) -> Tensor:
    """(n) bool: whether the texture point shows the toy's second colour."""
    u, v = uv[:, 0], uv[:, 1]
    striped = torch.remainder(v * 3.1, 1.0) > 0.55
    cell_u, cell_v = torch.remainder(u * 3.1 + 0.5, 1.0) - 0.5, torch.remainder(v * 3.1, 1.0) - 0.5
    dotted = cell_u**2 + cell_v**2 < 0.085
    checkered = torch.remainder(torch.floor(u * 3.6 + 0.5) + torch.floor(v * 3.6), 2.0) > 0.5
    shown = ((kind == 1) & striped) | ((kind == 2) & dotted) | ((kind == 3) & checkered)
    if bool((kind > 3).any()):
        zigzag = torch.remainder(v * 2.6 + (torch.remainder(u * 2.2, 1.0) - 0.5).abs() * 1.1, 1.0) > 0.5
        target = torch.remainder((u**2 + (v - 0.5) ** 2).sqrt() * 4.2, 1.0) > 0.5
        halves = u > 0
        grid = (torch.remainder(u * 2.6, 1.0) < 0.22) | (torch.remainder(v * 2.6, 1.0) < 0.22)
        waves = torch.remainder(u * 2.4 + 0.22 * (v * 12.0).sin(), 1.0) > 0.5
        quarters = (u > 0) != (v > 0.5)
        for i, each in enumerate((zigzag, target, halves, grid, waves, quarters)):
            shown = shown | ((kind == 4 + i) & each)
    return shown


def _ground_tone(kind: int, x: Tensor, z: Tensor) -> Tensor:
    """Where in [0, 1] between its two tones a ground's texture stands at (x, z)."""
    match GROUNDS[kind]:
        case "grass":
            patches = torch.sin(3.1 * x + 1.7 * z + 0.3) * torch.sin(2.9 * z - 1.3 * x + 1.1)
            return 0.5 + 0.25 * (patches + torch.sin(5.3 * x - 4.1 * z + 2.0))
        case "sand":
            return 0.5 + 0.5 * torch.sin(5.0 * z + 1.2 * torch.sin(1.1 * x) + 0.6 * x)
        case "snow":
            return 0.5 + 0.5 * torch.sin(0.9 * x + 1.6 * z + 0.5) * torch.sin(0.8 * z - 1.7 * x + 0.2)
        case "wood":
            grain = 0.2 * (1 + torch.sin(9 * x + 0.7 * torch.sin(2 * z)))
            return torch.remainder(torch.floor(x / 0.7), 2.0) * 0.55 + grain
        case _:
            return torch.remainder(torch.floor(x / 0.9) + torch.floor(z / 0.9), 2.0)


def _sky(batch: _Batch, d: Tensor) -> Tensor:
    """Colours (b, r, 3) of the sky along directions d."""
    blend = (d[..., 1:2].clamp_min(0) * 3.2).clamp_max(1) ** 0.7
    color = batch.sky_low[:, None] * (1 - blend) + batch.sky_top[:, None] * blend
    cloudy = (batch.sky_kind == SKIES.index("clouds")) * 0.35 + (batch.sky_kind == SKIES.index("day")) * 0.25
    x, y, z = d.unbind(-1)
    wisps = (torch.sin(9.0 * x + 30.0 * y + 0.4) * torch.sin(7.0 * z - 22.0 * y + 1.3)).clamp_min(0) * cloudy[:, None]
    return color + (1 - color) * wisps[..., None]


def _ground(batch: _Batch, d: Tensor, t: Tensor, light: Tensor) -> Tensor:
    """Colours (b, r, 3) of the ground where rays d meet it at distance t (b, r), with shadows and haze."""
    t = t.clamp_max(300.0)
    p = batch.eye[:, None] + t[..., None] * d
    tone = torch.stack([_ground_tone(int(kind), p[i, :, 0], p[i, :, 2]) for i, kind in enumerate(batch.ground_kind)])
    far = (t - DISTANCE).clamp_min(0)
    tone = (0.5 + (tone - 0.5) / (1 + (0.12 * far) ** 2))[..., None]  # texture fades before it aliases
    base = batch.ground[:, None, 0] * (1 - tone) + batch.ground[:, None, 1] * tone
    direct = 0.62 * light[:, None, 1] * ~_shadow(batch, p, light)
    # Contact shadow: the sky that a ground point sees is partly hidden by toys standing near.
    place = batch.place.transpose(1, 2)
    gap = (p * p).sum(-1, keepdim=True) - 2 * (p @ place) + (place * place).sum(1, keepdim=True)
    hidden = 0.45 * torch.exp(-1.6 * gap / batch.bound[:, None] ** 2) * (batch.bound[:, None] > 0)
    closed = (1 - hidden).prod(-1, keepdim=True)
    lit = batch.ambient[:, None] * closed + batch.sun[:, None] * direct[..., None]
    clear = torch.exp(-batch.fog[:, None] * far)[..., None]
    return base * lit * clear + batch.sky_low[:, None] * (1 - clear)


def _shade(batch: _Batch, d: Tensor, hits: _Hits, light: Tensor) -> Tensor:
    """Colours (b, r, 3) in [0, 1] of rays d, lit from light (b, 3)."""
    color = torch.where((hits.t < FAR)[..., None], _ground(batch, d, hits.t, light), _sky(batch, d))

    s, r, k = hits.s, hits.r, hits.k
    ray, t, n, sun = d[s, r], hits.t[s, r], hits.normal, light[s]
    p = batch.eye[s] + t[:, None] * ray
    second = _pattern(batch.pattern[s, k], hits.uv)
    base = torch.where(second[:, None], batch.second[s, k], batch.color[s, k])
    lambert = (n * sun).sum(-1).clamp_min(0)
    spots = torch.full_like(d, 1e6)  # points far away, in nobody's shadow, but for the rays that meet a toy
    spots[s, r] = p + 2e-3 * n
    lambert = lambert * ~_shadow(batch, spots, light)[s, r]
    sky_share = (0.62 + 0.38 * n[:, 1])[:, None]
    near_ground = (0.72 + 0.28 * (p[:, 1] / batch.scale[s, k] / 0.5).clamp(0, 1))[:, None]
    bounce = batch.ground[s, 0] * (0.14 * (1 - n[:, 1]))[:, None]
    lit = batch.ambient[s] * sky_share * near_ground + bounce + batch.sun[s] * 0.72 * lambert[:, None]
    half = torch.nn.functional.normalize(sun - ray, dim=-1)
    shine = (n * half).sum(-1).clamp_min(0) ** 40 * (lambert > 0) * batch.gloss[s, k]
    rim = (1 + (n * ray).sum(-1)).clamp(0, 1) ** 4 * (0.06 + 0.22 * batch.gloss[s, k])
    color[s, r] = base * lit + (0.75 * shine)[:, None] * batch.sun[s] + rim[:, None] * batch.sky_low[s]
    return color.clamp(0, 1)


def render(
    scenes: Scene | Sequence[Scene],
    size: int | tuple[int, int] = 64,
    supersample: int = 2,
    device: torch.device | str = "cpu",
    chunk: int = 32,
) -> Frames:
    """Renders scenes.

    Args:
        scenes: one scene or several.
        size: pixels, one number for a square picture or (h, w). The horizontal field of view is fixed by the camera.
        supersample: rays a pixel side; colour is their mean.
        device: where to compute; results stay there.
        chunk: scenes at a time (bounds memory, changes nothing else).

    Raises:
        BadInput: no scene, a size outside 8..4096 or supersample outside 1..8.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    h, w = (size, size) if isinstance(size, int) else size
    if not scenes:
        raise BadInput("render needs at least one scene.")
    if not (8 <= h <= 4096 and 8 <= w <= 4096):
        raise BadInput(f"size must be from 8 to 4096 pixels, got {w}x{h} (width x height).")
    if not 1 <= supersample <= 8:
        raise BadInput(f"supersample must be from 1 to 8, got {supersample}.")
    with torch.no_grad():
        parts = [_render(scenes[i : i + chunk], h, w, supersample, device) for i in range(0, len(scenes), chunk)]
    image, mask, depth, normal = (torch.cat([p[i] for p in parts]) for i in range(4))
    boxes = [_boxes(mask[i], len(scene.toys)) for i, scene in enumerate(scenes)]
    return Frames(image, mask, depth, normal, boxes, scenes)


def _render(scenes: Sequence[Scene], h: int, w: int, ss: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = _Batch(scenes, device)
    b = len(scenes)
    total = torch.zeros(b, h * w, 3, device=device)
    side = torch.nn.functional.normalize(torch.cross(batch.light, batch.up, dim=-1), dim=-1)
    other = torch.cross(batch.light, side, dim=-1)
    for i in range(ss * ss):
        d = batch.rays(h, w, (i % ss + 0.5) / ss, (i // ss + 0.5) / ss)
        # The n rays of a pixel look at n points spread evenly over the light's disc (a sunflower spiral).
        radius, angle = LIGHT_RADIUS * math.sqrt((i + 0.5) / (ss * ss)), 2.399963 * i
        light = batch.light + radius * (math.cos(angle) * side + math.sin(angle) * other) * (ss > 1)
        total += _shade(batch, d, _cast(batch, d), torch.nn.functional.normalize(light, dim=-1))
    image = (total / (ss * ss)).view(b, h, w, 3).permute(0, 3, 1, 2) * 2 - 1

    d = batch.rays(h, w, 0.5, 0.5)
    hits = _cast(batch, d)
    axis = (d * batch.forward[:, None]).sum(-1)
    depth = torch.where(hits.t >= FAR, torch.full_like(hits.t, math.inf), hits.t * axis).view(b, h, w)
    world = torch.zeros(b, h * w, 3, device=device)
    world[..., 1] = ((hits.toy < 0) & (hits.t < FAR)).float()
    world[hits.s, hits.r] = hits.normal
    axes = torch.stack((batch.right, batch.up, -batch.forward), 1)  # rows: camera x, y, z in world axes
    normal = torch.einsum("bij,brj->bir", axes, world).reshape(b, 3, h, w)
    return image.contiguous(), hits.toy.view(b, h, w), depth, normal


def _boxes(mask: Tensor, count: int) -> Tensor:
    boxes = torch.full((count, 4), math.nan)
    for i in range(count):
        ys, xs = (mask == i).nonzero(as_tuple=True)
        if len(ys):
            boxes[i] = torch.tensor((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), dtype=torch.float32)
    return boxes
