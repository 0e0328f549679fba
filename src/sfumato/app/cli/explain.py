"""Show where words are: in a picture made from a prompt, or in one that exists. With other systems (--by): what an
answer rests on, what a net's layers know, what words a concept is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.app.cli import flags, options, show
from sfumato.app.cli.commands import command
from sfumato.app.cli.flags import with_flags
from sfumato.app.jobs import JobOptions

OPTIONS = ("n", "steps", "guidance", "negative", "size", "frames", "fps", "seed", "scheduler")


@command()
@with_flags(("Options", flags.of_schema(JobOptions, only=OPTIONS)))
def explain(
    what: Annotated[
        str,
        typer.Argument(help="A prompt to make a picture from, a picture file, a net, or a folder."),
    ],
    prompt: Annotated[str | None, typer.Option(help="What the picture file shows. Default: the prompt in it.")] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="A word or phrase to look for; repeatable. Default: every word.")
    ] = None,
    by: options.By = None,
    with_: options.With = None,
    maps: Annotated[bool, typer.Option("--maps", help="Also write the maps as numbers (.safetensors).")] = False,
    model: options.Model = None,
    out: options.Out = Path("out"),
    config: options.Config = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    **given: Any,
) -> None:
    from sfumato import app

    values = flags.parsed({"prompt": prompt, "words": words, **given})
    batch = app.JobBatch([], model, with_ or [], dtype, device, config=config, maps=maps)
    job = app.ExplainJob(what, by, batch, values)
    with show.bar("pictures") as bar:
        show.written(app.explain_files(job, out, bar), out)
