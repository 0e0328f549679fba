"""Records as the arrays that scene-graph models are trained on, in two layouts.

*SGG*: ``VG-SGG.h5`` and ``VG-SGG-dicts.json`` of Xu et al. 2017 and the benchmarks after it: all boxes of all images in
one table, with the first and last row of each image. *sg2im*: ``train.h5`` and ``vocab.json`` of Johnson et al. 2018:
one row an image, padded with -1. Both are written as safetensors, with the same names and shapes and the vocabulary in
the header; ``h5py`` is not needed, and ``h5py.File("x.h5", "w").create_dataset(name, data=array)`` for each makes their
files of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ... import files
from ...errors import BadInput
from ...metrics.scene_graph import TrueGraph
from .records import GenomeObject, GenomeRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORM = "sfumato-genome-1"
SPLIT_SHARES = (0.8, 0.1, 0.1)  # of train, val, test
LONG_SIDE = 1024  # of the picture that boxes_1024 belong to
ATTRIBUTES = 10  # of one object, the most that is kept


@dataclass(frozen=True)
class Vocabulary:
    """Names of objects, predicates and attributes, the most frequent first, and how often each was seen."""

    objects: tuple[str, ...]
    predicates: tuple[str, ...]
    attributes: tuple[str, ...]
    object_count: tuple[int, ...] = ()
    predicate_count: tuple[int, ...] = ()

    def dicts(self) -> dict[str, dict[str, int] | dict[str, str]]:
        """``VG-SGG-dicts.json``: numbers from 1."""
        return {
            "label_to_idx": {name: i + 1 for i, name in enumerate(self.objects)},
            "idx_to_label": {str(i + 1): name for i, name in enumerate(self.objects)},
            "predicate_to_idx": {name: i + 1 for i, name in enumerate(self.predicates)},
            "idx_to_predicate": {str(i + 1): name for i, name in enumerate(self.predicates)},
            "object_count": dict(zip(self.objects, self.object_count, strict=False)),
            "predicate_count": dict(zip(self.predicates, self.predicate_count, strict=False)),
        }


def vocabulary(
    records: Iterable[GenomeRecord], objects: int = 150, predicates: int = 50, attributes: int = 200, least: int = 1
) -> Vocabulary:
    """The most frequent names (by number, then by name) of those that occur ``least`` times or more."""
    seen: tuple[Counter[str], Counter[str], Counter[str]] = (Counter(), Counter(), Counter())
    for record in records:
        for each in record.graph.objects:
            seen[0].update([each.name.lower()] if each.name else [])
            seen[2].update(word.lower() for word in each.attributes)
        seen[1].update(each.predicate.lower() for each in record.graph.relationships)
    kept = []
    for counts, most in zip(seen, (objects, predicates, attributes), strict=True):
        order = sorted((name for name in counts if counts[name] >= least), key=lambda name: (-counts[name], name))
        kept.append([(name, counts[name]) for name in order[:most]])
    names = [tuple(name for name, _ in each) for each in kept]
    numbers = [tuple(number for _, number in each) for each in kept]
    return Vocabulary(names[0], names[1], names[2], numbers[0], numbers[1])


def splits(n: int, shares: Sequence[float] = SPLIT_SHARES) -> NDArray[np.int32]:
    """0 train, 1 val, 2 test, for ``n`` images in order."""
    edges = np.round(np.cumsum(shares)[:-1] / sum(shares) * n)
    return np.searchsorted(edges, np.arange(n), side="right").astype(np.int32)


def _kept(record: GenomeRecord, index: dict[str, int], smallest: float) -> list[GenomeObject]:
    return [o for o in record.graph.objects if o.name.lower() in index and min(o.w, o.h) >= max(smallest, 1e-9)]


def sgg_arrays(
    records: Iterable[GenomeRecord], names: Vocabulary, shares: Sequence[float] = SPLIT_SHARES
) -> dict[str, np.ndarray]:
    """The arrays of ``VG-SGG.h5``.

    labels (n 1), boxes_1024 and boxes_512 (n 4; centre x, centre y, width, height in a picture whose longer side has so
    many pixels), img_to_first_box and img_to_last_box (i), relationships (m 2; rows of boxes), predicates (m 1),
    img_to_first_rel and img_to_last_rel (i; -1 where an image has none), split (i; 0 train, 1 val, 2 test), image_ids
    (i). Objects and predicates outside the vocabulary, and objects whose box is empty, are left out.
    """
    labels: list[int] = []
    boxes: list[list[float]] = []
    links: list[list[int]] = []
    predicates: list[int] = []
    ids: list[int] = []
    first: dict[str, list[int]] = {"box": [], "rel": []}
    last: dict[str, list[int]] = {"box": [], "rel": []}
    index = {name: i + 1 for i, name in enumerate(names.objects)}
    verbs = {name: i + 1 for i, name in enumerate(names.predicates)}
    for record in records:
        rows = {}
        before = {"box": len(labels), "rel": len(links)}
        scale = LONG_SIDE / max(record.image.width, record.image.height, 1)
        for it in _kept(record, index, 0):
            rows[it.id] = len(labels)
            labels.append(index[it.name.lower()])
            boxes.append([scale * v for v in (it.x + it.w / 2, it.y + it.h / 2, it.w, it.h)])
        for link in record.graph.relationships:
            if link.subject_id in rows and link.object_id in rows and link.predicate.lower() in verbs:
                links.append([rows[link.subject_id], rows[link.object_id]])
                predicates.append(verbs[link.predicate.lower()])
        for kind, found in (("box", labels), ("rel", links)):
            empty = len(found) == before[kind]
            first[kind].append(-1 if empty else before[kind])
            last[kind].append(-1 if empty else len(found) - 1)
        ids.append(record.image.id)
    wide = np.asarray(boxes, np.float32).reshape(-1, 4)
    return {
        "labels": np.asarray(labels, np.int64).reshape(-1, 1),
        "boxes_1024": wide,
        "boxes_512": wide / 2,
        "img_to_first_box": np.asarray(first["box"], np.int32),
        "img_to_last_box": np.asarray(last["box"], np.int32),
        "relationships": np.asarray(links, np.int32).reshape(-1, 2),
        "predicates": np.asarray(predicates, np.int64).reshape(-1, 1),
        "img_to_first_rel": np.asarray(first["rel"], np.int32),
        "img_to_last_rel": np.asarray(last["rel"], np.int32),
        "split": splits(len(ids), shares),
        "image_ids": np.asarray(ids, np.int64),
    }


def sg2im_arrays(
    records: Iterable[GenomeRecord], names: Vocabulary, smallest_image: int = 0, smallest_object: float = 0,
    objects: tuple[int, int] = (1, 30), relationships: tuple[int, int] = (0, 30),
) -> dict[str, np.ndarray]:  # fmt: skip
    """The arrays of sg2im's ``train.h5``; its own filters are 200 px, 32 px, (3, 30) and (1, 30).

    image_ids (i); object_ids and object_names (i o), object_boxes (i o 4; x, y, w, h), objects_per_image (i);
    relationship_ids, relationship_subjects, relationship_predicates and relationship_objects (i r), where subjects and
    objects are places in the image's row of objects; relationships_per_image (i); object_attributes (i o a) and
    attributes_per_object (i o). Names are numbers from 1 (0 is ``__image__``, ``__in_image__``); -1 fills up.
    Attributes count from 0. Images outside the bounds are left out, as in the original.

    Raises BadInput where no image is left.
    """
    noun = {name: i + 1 for i, name in enumerate(names.objects)}
    verb = {name: i + 1 for i, name in enumerate(names.predicates)}
    word = {name: i for i, name in enumerate(names.attributes)}
    kept = []
    for record in records:
        things = _kept(record, noun, smallest_object)[: objects[1] + 1]
        rows = {it.id: k for k, it in enumerate(things)}
        links = [
            each
            for each in record.graph.relationships
            if each.subject_id in rows and each.object_id in rows and each.predicate.lower() in verb
        ]
        size = min(record.image.width, record.image.height)
        inside = objects[0] <= len(things) <= objects[1] and relationships[0] <= len(links) <= relationships[1]
        if size >= smallest_image and inside:
            kept.append((record.image.id, things, links, rows))
    if not kept:
        raise BadInput("no image passes the bounds on sizes, objects and relationships; widen them.")
    i, o = len(kept), max(len(things) for _, things, _, _ in kept)
    r = max(max(len(links) for _, _, links, _ in kept), 1)
    one: dict[str, np.ndarray] = {
        name: np.full((i, o), -1, np.int64) for name in ("object_ids", "object_names", "attributes_per_object")
    }
    two: dict[str, np.ndarray] = {
        name: np.full((i, r), -1, np.int64)
        for name in (
            "relationship_ids",
            "relationship_subjects",
            "relationship_predicates",
            "relationship_objects",
        )
    }
    boxes: np.ndarray = np.full((i, o, 4), -1, np.int64)
    said: np.ndarray = np.full((i, o, ATTRIBUTES), -1, np.int64)
    for k, (_, things, links, rows) in enumerate(kept):
        for j, it in enumerate(things):
            one["object_ids"][k, j], one["object_names"][k, j] = it.id, noun[it.name.lower()]
            boxes[k, j] = [round(v) for v in (it.x, it.y, it.w, it.h)]
            told = [word[a.lower()] for a in it.attributes if a.lower() in word][:ATTRIBUTES]
            said[k, j, : len(told)], one["attributes_per_object"][k, j] = told, len(told)
        for j, link in enumerate(links):
            two["relationship_ids"][k, j], two["relationship_predicates"][k, j] = link.id, verb[link.predicate.lower()]
            two["relationship_subjects"][k, j] = rows[link.subject_id]
            two["relationship_objects"][k, j] = rows[link.object_id]
    return {
        "image_ids": np.asarray([each[0] for each in kept], np.int64),
        "object_boxes": boxes,
        "object_attributes": said,
        "objects_per_image": np.asarray([len(each[1]) for each in kept], np.int64),
        "relationships_per_image": np.asarray([len(each[2]) for each in kept], np.int64),
        **one,
        **two,
    }


def save_arrays(path: Path | str, arrays: dict[str, np.ndarray], names: Vocabulary) -> Path:
    """Writes arrays and their vocabulary to one safetensors file. Raises OSError."""
    from safetensors.numpy import save

    from ...writing import atomic_write

    metadata = {"format": FORM, "vocabulary": json.dumps(asdict(names))}
    with atomic_write(path) as file:
        file.write(save({name: np.ascontiguousarray(each) for name, each in arrays.items()}, metadata))
    return Path(path)


def load_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], Vocabulary]:
    """What :func:`save_arrays` wrote. Raises BadInput for any other file, OSError."""
    with files.reading_tensors(path, FORM, "arrays of scene graphs") as (file, metadata):
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (no mapping)
        return arrays, Vocabulary(**{key: tuple(each) for key, each in json.loads(metadata["vocabulary"]).items()})


def truths_of(arrays: dict[str, np.ndarray], split: int | None = None) -> list[TrueGraph]:
    """The graphs in SGG arrays, for :func:`sfumato.metrics.scene_graph.scene_graph_recall`; boxes x0 y0 x1 y1 of a
    picture of 1024 pixels. ``split``: only those of train (0), val (1) or test (2)."""
    found = []
    centre, size = arrays["boxes_1024"][:, :2], arrays["boxes_1024"][:, 2:]
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)
    for i in range(len(arrays["split"])):
        if split is not None and arrays["split"][i] != split:
            continue
        first, last = (int(arrays[f"img_to_{end}_box"][i]) for end in ("first", "last"))
        begin, finish = (int(arrays[f"img_to_{end}_rel"][i]) for end in ("first", "last"))
        rows = slice(max(first, 0), last + 1) if first >= 0 else slice(0, 0)
        links = slice(begin, finish + 1) if begin >= 0 else slice(0, 0)
        found.append(
            TrueGraph(
                arrays["labels"][rows, 0], boxes[rows], arrays["relationships"][links] - max(first, 0),
                arrays["predicates"][links, 0],
            )
        )  # fmt: skip
    return found
