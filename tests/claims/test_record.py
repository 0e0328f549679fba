"""The claims runner: kept parts, interruption, the table."""

from __future__ import annotations

import importlib
import json
import threading
from dataclasses import replace

import pytest
import torch

from claims import common, core, record, sources, table
from claims.__main__ import EXPERIMENTS, PAGES, choose, main
from claims.core import Context, Experiment, Part, Row
from sfumato.errors import UnknownName
from sfumato.locks import lock


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(core, "PICTURES", tmp_path / "pictures")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    record._weights_hash.cache_clear()
    sources.code_hash.cache_clear()
    sources._imports.cache_clear()


def row(text="it works"):
    return Row(claim=text, source="us", measured="0.9 [0.8, 1.0]", baseline="0.1", holds=True, n=10)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "weights" / "toy-x"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"one")
    return folder


@pytest.fixture
def experiment(tmp_path):
    source = tmp_path / "experiment.py"
    source.write_text("first = 1")
    calls: list[str] = []

    def part(name):
        def run(context):
            calls.append(name)
            return [row(name)]

        return run

    made = Experiment(
        "demo", "a demo", "For tests.", str(source), (Part("a", ("toy-x",), part("a")), Part("b", (), part("b")))
    )
    return made, calls, source


def context(tmp_path, **options):
    return Context(weights=tmp_path / "weights", **options)


def test_pictures_outlive_an_interruption_until_the_experiment_is_whole(tmp_path, experiment, model):
    drawn, stop = [], [True]

    def arm(context, name):
        def make():
            drawn.append(name)
            return torch.full((2, 3, 4, 4), 1 / 3), 7.5

        return common.resumed(context, (name, 5, ["a red ball"]), make)

    def part(context):
        pixels, cost = arm(context, "plain")
        assert torch.equal(pixels, torch.full((2, 3, 4, 4), 1 / 3)) and cost == 7.5
        if stop:
            raise KeyboardInterrupt
        arm(context, "ours")
        return [row()]

    two = replace(experiment[0], parts=(Part("a", ("toy-x",), part), Part("b", ("toy-x",), part)))
    with pytest.raises(KeyboardInterrupt):
        record.run(two, context(tmp_path))
    stop.clear()
    record.run(two, context(tmp_path), only="a")
    assert drawn == ["plain", "ours"]  # the first was there already
    kept = record.halfway(two, context(tmp_path))
    assert len(list(kept.iterdir())) == 2
    record.run(two, context(tmp_path))  # the other part draws nothing that the first one drew
    assert drawn == ["plain", "ours"] and not kept.exists()
    (model / "model.safetensors").write_bytes(b"two")
    record._weights_hash.cache_clear()
    assert record.halfway(two, context(tmp_path)) != kept
    record.run(two, context(tmp_path))
    assert drawn == ["plain", "ours"] * 2
    arm(Context(), "plain")  # outside of a run nothing is kept
    arm(Context(), "plain")
    assert drawn[-2:] == ["plain", "plain"] and not kept.parent.exists()


def test_what_experiments_make_alike_is_made_once(tmp_path, experiment, model):
    source = tmp_path / "children.py"
    source.write_text("a = 1\n")
    made = []

    def part(context):
        def make():
            made.append(1)
            return {"weights": torch.ones(2)}

        found = context.kept(("child",), make, str(source), ("toy-x",))
        assert torch.equal(found["weights"], torch.ones(2))
        return [row()]

    first = replace(experiment[0], parts=(Part("a", ("toy-x",), part),))
    second = replace(first, key="other")
    record.run(first, context(tmp_path))
    record.run(second, context(tmp_path))
    assert len(made) == 1 and not record.halfway(first, context(tmp_path)).exists()
    source.write_text("a = 2\n")
    sources.code_hash.cache_clear()
    record.run(second, context(tmp_path), fresh=True)
    assert len(made) == 2  # other code makes another child
    assert len([*(tmp_path / "cache" / "claims").glob("shared-children-toy-x/*")]) == 1
    (model / "model.safetensors").write_bytes(b"two")
    record._weights_hash.cache_clear()
    record.run(first, context(tmp_path))
    assert len(made) == 3
    assert Context().home(str(source), ("toy-x",)) is None  # outside of a run nothing is kept


