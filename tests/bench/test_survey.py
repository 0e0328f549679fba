"""The pass over a folder: constant state, the same figures after a kill, planted failures recovered, bad folders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.bench.folder import Folder
from sfumato.bench.judge import judge_folder, read_attributes
from sfumato.bench.report import Figure, Report, Table
from sfumato.bench.reservoir import Reservoir
from sfumato.bench.survey import CAP, Evaluators, SurveyTotals, survey
from sfumato.errors import BadInput, NoMatch, UnknownName
from sfumato.metrics.stats import Interval
from sfumato.models.readers import load_clip
from sfumato.toybox import SHAPES
from sfumato.toybox.dataset import draw_scene
from sfumato.toybox.oracle.toy_judge import ObjectReading, SceneReading
from tests.folders import write_renders

# --- reservoir -------------------------------------------------------------------------------------------------------


def test_a_reservoir_does_not_depend_on_order_or_batches_and_grows_nested():
    rows = np.arange(500, dtype=np.float32)[:, None]
    one = Reservoir(1, 40, seed=3)
    one.add(range(500), rows)
    two = Reservoir(1, 40, seed=3)
    for part in np.array_split(np.random.default_rng(0).permutation(500), 7):
        two.add(part, rows[part])
    assert set(one.indices) == set(two.indices) and (one.rows[:, 0] == one.indices).all()
    more = Reservoir(1, 80, seed=3)
    more.add(range(500), rows)
    assert set(one.indices) < set(more.indices)
    other = Reservoir(1, 40, seed=4)
    other.add(range(500), rows)
    assert set(one.indices) != set(other.indices)


def test_a_reservoir_draws_evenly():
    hits = np.zeros(60)
    for seed in range(600):
        kept = Reservoir(1, 20, seed)
        kept.add(range(60), np.zeros((60, 1)))
        hits[kept.indices] += 1
    # each index is kept with probability 1/3: 200 +- 11.5
    assert abs(hits - 200).max() < 5 * 11.6 and hits.sum() == 600 * 20


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def net(clip_folder):
    return load_clip(clip_folder)


def state(tally: SurveyTotals):
    plain = {name: getattr(tally, name) for name in tally._PLAIN if name != "seconds"}
    arrays = [tally.moments.mean, tally.moments.scatter, tally.sample.rows, tally.scores.scatter]
    return plain, [array.tobytes() for array in arrays]


def test_a_killed_pass_goes_on_to_the_very_same_state(renders, net, tmp_path):
    evaluators = Evaluators(net=net, clip=net)
    options = {"cap": 10, "seed": 1, "batch": 4, "every": 0.0}
    whole = survey(Folder(renders), evaluators, rows=tmp_path / "whole.jsonl", **options)

    def killed(done, total):
        if done >= 16:
            raise KeyboardInterrupt

    files = {"journal": tmp_path / "x.state", "rows": tmp_path / "x.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        survey(Folder(renders), evaluators, on_progress=killed, **files, **options)
    with (tmp_path / "x.jsonl").open("a") as file:  # written by the batch that the kill cut off
        file.write('{"file_name": "torn')
    passed = []
    resumed = survey(
        Folder(renders), evaluators, on_progress=lambda done, total: passed.append(done), **files, **options
    )
    assert passed[0] == 20 and passed[-1] == 40
    assert state(resumed) == state(whole)
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 40
    passed.clear()
    assert state(
        survey(Folder(renders), evaluators, on_progress=lambda *_: passed.append(1), **files, **options)
    ) == state(whole)
    assert not passed  # finished: nothing is looked at again


def test_a_state_of_something_else_is_not_gone_on_with(renders, net, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(renders, folder)
    journal = tmp_path / "x.state"
    survey(Folder(folder), Evaluators(net=net), journal=journal)
    first = SurveyTotals.load(journal, "other key", 10, 0)
    assert first is None
    Image.new("RGB", (64, 64)).save(folder / "000.png")  # a picture was rewritten
    passed = []
    survey(Folder(folder), Evaluators(net=net), journal=journal, on_progress=lambda done, _: passed.append(done))
    assert passed[0] == 32
    journal.write_bytes(journal.read_bytes()[:100])  # damaged: begins anew
    assert survey(Folder(folder), Evaluators(net=net), journal=journal).done == 40


def test_features_are_those_of_all_pictures_whatever_the_batch(renders, net):
    folder = Folder(renders)
    features = net.features([folder.picture(name) for name in folder.names])
    for batch in (7, 64):
        tally = survey(folder, Evaluators(net=net), batch=batch, cap=15)
        assert np.allclose(tally.moments.mean, features.mean(0), atol=1e-5)
        assert np.allclose(tally.moments.covariance, np.cov(features, rowvar=False), atol=1e-5)
        assert (
            np.allclose(tally.sample.rows, features[tally.sample.indices], atol=1e-5) and len(tally.sample.rows) == 15
        )


def test_the_state_does_not_grow_with_the_folder(renders, net, tmp_path):
    small = survey(Folder(renders), Evaluators(net=net, clip=net), cap=10, journal=tmp_path / "a.state")
    sizes = [(tmp_path / "a.state").stat().st_size]
    big = tmp_path / "big"
    shutil.copytree(renders, big)
    (big / "metadata.jsonl").unlink()
    for path in sorted(big.glob("*.png")):
        shutil.copy(path, path.with_name(f"again-{path.name}"))
    survey(
        Folder(big, {path.name: "a cube" for path in big.glob("*.png")}),
        Evaluators(net=net, clip=net),
        cap=10,
        journal=tmp_path / "b.state",
    )
    sizes.append((tmp_path / "b.state").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 64 and small.seen == 40


def test_corrupt_files_are_skipped_counted_and_named(renders, tmp_path, net):
    folder = tmp_path / "mixed"
    shutil.copytree(renders, folder)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:200])
    (folder / "005.png").write_text("not a picture")
    (folder / "007.png").unlink()
    Image.new("RGB", (90, 50)).save(folder / "009.png")
    report = judge_folder(folder, metrics=["presence", "clip_score"])
    assert report.data["pictures"]["seen"] == 37 and report.data["pictures"]["failed"] == 3
    told = "\n".join(report.notes)
    assert all(name in told for name in ("003.png", "005.png", "007.png")) and "1 pictures were resized" in told
    for path in folder.glob("*.png"):
        path.write_text("damage")
    with pytest.raises(BadInput, match="none of the 40 pictures .* can be read; 000.png"):
        judge_folder(folder)


# --- figures ---------------------------------------------------------------------------------------------------------


class OracleJudge:
    """Reads pictures perfectly: the scenes are known by their order."""

    def __init__(self, seed):
        self.seed, self.next = seed, 0
        self.net = type("Net", (), {"state_dict": staticmethod(lambda: {})})

    def read(self, images):
        out = []
        for picture in images:
            scene = draw_scene("test", self.seed, self.next)
            self.next += 1
            toys = [
                ObjectReading(
                    toy.shape, toy.color, toy.pattern, toy.size, picture[0] > 2, (8.0 * i, 0, 8.0 * i + 4, 4), 1
                )
                for i, toy in enumerate(scene.toys)
            ]
            out.append(SceneReading(tuple(toys), scene.ground, scene.sky))
        return out


def test_planted_failures_are_recovered_exactly(renders, tmp_path, monkeypatch):
    """Captions of known pictures are made wrong in a known share: colour in 10 of 40, shape in another 4."""
    from sfumato.bench import judge

    monkeypatch.setattr(judge, "load_judge", lambda name: OracleJudge(0))
    captions = {}
    single = 0
    for i in range(40):
        toys = [[toy.color, toy.shape] for toy in draw_scene("test", 0, i).toys]
        if i < 10:
            toys[0][0] = "white" if toys[0][0] != "white" else "black"
        elif i < 14:
            others = {toy[1] for toy in toys}
            toys[0][1] = next(shape for shape in SHAPES if shape not in others)
        single += len(toys)
        captions[f"{i:03d}.png"] = " and ".join(f"a {color} {shape}" for color, shape in toys)
    report = judge_folder(renders, prompts=captions, metrics=["presence"], out=tmp_path / "out")
    # a shape that was made wrong is absent, and with it its colour
    assert report["all_present"].value == 36 / 40 and report["all_bound"].value == 26 / 40
    assert report["present"].value == (single - 4) / single and report["bound"].value == (single - 14) / single
    assert report["counted"].value == 1 and report["all_right"].n == 40
    rows = [json.loads(line) for line in (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()]
    assert [row["all_right"] for row in rows] == [False] * 14 + [True] * 26
    assert report["all_bound"].low < 26 / 40 < report["all_bound"].high


def test_judging_renders_with_the_nets_of_the_zoo(renders, others, tmp_path):
    report = judge_folder(others, renders, out=tmp_path / "out", cap=25)
    assert report["all_bound"].value > 0.7  # the judge's own accuracy is measured in the claims
    assert 0 < report["CLIPScore(toy-clip)"].value <= 100
    assert report["FD(toy-clip)"] > 0 and report["KD(toy-clip)"].low < 0.5
    assert {"precision(toy-clip)", "coverage(toy-clip)"} <= {figure.name for figure in report.figures}
    assert any("biased upward" in note for note in report.notes) and any(
        "25 pictures a side" in n for n in report.notes
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 12 and "http" not in page and "<script" not in page
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["figures"]["FD(toy-clip)"] == report["FD(toy-clip)"]
    assert stored["nets"]["toy-clip"] and stored["options"]["cap"] == 25
    again = judge_folder(others, renders, out=tmp_path / "out", cap=25)  # from the states
    assert again.to_json()["figures"] == report.to_json()["figures"]


@pytest.fixture
def bare(tmp_path):
    return write_renders(tmp_path / "bare", 3, captions=False)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, BadInput, "has no captions and there are no real pictures"),
        ({"metrics": ["presence"]}, BadInput, "presence needs captions, and .* has none"),
        ({"metrics": ["clip_score"]}, BadInput, "clip_score needs captions"),
        ({"metrics": ["frechet"]}, BadInput, "frechet needs a folder of real pictures"),
        ({"attributes": ["red"]}, BadInput, "attributes needs a folder of real pictures"),
        ({"metrics": ["fid"]}, UnknownName, "unknown metric 'fid'"),
        ({"cap": 3}, BadInput, "cap of judge is 3"),
        ({"attributes": ["  "]}, BadInput, "attributes are empty"),
        ({"attributes": ["red", "red"]}, BadInput, "'red' is given twice"),
        ({"template": "no place"}, BadInput, "template of sad_pad"),
        ({"net": "no-such", "reference": True}, UnknownName, "unknown feature net 'no-such'"),
        ({"dtype": "float99", "reference": True}, UnknownName, "float99"),
    ],
)
def test_what_cannot_be_judged_is_refused(bare, renders, tmp_path, options, error, says):
    if options.pop("reference", False):
        options["reference"] = renders
    with pytest.raises(error, match=says):
        judge_folder(bare, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_too_small_for_a_figure(bare, renders, tmp_path, clip_folder):
    net = {"net": str(clip_folder), "clip": str(clip_folder)}
    with pytest.raises(BadInput, match="5 neighbours need more pictures than 3"):
        judge_folder(bare, renders, metrics=["manifold"], **net)
    with pytest.raises(BadInput, match="at least 20 pictures on each side; got 40 and 3"):
        judge_folder(bare, renders, attributes=["red"], captions=False, **net)
    small = judge_folder(bare, renders, **net)  # what can be measured is
    assert "FD(" + str(clip_folder) not in small.lines()[0] and any("manifold figures need" in n for n in small.notes)
    one = write_renders(tmp_path / "one", 1)
    with pytest.raises(BadInput, match="at least 2 pictures"):
        judge_folder(one, renders, metrics=["frechet"], **net)
    alone = judge_folder(one, metrics=["clip_score"], clip=net["clip"])
    assert alone.to_json()["figures"][f"CLIPScore({clip_folder})"]["low"] is None
    with pytest.raises(BadInput, match="both the folder and its reference"):
        judge_folder(renders, renders)


def test_captions_about_other_things(renders, clip_folder):
    captions = {f"{i:03d}.png": "a horse on a meadow" for i in range(40)}
    report = judge_folder(renders, prompts=captions, clip=str(clip_folder))
    assert any("no caption names a toy" in note for note in report.notes)
    with pytest.raises(NoMatch, match="no caption names a toy"):
        judge_folder(renders, prompts=captions, metrics=["presence"])


def test_half_precision_nets(renders, others, clip_folder):
    options = {"metrics": ["frechet", "kernel"], "net": str(clip_folder)}
    full = judge_folder(others, renders, **options)
    half = judge_folder(others, renders, dtype="bfloat16", **options)
    name = next(figure.name for figure in full.figures if figure.name.startswith("FD"))
    assert half[name] == pytest.approx(full[name], rel=0.3) and half[name] != full[name]


def test_attribute_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("# colours\nred\n\n blue sky \n")
    assert read_attributes(path) == ["red", "blue sky"]
    path.write_text("# nothing\n")
    with pytest.raises(BadInput, match="names no attribute"):
        read_attributes(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_attributes(path)


def test_reports_escape_and_round():
    report = Report("<b>", [Figure("x", Interval(0.12345, 0.1, 0.2, 7)), Figure("y", 1234.5678, "<i>")], ["a & b"])
    report.tables.append(Table("t", ("h",), [("<td>",)]))
    page = report.html()
    assert "<b>" not in page and "&lt;i&gt;" in page and "a &amp; b" in page and "&lt;td&gt;" in page
    assert report.lines()[0].startswith("x  0.123 [0.100, 0.200]") and "1235" in report.lines()[1]
    with pytest.raises(UnknownName, match="unknown figure 'z'"):
        report["z"]
    assert callable(sfumato.judge) and CAP >= 1000
