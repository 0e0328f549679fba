"""Measure a folder of pictures: against its captions, and against real pictures. Goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import options, show
from sfumato.app.cli.commands import command
from sfumato.errors import BadInput, WorkInterrupted


@command()
def judge(
    folder: Annotated[Path, typer.Argument(help="The pictures; or the real ones, when a second folder follows.")],
    fake: Annotated[Path | None, typer.Argument(help="The pictures to judge against the first folder.")] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="A further set, with --by a system that compares sets; repeatable.")
    ] = None,
    real: options.Real = None,
    reference: options.RealBefore = None,
    prompts: Annotated[Path | None, typer.Option(help="What the pictures show: JSONL, one object per line.")] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            "--attribute",
            "--attributes",
            help="One attribute, a file with one per line, or 'captions': the captions' own; repeatable.",
        ),
    ] = None,
    by: options.By = None,
    oracle: Annotated[bool, typer.Option("--oracle", help="The toy-judge, not CLIP, says what is shown.")] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "--metrics",
            help="presence, clip_score, frechet, kernel, manifold, attributes; repeatable. Default: all.",
        ),
    ] = None,
    net: Annotated[
        str | None, typer.Option(help="Net of the distances: a CLIP, or inception. Default: toy-clip.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP of scores and attributes. Default: toy-clip.")] = None,
    template: Annotated[str | None, typer.Option(help="Sentence for attributes. Default: 'a photo of {}'.")] = None,
    captions: Annotated[bool, typer.Option("--captions/--no-captions", help="Whether captions are read.")] = True,
    pairs: Annotated[bool, typer.Option("--pairs/--no-pairs", help="Whether pairs of attributes are compared.")] = True,
    draws: Annotated[int | None, typer.Option(help="Permutations behind attribute densities. Default: 100.")] = None,
    cap: Annotated[int | None, typer.Option(help="Most pictures a side where pairs count. Default: 10000.")] = None,
    seed: options.Seed = None,
    batch: Annotated[int | None, typer.Option(help="Pictures looked at together. Default: 32.")] = None,
    ray: options.Ray = False,
    workers: options.NWorkers = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and its state.")] = Path("judged"),
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
) -> None:
    from sfumato import app

    real = options.real_pictures(real, reference)
    if by is not None and app.judges_sets(by):
        values = (real, prompts, attribute, metric, net, clip, template, draws, cap, seed, batch, dtype)
        if any(each is not None for each in values) or oracle or ray or workers:
            raise BadInput(
                "with such a system give the sets, --also, -o and --json alone; it has parameters of its own."
            )
        with show.bar("steps") as bar:
            found: Any = app.judge([folder, *([fake] if fake else []), *(also or [])], by=by, out=out, on_progress=bar)
        if json_:
            show.json_text(found.to_json())
        else:
            typer.echo("\n".join([*found.lines(), str(out)]))
        return
    if also:
        raise BadInput("--also names a further set for a system that compares sets (--by); give two folders at most.")
    if fake is not None:
        if real is not None:
            raise BadInput("give the real pictures once: as the first of two folders, or as --real.")
        folder, real = fake, folder
    given = {"metrics": metric, "net": net, "clip": clip, "template": template, "draws": draws, "cap": cap,
             "seed": seed, "batch": batch, "dtype": dtype, "ray": ray or None, "workers": workers}  # fmt: skip
    chosen = {name: value for name, value in given.items() if value is not None}
    if attribute:
        from sfumato.bench.judge import read_attributes

        files = [Path(each) for each in attribute if Path(each).suffix == ".txt" or Path(each).is_file()]
        named = [each for each in attribute if Path(each) not in files]
        chosen["attributes"] = named + [each for path in files for each in read_attributes(path)]
    chosen |= {"oracle": oracle, "captions": captions, "pairs": pairs, "device": device}
    try:
        with show.bar("pictures") as bar:
            report = app.judge(folder, real, prompts=prompts, out=out, by=by, on_progress=bar, **chosen)
    except KeyboardInterrupt:
        raise WorkInterrupted(f"interrupted; the state is in {out}, the same command goes on from it.") from None
    show.report(report, json_)
