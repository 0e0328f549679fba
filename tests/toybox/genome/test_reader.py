"""Visual Genome's files as people have them: every spelling, any size, zipped; and everything that can be wrong."""

from __future__ import annotations

import io
import json
import random
import zipfile

import pytest

from sfumato.errors import BadInput, UnknownName
from sfumato.toybox.genome import VisualGenome, check, streaming
from sfumato.toybox.genome.streaming import items

THING = {"object_id": 5, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["cat"], "synsets": ["cat.n.01"]}
OTHER = THING | {"object_id": 6, "names": ["mat"], "synsets": []}
LINK = {"relationship_id": 8, "predicate": "on", "synsets": [], "subject_id": 5, "object_id": 6}
GRAPH = {"image_id": 1, "objects": [THING, OTHER], "relationships": [LINK]}
IMAGE = {"image_id": 1, "url": "https://a/rak248/VG_100K_2/1.jpg", "width": 10, "height": 12, "coco_id": None}


def put(folder, **contents):
    for name, value in contents.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def changed(value, **more):
    return json.loads(json.dumps(value)) | more


# --- every spelling --------------------------------------------------------------------------------------------------


def test_both_spellings_give_the_same_records(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    plain = {
        "id": 5,
        "x": 1,
        "y": 2,
        "width": 3,
        "height": 4.0,
        "name": "cat",
        "synsets": [{"synset_name": "cat.n.01"}],
    }
    old = {"id": 1, "objects": [plain, changed(plain, id=6, name="mat", synsets=[])]}
    old["relationships"] = [{"id": 8, "predicate": "on", "subject": {"id": 5}, "object": {"object_id": 6}}]
    span = {"synset_name": "cat.n.01", "entity_name": "cat", "entity_idx_start": 2, "entity_idx_end": 5}
    box = {"x": 0, "y": 0, "width": 4, "height": 4, "phrase": "a cat"}
    asked = {"image_id": 1, "question": "What?", "answer": "Cat."}
    put(tmp_path / "old", scene_graphs=[old], image_data=[changed(IMAGE, id=1)],
        region_descriptions=[{"id": 1, "regions": [box | {"id": 3, "image": 1, "synsets": [span]}]}],
        question_answers=[{"id": 1, "qas": [changed(asked, id=4)]}])  # fmt: skip
    put(tmp_path / "new", scene_graphs=[GRAPH], image_data=[IMAGE],
        region_descriptions=[{"image_id": 1, "regions": [box | {"region_id": 3, "image_id": 1, "synsets": [span]}]}],
        question_answers=[{"image_id": 1, "qas": [changed(asked, qa_id=4)]}])  # fmt: skip
    first, second = (list(VisualGenome(tmp_path / name).records()) for name in ("old", "new"))
    assert first == second and len(first) == 1
    assert first[0].image.path == "VG_100K_2/1.jpg" and first[0].graph.objects[0].h == 4
    assert first[0].regions[0].mentions[0].text == "cat" and first[0].questions[0].id == 4


def test_what_release_1_4_leaves_out_may_be_missing(tmp_path):
    bare = {"object_id": 5, "x": 1, "y": 2, "w": 3, "h": 4, "names": [], "merged_object_ids": [7, 9]}
    put(tmp_path, objects=[{"image_id": 1, "objects": [bare]}])
    [(_, (it,))] = VisualGenome(tmp_path).objects()
    assert it.merged == (7, 9) and it.name == "" and it.synsets == () and it.attributes == ()


# --- zips ------------------------------------------------------------------------------------------------------------


def test_zips_are_read_without_unpacking(tmp_path):
    inner = json.dumps([GRAPH])
    with zipfile.ZipFile(tmp_path / "scene_graphs.json.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scene_graphs.json", inner)
        archive.writestr("__MACOSX/scene_graphs.json", "shadow")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("VG/scene_graphs.json", inner)
        archive.writestr("VG/image_data.json", json.dumps([IMAGE]))
    assert list(VisualGenome(tmp_path).graphs()) == list(VisualGenome(tmp_path / "all.zip").graphs())
    assert len(list(VisualGenome(tmp_path / "all.zip").records())) == 1 and list(check(tmp_path / "all.zip")) == []


def test_zips_that_are_damaged_or_other_ones(tmp_path):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        words = random.Random(0)
        archive.writestr("objects.json", json.dumps([changed(GRAPH, image_id=words.random()) for _ in range(500)]))
    raw = whole.getvalue()
    cut, dirty = tmp_path / "cut.zip", tmp_path / "dirty.zip"
    cut.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match="no zip file, or it is cut off"):
        VisualGenome(cut)
    dirty.write_bytes(raw[:3000] + bytes(200) + raw[3200:])
    with pytest.raises(BadInput, match=r"objects.json in .*damaged"):
        list(VisualGenome(dirty).objects())
    with zipfile.ZipFile(tmp_path / "objects.json.zip", "w") as archive:
        archive.writestr("image_data.json", "[]")
    with pytest.raises(BadInput, match="holds no objects.json; it has image_data.json"):
        list(VisualGenome(tmp_path).objects())
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a/objects.json", "[]")
        archive.writestr("b/objects.json", "[]")
    with pytest.raises(BadInput, match="holds 2 files of the name objects.json; it has a/objects.json, b/objects.json"):
        list(VisualGenome(tmp_path / "two.zip").objects())
    with pytest.raises(BadInput, match=r"no relationships.json and no relationships.json.zip; it has cut.zip, "):
        list(VisualGenome(tmp_path).relationships())
    with pytest.raises(FileNotFoundError):
        VisualGenome(tmp_path / "nowhere")
    with pytest.raises(UnknownName, match="refuse, drop"):
        VisualGenome(tmp_path, faults="fix")


