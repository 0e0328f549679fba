"""Work on several Ray workers gives what one process gives. Needs ray (extra ``scale``)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import ANY

import pytest

from sfumato import scale
from sfumato.errors import BadInput, UnknownName
from sfumato.scale import Workers
from tests.app.conftest import loaded_once, refused, sfumato, tiny_inpaint, tiny_sd  # noqa: F401
from tests.folders import write_renders


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One local cluster for all of these. Its workers would step back for everybody else, but these tests wait."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'sfumato[scale]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        with scale._settings():
            scale._connect(2)
        yield
        ray.shutdown()


def test_results_come_in_order_and_each_worker_is_made_once(tmp_path):
    asked = [(tag, None if tag % 5 == 0 else tag) for tag in range(12)]
    pulled = []

    def make_worker():  # in here, or the workers would have to import this file and all that it needs
        count = 0

        def work(item):
            nonlocal count
            count += 1
            if isinstance(item, Path) and not item.exists():
                item.touch()
                os._exit(1)
            if item == "broken":
                raise ValueError("boom")
            if item == "wrong":
                raise UnknownName("thing", "wrong", ["right"])
            return item, os.getpid(), count

        return work

    def items():
        for pair in asked:
            pulled.append(pair)
            yield pair

    with Workers(make_worker, 2) as pool:
        got, most = [], 0
        for tag, answer in pool.map(items()):
            got.append((tag, answer and answer[0]))
            most = max(most, len(pulled) - len(got))
        counts = {}
        for _, answer in pool.map(enumerate("abcdef")):
            counts[answer[1]] = answer[2]
        for _ in pool.map(enumerate("gh")):
            break  # what is left unread does not come up later
        assert pool.ask("i")[0] == "i"
        with pytest.raises(UnknownName) as caught:
            list(pool.map([(0, "a"), (1, "wrong")]))
        with pytest.raises(RuntimeError, match="^ValueError: boom$"):
            pool.ask("broken")
        assert pool.ask(tmp_path / "died") == (tmp_path / "died", ANY, 1)  # by a new worker
    assert got == asked and most <= 2 * scale.AHEAD + 1
    assert sum(counts.values()) == 9 + 6 and len(counts) == 2  # none was made twice
    assert str(caught.value) == str(UnknownName("thing", "wrong", ["right"]))
    with pytest.raises(BadInput, match="at least 1"):
        Workers(make_worker, 0)


def told(folder: str) -> dict:
    report = json.loads(Path(folder, "report.json").read_text())
    return {name: value for name, value in report.items() if name != "seconds"}


def test_judge_is_the_same_on_two_workers(sfumato, tmp_path):  # noqa: F811
    real, fake = write_renders(tmp_path / "real", 14), write_renders(tmp_path / "fake", 12, seed=1)
    (fake / "003.png").write_bytes(b"not a picture")
    command = (
        "judge",
        real,
        fake,
        "--batch",
        4,
        "--metric",
        "presence",
        "--metric",
        "clip_score",
        "--metric",
        "frechet",
    )
    for name, more in (("alone", ()), ("two", ("--ray", "--workers", 2))):
        done = sfumato(*command, "-o", name, *more)
        assert done.code == 0, done.err
    assert told("alone") == told("two")
    assert told("two")["pictures"]["failed"] == 1 and told("two")["pictures"]["named"][0][0] == "003.png"
    rows = [Path(name, "pictures.jsonl").read_bytes() for name in ("alone", "two")]
    assert rows[0] == rows[1] and rows[0].count(b"\n") == 11


def test_make_is_the_same_on_one_worker_and_goes_on(sfumato, tiny_sd, tmp_path):  # noqa: F811
    lines = ['{"prompt": "a red cube", "n": 2}', "broken", '{"prompt": "a blue ball", "seed": 5, "task": "one"}']
    lines += ['{"prompt": "a red cube"}', '{"prompt": "a cone", "size": [33, 33], "n": 2}']
    Path("p.jsonl").write_text("\n".join(lines) + "\n")
    command = ("make", "--prompts", "p.jsonl", "-m", tiny_sd, "--steps", 1, "--with", "daam")
    for name, more in (("alone", ()), ("one", ("--ray", "--workers", 1))):  # loading models is what takes time here
        done = sfumato(*command, "-o", name, *more)
        assert done.code == 2 and "2 of 5 lines could not be followed: line 2" in done.err and "line 5" in done.err
    there = {name: sorted(path.name for path in Path(name).iterdir()) for name in ("alone", "one")}
    assert there["alone"] == there["one"] and len(there["one"]) == 9  # 4 pictures, 4 heat maps, the journal
    for path in Path("alone").glob("*.png"):
        assert path.read_bytes() == Path("one", path.name).read_bytes()
    journals = [
        [{**json.loads(line), "seconds": 0} for line in Path(name, "metadata.jsonl").read_text().splitlines()]
        for name in there
    ]
    assert journals[0] == journals[1]
    # a picture that was lost is made again under its name, the others are not
    Path("one/a-blue-ball-5.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in Path("one").glob("a-red*.png")}
    again = sfumato(*command, "-o", "one")
    assert "3 pictures were there already" in again.err and again.lines[0] == "one/a-blue-ball-5.png"
    assert before == {path: path.stat().st_mtime_ns for path in Path("one").glob("a-red*.png")}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("make", "a cube", "--ray"), ["give --prompts"]),
        (("make", "--prompts", "p.jsonl", "--workers", 2), ["give --ray too"]),
        (("judge", "{toys}", "--workers", 2), ["give --ray too"]),
        (("judge", "{toys}", "--ray", "--workers", 0), ["workers of judge is 0"]),
    ],
)
def test_what_makes_no_sense_is_refused(refused, tmp_path, args, says):  # noqa: F811
    write_renders(tmp_path / "toys", 1)
    refused(*[str(arg).format(toys=tmp_path / "toys") for arg in args], says=says)
