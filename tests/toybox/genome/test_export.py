"""Toys as Visual Genome: nothing is lost on the way, every id leads somewhere, and others' loaders read it."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import BadInput, UnknownName
from sfumato.metrics.scene_graph import oracle, scene_graph_recall
from sfumato.toybox import Scene, Toy, render, sample_scene
from sfumato.toybox.dataset import draw_scene
from sfumato.toybox.genome import (
    GenomeWriter,
    VisualGenome,
    check,
    export_genome,
    load_arrays,
    read_scenes,
    record_of,
    save_arrays,
    sg2im_arrays,
    sgg_arrays,
    truths_of,
    vocabulary,
)
from sfumato.toybox.genome.scenes import SYNSETS, Counter, box_of
from sfumato.toybox.genome.writer import run_lengths

N = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_genome(tmp_path_factory.mktemp("genome") / "vg", n=N, size=32, seed=3)


@pytest.fixture(scope="module")
def records(folder):
    return list(VisualGenome(folder).records())


def drawn(n=N):
    scenes = [draw_scene("train", 3, i) for i in range(n)]
    return scenes, render(scenes, 32)


def test_an_exported_folder_is_read_from_a_zip_of_the_whole_folder_too(folder: Path, tmp_path: Path) -> None:
    zipped = Path(shutil.make_archive(str(tmp_path / "vg"), "zip", folder.parent, folder.name))
    with zipfile.ZipFile(zipped) as archive:  # which holds the file of another release in a folder of its own
        assert {f"{folder.name}/objects.json", f"{folder.name}/1.4/objects.json"} <= set(archive.namelist())
    assert [*check(zipped)] == [*check(folder)] == []
    ours, theirs = (list(VisualGenome(each).records()) for each in (zipped, folder))
    assert ours == theirs and len(ours) == N


def test_records_come_back_as_they_were(folder, records):
    scenes, frames = drawn()
    ids = Counter()
    made = [record_of(s, frames.mask[i].numpy(), frames.depth[i].numpy(), i + 1, ids) for i, s in enumerate(scenes)]
    assert records == made and len({q.region_id for r in records for q in r.questions}) > 3
    assert read_scenes(folder) == {i + 1: scene for i, scene in enumerate(scenes)}
    joined = folder.parent / "joined"  # without scene_graphs.json the graphs are put together from the other files
    joined.mkdir()
    for name in ("image_data", "objects", "attributes", "relationships"):
        (joined / f"{name}.json").write_bytes((folder / f"{name}.json").read_bytes())
    assert [r.graph for r in VisualGenome(joined).records()] == [r.graph for r in made]


def test_real_records_can_be_written_again(folder, records, tmp_path):
    with GenomeWriter(tmp_path, dict(SYNSETS.values())) as writer:
        for record in records:
            writer.add(record)
    assert list(VisualGenome(tmp_path).records()) == records
    for name in ("objects", "scene_graphs", "region_graphs", "question_answers", "1.4/objects"):
        assert (tmp_path / f"{name}.json").read_bytes() == (folder / f"{name}.json").read_bytes()
    graph = records[0].graph
    lost = replace(graph, relationships=(replace(graph.relationships[0], subject_id=999),))
    with GenomeWriter(tmp_path, {}) as writer, pytest.raises(BadInput, match="not there"):
        writer.add(replace(records[0], graph=lost))


def test_boxes_masks_and_pictures_are_those_of_the_render(folder, records):
    scenes, frames = drawn()
    extra = json.loads((folder / "toybox_extra.json").read_text())
    for i, record in enumerate(records):
        mask = frames.mask[i].numpy()
        seen = [k for k in range(len(scenes[i].toys)) if (mask == k).any()]
        toys = record.graph.objects[: len(seen)]
        for k, it in zip(seen, toys, strict=True):
            x0, y0, x1, y1 = frames.boxes[i][k].int().tolist()
            assert (it.x, it.y, it.x + it.w, it.y + it.h) == (x0, y0, x1, y1)
            assert it.names == (scenes[i].toys[k].shape,) and scenes[i].toys[k].color in it.attributes
            runs = extra[str(i + 1)]["masks"][str(it.id)]
            flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(mask.shape)
            assert (flat == (mask == k)).all()
        picture = Image.open(folder / "png" / f"{i + 1}.png")
        assert (np.asarray(picture) == np.asarray(frames.pil(i))).all()
        assert Image.open(folder / record.image.path).size == (32, 32)
    assert run_lengths(np.ones((2, 2), bool)) == [0, 4] and run_lengths(np.zeros((2, 2), bool)) == [4]
    assert box_of(np.zeros((3, 3), bool)) is None


def test_phrases_spans_relations_and_answers_are_true(records):
    for record in records:
        things = {it.id: it for it in record.graph.objects}
        assert record.regions and [g.region for g in record.region_graphs] == list(record.regions)
        for region, graph in zip(record.regions, record.region_graphs, strict=True):
            assert region.mentions and all(region.phrase[m.start : m.end] == m.text for m in region.mentions)
            assert {o.name for o in graph.objects} <= {m.text for m in region.mentions}
            for it in graph.objects:  # a region covers what it speaks of
                assert region.x <= it.x and it.x + it.w <= region.x + region.width
            assert all(link in record.graph.relationships for link in graph.relationships)
        pairs = [(r.subject_id, r.object_id) for r in record.graph.relationships]
        assert len(set(pairs)) == len(pairs)  # one predicate a pair: with graph constraint the truth can be reached
        for link in record.graph.relationships:
            a, b = things[link.subject_id], things[link.object_id]
            if link.predicate == "left of":
                assert a.x + a.w / 2 < b.x + b.w / 2
        for q in record.questions:
            assert q.question.split()[0] in ("What", "Where", "How") and q.question.endswith("?")
            if q.question.startswith("What color"):
                assert q.answer in q.question_objects[0].attributes
            if q.answer_objects:
                assert q.answer.split()[-1] == q.answer_objects[0].name


def test_what_is_hidden_or_not_there_is_not_said():
    hidden = Scene((Toy("cube", "red", x=0.0, z=-0.8), Toy("ball", "blue", size="small", x=0.0, z=0.9)))
    frames = render([hidden], 32)
    mask = np.where(frames.mask[0].numpy() == 1, 0, frames.mask[0].numpy())  # the ball covered whole
    record = record_of(hidden, mask, frames.depth[0].numpy(), 1, Counter())
    assert [it.name for it in record.graph.objects] == ["cube", "grass", "sky"]
    assert not any("ball" in r.phrase for r in record.regions)
    assert not any(q.question.startswith("How many") for q in record.questions)  # one of them is not seen
    empty = render([Scene(())], 16)
    bare = record_of(Scene(()), empty.mask[0].numpy(), empty.depth[0].numpy(), 1, Counter())
    assert [r.phrase for r in bare.regions] == ["the grass", "the sky by day"]


def test_every_word_has_a_synset_and_every_scene_passes_the_check(folder):
    assert list(check(folder)) == []
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, 3, "any") for _ in range(3)]
    frames = render(scenes, 16)
    ids = Counter()
    for i, scene in enumerate(scenes):
        record = record_of(scene, frames.mask[i].numpy(), frames.depth[i].numpy(), i, ids)
        names = {s for it in record.graph.objects for s in it.synsets} | {
            s for link in record.graph.relationships for s in link.synsets
        }
        assert names <= {name for name, _ in SYNSETS.values()}


def test_the_drivers_reading_rules_hold(folder):
    """As the authors' Python driver reads: ``id`` of every image of regions, objects by keyword, all synsets known."""
    synsets = {s["synset_name"] for s in json.loads((folder / "synsets.json").read_text())}
    images = {i["id"] for i in json.loads((folder / "image_data.json").read_text())}

    def thing(object_id, x, y, w, h, names, synsets):  # a further key would raise
        return object_id, names, synsets

    for entry in json.loads((folder / "region_descriptions.json").read_text()):
        assert entry["id"] in images and entry["regions"][0]["image_id"] == entry["id"]
    for entry in json.loads((folder / "objects.json").read_text()):
        assert all(set(thing(**each)[2]) <= synsets for each in entry["objects"])
    for entry in json.loads((folder / "relationships.json").read_text()):
        for each in entry["relationships"]:  # embedded objects: some loaders want name, some names
            assert each["subject"]["name"] == each["subject"]["names"][0] and each["object"]["object_id"]
    for image in images:
        graph = json.loads((folder / "by-id" / f"{image}.json").read_text())
        known = {each["object_id"] for each in graph["objects"]}
        assert all({r["subject_id"], r["object_id"]} <= known for r in graph["relationships"])
    gqa = json.loads((folder / "sceneGraphs.json").read_text())
    assert all(r["object"] in g["objects"] for g in gqa.values() for o in g["objects"].values() for r in o["relations"])