# --- streaming -------------------------------------------------------------------------------------------------------


class Endless(io.RawIOBase):
    """An array of ``n`` equal items that is never in memory as a whole."""

    def __init__(self, item: bytes, n: int):
        self.item, self.n, self.sent, self.rest = item, n, 0, b"["

    def read(self, size=-1):
        while len(self.rest) < size and self.sent < self.n:
            self.sent += 1
            self.rest += self.item + (b"]" if self.sent == self.n else b",")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken


def test_memory_does_not_grow_with_the_file(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 1 << 14)
    widest = []
    more = streaming._Scanner.more

    def watched(scan):
        more(scan)
        widest.append(len(scan.window))

    monkeypatch.setattr(streaming._Scanner, "more", watched)
    item = json.dumps(GRAPH).encode()
    n = 6_000  # 1.5 MB, a hundred windows
    assert sum(1 for _ in items(Endless(item, n), "x")) == n
    assert max(widest) <= 2 * (1 << 14) + len(item)


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_any_window_reads_the_same(monkeypatch, window):
    monkeypatch.setattr(streaming, "WINDOW", window)
    value = [{"a": [1, 2.5, -3e4, True, None]}, 'é\u20ac\U0001f600 \\ " \n', 12, [], {}, -0.5, "x" * 300, 123456789]
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=3), " \n[ ] \n"):
        assert list(items(io.BytesIO(text.encode()), "x")) == json.loads(text)
    assert list(items(io.BytesIO(b"\xef\xbb\xbf[1]"), "x")) == [1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no JSON array"),
        (b'{"a": 1}', "no JSON array"),
        (b'[{"a": 1}', "ends in the middle of the array"),
        (b'[{"a": 1},', "ends in the middle of the array"),
        (b'[{"a": 1}, {"a', "ends in the middle of an item"),
        (b"[1 2]", "expected ',' or ']', found '2'"),
        (b"[1,]", "expecting value"),
        (b"[1] 2", "something follows"),
        (b"[{'a': 1}" + b" " * 200 + b"]", "character 2: expecting property name"),
        (b"[NaN]", "NaN"),
        (b"[\xff\xfe]", "not UTF-8"),
        (b"[" + b"[" * 100_000, "nested too deep"),
    ],
)
def test_damaged_arrays_are_told_in_one_line(text, says):
    with pytest.raises(BadInput, match=says) as caught:
        list(items(io.BytesIO(text), "objects.json"))
    assert "objects.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_item_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(streaming, "LARGEST_ITEM", 1 << 20)
    with pytest.raises(BadInput, match="one item has more than 1 million characters"):
        list(items(io.BytesIO(b'["' + b"a" * (4 << 20)), "objects.json"))


