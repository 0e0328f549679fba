"""What commands show: progress bars, tables, JSON, reports."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from sfumato.errors import WorkInterrupted


@contextlib.contextmanager
def bar(unit: str, after: float = 2.0) -> Iterator[Any]:
    """A progress bar for work of more than ``after`` seconds, on a terminal only.

    Yields ``show(done, total, share, note="")``: ``done`` of ``total`` units are finished, and ``share`` of the next.
    """
    start, drawn, task = time.monotonic(), None, None  # type: Any, Any, Any

    def show(done: int, total: int, share: float = 0.0, note: str = "") -> None:
        nonlocal drawn, task
        said = note or f"{done}/{total} {unit}"
        if drawn is None and sys.stderr.isatty() and time.monotonic() - start >= after:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.fields[said]}", markup=False), TimeRemainingColumn())
            drawn = Progress(*columns, console=Console(file=sys.stderr), transient=True)
            drawn.start()
            task = drawn.add_task("", total=total, completed=done + share, said=said)
        if drawn is not None:
            drawn.update(task, total=total, completed=done + share, said=said)

    try:
        yield show
    finally:
        if drawn is not None:
            drawn.stop()


def written(items: Iterable[Any], out: Path) -> list[Path]:
    """Say each line of text and each file as soon as it is there; returns the files. A list holds the files of one
    picture.

    Raises WorkInterrupted, saying what is finished.
    """
    files: list[Path] = []
    try:
        for item in items:
            files += [item[0]] if isinstance(item, list) else [item] if isinstance(item, Path) else []
            for each in item if isinstance(item, list) else [item]:
                typer.echo(each)
    except (KeyboardInterrupt, WorkInterrupted):
        finished = f"{len(files)} finished pictures are in {out}" if files else "no picture was finished"
        raise WorkInterrupted(f"interrupted; {finished}, nothing half-written is left.") from None
    return files


def json_text(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def table(titles: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*titles, box=box.SIMPLE_HEAD)
    for row in rows:
        drawn.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(drawn)


def report(found: Any, json_: bool) -> None:
    """A report on stdout, and where its files are."""
    if json_:
        json_text(found.to_json())
        return
    for line in found.lines():
        typer.echo(line)
    for path in found.files:
        typer.echo(path)
