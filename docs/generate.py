"""``python -m docs.generate`` writes every table of README and docs that can be known from the code: methods, models,
parameters, what a system runs on; and the modules ``arguments.py``, the options of public functions as type checkers
read them. A test fails when they are stale.

Tables stand between ``<!-- generated: NAME -->`` and ``<!-- end of generated -->``. ``--composition`` also runs the new
pairs of systems for the table of docs/composition.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from docs import wishes
from sfumato import app, cards, protocol, registry

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- generated: {} -->", "<!-- end of generated -->"
CLAIMS = "<!-- measured: written by python -m claims -->"


def methods(page: Path) -> str:
    """Every system: key, what it does, the paper, its page."""
    link = "docs/systems/" if page.parent == ROOT else ""
    rows = [(f"[`{key}`]({link}{key}.md)", card.verb, card.summary, _paper(card)) for key, card in _methods().items()]
    return _table(("key", "verb", "what it does", "paper"), rows)


def models(page: Path) -> str:
    """The built-in models, and what else can be loaded."""
    from sfumato.models.families import families

    rows = [(f"`{name}`", registry.card(name).get("summary", "")) for name in registry.names()]
    classes = sorted({name for family in families().values() if _ours(family) for name in family.pipeline_classes})
    rows.append(("yours", f"a diffusers folder, a `.safetensors` file or a hub id of {_listed(classes)}"))
    return _table(("name", "what it is"), rows)


def families(page: Path) -> str:
    """Family x system: + where it runs, else what the family lacks. Families that offer the same share a column."""
    from sfumato.models.families import families as known

    ours = dict.fromkeys(family for family in known().values() if _ours(family))
    asked = {need for card in _methods().values() for need in card.needs}
    columns: dict[frozenset[str], list[str]] = {}
    for family in ours:
        columns.setdefault(family.capabilities & asked, []).append(f"`{family.name}`")
    rows = []
    for key, card in _methods().items():
        lacking = [", ".join(need for need in card.needs if need not in offered) for offered in columns]
        rows.append((f"[`{key}`](systems/{key}.md)", *(f"no {lack}" if lack else "+" for lack in lacking)))
    return _table(("system", *(" ".join(names) for names in columns.values())), rows)


def pipelines(page: Path) -> str:
    """Pipeline classes that are loaded as another one, and those of the known families' kin that are not served."""
    from sfumato.models.families import UNSUPPORTED, siblings

    rows: dict[tuple[str, str], list[str]] = {}
    for name, (base, lost) in sorted(siblings().items()):
        rows.setdefault((f"`{base}`", lost), []).append(f"`{name}`")
    for name, reason in sorted(UNSUPPORTED.items()):
        rows.setdefault(("none", reason), []).append(f"`{name}`")
    return _table(
        ("pipeline class", "loaded as", "what is not followed, or why not"),
        [(", ".join(names), base, lost) for (base, lost), names in rows.items()],
    )


