"""Records written as Visual Genome's files: image after image, so that memory does not grow with their number.

Where loaders differ, both spellings are written: ``id`` and ``image_id`` of images, ``name`` and ``names`` of embedded
objects. ``objects.json`` is that of release 1.2 (its Python driver takes no further key), ``1.4/objects.json`` has
``merged_object_ids``; ``by-id/`` holds the graphs as the driver reads them, ``sceneGraphs.json`` GQA's form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from ... import valid, writing
from ...errors import BadInput
from .. import rendering
from ..dataset import bounded, draw_scene
from ..scene import Scene
from .arrays import save_arrays, sg2im_arrays, sgg_arrays, vocabulary
from .reader import VisualGenome
from .records import GenomeGraph, GenomeObject, GenomeRecord, GenomeRegion, GenomeRelationship
from .scenes import ALIASES, SYNSETS, Counter, record_of

EXTRA = "toybox_extra.json"
FILES = (
    "image_data",
    "region_descriptions",
    "objects",
    "attributes",
    "relationships",
    "scene_graphs",
    "region_graphs",
    "question_answers",
)


def _thing(it: GenomeObject, name: bool = False, attributes: bool = False) -> dict[str, Any]:
    said: dict[str, Any] = {"object_id": it.id, "x": it.x, "y": it.y, "w": it.w, "h": it.h}
    said |= {"name": it.name} if name else {}
    said |= {"names": list(it.names), "synsets": list(it.synsets)}
    return said | ({"attributes": list(it.attributes)} if attributes else {})


def _link(it: GenomeRelationship) -> dict[str, Any]:
    return {"relationship_id": it.id, "predicate": it.predicate, "synsets": list(it.synsets)}


def _ends(it: GenomeRelationship) -> dict[str, Any]:
    return _link(it) | {"subject_id": it.subject_id, "object_id": it.object_id}


def _region(it: GenomeRegion) -> dict[str, Any]:
    spans = [
        {"synset_name": m.synset, "entity_name": m.text, "entity_idx_start": m.start, "entity_idx_end": m.end}
        for m in it.mentions
    ]
    box = {"x": it.x, "y": it.y, "width": it.width, "height": it.height}
    return {"region_id": it.id, "image_id": it.image_id, **box, "phrase": it.phrase, "synsets": spans}


def _graph(it: GenomeGraph) -> dict[str, Any]:
    objects = [_thing(each, attributes=True) for each in it.objects]
    return {"objects": objects, "relationships": [_ends(each) for each in it.relationships]}


def entries(record: GenomeRecord) -> dict[str, dict[str, Any]]:
    """File, without its ending -> what stands in it about this image."""
    image, graph = record.image, record.graph
    by_id = {each.id: each for each in graph.objects}
    both = {"image_id": image.id, "id": image.id}
    embedded = [
        _link(each) | {"subject": _thing(by_id[each.subject_id], True), "object": _thing(by_id[each.object_id], True)}
        for each in graph.relationships
    ]
    linked = [
        _region(each.region)
        | {
            "objects": [_thing(one, True, True) for one in each.objects],
            "relationships": [_ends(one) for one in each.relationships],
        }
        for each in record.region_graphs
    ]
    asked = [
        {
            "qa_id": each.id, "image_id": image.id, "question": each.question, "answer": each.answer,
            "q_objects": [_thing(one, True) for one in each.question_objects],
            "a_objects": [_thing(one, True) for one in each.answer_objects],
        }
        for each in record.questions
    ]  # fmt: skip
    size = {"width": image.width, "height": image.height}
    return {
        "image_data": both | {"url": image.url, **size, "coco_id": image.coco_id, "flickr_id": image.flickr_id},
        "region_descriptions": both | {"regions": [_region(each) for each in record.regions]},
        "objects": both | {"objects": [_thing(each) for each in graph.objects]},
        "attributes": both | {"attributes": [_thing(each, attributes=True) for each in graph.objects]},
        "relationships": both | {"relationships": embedded},
        "scene_graphs": both | _graph(graph),
        "region_graphs": both | {"regions": linked},
        "question_answers": both | {"qas": asked},
    }


def gqa_graph(record: GenomeRecord) -> dict[str, Any]:
    """A graph as GQA writes it: objects by id, each with the relations that begin at it."""
    objects: dict[str, dict[str, Any]] = {}
    for it in record.graph.objects:
        box = {"x": it.x, "y": it.y, "w": it.w, "h": it.h}
        objects[str(it.id)] = {"name": it.name, **box, "attributes": list(it.attributes), "relations": []}
    for each in record.graph.relationships:
        objects[str(each.subject_id)]["relations"].append({"name": each.predicate, "object": str(each.object_id)})
    return {"width": record.image.width, "height": record.image.height, "objects": objects}


class GenomeWriter:
    """Writes records into a folder, one :meth:`add` after the other; use it in a ``with`` statement.

    Args:
        folder: an existing folder, such as :func:`sfumato.writing.atomic_folder` gives.
        synsets: name -> definition.
        tables: surface names -> synset, by kind ("object", "attribute", "relationship").
        aliases: groups of names of one thing, the first of which is the one to use, for relationship_alias.txt.
    """

    def __init__(
        self, folder: Path, synsets: dict[str, str], tables: dict[str, dict[str, str]] | None = None,
        aliases: Iterable[Iterable[str]] = (),
    ):  # fmt: skip
        self.folder, self.count, self.regions = folder, 0, 0
        told = [{"synset_name": name, "synset_definition": text} for name, text in synsets.items()]
        self._write("synsets.json", told)
        for kind, table in (tables or {}).items():
            self._write(f"{kind}_synsets.json", table)
        for kind, groups in (("object", ()), ("relationship", aliases)):
            lines = "".join(",".join(group) + "\n" for group in groups)
            (folder / f"{kind}_alias.txt").write_text(lines, encoding="utf-8")
        (folder / "by-id").mkdir(exist_ok=True)
        (folder / "1.4").mkdir(exist_ok=True)
        self.stack = ExitStack()
        self.open: dict[str, IO[str]] = {}

    def _write(self, name: str, value: Any) -> None:
        (self.folder / name).write_text(valid.json_text(value), encoding="utf-8")

    def __enter__(self) -> GenomeWriter:
        for name in (*FILES, "1.4/objects", "qa_to_region_mapping", "sceneGraphs"):
            self.open[name] = self.stack.enter_context((self.folder / f"{name}.json").open("w", encoding="utf-8"))
            self.open[name].write("{" if name in ("qa_to_region_mapping", "sceneGraphs") else "[")
        return self

    def __exit__(self, *failed: object) -> None:
        for name, file in self.open.items():
            file.write("}" if name in ("qa_to_region_mapping", "sceneGraphs") else "]")
        self.stack.close()

    def add(self, record: GenomeRecord) -> None:
        """One image more. Raises BadInput where a relationship names an object that the graph has not."""
        known = {each.id for each in record.graph.objects}
        for each in record.graph.relationships:
            if not {each.subject_id, each.object_id} <= known:
                raise BadInput(f"image {record.image.id}: relationship {each.id} names an object that is not there.")
        joint = ", " if self.count else ""
        for name, entry in entries(record).items():
            self.open[name].write(joint + valid.json_text(entry))
            if name == "objects":
                merged = [
                    e | {"merged_object_ids": list(o.merged)}
                    for e, o in zip(entry["objects"], record.graph.objects, strict=True)
                ]
                self.open["1.4/objects"].write(joint + valid.json_text(entry | {"objects": merged}))
            if name == "scene_graphs":
                self._write(f"by-id/{record.image.id}.json", entry)
        self.open["sceneGraphs"].write(f'{joint}"{record.image.id}": {valid.json_text(gqa_graph(record))}')
        for asked in record.questions:
            if asked.region_id is not None:
                mark = ", " if self.regions else ""
                self.open["qa_to_region_mapping"].write(f'{mark}"{asked.id}": {asked.region_id}')
                self.regions += 1
        self.count += 1


def export_genome(
    folder: Path | str,
    n: int = 16,
    size: int = 64,
    seed: int = 0,
    split: str = "train",
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes ``n`` scenes of the toybox as Visual Genome would have them: its JSON files, ``VG_100K/<id>.jpg`` and the
    same pictures without loss in ``png/``, arrays for scene-graph models in ``arrays/``, and ``toybox_extra.json``
    with what Visual Genome has no place for (scenes, masks), by image id.

    Written beside and renamed: an interrupted export leaves nothing.

    Raises:
        BadInput: n < 1, or the folder exists and is not empty. UnknownName: split. OSError: it cannot be written.
    """
    folder = writing.only_folder(folder, "pictures and annotations")
    bounded(n, size, seed)
    defined = dict(SYNSETS.values())
    words = {
        "object": [w for w, (name, _) in SYNSETS.items() if ".n." in name],
        "attribute": [w for w, (name, _) in SYNSETS.items() if name.split(".")[1] in "as"],
        "relationship": [w for w, (name, _) in SYNSETS.items() if ".r." in name],
    }
    tables = {kind: {word: SYNSETS[word][0] for word in each} for kind, each in words.items()}
    with writing.atomic_folder(folder) as part:
        for name in ("VG_100K", "png"):
            (part / name).mkdir()
        ids = Counter()
        with (
            GenomeWriter(part, defined, tables, ALIASES) as writer,
            (part / EXTRA).open("w", encoding="utf-8") as extra,
        ):
            extra.write("{")
            for start in range(0, n, 64):
                scenes = [draw_scene(split, seed, i) for i in range(start, min(start + 64, n))]
                frames = rendering.render(scenes, size)
                for j, scene in enumerate(scenes):
                    number = start + j + 1
                    mask, depth = frames.mask[j].numpy(), frames.depth[j].numpy()
                    record = record_of(scene, mask, depth, number, ids)
                    writer.add(record)
                    picture = frames.pil(j)
                    picture.save(part / "VG_100K" / f"{number}.jpg", quality=95)
                    picture.save(part / "png" / f"{number}.png")
                    more = {"scene": asdict(scene), "masks": _masks(record, scene, mask)}
                    extra.write(f'{", " if number > 1 else ""}"{number}": {valid.json_text(more)}')
                if on_progress:
                    on_progress(min(start + 64, n), n)
            extra.write("}")
        _write_arrays(part)
    return folder