def test_parts_are_kept_until_what_they_measure_changes(tmp_path, experiment, model):
    made, calls, source = experiment
    record.run(made, context(tmp_path))
    record.run(made, context(tmp_path))
    assert calls == ["a", "b"]
    (model / "model.safetensors").write_bytes(b"two")
    record._weights_hash.cache_clear()
    record.run(made, context(tmp_path))
    assert calls == ["a", "b", "a"]
    (model / "sfumato.json").write_text("{}")  # a card is not the model
    record._weights_hash.cache_clear()
    record.run(made, context(tmp_path))
    assert len(calls) == 3
    source.write_text("second = 1")
    sources.code_hash.cache_clear()
    record.run(made, context(tmp_path))
    record.run(made, context(tmp_path), fresh=True)
    assert calls[3:] == ["a", "b", "a", "b"]


def test_one_part_alone_leaves_the_others_on_record(tmp_path, experiment, model):
    made, calls, source = experiment
    assert list(record.run(made, context(tmp_path), only="b")["parts"]) == ["b"]
    record.run(made, context(tmp_path))
    source.write_text("second = 1")
    sources.code_hash.cache_clear()
    found = record.run(made, context(tmp_path), only="b")
    assert calls == ["b", "a", "b"] and list(found["parts"]) == ["a", "b"]
    with pytest.raises(UnknownName, match="part of demo"):
        record.run(made, context(tmp_path), only="c")


def test_a_part_is_asked_for_by_its_name_or_by_a_piece_of_it(tmp_path, experiment):
    made, calls, _ = experiment
    named = replace(made, parts=tuple(replace(made.parts[1], name=name) for name in ("toy", "toy: more", "other")))
    assert list(record.run(named, context(tmp_path), only="toy")["parts"]) == ["toy"]
    assert list(record.run(named, context(tmp_path), only="to")["parts"]) == ["toy", "toy: more"]
    assert calls == ["b", "b"]


def test_runs_of_other_parts_beside_this_one_lose_nothing(tmp_path, experiment, model):
    made, calls, _ = experiment

    def while_another_runs(_):
        record.run(made, context(tmp_path), only="b")
        calls.append("a")
        return [row("a")]

    slow = replace(made, parts=(replace(made.parts[0], run=while_another_runs), made.parts[1]))
    found = record.run(slow, context(tmp_path), only="a")
    assert calls == ["b", "a"] and list(found["parts"]) == ["a", "b"] and record.stale(made, context(tmp_path)) == {}
    record.run(slow, context(tmp_path))
    assert calls == ["b", "a"]


def test_a_record_is_written_by_one_run_at_a_time(tmp_path, experiment):
    made, *_ = experiment
    (tmp_path / "results").mkdir()
    held, done = lock(tmp_path / "results"), threading.Event()

    def waits():
        record.run(made, context(tmp_path), only="b")
        done.set()

    other = threading.Thread(target=waits)
    other.start()
    assert held is not None and not done.wait(0.3) and not (tmp_path / "results" / "demo.json").exists()
    held.release()
    other.join(10)
    assert done.is_set() and list(record.read_record(tmp_path / "results" / "demo.json")["parts"]) == ["b"]


def test_an_interruption_keeps_finished_parts(tmp_path, experiment, model):
    made, calls, source = experiment

    def stop(_):
        raise KeyboardInterrupt

    broken = Experiment("demo", "", "", str(source), (made.parts[0], Part("b", (), stop)))
    with pytest.raises(KeyboardInterrupt):
        record.run(broken, context(tmp_path))
    assert list(json.loads((tmp_path / "results" / "demo.json").read_text())["parts"]) == ["a"]
    found = record.run(made, context(tmp_path))
    assert calls == ["a", "b"] and list(found["parts"]) == ["a", "b"]


def test_missing_weights_are_said_and_left_out(tmp_path, experiment):
    made, calls, _ = experiment
    lines: list[str] = []
    found = record.run(made, context(tmp_path, report=lines.append))
    assert calls == ["b"] and list(found["parts"]) == ["b"]
    assert any("toy-x" in line for line in lines)