def test_arrays_hold_what_the_graphs_hold(folder, records, tmp_path):
    names = vocabulary(records)
    sgg, again = load_arrays(folder / "arrays" / "sgg.safetensors")
    assert again == names and all((sgg[k] == v).all() for k, v in sgg_arrays(records, names).items())
    objects = sum(len(r.graph.objects) for r in records)
    links = [link for r in records for link in r.graph.relationships]
    assert len(sgg["labels"]) == objects and len(sgg["relationships"]) == len(links)
    dicts = names.dicts()
    assert [dicts["idx_to_predicate"][str(p)] for p in sgg["predicates"][:, 0]] == [link.predicate for link in links]
    first = records[0].graph.objects[0]
    assert np.allclose(
        sgg["boxes_1024"][0], 32 * np.array([first.x + first.w / 2, first.y + first.h / 2, first.w, first.h])
    )
    assert np.allclose(sgg["boxes_512"] * 2, sgg["boxes_1024"]) and sgg["split"].tolist() == [0] * 6 + [1, 2]
    sg2im = sg2im_arrays(records, names)
    assert sg2im["objects_per_image"].tolist() == [len(r.graph.objects) for r in records]
    for k, record in enumerate(records):
        ids = sg2im["object_ids"][k, : sg2im["objects_per_image"][k]]
        ends = sg2im["relationship_subjects"][k, : sg2im["relationships_per_image"][k]]
        assert ids[ends].tolist() == [link.subject_id for link in record.graph.relationships]
        said = sg2im["object_attributes"][k, 0, : sg2im["attributes_per_object"][k, 0]]
        assert tuple(names.attributes[a] for a in said) == record.graph.objects[0].attributes
    assert (sg2im["object_ids"][sg2im["object_names"] < 0] == -1).all()
    with pytest.raises(BadInput, match="no image passes"):
        sg2im_arrays(records, names, smallest_image=200)
    few = vocabulary(records, objects=2, predicates=1)  # what is not in it leaves no trace
    cut = sgg_arrays(records, few)
    assert set(cut["labels"].ravel().tolist()) <= {1, 2} and set(cut["predicates"].ravel().tolist()) <= {1}
    with pytest.raises(BadInput, match="holds no arrays"):
        load_arrays(
            save_arrays(tmp_path / "x", sgg, names).with_name("y") if (tmp_path / "y").write_bytes(b"1") else ""
        )


