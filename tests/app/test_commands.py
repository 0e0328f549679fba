"""The other commands: lists, the toybox, training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato as package
from sfumato import cards, registry
from sfumato.toybox import Scene, render


def test_a_folder_is_inspected_facts_first(sfumato, tiny_sd, monkeypatch):
    """What is known at once is printed before memory is worked out, which takes long."""

    def walk(model, keys=None, on_progress=None):
        on_progress(0, 20, "daam")
        if stopped:
            raise KeyboardInterrupt
        return {"daam": 3 * 2**20, "attend_excite": None}

    monkeypatch.setattr("sfumato.sampling.footprint.adds", walk)
    stopped = False
    done = sfumato("models", tiny_sd, "--inspect")
    facts, sites, systems = done.out.split("\n\n", 2)
    assert done.code == 0 and "32x32" in facts and "cross" in sites and "16x16" in sites
    memory = {line.split()[0]: line.split()[1:] for line in systems.splitlines() if line.split()}
    assert memory["daam"] == ["+", "3.0"] and memory["attend_excite"] == memory["lora"] == ["+"]
    stopped = True
    cut = sfumato("models", tiny_sd, "--inspect")
    assert cut.code == 130 and cut.out.rstrip("\n") == f"{facts}\n\n{sites}".rstrip("\n")
    assert sfumato("models", tiny_sd, "--inspect", "--json").out == ""  # whole, or nothing


def test_version_and_help(sfumato):
    assert sfumato("--version").out == f"sfumato {package.__version__}\n"
    assert sfumato().code == 2
    for command in (
        (),
        ("make",),
        ("explain",),
        ("models",),
        ("methods",),
        ("train",),
        ("toybox", "sample"),
        ("claims",),
        ("judge",),
        ("compare",),
        ("edit",),
        ("segment",),
        ("toybox", "prompts"),
        ("toybox", "genome"),
    ):
        done = sfumato(*command, "--help")
        assert done.code == 0 and "Usage" in done.out


def test_models_and_methods_are_listed(sfumato):
    listed = json.loads(sfumato("models", "--json").out)
    assert sorted(listed) == registry.names()
    for name in registry.names():
        assert name in sfumato("models").out and json.loads(sfumato("models", name).out) == registry.card(name)
    told = json.loads(sfumato("methods", "--json").out)
    assert sorted(told) == sorted(cards.methods())
    for key, card in cards.methods().items():
        assert key in sfumato("methods", "--verb", card.verb).out
        page = sfumato("methods", key).out
        assert card.title in page
        assert all(name in page for name in cards.method(key).Params.model_fields)
        schema = json.loads(sfumato("methods", key, "--json").out)
        assert sorted(schema["parameters"]) == sorted(cards.method(key).Params.model_fields)


def test_a_model_is_written_as_a_whole_folder(sfumato, refused):
    done = sfumato("models", "toy-vae", "--export", "vae")
    assert done.code == 0 and done.lines == ["vae"], done.err
    copied = {path.name: path.read_bytes() for path in Path("vae").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in registry.find("toy-vae").iterdir()}
    refused("models", "toy-vae", "--export", "vae", says=["vae", "not empty"])
    refused("models", "--export", "all", says=["needs the name"])
    refused("models", "toy-va", "--export", "all", says=["or 'toy-vae'"])


def test_toybox_sample_is_an_imagefolder(sfumato):
    done = sfumato("toybox", "sample", "-n", 3, "-o", "toys", "--size", 48, "--seed", 7, "--split", "heldout")
    assert done.code == 0, done.err
    folder = Path("toys")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        image = np.asarray(Image.open(folder / line["file_name"]))
        assert image.shape == (48, 48, 3) and line["text"]
        stem = Path(line["file_name"]).stem
        mask = np.asarray(Image.open(folder / "masks" / f"{stem}.png"))
        scene = Scene.from_json((folder / "scenes" / f"{stem}.json").read_text())
        frames = render([scene], size=48)
        assert (mask.astype(int) - 1 == frames.mask[0].numpy()).all()
    again = sfumato("toybox", "sample", "-n", 3, "-o", "again", "--size", 48, "--seed", 7, "--split", "heldout")
    assert again.code == 0
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (Path("again") / path.relative_to(folder)).read_bytes()


def test_toybox_genome_is_written_and_checked(sfumato, refused):
    done = sfumato("toybox", "genome", "-n", 2, "-o", "vg", "--size", 16)
    assert done.code == 0 and done.lines == ["vg"] and len(json.loads(Path("vg/objects.json").read_text())) == 2
    assert sfumato("toybox", "genome", "--check", "vg").lines == ["no faults"]
    graphs = json.loads(Path("vg/scene_graphs.json").read_text())
    graphs[0]["relationships"][0]["object_id"] = 999
    Path("vg/scene_graphs.json").write_text(json.dumps(graphs))
    told = sfumato("toybox", "genome", "--check", "vg")
    assert told.code == 1 and told.lines == [
        "scene_graphs.json, image 1: relationship 1 has object 999, which is no object there"
    ]
    refused("toybox", "genome", "--check", "nowhere", says=["nowhere"])
    refused("toybox", "genome", "-o", "vg", says=["is not empty"])


def test_toybox_interrupted_leaves_nothing(sfumato, monkeypatch, tmp_path):
    from sfumato.toybox import rendering

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "render", interrupted)
    done = sfumato("toybox", "sample", "-o", "toys")
    assert done.code == 130 and done.err == "error: interrupted; nothing half-written is left.\n"
    assert list(tmp_path.iterdir()) == []


class _Run:
    """What the trainer hands back, without the hours."""

    step, warnings, folder, exported = 40, ["checkpoint 3 was damaged"], "runs/x", "runs/x/export"

    def __init__(self, finished, interrupted):
        self.finished, self.interrupted = finished, interrupted


@pytest.mark.parametrize(
    ("run", "code", "out", "err"),
    [
        (_Run(True, False), 0, "runs/x/export\n", "warning: checkpoint 3 was damaged\n"),
        (_Run(False, False), 0, "stopped after step 40; go on with: sfumato train toy-judge --resume\n", "warning: "),
        (_Run(False, True), 130, "", "go on with: sfumato train toy-judge --resume\n"),
    ],
)
def test_train_tells_how_it_ended(sfumato, monkeypatch, run, code, out, err):
    asked = {}
    monkeypatch.setattr("sfumato.app.train", lambda recipe, **options: asked.update(recipe=recipe, **options) or run)
    done = sfumato("train", "toy-judge", "--resume", "--minutes", 2.5)
    assert (done.code, done.out) == (code, out) and err in done.err
    assert (asked["recipe"], asked["resume"], asked["minutes"]) == ("toy-judge", True, 2.5)


def test_claims_need_the_repository(refused, monkeypatch):
    monkeypatch.setattr("sfumato.app.cli.claims.__file__", "/nowhere/lib/python/sfumato/app/cli/claims.py")
    refused("claims", says=["clone it"])


@pytest.fixture
def other_claims():
    """Claims of another folder may be imported; the real ones are what others know, before and afterwards."""

    def taken():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "claims"}

    own = taken()
    yield
    taken()
    sys.modules.update(own)


def test_claims_run_from_the_repository(sfumato, tmp_path, other_claims):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "__main__.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    (tmp_path / "claims" / "__init__.py").write_text("")
    done = sfumato("claims", "daam", "--quick", "2")
    assert (done.code, done.out) == (3, "['daam', '--quick', '2']\n")
