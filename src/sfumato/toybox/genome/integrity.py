"""Referential integrity of Visual Genome's files: ids that lead nowhere, ids used twice, boxes outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import fields
from .reader import VisualGenome, dangling, outside
from .records import GenomeImage, GenomeObject, GenomeRegion


@dataclass(frozen=True)
class Finding:
    """One fault: the file, the image (None: of the file as a whole), and what is wrong."""

    file: str
    image_id: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.image_id is None else f', image {self.image_id}'}: {self.what}"


def report(path: Path | str, most: int = 20) -> tuple[list[str], int]:
    """(lines for people, number of faults): up to ``most`` faults of each file, how many more it has, and "no faults".

    Raises BadInput as :func:`check`.
    """
    lines: list[str] = []
    counts: Counter[str] = Counter()
    for finding in check(path):
        counts[finding.file] += 1
        if counts[finding.file] <= most:
            lines.append(str(finding))
    lines += [f"{file}: {n - most} more" for file, n in counts.items() if n > most]
    return lines or ["no faults"], sum(counts.values())


class _Ids:
    """The ids of one kind in all images; those of one image are unique already (the reader sees to it)."""

    def __init__(self, file: str, kind: str):
        self.file, self.kind = file, kind
        self.parts: list[np.ndarray] = []
        self.images: list[int] = []

    def add(self, image_id: int, ids: Iterable[int]) -> None:
        self.parts.append(np.fromiter(ids, np.int64))
        self.images.append(image_id)

    def twice(self) -> Iterator[Finding]:
        """Ids that several images have."""
        if not self.parts:
            return
        every: np.ndarray = np.concatenate(self.parts)
        owner: np.ndarray = np.repeat(self.images, [len(part) for part in self.parts])
        order = np.argsort(every, kind="stable")
        again = np.flatnonzero(every[order][1:] == every[order][:-1])
        for k in again:
            first, second = owner[order[k]], owner[order[k + 1]]
            yield Finding(self.file, int(second), f"{self.kind} id {every[order[k]]} is also used in image {first}")

    def of_images(self) -> dict[int, np.ndarray]:
        return dict(zip(self.images, self.parts, strict=True))


def check(path: Path | str) -> Iterator[Finding]:
    """Goes through all files that are there, and yields every fault of reference. In bounded memory but for the ids.

    Looked at: images that are not in image_data.json, or missing from a file; relationships, attributes and regions of
    questions that name what is not there; ids used twice; boxes that leave their picture; synsets without a definition;
    spans that are not what they say.

    Raises BadInput for what cannot be read at all, as :class:`.VisualGenome`.
    """
    genome = VisualGenome(path, faults="drop")
    images = {}
    for image in genome.images():
        if image.id in images:
            yield Finding("image_data.json", image.id, "comes a second time")
        if not image.width or not image.height:
            yield Finding("image_data.json", image.id, f"has {image.width}x{image.height} pixels")
        images[image.id] = image
    defined = set(genome.synsets()) if genome.has("synsets.json") else None
    known: dict[int, np.ndarray] | None = None
    if genome.has("objects.json"):
        objects = _Ids("objects.json", "object")
        for image_id, found in genome.objects():
            objects.add(image_id, (each.id for each in found))
            yield from _of_image("objects.json", image_id, images)
            yield from _boxes("objects.json", images.get(image_id), found)
            yield from _defined("objects.json", image_id, (s for each in found for s in each.synsets), defined)
        yield from objects.twice()
        known = objects.of_images()
        yield from _absent("objects.json", images, known)
    yield from _links(genome, images, known, defined)
    regions = set()
    if genome.has("region_descriptions.json"):
        numbers, seen = _Ids("region_descriptions.json", "region"), set()
        for image_id, spoken in genome.regions():
            numbers.add(image_id, (region.id for region in spoken))
            regions |= {region.id for region in spoken}
            seen.add(image_id)
            yield from _of_image(numbers.file, image_id, images)
            for region in spoken:
                yield from _region(numbers.file, region, images.get(image_id))
                yield from _defined(numbers.file, image_id, (m.synset for m in region.mentions), defined)
        yield from numbers.twice()
        yield from _absent(numbers.file, images, seen)
    if genome.has("question_answers.json"):
        asked = _Ids("question_answers.json", "question")
        for image_id, questions in genome.questions():
            asked.add(image_id, (each.id for each in questions))
            yield from _of_image(asked.file, image_id, images)
            for each in questions:
                if each.region_id is not None and regions and each.region_id not in regions:
                    fault = f"question {each.id} is about region {each.region_id}, which is not there"
                    yield Finding("qa_to_region_mapping.json", image_id, fault)
                for one in (*each.question_objects, *each.answer_objects):
                    if known is not None and one.id not in known.get(image_id, ()):
                        yield Finding(asked.file, image_id, f"question {each.id} names object {one.id}, not there")
        yield from asked.twice()


def _links(
    genome: VisualGenome, images: dict[int, GenomeImage], known: dict[int, np.ndarray] | None, defined: set[str] | None
) -> Iterator[Finding]:
    """Relationships, attributes and graphs against the objects of their image."""
    name = "relationships.json"
    if genome.has(name):
        numbers = _Ids(name, "relationship")
        for image_id, found in genome.relationships():
            numbers.add(image_id, (each.id for each in found))
            yield from _of_image(name, image_id, images)
            yield from _defined(name, image_id, (s for each in found for s in each.synsets), defined)
            if known is not None:
                for fault in dangling(found, set(known.get(image_id, np.empty(0)).tolist())):
                    yield Finding(name, image_id, fault)
        yield from numbers.twice()
    name = "attributes.json"
    if genome.has(name):
        for image_id, things in genome.attributes():
            yield from _of_image(name, image_id, images)
            yield from _boxes(name, images.get(image_id), things)
            there = set(known.get(image_id, np.empty(0)).tolist()) if known is not None else None
            for each in things:
                if there is not None and each.id not in there:
                    yield Finding(name, image_id, f"object {each.id} is not in objects.json")
    for name in ("scene_graphs.json", "region_graphs.json"):
        if not genome.has(name):
            continue
        for at, image_id in genome.per_image(name):
            yield from _of_image(name, image_id, images)
            there = set(known.get(image_id, np.empty(0)).tolist()) if known is not None else None
            for part in [at] if name == "scene_graphs.json" else at.inner("regions", "region", "region_id", "id"):
                yield from _graph(name, image_id, part, there)
                yield from _boxes(name, images.get(image_id), _things(part))


def _things(at: fields.Fields) -> list[GenomeObject]:
    return [fields.thing(each) for each in at.inner("objects", "object", "object_id", "id")]


def _graph(name: str, image_id: int, at: fields.Fields, known: set[int] | None) -> Iterator[Finding]:
    objects = _things(at)
    links = [fields.relationship(each) for each in at.inner("relationships", "relationship", "relationship_id", "id")]
    where = "" if name == "scene_graphs.json" else f"{at.place.rpartition(', ')[2]}: "
    for fault in dangling(links, {each.id for each in objects}):
        yield Finding(name, image_id, f"{where}{fault}")
    for each in objects:
        if known is not None and each.id not in known:
            yield Finding(name, image_id, f"{where}object {each.id} is not in objects.json")


def _of_image(file: str, image_id: int, images: dict[int, GenomeImage]) -> Iterator[Finding]:
    if image_id not in images:
        yield Finding(file, image_id, "is not in image_data.json")


def _absent(file: str, images: dict[int, GenomeImage], there: Iterable[int]) -> Iterator[Finding]:
    for image_id in sorted(set(images) - set(there)):
        yield Finding(file, image_id, "is in image_data.json but not here")


def _boxes(file: str, image: GenomeImage | None, objects: Iterable[GenomeObject]) -> Iterator[Finding]:
    for each in objects if image is not None else ():
        assert image is not None
        if fault := outside((each.x, each.y, each.w, each.h), image):
            yield Finding(file, image.id, f"object {each.id}: {fault}")


def _region(file: str, it: GenomeRegion, image: GenomeImage | None) -> Iterator[Finding]:
    if image is not None and (fault := outside((it.x, it.y, it.width, it.height), image)):
        yield Finding(file, it.image_id, f"region {it.id}: {fault}")
    for each in it.mentions:
        said = it.phrase[each.start : each.end]
        if said.lower() != each.text.lower():
            fault = f"region {it.id}: characters {each.start} to {each.end} are {said!r}, not {each.text!r}"
            yield Finding(file, it.image_id, fault)


def _defined(file: str, image_id: int, names: Iterable[str], defined: set[str] | None) -> Iterator[Finding]:
    for name in sorted(set(names) - defined) if defined is not None else ():
        yield Finding(file, image_id, f"synset {name!r} is not in synsets.json")
