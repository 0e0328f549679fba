"""Visual Genome's files read as records, one image after the other, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ... import valid
from ...errors import BadInput, UnknownName
from . import fields, streaming
from .fields import Fields
from .records import (
    GenomeGraph,
    GenomeImage,
    GenomeObject,
    GenomeQuestion,
    GenomeRecord,
    GenomeRegion,
    GenomeRelationship,
    RegionGraph,
    Synset,
)

T = TypeVar("T")
FAULTS = ("refuse", "drop")
MOST_TOLD = 12  # ids in one error
LARGEST_TABLE = 64 << 20  # bytes of a file that is read as a whole
#: file -> the list that every image has in it
LISTS = {
    "region_descriptions.json": "regions",
    "objects.json": "objects",
    "attributes.json": "attributes",
    "relationships.json": "relationships",
    "scene_graphs.json": "objects",
    "region_graphs.json": "regions",
    "question_answers.json": "qas",
}


class VisualGenome:
    """A folder of Visual Genome's files, of their zips, or one zip with all of them; from its makers or from
    :func:`.export_genome`.

    Every method that names a file's content opens that file when it is called and goes through it once; what is not
    asked for need not be there. Values are checked as they pass: BadInput names file, image, record and field.

    Args:
        path: the folder or zip.
        faults: what is done about ids that lead nowhere and boxes that leave their picture: "refuse" them, or "drop"
            those relationships and cut those boxes (real data has both).

    Raises:
        BadInput: ``path`` is no folder and no whole zip. OSError: it cannot be read.
    """

    def __init__(self, path: Path | str, faults: Literal["refuse", "drop"] = "refuse"):
        if faults not in FAULTS:
            raise UnknownName("way with faults", faults, FAULTS)
        self.source, self.drop = streaming.JsonFiles(path), faults == "drop"

    def has(self, name: str) -> bool:
        """Whether a file such as ``objects.json`` is there."""
        return self.source.has(name)

    # -- one file each --------------------------------------------------------------------------------------------
    def images(self) -> Iterator[GenomeImage]:
        """image_data.json."""
        for at in self.entries("image_data.json"):
            yield fields.image(at)

    def regions(self) -> Iterator[tuple[int, tuple[GenomeRegion, ...]]]:
        """region_descriptions.json: image id, its regions."""
        return self._each("region_descriptions.json", "region", fields.region, "region_id", "id")

    def objects(self) -> Iterator[tuple[int, tuple[GenomeObject, ...]]]:
        """objects.json: image id, its objects."""
        return self._each("objects.json", "object", lambda of, _: fields.thing(of), "object_id", "id")

    def attributes(self) -> Iterator[tuple[int, tuple[GenomeObject, ...]]]:
        """attributes.json: image id, its objects with their attributes."""
        return self._each("attributes.json", "object", lambda of, _: fields.thing(of), "object_id", "id")

    def relationships(self) -> Iterator[tuple[int, tuple[GenomeRelationship, ...]]]:
        """relationships.json: image id, its relationships."""
        name, ids = "relationships.json", ("relationship_id", "id")
        return self._each(name, "relationship", lambda of, _: fields.relationship(of), *ids)

    def questions(self) -> Iterator[tuple[int, tuple[GenomeQuestion, ...]]]:
        """question_answers.json: image id, its questions, each with its region where qa_to_region_mapping.json has
        one."""
        regions = self.table("qa_to_region_mapping.json") if self.has("qa_to_region_mapping.json") else {}
        for image_id, found in self._each("question_answers.json", "question", fields.question, "qa_id", "id"):
            yield image_id, tuple(replace(each, region_id=regions.get(str(each.id))) for each in found)

    def graphs(self) -> Iterator[GenomeGraph]:
        """scene_graphs.json; every relationship leads to objects of its image."""
        for at, image_id in self.per_image("scene_graphs.json"):
            objects = tuple(fields.thing(each) for each in at.inner("objects", "object", "object_id", "id"))
            ids = ("relationship_id", "id")
            links = [fields.relationship(each) for each in at.inner("relationships", "relationship", *ids)]
            unique([each.id for each in objects], "object", at.place)
            yield GenomeGraph(image_id, objects, self._resolved(links, objects, at.place))

    def region_graphs(self) -> Iterator[tuple[int, tuple[RegionGraph, ...]]]:
        """region_graphs.json: image id, the graph of each of its regions."""
        for at, image_id in self.per_image("region_graphs.json"):
            found = []
            for each in at.inner("regions", "region", "region_id", "id"):
                objects = tuple(fields.thing(one) for one in each.inner("objects", "object", "object_id", "id"))
                links = [fields.relationship(one) for one in each.inner("relationships", "relationship")]
                here = fields.region(each, image_id)
                found.append(RegionGraph(here, objects, self._resolved(links, objects, each.place)))
            yield image_id, tuple(found)

    def synsets(self) -> dict[str, Synset]:
        """synsets.json: by name."""
        found = {}
        for at in self.entries("synsets.json"):
            each = Synset(at.text("synset_name"), at.text("synset_definition") if at.has("synset_definition") else "")
            found[each.name] = each
        return found

    def table(self, name: str) -> dict[str, Any]:
        """A file that is one JSON object, as a whole: qa_to_region_mapping.json, object_synsets.json and the like."""
        with self.source.open(name) as (file, label):
            with streaming.readable(label):
                raw = file.read(LARGEST_TABLE + 1)
        if len(raw) > LARGEST_TABLE:
            raise BadInput(f"{label} is larger than {LARGEST_TABLE >> 20} MB, the most that is read as a whole.")
        try:
            value = valid.loads(raw)
        except ValueError as error:
            raise BadInput(f"{label} is no JSON: {str(error)[:120]}.") from None
        if not isinstance(value, dict):
            raise BadInput(f"{label} is {valid.brief(value)}; it must be a JSON object.")
        return value

    # -- all of an image ------------------------------------------------------------------------------------------
    def records(self) -> Iterator[GenomeRecord]:
        """Everything about one image after the other, from the files that are there, which must all tell of the same
        images in the same order. Graphs are scene_graphs.json's, else joined from objects, attributes, relationships;
        the objects of questions are those of the graph.

        Raises BadInput where a file leaves the order, or ends before the others.
        """
        regions = self._optional("region_descriptions.json", self.regions)
        linked = self._optional("region_graphs.json", self.region_graphs)
        asked = self._optional("question_answers.json", self.questions)
        graphs = self.graphs() if self.has("scene_graphs.json") else self._joined()
        for image in self.images():
            graph = next(graphs, None)
            if graph is None or graph.image_id != image.id:
                label = "ends there" if graph is None else f"has image {graph.image_id}"
                raise BadInput(f"image_data.json goes on with image {image.id}, but the graphs' file {label}.")
            whole = GenomeGraph(image.id, tuple(self._inside(o, image) for o in graph.objects), graph.relationships)
            known = {each.id: each for each in whole.objects}
            yield GenomeRecord(
                image,
                whole,
                self._next(regions, image.id, "region_descriptions.json"),
                self._next(linked, image.id, "region_graphs.json"),
                tuple(_named(each, known) for each in self._next(asked, image.id, "question_answers.json")),
            )

    def _joined(self) -> Iterator[GenomeGraph]:
        """Graphs from objects.json, and attributes.json and relationships.json where they are there."""
        more = self._optional("attributes.json", self.attributes)
        links = self._optional("relationships.json", self.relationships)
        for image_id, objects in self.objects():
            said = {each.id: each.attributes for each in self._next(more, image_id, "attributes.json")}
            found = tuple(replace(each, attributes=said.get(each.id, each.attributes)) for each in objects)
            place = f"relationships.json, image {image_id}"
            here = self._next(links, image_id, "relationships.json")
            yield GenomeGraph(image_id, found, self._resolved(here, found, place))

    def _optional(self, name: str, read: Callable[[], Iterator[T]]) -> Iterator[T] | None:
        return read() if self.has(name) else None

    @staticmethod
    def _next(stream: Iterator[tuple[int, tuple[T, ...]]] | None, image_id: int, name: str) -> tuple[T, ...]:
        if stream is None:
            return ()
        found = next(stream, None)
        if found is None or found[0] != image_id:
            label = "ends there" if found is None else f"has image {found[0]}"
            raise BadInput(f"the files do not tell of the same images: at image {image_id}, {name} {label}.")
        return found[1]

    # -- what all files share -------------------------------------------------------------------------------------
    def entries(self, name: str) -> Iterator[Fields]:
        """The entries of a file, one after the other."""
        with self.source.open(name) as (file, label):
            for index, raw in enumerate(streaming.items(file, label)):
                yield Fields(raw, f"{label}, entry {index + 1}")

    def per_image(self, name: str) -> Iterator[tuple[Fields, int]]:
        """(entry, image id) of a file with one entry an image. Raises BadInput for an image that comes twice, and for
        entries without the list that this file is about: then it is another one."""
        seen, key = set(), LISTS[name]
        for at in self.entries(name):
            image_id = at.whole("image_id", "id")
            if image_id in seen:
                raise BadInput(f"{at.place}: image {image_id} comes a second time.")
            seen.add(image_id)
            if key not in at.raw:
                keys = ", ".join(map(str, list(at.raw)[:10]))
                raise BadInput(f"{at.place} has no {key!r} but {keys}; is this file really {name}?")
            yield Fields(at.raw, f"{at.place.rpartition(', ')[0]}, image {image_id}"), image_id

    def _each(
        self, name: str, kind: str, make: Callable[[Fields, int], T], *ids: str
    ) -> Iterator[tuple[int, tuple[T, ...]]]:
        for at, image_id in self.per_image(name):
            found = tuple(make(each, image_id) for each in at.inner(LISTS[name], kind, *ids))
            unique([each.id for each in found], kind, at.place)  # type: ignore[attr-defined]
            yield image_id, found

    def _resolved(
        self, links: list[GenomeRelationship] | tuple[GenomeRelationship, ...], objects: tuple[GenomeObject, ...],
        place: str,
    ) -> tuple[GenomeRelationship, ...]:  # fmt: skip
        """The relationships whose ends are there. Raises BadInput, which names each end that is not, unless they are to
        be dropped."""
        known = {each.id for each in objects}
        lost = list(dangling(links, known))
        if not lost or self.drop:
            return tuple(each for each in links if {each.subject_id, each.object_id} <= known)
        more = f" and {len(lost) - MOST_TOLD} more" if len(lost) > MOST_TOLD else ""
        raise BadInput(f"{place}: {'; '.join(lost[:MOST_TOLD])}{more}; faults='drop' leaves these out.")

    def _inside(self, it: GenomeObject, image: GenomeImage) -> GenomeObject:
        """An object whose box lies in the picture. Raises BadInput for another one, unless it is to be cut."""
        fault = outside((it.x, it.y, it.w, it.h), image)
        if not fault:
            return it
        if not self.drop:
            raise BadInput(f"image {image.id}, object {it.id}: {fault}; faults='drop' cuts such boxes.")
        x, y = min(max(it.x, 0), image.width), min(max(it.y, 0), image.height)
        w = max(min(it.x + it.w, image.width) - x, 0)
        return replace(it, x=x, y=y, w=w, h=max(min(it.y + it.h, image.height) - y, 0))


def _named(it: GenomeQuestion, known: dict[int, GenomeObject]) -> GenomeQuestion:
    """A question whose objects are those of the graph, which say more, where the ids are the same."""
    first, second = (tuple(known.get(o.id, o) for o in each) for each in (it.question_objects, it.answer_objects))
    return replace(it, question_objects=first, answer_objects=second)


def dangling(links: list[GenomeRelationship] | tuple[GenomeRelationship, ...], known: set[int]) -> Iterator[str]:
    """In words, every end of a relationship that is none of the ``known`` objects."""
    for link in links:
        for end, where in ((link.subject_id, "subject"), (link.object_id, "object")):
            if end not in known:
                yield f"relationship {link.id} has {where} {end}, which is no object there"


def outside(box: tuple[float, float, float, float], image: GenomeImage) -> str:
    """What is wrong with a box x, y, w, h in an image; empty where nothing is. Boxes may count pixels from 0 or 1."""
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"its box is {w}x{h}"
    if x < 0 or y < 0 or x + w > image.width + 1 or y + h > image.height + 1:
        return f"its box x {x}, y {y}, {w}x{h} leaves the picture of {image.width}x{image.height}"
    return ""


def unique(ids: list[int], kind: str, place: str) -> None:
    """Raises BadInput, which names each id that comes more than once."""
    if len(set(ids)) == len(ids):
        return
    seen: set[int] = set()
    twice = [each for each in ids if each in seen or seen.add(each)]  # type: ignore[func-returns-value]
    raise BadInput(f"{place}: {kind} id {', '.join(map(str, dict.fromkeys(twice)))} comes more than once.")
