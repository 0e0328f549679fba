"""The house rules that only reading the sources can hold: sizes, families by name, state in its place, privacy."""

from __future__ import annotations

import ast
from pathlib import Path

import sfumato
from sfumato import cards
from sfumato.models.families import families
from tests.front_door.advice import trees

SOURCE = Path(sfumato.__file__).parent
FILES = [str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py"))]
OF_SYSTEMS = {
    name
    for name in FILES
    for key, card in cards._shipped().items()
    if name == f"{card.verb}/{key}.py" or name.startswith(f"{card.verb}/{key}/")
}
#: private names of the libraries that ours has no public way around; families own those of their pipelines
LIBRARIES = {
    "_AttentionBackendRegistry", "_C", "_are_functorch_transforms_active", "_attention_backend", "_base", "_cdata",
    "_foreach_lerp_", "_fused_sdp_choice", "_get_signature_types", "_is_amx_tile_supported",
    "_is_avx512_bf16_supported", "_is_mkldnn_bf16_supported", "_local_scalar_dense", "_parameters",
    "_scaled_dot_product_flash_attention_for_cpu", "_schema",
}  # fmt: skip
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _stored(tree: ast.AST) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]


def _private(tree: ast.AST) -> set[str]:
    """Private attributes that a file reads of something else than self, and that it does not define itself."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (*FUNCTIONS[:2], ast.ClassDef))}
    own |= {node.target.id for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}  # fmt: skip
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr[:1] == "_"]
    of_self = {node.attr for node in read if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    return {node.attr for node in read if not node.attr.startswith("__")} - own - of_self


def _function_state(tree: ast.AST) -> list[str]:
    """Attributes set on functions that the file itself defines."""
    found = []
    for scope in (node for node in ast.walk(tree) if isinstance(node, (ast.Module, *FUNCTIONS[:2]))):
        inside = [node for node in scope.body if isinstance(node, FUNCTIONS)]
        if not (named := {node.name for node in inside if isinstance(node, FUNCTIONS[:2])}):
            continue
        taken = {node.id for node in ast.walk(scope) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        found += [
            ast.unparse(node)
            for node in _stored(scope)
            if isinstance(node.value, ast.Name) and node.value.id in named - taken
        ]
    return found


def _changes_itself(tree: ast.AST) -> list[str]:
    """Where a method that is no constructor sets ``role`` or ``params`` of its object."""
    return [
        f"{method.name}: {ast.unparse(node)}"
        for method in ast.walk(tree)
        if isinstance(method, FUNCTIONS[:2]) and method.name != "__init__"
        for node in _stored(method)
        if node.attr in ("role", "params") and isinstance(node.value, ast.Name) and node.value.id == "self"
    ]


def test_no_file_is_too_long():
    lines = {name: len((SOURCE / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert len(OF_SYSTEMS) > 34
    assert {name: n for name, n in lines.items() if n > (300 if name in OF_SYSTEMS else 450)} == {}


def test_systems_know_no_family_by_name():
    names = {family.name for family in families().values()} - {"unet"}
    found = {
        f"{name}:{node.lineno}": node.value
        for name in OF_SYSTEMS
        for node in ast.walk(trees()[name])
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {} and {"sd", "sdxl", "flux", "wan"} <= names


def test_functions_hold_no_state():
    assert _function_state(ast.parse("def f(): ...\nf.seen = 1")) == ["f.seen"]
    assert _function_state(ast.parse("def f():\n    def g(): ...\n    g.seen = 1")) == ["g.seen"]
    assert {name: found for name, tree in trees().items() if (found := _function_state(tree))} == {}


def test_private_fields_stay_inside_their_file():
    assert _private(ast.parse("call._q = 1")) == {"_q"} and not _private(ast.parse("self._q = 1"))
    ours = {name: tree for name, tree in trees().items() if not name.startswith("models/families/")}
    assert {name: found for name, tree in ours.items() if (found := _private(tree) - LIBRARIES)} == {}


def test_systems_do_not_change_their_own_role_or_parameters():
    changed = ast.parse("class A:\n    def start(self, run):\n        self.params = self.role = 1")
    assert len(_changes_itself(changed)) == 2
    assert {name: found for name, tree in trees().items() if (found := _changes_itself(tree))} == {}


#: what looks at a clock, and why: to stop after minutes, to tell, to save in between, to know what is abandoned
CLOCKS = {"app/cli/show.py", "app/prompts_file.py", "bench/survey.py", "training/runs.py", "training/trainer.py"}
CLOCKS |= {"teach/discriminative_tokens.py", "writing.py"}


def test_no_number_depends_on_the_clock():
    """What is decided by a measured time is decided otherwise on a busy machine, and equal runs are not equal."""
    looking = {
        name
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "time"
        and node.attr in ("time", "monotonic", "perf_counter", "process_time")
    }
    assert looking == CLOCKS
