"""Folders of pictures: what counts, where captions come from, what is refused; the journal of made pictures."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sfumato import files
from sfumato.bench.folder import Folder
from sfumato.bench.journal import Journal
from sfumato.errors import BadInput


def picture(path, color="red"):
    Image.new("RGB", (8, 8), color).save(path)


def test_only_pictures_count_and_what_was_drawn_beside_them_does_not(tmp_path):
    for name in ("b.png", "a.jpg", "a.daam.png", "b.daam.png", "b-grid.png", "c-grid.png", "v1.5.png", ".hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "below").mkdir()
    folder = Folder(tmp_path)
    # a.daam.png has no a.png beside it, c-grid.png no c.png: they are pictures of their own
    assert folder.names == ["a.daam.png", "a.jpg", "b.png", "c-grid.png", "v1.5.png"]
    assert (folder.others, folder.drawn) == (1, 2)
    assert folder.about("b.png") == {"text": None}


def test_captions_come_from_metadata_recipes_or_a_file(tmp_path):
    files.save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), {"prompt": "a cube", "seed": 3})
    picture(tmp_path / "b.png")
    assert Folder(tmp_path).about("a.png")["text"] == "a cube" and Folder(tmp_path).about("a.png")["seed"] == 3
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "first"}\n\n{"prompt": "second", "task": "one"}\n')
    by_order = Folder(tmp_path, lines)
    assert [by_order.about(name)["text"] for name in by_order.names] == ["first", "second"]
    assert by_order.about("b.png")["task"] == "one"
    lines.write_text('{"file_name": "b.png", "text": "bé"}\n')
    by_name = Folder(tmp_path, lines)
    assert by_name.about("b.png")["text"] == "bé" and by_name.about("a.png")["text"] == "a cube"
    assert Folder(tmp_path, {"a.png": "told"}).about("a.png") == {"text": "told"}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "caption": "c"}\n')
    assert Folder(tmp_path).names == ["b.png"]  # an imagefolder says what belongs to it


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"file_name": "a.png"}\n{"file_name": "a.png"}\n', "line 2: 'a.png' is named twice"),
        ('{"file_name": "../x.png"}\n', "lies outside"),
        ('{"text": "no name"}\n', "line 1: no file_name"),
        ("[1]\n", "line 1: not a JSON object"),
        ("\n\n{torn\n", "line 3: not a JSON object"),
        ("[" * 100_000 + "\n", "line 1: not a JSON object"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, text, says):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(BadInput, match=says):
        Folder(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        Folder(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        Folder(tmp_path / "file")
    with pytest.raises(BadInput, match="holds no picture"):
        Folder(tmp_path)
    picture(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "1"}\n{"prompt": "2"}\n')
    with pytest.raises(BadInput, match="has 2 prompts for 1 pictures"):
        Folder(tmp_path, tmp_path / "p.jsonl")
    with pytest.raises(OSError, match="No such file"):
        Folder(tmp_path, tmp_path / "q.jsonl")


def test_the_fingerprint_follows_pictures_and_captions(tmp_path):
    picture(tmp_path / "a.png")
    first = Folder(tmp_path).fingerprint()
    assert Folder(tmp_path).fingerprint() == first
    assert Folder(tmp_path, {"a.png": "told"}).fingerprint() != first
    picture(tmp_path / "b.png")
    second = Folder(tmp_path).fingerprint()
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    assert len({first, second, Folder(tmp_path).fingerprint()}) == 3


def test_the_journal_serves_each_line_once(tmp_path):
    journal = Journal(tmp_path)
    paths = [journal.begin("k", "a", {"text": "a"}) for _ in range(2)]
    assert [path.name for path in paths] == ["a.png", "a-2.png"]  # neither is there yet: both names are promised
    picture(paths[1])
    again = Journal(tmp_path)
    assert again.take("k") == paths[1] and again.take("k") is None and again.take("other") is None
    assert again.begin("k", "a", {}) == paths[0]  # promised and never made
    assert again.begin("k", "a", {}).name == "a-3.png"
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["a.png", "a-2.png", "a-3.png"] and rows[0]["text"] == "a"
