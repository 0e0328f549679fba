"""Type the name of an object, get masks of it and a network that segments it. No mask is drawn by anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato import cards
from sfumato.app.cli import flags, options, show
from sfumato.app.cli.commands import command
from sfumato.app.cli.flags import with_flags
from sfumato.app.jobs import JobOptions
from sfumato.errors import BadInput

SEGMENTER = cards.default("segment")


@command()
@with_flags(
    (f"Parameters of {SEGMENTER} (of others: in --by)", flags.of_system(SEGMENTER)),
    ("Options", flags.of_schema(JobOptions, only=("size",))),
)
def segment(
    what: Annotated[str, typer.Argument(help="The name of an object; or a segmenter.safetensors made before.")],
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Pictures or a folder of them. None: pictures are made.")
    ] = None,
    model: options.Model = None,
    remover: Annotated[
        str | None, typer.Option(help="The model that redraws pictures without it. Default: MODEL, or a built-in one.")
    ] = None,
    by: options.By = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is empty or not there yet.")] = Path(
        "segmented"
    ),
    config: options.Config = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    **given: Any,
) -> None:
    from sfumato import app

    values = flags.parsed(given)
    if pictures and "n" in values:
        raise BadInput("-n is how many pictures to make; it cannot be given with pictures.")
    with show.bar("steps") as bar:

        def report(stage: str, done: int, total: int) -> None:
            bar(done, total, 0.0, f"{done}/{total} {stage}")

        for path in app.segment_files(
            what, pictures or [], out, model, remover, dtype, device, report, by=by, config=config, **values
        ):
            typer.echo(path)
