"""How far a judge can be trusted: its accuracy against the truth of renders, printed beside whatever leans on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.metrics import stats
from sfumato.toybox import Scene
from sfumato.toybox.oracle.toy_judge import ATTRIBUTES, ObjectReading, SceneReading

MIN_PIXELS = 30


@dataclass(frozen=True)
class Accuracy:
    """A judge against the truth.

    Every toy with at least ``min_pixels`` visible pixels counts; a toy that was not found counts as wrong in every
    attribute. ``attributes`` is the share of all those attributes and of every picture's ground and sky that are right.

    Attributes:
        attributes: all of shape, colour, pattern, size, ground and sky together.
        single: the same by name.
        found: share of the toys that were found (mask IoU above one half).
        counted: share of pictures, among those whose toys are all large enough, with the right number of toys.
        miou: mean IoU of the found mask, 0 where none was found.
        toys, pictures, left_out: how many counted, and how many toys were too small to count.
    """

    attributes: stats.Interval
    single: dict[str, stats.Interval]
    found: stats.Interval
    counted: stats.Interval
    miou: float
    toys: int
    pictures: int
    left_out: int
    min_pixels: int

    def to_json(self) -> dict[str, object]:
        """Plain numbers."""
        return {
            "attributes": self.attributes.to_json(),
            "single": {name: interval.to_json() for name, interval in self.single.items()},
            "found": self.found.to_json(),
            "counted": self.counted.to_json(),
            "miou": self.miou,
            "toys": self.toys,
            "pictures": self.pictures,
            "left_out": self.left_out,
            "min_pixels": self.min_pixels,
        }


def measure(
    readings: Sequence[SceneReading], scenes: Sequence[Scene], masks: Tensor, min_pixels: int = MIN_PIXELS
) -> Accuracy:
    """Accuracy of ``readings`` of pictures of ``scenes`` whose true ``masks`` are integer (b, h, w), -1 background."""
    if not len(readings) == len(scenes) == len(masks):
        raise BadInput(f"measure: {len(readings)} readings, {len(scenes)} scenes and {len(masks)} masks do not match.")
    single: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, "ground", "sky")}
    found: list[bool] = []
    overlaps: list[float] = []
    counted: list[bool] = []
    left_out = 0
    for reading, scene, mask in zip(readings, scenes, masks, strict=True):
        single["ground"].append(reading.ground == scene.ground)
        single["sky"].append(reading.sky == scene.sky)
        areas = [int((mask == index).sum()) for index in range(len(scene.toys))]
        small = sum(area < min_pixels for area in areas)
        left_out += small
        if not small:
            counted.append(len(reading.objects) == len(scene.toys))
        for index, (toy, area) in enumerate(zip(scene.toys, areas, strict=True)):
            if area < min_pixels:
                continue
            match, overlap = best_match(reading, mask == index)
            found.append(overlap > 0.5)
            overlaps.append(overlap)
            for name in ATTRIBUTES:
                right = match is not None and overlap > 0.5 and getattr(match, name) == getattr(toy, name)
                single[name].append(right)
    if not found or not counted:
        raise BadInput(f"measure: no toy has {min_pixels} visible pixels.")
    return Accuracy(
        attributes=stats.share([right for hits in single.values() for right in hits]),
        single={name: stats.share(hits) for name, hits in single.items()},
        found=stats.share(found),
        counted=stats.share(counted),
        miou=sum(overlaps) / len(overlaps),
        toys=len(found),
        pictures=len(readings),
        left_out=left_out,
        min_pixels=min_pixels,
    )


def best_match(reading: SceneReading, mask: Tensor) -> tuple[ObjectReading | None, float]:
    """The toy read whose mask overlaps ``mask`` bool (h, w) most, and the IoU; (None, 0.0) when none touches it."""
    best, most = None, 0.0
    for toy in reading.objects:
        union = int(torch.count_nonzero(toy.mask | mask))
        overlap = int(torch.count_nonzero(toy.mask & mask)) / max(union, 1)
        if overlap > most:
            best, most = toy, overlap
    return best, most
