"""Finding models by name: what is wrong is answered before anything heavy is loaded, without a connection at once."""

from __future__ import annotations

import gc
import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from sfumato import app, checkpoints
from sfumato.errors import BadInput
from sfumato.startup import collector_paused

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def answering():
    class NotThere(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), NotThere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_whatever_answers_is_reachable(answering: str) -> None:
    assert checkpoints.reachable(answering)
    assert not checkpoints.reachable(NOBODY)
    assert not checkpoints.reachable("http://no-such-host.invalid")
    assert not checkpoints.reachable("no address at all")


@pytest.mark.parametrize("revision", [None, "v2"])
def test_without_a_connection_a_hub_id_is_refused_at_once(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOBODY)
    start = time.perf_counter()
    with pytest.raises(BadInput, match="nobody/nothing.* is not in the local cache and the Hugging Face Hub cannot"):
        checkpoints.find("nobody/nothing", revision)
    assert time.perf_counter() - start < 2


def test_without_a_connection_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOBODY)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert checkpoints.find("somebody/tiny") == checkpoints.Checkpoint(snapshot, commit, "somebody/tiny", False)


def test_a_wrong_name_is_answered_without_torch() -> None:
    code = """
import json, sys
from sfumato.app.cli import main
try:
    main()
except SystemExit as left:
    print(json.dumps([left.code, "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "make", "a red cube", "-m", "toy-ds"], capture_output=True, text=True
    )
    assert json.loads(done.stdout) == [2, False]
    assert done.stderr.startswith("error: unknown model 'toy-ds'. Did you mean 'toy-sd'")


def test_the_collector_is_as_before() -> None:
    assert gc.isenabled()
    with pytest.raises(KeyError), collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_a_postponed_module_runs_when_it_is_used() -> None:
    code = """
import json, sys
from sfumato.startup import import_on_use
import_on_use("colorsys", "no_such_module", "xml.dom")
import colorsys, colorsys as again
import xml.dom.minidom
early = hasattr(type(colorsys), "__getattr__"), "ONE_THIRD" in vars(colorsys)
third = colorsys.ONE_THIRD
from xml.dom import Node
try:
    import no_such_module
except ModuleNotFoundError:
    missing = True
print(json.dumps([early, third == 1 / 3, type(colorsys) is type(sys), again is colorsys, Node.ELEMENT_NODE, missing]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[True, False], True, True, True, 1, True]


def test_a_model_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    find = checkpoints.find

    def counted(*given: object) -> checkpoints.Checkpoint:
        asked.append(given)
        return find(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "find", counted)
    assert app.load("toy-sd").name == "toy-sd"
    assert asked == [("toy-sd", None)]