def system(page: Path) -> str:
    """What the card of a system says, and its parameters."""
    cls = cards.method(page.stem)
    card = cls.CARD  # type: ignore[attr-defined]
    facts = {
        "serves": "; ".join(f"`{verb}` ({', '.join(words)})" for verb, words in protocol.serves(cls).items()),
        "runs on": runs_on(card),
        "costs": card.cost,
        "defaults from": card.defaults_from,
        "not reproduced": card.not_reproduced,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    rows = [(f"`{each.name}`", _default(each), each.meaning) for each in cards.parameters(page.stem)]
    return "\n".join([*lines, "", _table(("parameter", "default", "meaning"), rows)])


def _default(parameter: cards.Parameter) -> str:
    return parameter.default if parameter.default == "required" else f"`{parameter.default}`"


def face(page: Path) -> str:
    """The functions of the public face, and what each is for."""
    import inspect

    import sfumato

    rows = []
    for name in sfumato.__all__:
        found = getattr(app, name, None) or getattr(cards, name, None)
        if found is not None:
            about = " ".join((inspect.getdoc(found) or "").split("\n\n")[0].split())
            taken = [each.name for each in inspect.signature(found).parameters.values() if each.default is each.empty]
            rows.append((f"`sfumato.{name}({', '.join(taken)}, ...)`".replace("(, ", "("), about))
    return _table(("function", "what it does"), rows)


def wanted(page: Path) -> str:
    """The commonest wishes: command, what was measured, what it costs."""
    return _table(("I want", "use", "measured", "cost"), wishes.rows())


def wanted_too(page: Path) -> str:
    """Further wishes, and their commands."""
    return _table(("I want", "use"), wishes.more())


def runs_on(card: cards.Card) -> str:
    """The families that offer what a system needs, in words."""
    from sfumato.models.families import families, offering

    if not card.needs:
        return "any model"
    ours = {family.name for family in families().values() if _ours(family)}
    names = [f"`{name}`" for name in offering(card.needs) if name in ours]
    needs = "; ".join(cards.CAPABILITIES[need] for need in card.needs)
    return f"{', '.join(names)} (it needs {needs})" if names else needs


def _ours(family: type) -> bool:
    """Not one that a test or another package has added."""
    return family.__module__.startswith("sfumato.")


def _methods() -> dict[str, cards.Card]:
    return {key: card for key, card in cards.methods().items() if _ours(cards.method(key))}


def _paper(card: cards.Card) -> str:
    return f"[{card.paper}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.paper


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


HEAD = '''"""{about} Written by ``python -m docs.generate`` from the schemas, for type checkers."""

from __future__ import annotations

{imports}
'''
GUIDANCE = dict.fromkeys(("guidance", "true_guidance"), "float | Guidance | None")


def modules() -> dict[Path, str]:
    """Module -> its text: the options of the public functions as ``TypedDict``."""
    from sfumato.app.editing import EditOptions
    from sfumato.bench.options import CompareOptions, JudgeOptions
    from sfumato.cards.signatures import typed_dict
    from sfumato.sampling.options import Options

    editor, segmenter, teacher = (cards.method(cards.default(task)).Params for task in ("edit", "segment", "teach"))
    options = "Options of {}; see :class:`{}`."
    found = {
        "sampling": [
            typed_dict("GenerateArguments", options.format("a generation", "sfumato.sampling.Options"), Options,
                       without=("prompt",), types_of=GUIDANCE),
        ],
        "bench": [
            typed_dict("JudgeArguments", options.format("judging", "sfumato.bench.options.JudgeOptions"), JudgeOptions),
            typed_dict("CompareArguments", options.format("comparing", "sfumato.bench.options.CompareOptions"),
                       CompareOptions, without=("seed",)),
        ],
        "app": [
            typed_dict("EditArguments", "Options of an edit, and the parameters of the system that edits by default.",
                       EditOptions, editor, without=("prompt", "from_", "source", "mask")),
            typed_dict("SegmentArguments", "Parameters of the system that segments by default.", segmenter),
            typed_dict("TeachArguments", "Parameters of the system that teaches by default.", teacher),
        ],
    }  # fmt: skip
    return {ROOT / "src" / "sfumato" / room / "arguments.py": _module(room, found[room]) for room in found}


def _module(room: str, classes: list[str]) -> str:
    body = "\n\n".join(classes)
    names = {module: [name for name in names if re.search(rf"\b{name}\b", body)] for module, names in IMPORTED.items()}
    imports = [f"from {module} import {', '.join(found)}" for module, found in names.items() if found]
    if "| Guidance" in body:
        imports += ["", "from sfumato.sampling.guidance import Guidance"]
    about = {"sampling": "Options of a generation.", "bench": "Options of judging and comparing."}
    text = about.get(room, "Options of the verbs.")
    return HEAD.format(about=text, imports="\n".join(imports)) + "\n\n" + body


IMPORTED = {"collections.abc": ("Sequence",), "typing": ("Any", "Literal", "TypedDict")}


def tables() -> dict[Path, dict[str, Callable[[Path], str]]]:
    """Page -> name of the block -> what writes it."""
    found: dict[Path, dict[str, Callable[[Path], str]]] = {
        ROOT / "README.md": {"models": models, "methods": methods},
        ROOT / "docs" / "index.md": {"face": face},
        ROOT / "docs" / "systems" / "README.md": {"methods": methods},
        ROOT / "docs" / "models.md": {"families": families, "pipelines": pipelines},
        ROOT / "docs" / "i-want.md": {"wishes": wanted, "more": wanted_too},
    }
    for key in _methods():
        found[ROOT / "docs" / "systems" / f"{key}.md"] = {"system": system}
    return found


def written(page: Path, blocks: dict[str, Callable[[Path], str]]) -> str:
    """The text of a page with its blocks as they are today; a block it has not yet stands before its claims, or last.

    Raises FileNotFoundError for a system without a page.
    """
    text = page.read_text(encoding="utf-8")
    for name, write in blocks.items():
        begin = BEGIN.format(name)
        if begin not in text:
            place = text.find("## Its claims")
            place = text.find(CLAIMS) if place < 0 else place
            place = len(text) if place < 0 else place
            head = "## Parameters\n\n" if name == "system" else ""
            text = f"{text[:place].rstrip()}\n\n{head}{begin}\n{END}\n\n{text[place:]}".rstrip() + "\n"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{write(page)}\n\n{END}{rest.partition(END)[2]}"
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--composition", action="store_true", help="also run new pairs of systems (minutes)")
    given = parser.parse_args(arguments)
    for page, blocks in tables().items():
        text = written(page, blocks)
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))
    for path, text in modules().items():
        if not path.is_file() or text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    if given.composition:
        from tests.contract import matrix

        matrix.main()


if __name__ == "__main__":
    main()
