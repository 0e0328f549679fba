"""Rays and the six shapes, in a toy's local frame: base on y = 0, about one unit tall, every hit in closed form.

Each shape takes origins o and directions d (n, 3) and returns distances t (n) - ``FAR`` where missed -, normals (n, 3)
and texture coordinates (n, 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1e9


def _quadratic(a: Tensor, half_b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Both roots of a t^2 + 2 half_b t + c = 0, low first; (FAR, -FAR) where there is none."""
    disc = half_b * half_b - a * c
    root = disc.clamp_min(0).sqrt()
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    low, high = (-half_b - root) / a, (-half_b + root) / a
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    none = disc < 0
    return low.masked_fill(none, FAR), high.masked_fill(none, -FAR)


def _slab(o: Tensor, d: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Entry and exit of rays through low <= coordinate <= high for one coordinate."""
    safe = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    t0, t1 = (low - o) / safe, (high - o) / safe
    return torch.minimum(t0, t1), torch.maximum(t0, t1)


def _first(enter: Tensor, leave: Tensor) -> Tensor:
    """First crossing in front of the ray's origin of a convex body with that interval, else FAR."""
    t = torch.where(enter > 1e-4, enter, leave)
    return torch.where((leave > enter) & (t > 1e-4), t, torch.full_like(t, FAR))


def _ball(o: Tensor, d: Tensor):
    centre = o.new_tensor((0.0, 0.5, 0.0))
    oc = o - centre
    t = _first(*_quadratic((d * d).sum(-1), (d * oc).sum(-1), (oc * oc).sum(-1) - 0.25))
    p = oc + t.clamp_max(1e3)[:, None] * d
    uv = torch.stack((torch.atan2(p[:, 0], -p[:, 2]) * 0.42, p[:, 1] + 0.5), -1)
    return t, p * 2, uv


def _box(o: Tensor, d: Tensor, low: tuple[float, float, float], high: tuple[float, float, float]):
    spans = [_slab(o[:, i], d[:, i], low[i], high[i]) for i in range(3)]
    enters = torch.stack([s[0] for s in spans], -1)
    leaves = torch.stack([s[1] for s in spans], -1)
    enter, axis_in = enters.max(-1)
    leave, axis_out = leaves.min(-1)
    t = _first(enter, leave)
    axis = torch.where(enter > 1e-4, axis_in, axis_out)
    normal = torch.nn.functional.one_hot(axis, 3).to(o) * -torch.sign(d) * torch.where(enter > 1e-4, 1.0, -1.0)[:, None]
    return t, normal, _triplanar(o + t.clamp_max(1e3)[:, None] * d, axis)


def _triplanar(p: Tensor, axis: Tensor) -> Tensor:
    u = torch.where(axis == 0, p[:, 2], p[:, 0])
    v = torch.where(axis == 1, p[:, 2], p[:, 1])
    return torch.stack((u, v), -1)


def _cube(o: Tensor, d: Tensor):
    return _box(o, d, (-0.42, 0.0, -0.42), (0.42, 0.84, 0.42))


def _cross(o: Tensor, d: Tensor):
    upright = _box(o, d, (-0.17, 0.0, -0.17), (0.17, 1.0, 0.17))
    beam = _box(o, d, (-0.5, 0.33, -0.17), (0.5, 0.67, 0.17))
    nearer = upright[0] <= beam[0]
    return (
        torch.where(nearer, upright[0], beam[0]),
        torch.where(nearer[:, None], upright[1], beam[1]),
        torch.where(nearer[:, None], upright[2], beam[2]),
    )


def _cylinder(o: Tensor, d: Tensor):
    radius = 0.38
    flat_o, flat_d = o[:, [0, 2]], d[:, [0, 2]]
    side_in, side_out = _quadratic(
        (flat_d * flat_d).sum(-1), (flat_d * flat_o).sum(-1), (flat_o * flat_o).sum(-1) - radius**2
    )
    cap_in, cap_out = _slab(o[:, 1], d[:, 1], 0.0, 1.0)
    enter, leave = torch.maximum(side_in, cap_in), torch.minimum(side_out, cap_out)
    t = _first(enter, leave)
    p = o + t.clamp_max(1e3)[:, None] * d
    on_cap = (t - cap_in).abs() < (t - side_in).abs()
    cap_normal = torch.stack((torch.zeros_like(t), -torch.sign(d[:, 1]), torch.zeros_like(t)), -1)
    side_normal = torch.stack((p[:, 0] / radius, torch.zeros_like(t), p[:, 2] / radius), -1)
    side_uv = torch.stack((torch.atan2(p[:, 0], -p[:, 2]) * radius, p[:, 1]), -1)
    return (
        t,
        torch.where(on_cap[:, None], cap_normal, side_normal),
        torch.where(on_cap[:, None], p[:, [0, 2]], side_uv),
    )


def _cone(o: Tensor, d: Tensor):
    height, radius = 1.05, 0.52
    slope = radius / height
    # x^2 + z^2 = slope^2 (height - y)^2, the nappe below the apex and above the ground
    up_o, up_d = height - o[:, 1], -d[:, 1]
    a = d[:, 0] ** 2 + d[:, 2] ** 2 - slope**2 * up_d**2
    b = d[:, 0] * o[:, 0] + d[:, 2] * o[:, 2] - slope**2 * up_d * up_o
    c = o[:, 0] ** 2 + o[:, 2] ** 2 - slope**2 * up_o**2
    low, high = _quadratic(a, b, c)
    best = torch.full_like(low, FAR)
    for t in (high, low):
        y = o[:, 1] + t.clamp(-1e3, 1e3) * d[:, 1]
        best = torch.where((t > 1e-4) & (t < FAR) & (y >= 0) & (y <= height), torch.minimum(t, best), best)
    p = o + best.clamp_max(1e3)[:, None] * d
    normal = torch.stack((p[:, 0], slope**2 * (height - p[:, 1]), p[:, 2]), -1)
    uv = torch.stack((torch.atan2(p[:, 0], -p[:, 2]) * 0.32, p[:, 1]), -1)
    return best, torch.nn.functional.normalize(normal, dim=-1), uv


def _ring(o: Tensor, d: Tensor):
    # A wheel: an outer cylinder along local z with a round hole, so an interval minus an interval.
    outer, inner, half = 0.5, 0.25, 0.17
    o = o - o.new_tensor((0.0, 0.5, 0.0))
    a, b = (d[:, :2] ** 2).sum(-1), (d[:, :2] * o[:, :2]).sum(-1)
    r2 = (o[:, :2] ** 2).sum(-1)
    out_in, out_out = _quadratic(a, b, r2 - outer**2)
    hole_in, hole_out = _quadratic(a, b, r2 - inner**2)
    face_in, face_out = _slab(o[:, 2], d[:, 2], -half, half)
    enter, leave = torch.maximum(out_in, face_in), torch.minimum(out_out, face_out)
    solid = (leave > enter) & (enter > 1e-4)
    through = (hole_in < enter) & (enter < hole_out)  # the face is met inside the hole
    wall = through & (hole_out < leave)  # and then the hole's far wall is met
    t = torch.where(through, torch.where(wall, hole_out, torch.full_like(enter, FAR)), enter)
    t = torch.where(solid, t, torch.full_like(t, FAR))
    p = o + t.clamp_max(1e3)[:, None] * d
    radial = torch.nn.functional.pad(p[:, :2] / p[:, :2].norm(dim=-1, keepdim=True).clamp_min(1e-6), (0, 1))
    face = torch.stack((torch.zeros_like(t), torch.zeros_like(t), -torch.sign(d[:, 2])), -1)
    on_face = ~wall & ((t - face_in).abs() < (t - out_in).abs())
    normal = torch.where(wall[:, None], -radial, torch.where(on_face[:, None], face, radial))
    round_uv = torch.stack((torch.atan2(p[:, 0], p[:, 1]) * 0.4, p[:, 2] + 0.5), -1)
    flat_uv = p[:, :2] + 0.5
    return t, normal, torch.where(on_face[:, None], flat_uv, round_uv)


INTERSECT = {
    "ball": _ball,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "ring": _ring,
    "cross": _cross,
}
BOUND_CENTRE, BOUND_RADIUS = 0.5, 0.78  # of the sphere around every shape, in local units
