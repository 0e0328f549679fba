"""``python -m claims [KEY...]``: runs experiments, writes ``results/*.json``, the overview ``README.md`` and a page of
details for each in ``details/``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from claims import core, record, table
from sfumato import cards
from sfumato.errors import BadInput, SfumatoError, UnknownName, WorkInterrupted
from sfumato.interrupts import interruptions_raised, stopped_by_signals

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
    parser.add_argument("--part", default="", metavar="TEXT", help="only this part, or those whose name contains this")
    parser.add_argument("--quick", action="store_true", help="small samples, into results/quick; shows that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure again what is still valid")
    parser.add_argument(
        "--weights", type=Path, help="folder whose subfolders replace the zoo's models of the same name"
    )
    parser.add_argument("--stale", action="store_true", help="list what must run again, and why; measure nothing")
    parser.add_argument("--threads", type=int, help="CPU threads")
    asked = parser.parse_args(arguments)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        keys = choose(asked.keys, EXPERIMENTS)
        if asked.threads is not None:
            import torch

            torch.set_num_threads(positive("--threads", asked.threads))
        context = core.Context(asked.quick, asked.weights, report)
        if asked.stale:
            for key, parts in stale(keys, context).items():
                print(*(f"{key} / {part}: {why}" for part, why in parts.items()), sep="\n")
            return 0
        for key in keys:
            record.run(experiment(key), context, asked.fresh, asked.part)
        print(write_table(context))
    except SfumatoError as error:
        report(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        report("interrupted; finished parts are kept, run the same command to go on")
        return WorkInterrupted.exit_code
    return 0


def choose(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """The keys to run: those asked for, or all. Raises UnknownName."""
    for key in asked:
        if key not in known:
            raise UnknownName("claim", key, known)
    return list(asked) or list(known)


def positive(name: str, value: int) -> int:
    """``value`` if it is above 0. Raises BadInput."""
    if value < 1:
        raise BadInput(f"{name} must be at least 1, got {value}.")
    return value


def experiment(key: str) -> core.Experiment:
    """The claims under a key."""
    return importlib.import_module(f"claims.{key}").EXPERIMENT


def stale(keys: Iterable[str], context: core.Context) -> dict[str, dict[str, str]]:
    """Key -> part -> why it must run again; keys with nothing stale are left out."""
    return {key: parts for key in keys if (parts := record.stale(experiment(key), context))}


def write_table(context: core.Context) -> Path:
    """Writes the overview of every record there is, the details of each, and each system's own into its page; returns
    the overview's path."""
    folder, home = record.results_folder(context.quick), core.HERE
    target = folder / "README.md" if context.quick else home / "README.md"
    pictures = "../../pictures/quick" if context.quick else "pictures"
    records = [each for each in (record.read_record(folder / f"{key}.json") for key in EXPERIMENTS) if each]
    old = stale((each["key"] for each in records), context)
    record.write(target, table.overview(records, old, "details", pictures))
    for each in records:
        shown = table.details(each, f"../{pictures}", old.get(each["key"], ()))
        record.write(target.parent / "details" / f"{each['key']}.md", shown)
        page = PAGES / f"{each['key']}.md"
        if page.exists() and not context.quick:
            record.write(page, table.page(page.read_text(encoding="utf-8"), each))
    return target


if __name__ == "__main__":
    with stopped_by_signals(), interruptions_raised():
        raise SystemExit(main())