# --- what records cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (changed(GRAPH, objects=[changed(THING, x="1"), OTHER]), "image 1, object 5: x is '1'; it must be a number"),
        (changed(GRAPH, objects=[changed(THING, object_id="5")]), "object_id is '5'; it must be a whole number"),
        (changed(GRAPH, objects=[changed(THING, object_id=True)]), "object_id is True"),
        (changed(GRAPH, objects=[changed(THING, object_id=-5)]), "object_id is -5"),
        (changed(GRAPH, objects=[changed(THING, w=None)]), "has no w or width; it has object_id, x"),
        (changed(GRAPH, objects=[changed(THING, id=7)]), "object_id 5 but id 7; they must agree"),
        (changed(GRAPH, objects=[changed(THING, names="cat")]), "names is 'cat'; it must be a list"),
        (changed(GRAPH, objects=[changed(THING, names=[3])]), "names is 3; it must be a text"),
        (changed(GRAPH, objects=[3]), "object number 1 is 3; it must be a JSON object"),
        (changed(GRAPH, objects={"a": 1}), "objects is {'a': 1}; it must be a list"),
        (changed(GRAPH, objects=[THING, THING]), "image 1: object id 5 comes more than once"),
        (changed(GRAPH, image_id="one"), "image_id is 'one'"),
        (changed(GRAPH, relationships=[changed(LINK, predicate=None)]), "has no predicate"),
        (changed(GRAPH, relationships=[changed(LINK, subject_id=4, object_id=9)]),
         "relationship 8 has subject 4, which is no object there; relationship 8 has object 9"),
        ({"image_id": 1, "relationships": []}, "has no 'objects' but image_id, relationships; is this file really"),
        (7, "entry 1 is 7"),
    ],
)  # fmt: skip
def test_wrong_graphs_are_told_with_their_place(tmp_path, graph, says):
    put(tmp_path, scene_graphs=[graph])
    with pytest.raises(BadInput) as caught:
        list(VisualGenome(tmp_path).graphs())
    assert says in str(caught.value) and "scene_graphs.json" in str(caught.value) and "\n" not in str(caught.value)


def test_many_dangling_ids_make_one_line(tmp_path):
    links = [changed(LINK, relationship_id=i, subject_id=100 + i) for i in range(50)]
    put(tmp_path, scene_graphs=[changed(GRAPH, relationships=links)], image_data=[IMAGE])
    with pytest.raises(BadInput, match="subject 100.*subject 111.* and 38 more"):
        list(VisualGenome(tmp_path).graphs())
    [graph] = VisualGenome(tmp_path, faults="drop").graphs()
    assert graph.relationships == () and len(graph.objects) == 2
    told = [str(each) for each in check(tmp_path)]  # here every single one is named
    assert len(told) == 50 and all(f"subject {100 + i}" in line for i, line in enumerate(told))


def test_boxes_outside_are_refused_or_cut(tmp_path):
    put(tmp_path, scene_graphs=[changed(GRAPH, objects=[changed(THING, x=-2, w=30), OTHER])], image_data=[IMAGE])
    with pytest.raises(BadInput, match="image 1, object 5: its box x -2, y 2, 30x4 leaves the picture of 10x12"):
        list(VisualGenome(tmp_path).records())
    [record] = VisualGenome(tmp_path, faults="drop").records()
    assert (record.graph.objects[0].x, record.graph.objects[0].w) == (0, 10)


