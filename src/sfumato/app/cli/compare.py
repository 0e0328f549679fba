"""Compare two models, settings or folders on the same prompts and seeds. Goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import flags, options, show
from sfumato.app.cli.commands import command
from sfumato.app.cli.flags import with_flags
from sfumato.app.jobs import JobOptions
from sfumato.errors import BadInput, WorkInterrupted

SETTINGS = ("steps", "guidance", "negative", "size", "scheduler")


@command()
@with_flags(("Settings of both", flags.of_schema(JobOptions, only=SETTINGS)))
def compare(
    first: Annotated[str, typer.Argument(help="A folder of pictures, or MODEL or MODEL:steps=10,guidance=3,...")],
    second: Annotated[str, typer.Argument(help="The other one, of the same kind.")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL as for make --prompts; for folders: what the pictures show.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt; repeatable.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Prompts of a task (`sfumato toybox prompts --help`); repeatable.")
    ] = None,
    with_: options.With = None,
    n: Annotated[int | None, typer.Option("-n", help="Pictures of each prompt; prompts of each --task.")] = None,
    real: options.Real = None,
    reference: options.RealBefore = None,
    seed: options.Seed = None,
    net: Annotated[str | None, typer.Option(help="Net of the distances. Default: toy-clip.")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP of the scores. Default: toy-clip.")] = None,
    shown: Annotated[int | None, typer.Option(help="Pairs on the page. Default: 40.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of report and pictures, or x.png.")] = Path(
        "compared"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    **given: Any,
) -> None:
    from sfumato import app

    if sum(bool(source) for source in (prompts, prompt, task)) > 1:
        raise BadInput("give one of --prompts, --prompt and --task.")
    source: Any = prompts or prompt
    if task:
        from sfumato.toybox.oracle.prompts import prompt_set, write_prompts

        at = app.beside(out, "prompts.jsonl", "prompts.jsonl")
        at.parent.mkdir(parents=True, exist_ok=True)
        source, n = write_prompts(at, prompt_set(task, n or 20, seed or 0)), None
        seed = None  # every prompt of the set has its own
    settings = flags.parsed(given)
    measuring = {"reference": options.real_pictures(real, reference), "net": net, "clip": clip, "shown": shown}
    try:
        with show.bar("pairs") as bar:
            report = app.compare(
                first, second, prompts=source, n=n, seed=seed, out=out, dtype=dtype, device=device, on_progress=bar,
                options=settings, with_=with_ or [],
                **{name: value for name, value in measuring.items() if value is not None},
            )  # fmt: skip
    except (KeyboardInterrupt, WorkInterrupted):
        raise WorkInterrupted(f"interrupted; what is made is in {out}, the same command goes on from it.") from None
    show.report(report, json_)
