"""How many toybox scenes a second are rendered."""

from __future__ import annotations

import time

from benchmarks.core import Figure, Spread
from sfumato.toybox import render
from sfumato.toybox.dataset import draw_scene

SCENES = 128


def run() -> list[Figure]:
    """Scenes per second at 64x64 with 2x2 rays a pixel, all cores."""
    scenes = [draw_scene("train", 5, index) for index in range(SCENES)]
    render(scenes[:16], 64)
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        render(scenes, 64, supersample=2)
        rates.append(SCENES / (time.perf_counter() - start))
    got = Spread.of(rates)
    return [
        Figure(
            name="scenes per second, 64x64, 2x2 supersampling",
            value=got.text(0),
            aim="80 or more on 2 cores",
            met=got.median >= 80,
            detail=f"{SCENES} scenes a round, {got.rounds} rounds; mask, depth and normals included",
            data={"rates": rates},
        )
    ]
