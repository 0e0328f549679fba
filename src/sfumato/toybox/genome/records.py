"""The records of Visual Genome, typed: the same for downloaded data and for toys.

Boxes are x, y (upper left corner), width, height in pixels, as in the files.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Number = int | float


@dataclass(frozen=True)
class Synset:
    """A meaning: WordNet's name for it (``cat.n.01``) and what it means."""

    name: str
    definition: str


@dataclass(frozen=True)
class GenomeImage:
    """One picture: its size in pixels, where it lay, and its numbers in COCO and Flickr where it has any."""

    id: int
    width: int
    height: int
    url: str = ""
    coco_id: int | None = None
    flickr_id: int | None = None

    @property
    def path(self) -> str:
        """Folder and name of its file, ``VG_100K/1.jpg``: the last two parts of the address."""
        return "/".join(self.url.split("/")[-2:]) if self.url else f"VG_100K/{self.id}.jpg"


@dataclass(frozen=True)
class Mention:
    """Characters [start, end) of a phrase that name something, and its synset."""

    text: str
    start: int
    end: int
    synset: str


@dataclass(frozen=True)
class GenomeRegion:
    """A phrase about a box."""

    id: int
    image_id: int
    x: Number
    y: Number
    width: Number
    height: Number
    phrase: str
    mentions: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class GenomeObject:
    """A thing in a box, its names, their synsets and its attributes; ``merged``: ids found to be this same thing."""

    id: int
    x: Number
    y: Number
    w: Number
    h: Number
    names: tuple[str, ...]
    synsets: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    merged: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The first name; empty where it has none."""
        return self.names[0] if self.names else ""


@dataclass(frozen=True)
class GenomeRelationship:
    """subject --predicate--> object, by the ids of objects."""

    id: int
    predicate: str
    subject_id: int
    object_id: int
    synsets: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenomeGraph:
    """The objects of an image and what they are to one another."""

    image_id: int
    objects: tuple[GenomeObject, ...] = ()
    relationships: tuple[GenomeRelationship, ...] = ()


@dataclass(frozen=True)
class RegionGraph:
    """What one region's phrase speaks of."""

    region: GenomeRegion
    objects: tuple[GenomeObject, ...] = ()
    relationships: tuple[GenomeRelationship, ...] = ()


@dataclass(frozen=True)
class GenomeQuestion:
    """A question about an image or, with ``region_id``, about a region; the objects that it and its answer name."""

    id: int
    image_id: int
    question: str
    answer: str
    question_objects: tuple[GenomeObject, ...] = ()
    answer_objects: tuple[GenomeObject, ...] = ()
    region_id: int | None = None


@dataclass(frozen=True)
class GenomeRecord:
    """All that is known of one image."""

    image: GenomeImage
    graph: GenomeGraph
    regions: tuple[GenomeRegion, ...] = ()
    region_graphs: tuple[RegionGraph, ...] = ()
    questions: tuple[GenomeQuestion, ...] = field(default=())
