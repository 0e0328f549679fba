"""The table of docs/composition.md: which systems run together. ``python -m tests.contract.matrix`` writes it anew from
the registry, by running every pair on tiny models; the contract suite holds the page to it."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from sfumato.errors import Conflict

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
START, END = "<!-- written by python -m tests.contract.matrix -->", "<!-- end -->"
TOGETHER, REFUSED, UNETS, NOWHERE = "+", "x", "u", "-"


def page() -> str:
    return PAGE.read_text(encoding="utf-8").replace("\\|", "|")


@functools.cache
def _cells() -> dict[tuple[str, str], str]:
    """The table as the page has it: (row, column) -> cell."""
    table = [
        [cell.replace("`", "").strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines()
        if line.startswith("|") and "---" not in line
    ]
    rows = [(cells[0].split(". ")[-1], cells[1:]) for cells in table[1:]]
    columns = [name for name, _ in rows] + table[0][1 + len(rows) :]
    return {(row, column): cell for row, cells in rows for column, cell in zip(columns, cells, strict=True)}


def cell(one: str, other: str) -> str:
    """What the page says of two systems, or of a system and a variant of guidance."""
    return _cells()[one, other]


def names() -> list[str]:
    """The systems of the page, in order."""
    return list(dict.fromkeys(row for row, _ in _cells()))


def kinds(*keys: str) -> list[str]:
    """The tiny models on which systems are tried together: a U-Net and joint attention, else the inpainting model."""
    from tests.contract.systems import PAIRS

    fitting = [kind for kind in ("sd", "sd3", "inpaint") if all((key, kind) in PAIRS for key in keys)]
    return [kind for kind in fitting if kind != "inpaint"] or fitting


def _outcome(one: str, other: str, kind: str) -> str:
    from tests.contract import checks
    from tests.contract.systems import maker
    from tests.tiny import tiny_model

    try:
        if other in checks.GUIDANCE:
            checks.run(tiny_model(kind), maker(one)(), **checks.GUIDANCE[other])
        else:
            checks.run(tiny_model(kind), [maker(one)(), maker(other)()])
    except Conflict as refusal:
        return str(refusal)
    return ""


def table(anew: Collection[str] = ()) -> str:
    """The table and the reasons of the refusals, by running every pair that the page does not have yet as running
    together (the suite runs those in groups), and every pair of the systems named ``anew``."""
    from tests.contract import checks
    from tests.contract.systems import SYSTEMS

    reasons: dict[str, list[str]] = {}
    found: dict[tuple[str, str], str] = {}
    keys = list(SYSTEMS)
    for i, one in enumerate(keys):
        for other in [*keys[i:], *checks.GUIDANCE]:
            if _cells().get((one, other)) == TOGETHER and not {one, other} & set(anew):
                found[one, other] = found[other, one] = TOGETHER
                continue
            both = [one] if other in checks.GUIDANCE else [one, other]
            said = {kind: _outcome(one, other, kind) for kind in kinds(*both)}
            if not said:  # no model here has what both need
                found[one, other] = found[other, one] = NOWHERE
                continue
            refused = [reason for reason in said.values() if reason]
            mark = TOGETHER if not refused else REFUSED if len(refused) == len(said) else UNETS
            assert mark != UNETS or said["sd3"], f"{one} and {other} refuse on U-Nets only, for which there is no mark"
            found[one, other] = found[other, one] = mark
            for reason in dict.fromkeys(refused):
                reasons.setdefault(reason, []).append(f"`{one}`" if one == other else f"`{one}` and `{other}`")
    head = ["", *(str(i) for i in range(1, len(keys) + 1)), *checks.GUIDANCE]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for i, one in enumerate(keys, 1):
        row = [f"{i}. `{one}`", *(found[one, other] for other in [*keys, *checks.GUIDANCE])]
        lines.append(f"| {' | '.join(row)} |")
    told = [f"- {', '.join(pairs)}: {reason}" for reason, pairs in reasons.items()]
    return "\n".join([*lines, "", "Refused, with these words:", "", *(told or ["- nothing"])])


def main() -> None:
    from tests.examples import write_examples

    with tempfile.TemporaryDirectory() as folder:
        os.environ["SFUMATO_CACHE"] = folder
        write_examples(Path(folder))
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        written = table(sys.argv[1:])
        PAGE.write_text(f"{before}{START}\n\n{written}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        _cells.cache_clear()


if __name__ == "__main__":
    import tests.conftest  # noqa: F401 - one thread, no network

    main()
