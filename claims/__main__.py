"""``python -m claims [KEY...]``: runs experiments, writes ``results/*.json`` and the table ``README.md``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from claims import core
from sfumato import cards
from sfumato.errors import SfumatoError

PAGES = core.HERE.parent / "docs" / "systems"


def discovered(folder: Path = core.HERE) -> list[str]:
    """Keys of all claims: the modules beside this one that hold an EXPERIMENT, systems first, in the order of cards."""
    found = [path.stem for path in sorted(folder.glob("[a-z]*.py")) if "\nEXPERIMENT = " in path.read_text("utf-8")]
    order = list(cards.methods())
    return sorted(found, key=lambda key: order.index(key) if key in order else len(order))


EXPERIMENTS = discovered()


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 whatever the verdicts are, 2 on bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m claims", description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help=f"which claims: {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--part", default="", metavar="TEXT", help="only parts whose name contains this")
    parser.add_argument("--quick", action="store_true", help="small samples, into results/quick; shows that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure again what is still valid")
    parser.add_argument(
        "--weights", type=Path, help="folder whose subfolders replace the zoo's models of the same name"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    asked = parser.parse_args(arguments)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        keys = core.choose(asked.keys, EXPERIMENTS)
        if asked.threads is not None:
            import torch

            torch.set_num_threads(core.positive("--threads", asked.threads))
        context = core.Context(asked.quick, asked.weights, report)
        for key in keys:
            core.run(importlib.import_module(f"claims.{key}").EXPERIMENT, context, asked.fresh, asked.part)
        print(write_table(asked.quick))
    except SfumatoError as error:
        report(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        report("interrupted; finished parts are kept, run the same command to go on")
        return 130
    return 0


def write_table(quick: bool) -> Path:
    """Writes the table of every record there is, and each system's own into its page; returns the table's path."""
    folder = core.results_folder(quick)
    records = [core.read_record(folder / f"{key}.json") for key in EXPERIMENTS]
    target = folder / "README.md" if quick else core.HERE / "README.md"
    core.write(target, core.table([r for r in records if r], "../../pictures/quick" if quick else "pictures"))
    for record in [] if quick else records:
        page = PAGES / f"{record.get('key')}.md"
        if page.exists():
            core.write(page, core.page(page.read_text(encoding="utf-8"), record))
    return target


if __name__ == "__main__":
    raise SystemExit(main())