def test_files_that_tell_of_other_images(tmp_path):
    put(tmp_path, image_data=[IMAGE, changed(IMAGE, image_id=2)], scene_graphs=[GRAPH])
    with pytest.raises(BadInput, match="goes on with image 2, but the graphs' file ends there"):
        list(VisualGenome(tmp_path).records())
    put(tmp_path, scene_graphs=[GRAPH, GRAPH])
    with pytest.raises(BadInput, match="image 1 comes a second time"):
        list(VisualGenome(tmp_path).records())
    put(tmp_path, scene_graphs=[GRAPH, changed(GRAPH, image_id=2)], region_descriptions=[{"id": 2, "regions": []}])
    with pytest.raises(BadInput, match="at image 1, region_descriptions.json has image 2"):
        list(VisualGenome(tmp_path).records())


def test_the_check_names_every_fault(tmp_path):
    box = {"x": 0, "y": 0, "width": 4, "height": 99, "phrase": "a cat"}
    span = {"synset_name": "cat.n.01", "entity_name": "dog", "entity_idx_start": 2, "entity_idx_end": 5}
    put(
        tmp_path,
        image_data=[IMAGE, changed(IMAGE, image_id=2), changed(IMAGE, image_id=3)],
        synsets=[{"synset_name": "mat.n.01", "synset_definition": "a mat"}],
        objects=[
            {"image_id": 1, "objects": [changed(THING, h=0), OTHER]},
            {"image_id": 2, "objects": [OTHER]},
            {"image_id": 9, "objects": []},
        ],
        attributes=[{"image_id": 1, "attributes": [changed(THING, object_id=77, w=0, attributes=["red"])]}],
        relationships=[{"image_id": 1, "relationships": [changed(LINK, subject={"object_id": 4}, object=OTHER)]}],
        scene_graphs=[changed(GRAPH, objects=[changed(THING, x=-2), changed(OTHER, object_id=66)])],
        region_graphs=[{"image_id": 1, "regions": [box | {"region_id": 3, "objects": [], "relationships": [LINK]}]}],
        region_descriptions=[{"id": 1, "regions": [box | {"region_id": 3, "synsets": [span]}]}],
        question_answers=[
            {
                "id": 1,
                "qas": [
                    {"qa_id": 4, "question": "What?", "answer": "It.", "q_objects": [changed(THING, object_id=55)]}
                ],
            }
        ],
        qa_to_region_mapping={"4": 33},
    )
    told = "\n".join(str(each) for each in check(tmp_path))
    for line in (
        "objects.json, image 1: object 5: its box is 3x0",
        "objects.json, image 1: synset 'cat.n.01' is not in synsets.json",
        "objects.json, image 2: object id 6 is also used in image 1",
        "objects.json, image 9: is not in image_data.json",
        "objects.json, image 3: is in image_data.json but not here",
        "attributes.json, image 1: object 77 is not in objects.json",
        "attributes.json, image 1: object 77: its box is 0x",
        "scene_graphs.json, image 1: object 5: its box x -2, y",
        "relationships.json, image 1: relationship 8 has subject 4, which is no object there",
        "scene_graphs.json, image 1: relationship 8 has object 6, which is no object there",
        "scene_graphs.json, image 1: object 66 is not in objects.json",
        "region_graphs.json, image 1: region 3: relationship 8 has subject 5",
        "region_descriptions.json, image 1: region 3: its box x 0, y 0, 4x99 leaves",
        "region_descriptions.json, image 1: region 3: characters 2 to 5 are 'cat', not 'dog'",
        "qa_to_region_mapping.json, image 1: question 4 is about region 33, which is not there",
        "question_answers.json, image 1: question 4 names object 55, not there",
    ):
        assert line in told, line