def _masks(record: GenomeRecord, scene: Scene, mask: np.ndarray) -> dict[str, list[int]]:
    """Object id -> run lengths of its pixels in rows, the first of pixels that are not its own."""
    seen = [i for i in range(len(scene.toys)) if (mask == i).any()]
    return {str(it.id): run_lengths(mask == i) for i, it in zip(seen, record.graph.objects, strict=False)}


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask (h w) read in rows, by turns of unset and set pixels; the first may be 0."""
    flat = np.concatenate([[False], mask.reshape(-1), [not mask.reshape(-1)[-1]]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(edges, prepend=0).tolist()


def read_scenes(folder: Path | str) -> dict[int, Scene]:
    """The exact scenes of an export, by image id. Raises BadInput where toybox_extra.json is missing or damaged."""
    raw = VisualGenome(folder).table(EXTRA)
    try:
        return {int(number): Scene.from_json(json.dumps(each["scene"])) for number, each in raw.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{EXTRA} in {folder} is damaged: {valid.brief(str(error), 120)}.") from None


def _write_arrays(folder: Path) -> None:
    """The arrays of both dialects, from the files just written: as a user would make them."""
    names = vocabulary(VisualGenome(folder).records())
    (folder / "arrays").mkdir()
    for name, made in (("sgg", sgg_arrays), ("sg2im", sg2im_arrays)):
        save_arrays(folder / "arrays" / f"{name}.safetensors", made(VisualGenome(folder).records(), names), names)
