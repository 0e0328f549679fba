"""The public face as completion, ``help`` and notebooks show it."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
import torch
from PIL import Image

import sfumato as package
from docs import generate
from sfumato import app, cards, protocol
from sfumato.app.cli import commands
from sfumato.app.editing import EditOptions, EditResult
from sfumato.app.explaining import Explanation
from sfumato.bench.judge import judge_folder
from sfumato.bench.options import CompareOptions, JudgeOptions
from sfumato.bench.report import Figure, Report
from sfumato.cards.signatures import written
from sfumato.markup import LONGEST, described, gallery
from sfumato.sampling import Options
from sfumato.sampling import generate as draw
from sfumato.teach.examples import Examples
from tests.tiny import tiny_model

FACE = {name: getattr(package, name) for name in package.__all__ if name != "__version__"}
OPTIONS = {
    "make": Options, "explain": Options, "edit": EditOptions, "judge": JudgeOptions, "compare": CompareOptions,
    "segment": cards.method("text_to_segmentation").Params,
}  # fmt: skip


def test_dir_is_the_documented_face() -> None:
    assert dir(package) == sorted(package.__all__)
    assert {"teach", "method", "build", "judge", "compare", "segment"} <= set(dir(package))
    text = (generate.ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [name for name in FACE if f"sfumato.{name}(" not in text] == []


@pytest.mark.parametrize("name", FACE)
def test_signatures_are_spelt_out(name: str) -> None:
    signature = inspect.signature(FACE[name])
    assert not [each for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD]
    assert signature.return_annotation is not signature.empty
    assert not re.search(r"\bAny$", str(signature.return_annotation)), signature
    schema = OPTIONS.get(name)
    for field, info in (schema.model_fields if schema else {}).items():
        if name in ("make", "explain", "edit") and field in ("prompt", "from_"):
            continue
        shown = signature.parameters[field]
        if field not in ("seed", "size") or name in ("make", "explain"):  # those that a verb takes itself
            assert shown.default == info.default, field


def test_generate_and_judge_folder_too() -> None:
    for function in (draw, judge_folder):
        assert "options" not in inspect.signature(function).parameters
    assert list(inspect.signature(draw).parameters)[-1] == list(Options.model_fields)[-1]


@pytest.mark.parametrize("path", generate.modules(), ids=lambda path: path.parent.name)
def test_arguments_for_type_checkers_are_those_of_the_schemas(path) -> None:
    assert path.read_text(encoding="utf-8") == generate.modules()[path], "stale: run python -m docs.generate"


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int | None, "int | None"),
        (list[str], "str | Sequence[str]"),
        (list[tuple[str, float]] | None, "Sequence[tuple[str, float]] | None"),
        (float | tuple[float, float] | None, "float | tuple[float, float] | None"),
        (dict[str, list[int]], "dict[str, int | Sequence[int]]"),
    ],
)
def test_types_as_they_are_written(annotation, text: str) -> None:
    assert written(annotation) == text


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_keeps_every_bracket(name: str) -> None:
    from typer.testing import CliRunner

    command = commands.loaded(name)
    shown = CliRunner().invoke(commands.app, [name, "--help"], env={"COLUMNS": "4000"}).output
    said = [command.help or "", *(getattr(each, "help", None) or "" for each in getattr(command, "params", []))]
    for bracketed in re.findall(r"\S*\\\[[^\]]*\]", " ".join(said)):
        assert bracketed.replace("\\[", "[") in shown
    assert name not in ("make", "edit", "compare") or "words=[red cube|ball]" in shown


def test_options_are_called_alike() -> None:
    """What several commands take has one name, one short form and may be repeated everywhere or nowhere."""
    found: dict[str, set] = {}
    for name in commands.COMMANDS:
        for each in getattr(commands.loaded(name), "params", []):
            for flag in each.opts if each.param_type_name == "option" else ():
                found.setdefault(flag, set()).add((each.name, tuple(each.opts), each.multiple))
    shared = ("--with", "--by", "--seed", "--scheduler", "--device", "--dtype", "--model", "--steps", "--guidance")
    for flag in (*shared, "--size", "--net", "--clip", "--metrics", "--attributes"):
        assert len(found[flag]) == 1, (flag, found[flag])


DRAW = "make explain edit segment compare"
#: option -> every command that has it; what is not there has no meaning there
PRESENT = {
    "--model": "make explain edit segment adapters teach",
    "--config": "make explain edit segment teach",
    "--device": f"{DRAW} judge train teach",
    "--dtype": f"{DRAW} judge teach",  # a recipe says its own precision
    "--out": f"{DRAW} judge train teach",
    "--with": "make explain edit compare",
    "--by": "explain edit segment judge teach",
    "--scheduler": "make explain edit compare",  # segment walks the schedule of its method
    "--steps": f"{DRAW} teach",
    "--guidance": DRAW,
    "--size": DRAW,
    "--seed": f"{DRAW} judge teach",  # a recipe has its seed
    "--negative": "make explain compare",
    "-n": "make explain segment compare",
    "--prompt": "explain segment compare",  # of the others it is the argument
    "--prompts": "make judge compare",
    "--like": "make edit",
    "--allow": "make edit",
    "--mask": "edit",
    "--resume": "train teach",
    "--minutes": "train teach",
    "--json": "judge compare models methods adapters",
    "--reference": "make judge compare",  # what is drawn by; in judge and compare the hidden earlier name of --real
    "--real": "judge compare",
    "--net": "judge compare",
    "--clip": "judge compare",
    "--ray": "make judge",
    "--workers": "make judge",
}


def test_options_are_where_they_mean_something() -> None:
    found: dict[str, set[str]] = {}
    for name in commands.COMMANDS:
        for each in getattr(commands.loaded(name), "params", []):
            for flag in each.opts if each.param_type_name == "option" else ():
                found.setdefault(flag, set()).add(name)
    assert {flag: found[flag] for flag in PRESENT} == {flag: set(names.split()) for flag, names in PRESENT.items()}
    several = {flag for flag, names in found.items() if len(names) > 1 and flag.startswith("--")}
    clips_alone = {"--frames", "--fps"}  # of make and explain, by their one schema
    parameters = {"--name", "--strength", "--threshold"}  # of a taught word; of systems that edit and segment
    assert several - set(PRESENT) - clips_alone - parameters == set()


def test_results_print_short_and_show_in_notebooks() -> None:
    prompts = [f"a cube, number {i}, " + "very " * 30 + "red" for i in range(5)]
    result = draw(tiny_model("sd"), prompts, steps=1, guidance=1.0, size=(32, 32))
    report = Report("a <b>", [Figure(f"figure {i}", 0.5) for i in range(9)])
    explanation = Explanation(result.images, [], result)
    examples = Examples(torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8), ("x",) * 4)
    for shown in (result, explanation, EditResult(None, [result], [{}]), report, examples):
        assert len(repr(shown)) <= LONGEST + 60 and "tensor(" not in repr(shown) and "\n" not in repr(shown)
    page = result._repr_html_()
    assert page.count("data:image/png;base64,") == 5 and "(seed 4)" in page
    assert explanation._repr_html_().count("data:image") == 5
    assert EditResult(None, [result], [{}])._repr_html_().count("data:image") == 1
    assert "a &lt;b&gt;" in report._repr_html_() and "figure 8" in report._repr_html_()


def test_a_gallery_is_bounded() -> None:
    shown = gallery("x", [("<i>", Image.new("RGB", (2000, 500)))] * 40)
    assert shown.count("<figure>") == 16 and "24 more" in shown and "<i>" not in shown and len(shown) < 200_000


def test_records_say_shapes_instead_of_numbers() -> None:
    text = described(Examples(torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8), ("x", "y")))
    assert text == "Examples(pictures=Tensor(4 3 8 8), masks=Tensor(4 8 8), labels=('x', 'y'))"


def test_records_of_arrays_print_short() -> None:
    """Every public dataclass that holds arrays or pictures says their shapes, never their numbers."""
    long = []
    for path in sorted((generate.ROOT / "src" / "sfumato").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            record = any(ast.unparse(each).startswith("dataclass") for each in node.decorator_list)
            fields = [ast.unparse(each) for each in node.body if record and isinstance(each, ast.AnnAssign)]
            own = {ast.unparse(each.targets[0]) for each in node.body if isinstance(each, ast.Assign)}
            own |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            shown = [each for each in fields if "repr=False" not in each and "Callable" not in each]
            if "__repr__" not in own and any(re.search(r"\b(Tensor|ndarray)\b", each) for each in shown):
                long.append(f"{path.name}: {node.name}")
    assert not long


def test_every_verb_is_in_the_protocol() -> None:
    assert set(protocol.VERBS) == {"make", "explain", "edit", "segment", "teach", "judge", "train"}
    assert set(protocol.VERBS) <= set(app.__all__)
