"""The toybox: a world of toys in which everything is known exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.app.cli import show
from sfumato.app.cli.commands import group

toybox_app = typer.Typer(no_args_is_help=True, help=__doc__)


@toybox_app.command("sample")
def toybox_sample(
    n: Annotated[int, typer.Option("-n", min=1, help="How many scenes.")] = 16,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is empty or not there yet.")] = Path("toybox"),
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other scenes.")] = 0,
    split: Annotated[str, typer.Option(help="train, val, test, or heldout: combinations never in training.")] = "train",
) -> None:
    """Write an imagefolder: pictures, metadata.jsonl (file_name, text), masks/ and scenes/."""
    from sfumato.toybox import export_imagefolder

    with show.bar("scenes") as bar:
        typer.echo(export_imagefolder(out, n=n, size=size, seed=seed, split=split, on_progress=bar))


@toybox_app.command("prompts")
def toybox_prompts(
    task: Annotated[
        list[str] | None,
        typer.Option(help="one, two, colors, counting, position, color_attribution; repeatable. Default: all."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many prompts of each task.")] = 20,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file.")] = Path("prompts.jsonl"),
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other prompts.")] = 0,
    scenery: Annotated[bool, typer.Option("--scenery/--no-scenery", help="Whether the ground is named.")] = True,
    bare: Annotated[bool, typer.Option("--bare", help="No colours where colour is not the point.")] = False,
) -> None:
    """Write a prompt set in the manner of GenEval, for make --prompts and compare --prompts."""
    from sfumato.toybox.oracle.prompts import TASKS, prompt_set, write_prompts

    typer.echo(write_prompts(out, prompt_set(task or TASKS, n, seed, scenery, bare)))


@toybox_app.command("genome")
def toybox_genome(
    n: Annotated[int, typer.Option("-n", min=1, help="How many scenes.")] = 16,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is empty or not there yet.")] = Path("genome"),
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other scenes.")] = 0,
    split: Annotated[str, typer.Option(help="train, val, test, or heldout: combinations never in training.")] = "train",
    check: Annotated[
        Path | None,
        typer.Option(
            help="Write nothing, but look through this folder or zip of Visual Genome's files for faults (exit code 1)."
        ),
    ] = None,
) -> None:
    """Write Visual Genome's files about toys: regions, objects, relationships, graphs, questions, arrays, pictures."""
    if check is not None:
        from sfumato.toybox.genome.integrity import report

        lines, faults = report(check)
        for line in lines:
            typer.echo(line)
        raise typer.Exit(1 if faults else 0)
    from sfumato.toybox.genome import export_genome

    with show.bar("scenes") as bar:
        typer.echo(export_genome(out, n=n, size=size, seed=seed, split=split, on_progress=bar))


group("toybox", toybox_app)