def test_the_truth_has_recall_one_and_shuffled_predicates_have_not(folder):
    sgg, names = load_arrays(folder / "arrays" / "sgg.safetensors")
    truths = truths_of(sgg)
    assert len(truths) == N and len(truths_of(sgg, 1)) == 1
    found = [oracle(truth, len(names.predicates)) for truth in truths]
    for constraint in (True, False):
        score = scene_graph_recall(truths, found, (20,), constraint)
        assert score.recall[20].value == 1 and score.mean_recall[20] == 1
    rng = np.random.default_rng(0)
    wrong = [replace(each, scores=rng.permuted(each.scores[:, 1:], axis=1)) for each in found]
    wrong = [replace(each, scores=np.pad(each.scores, ((0, 0), (1, 0)))) for each in wrong]
    assert scene_graph_recall(truths, wrong, (20,)).recall[20].value < 0.6


def test_refusals_leave_nothing(tmp_path):
    with pytest.raises(BadInput, match="n is 0; it must be from 1"):
        export_genome(tmp_path / "a", n=0)
    with pytest.raises(UnknownName, match="train"):
        export_genome(tmp_path / "a", split="trian")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(BadInput, match="not empty"):
        export_genome(tmp_path / "full")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_genome(tmp_path / "new", n=2, size=16, on_progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