def test_quick_results_stay_apart(tmp_path, experiment, model):
    made, calls, _ = experiment
    record.run(made, context(tmp_path, quick=True))
    assert not (tmp_path / "results" / "demo.json").exists() and (tmp_path / "results" / "quick" / "demo.json").exists()
    assert context(tmp_path, quick=True).count(500, 7) == 7 and context(tmp_path).count(500, 7) == 500


def test_one_line_a_system_and_the_details_behind_it(tmp_path, experiment, model):
    made, *_ = experiment
    found = record.run(made, context(tmp_path))
    text = table.overview([found], {"demo": ["a"]}, "details", "pictures")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 and lines[2].startswith(
        "| [demo](details/demo.md) | a | 0.9 [0.8, 1.0] | 0.1 | **holds** (stale)"
    )
    assert "1 parts were measured with other code" in text
    assert "stale)" not in table.overview([found], {}, "details", "pictures")
    assert "stale)" not in table.overview([found], {"demo": ["b"]}, "details", "pictures")  # another part is
    more = table.details(found, "../pictures")
    assert "**Stale**" not in more
    assert "## a\n\n**Stale**: measured" in table.details(found, "../pictures", ["a"])
    assert "## a" in more and "## b" in more and "- baseline: 0.1" in more and "For tests." in more
    del found["parts"]["b"]["rows"][0]["headline"]  # of before rows were marked; "a" was measured again since
    assert "| b |" in table.overview([found], {}, "details", "pictures").splitlines()[-1]
    found["parts"]["b"]["rows"][0]["headline"] = True
    assert "| b |" in table.overview([found], {}, "details", "pictures").splitlines()[-1]


def test_what_is_stale_is_told_with_the_reason(tmp_path, experiment, model):
    made, _, source = experiment
    assert set(record.stale(made, context(tmp_path)).values()) == {"never measured"}
    record.run(made, context(tmp_path))
    assert record.stale(made, context(tmp_path)) == {}
    (model / "model.safetensors").write_bytes(b"two")
    record._weights_hash.cache_clear()
    assert record.stale(made, context(tmp_path)) == {"a": "other weights of toy-x"}
    source.write_text("second = 2")
    sources.code_hash.cache_clear()
    assert record.stale(made, context(tmp_path)) == {"a": "other weights of toy-x; other code", "b": "other code"}
    renamed = replace(made, parts=(replace(made.parts[1], name="c"),))
    assert record.stale(renamed, context(tmp_path)) == {"c": "never measured"} | dict.fromkeys(
        "ab", "other parts have taken its place"
    )
    found = json.loads((tmp_path / "results" / "demo.json").read_text())
    for part in found["parts"].values():
        part["fingerprint"] = "0123"  # as it was once
    (tmp_path / "results" / "demo.json").write_text(json.dumps(found))
    assert "before the record knew" in record.stale(made, context(tmp_path))["b"]


def test_command_line(tmp_path, capsys, monkeypatch):
    assert main(["nonsense"]) == 2
    assert "unknown claim 'nonsense'" in capsys.readouterr().err
    assert main(["zoo", "--threads", "0"]) == 2
    monkeypatch.setattr(core, "HERE", tmp_path)
    monkeypatch.setattr(record, "run", lambda *_: None)
    assert main(["zoo"]) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "README.md")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "run", interrupted)
    assert main(["zoo"]) == 130 and "kept" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in core.HERE.glob("[a-z]*.py")))
def test_every_module_can_be_imported(name):
    module = importlib.import_module(f"claims.{name}")
    assert name not in EXPERIMENTS or module.EXPERIMENT.key == name


def test_choose():
    assert choose([], ["a", "b"]) == ["a", "b"] and choose(["b"], ["a", "b"]) == ["b"]
    with pytest.raises(UnknownName):
        choose(["c"], list(EXPERIMENTS))


def test_a_page_shows_what_was_measured_and_keeps_its_own_words():
    found = {"key": "demo", "parts": {"one": {"rows": [row("first").to_json()]}}}
    page = "# X\n\n## Its claims\n\nWhy.\n\n## Sources\n\nBooks.\n"
    shown = table.page(page, found)
    assert "- **holds** - first: 0.9 [0.8, 1.0] (n 10)" in shown
    assert shown.startswith("# X\n\n## Its claims\n\nWhy.\n\n") and shown.endswith("\n\n## Sources\n\nBooks.\n")
    found["parts"]["one"]["rows"] = [row("second").to_json()]
    again = table.page(shown, found)
    assert "first" not in again and again == table.page(again, found) == table.page(page, found)
    assert table.page("# Y\n", found) == "# Y\n"


@pytest.mark.parametrize("key", [key for key in EXPERIMENTS if (PAGES / f"{key}.md").exists()])
def test_pages_tell_what_is_on_record(key):
    found = record.read_record(core.HERE / "results" / f"{key}.json")
    page = (PAGES / f"{key}.md").read_text(encoding="utf-8")
    assert table.BEGIN not in page if not found else page == table.page(page, found)


def test_a_result_depends_on_where_a_name_is_defined_and_not_on_what_annotations_name(tmp_path, monkeypatch):
    room = tmp_path / "claims"
    for name, text in {
        "__init__": "",
        "one": "from claims.face import Used\nfrom __future__ import annotations\n",
        "face/__init__": (
            "from typing import TYPE_CHECKING\nfrom claims.helper import lazy\n"
            "if TYPE_CHECKING:\n    from claims.face.inner import Used\n    from claims.unused import Other\n"
        ),
        "face/inner": "from .deep import Used\n",
        "face/deep": (
            "import typing\nfrom typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from claims.only_annotated import X\nelse:\n    from claims.otherwise import X\n"
            "def f():\n    import claims.late\n"
        ),
        **dict.fromkeys(("helper", "unused", "only_annotated", "otherwise", "late"), ""),
    }.items():
        (room / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (room / f"{name}.py").write_text(text)
    monkeypatch.setattr(sources, "ROOMS", {"claims": room})
    sources._tree.cache_clear()
    found = {str(path.relative_to(room)) for path in sources.dependencies(room / "one.py")}
    face = {"face/__init__.py", "face/inner.py", "face/deep.py"}
    assert found == {*face, "helper.py", "late.py", "one.py", "otherwise.py"}


def test_what_is_measured_with_a_trained_flow_does_not_depend_on_recipes_of_the_zoo():
    found = {
        path.name for path in sources.dependencies(core.HERE / "data_biases.py", sources.system_files("data_biases"))
    }
    assert {"translator.py", "projection.py", "trainer.py", "players.py", "vector_ae.py", "codes.py"} <= found
    assert not {"objective.py", "runs.py", "loop.py"} & found


def test_what_is_kept_halfway_comes_back_as_it_was(tmp_path):
    wide = torch.arange(6.0).reshape(2, 3)
    value = {
        "words": {"<rex>": {"text_encoder": wide.T}},
        "rows": [wide[0], wide[1]],  # of one storage
        "plain": [1, 2.5, float("inf"), "a", None, True, []],
        "flag": torch.tensor([True, False]),
    }
    context, made = Context(), []
    context.halfway = tmp_path / "half"

    def make():
        made.append(1)
        return value

    for _ in range(2):
        found = context.kept(("a", 1), make)
        assert found["plain"] == value["plain"] and list(found) == list(value)
        assert torch.equal(found["words"]["<rex>"]["text_encoder"], wide.T)
        assert torch.equal(found["rows"][1], wide[1]) and found["flag"].dtype == torch.bool
    assert made == [1]
    assert context.kept(("a", 2), lambda: 7) == 7 == context.kept(("a", 2), lambda: 8)
    for bad in ({1: 2}, (1, 2), {"a": object()}):
        with pytest.raises(TypeError):
            context.kept((str(bad),), lambda bad=bad: bad)
    assert len(list(context.halfway.iterdir())) == 2  # nothing of what could not be written


def test_every_picture_belongs_to_a_row_and_every_row_finds_its_picture():
    written = [json.loads(path.read_text()) for path in (core.HERE / "results").glob("*.json")]
    named = {row["picture"] for each in written for part in each["parts"].values() for row in part["rows"]} - {None}
    kept = {path.name for path in (core.HERE / "pictures").glob("*.png")}
    assert kept == named
