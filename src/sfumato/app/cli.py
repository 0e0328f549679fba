"""The command line: one command per verb, thin over :mod:`sfumato.app`. Heavy imports happen inside the commands.

Whatever goes wrong on purpose is one line on stderr and exit code 2; ``--debug`` shows the traceback instead. Ctrl-C
keeps what is finished and leaves with 130.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sfumato.errors import BadInput, NotSupported, SfumatoError, WorkInterrupted


class _OneLine(TyperGroup):
    """The command group whose errors are one line each."""

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        options = args[: args.index("--")] if "--" in args else args
        debug = "--debug" in options
        if debug:  # accepted before and after the command
            args.remove("--debug")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = _teller()
                code = super().main(args=args, prog_name="sfumato", **{**extra, "standalone_mode": False})
            if code == 130:  # some versions of typer turn Ctrl-C into this
                code = _report(KeyboardInterrupt())
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                raise
            code = _report(error)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException) -> int:
    """Say what went wrong in one line on stderr; returns the exit code."""
    if isinstance(error, SfumatoError):
        message, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted; nothing half-written is left.", 130
    elif isinstance(error, OSError):
        message, code = _os_error(error), 2
    elif hasattr(error, "format_message"):  # a wrong option or command, whichever parser typer carries
        said = error.format_message()
        if not said:  # the bare command: its help is on the screen already
            return 2
        message, code = f"{said.rstrip('.')}. Try --help.", 2
    elif type(error).__name__ == "Abort":
        message, code = "interrupted; nothing half-written is left.", 130
    else:
        message = f"unexpected {type(error).__name__}: {error}. Please report it with what --debug shows."
        code = 1
    typer.echo("error: " + " ".join(message.split()), err=True)
    return code


def _os_error(error: OSError) -> str:
    import errno

    remedy = {
        errno.ENOSPC: "free some space or write elsewhere with -o",
        errno.EFBIG: "the file system allows no larger file; write elsewhere with -o",
        errno.EDQUOT: "free some of your quota or write elsewhere with -o",
        errno.EACCES: "check its permissions or write elsewhere with -o",
        errno.EPERM: "check its permissions or write elsewhere with -o",
        errno.EROFS: "the file system is read-only; write elsewhere with -o",
        errno.ENOENT: "check the path",
    }.get(error.errno or 0, "check the path and the disk")
    return f"{error.filename or 'a file'}: {error.strerror or error}; {remedy}."


def _teller() -> Any:
    """Tells each of our own warnings once, in one line; those of the libraries below are not the user's to act on."""
    told = set()

    def tell(message: Any, category: Any, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        if category.__module__.startswith("sfumato.") and line not in told:
            told.add(line)
            typer.echo(f"warning: {line}", err=True)

    return tell


app = typer.Typer(
    cls=_OneLine,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make, look inside, steer, teach, animate and judge generative image models.",
)
toybox_app = typer.Typer(no_args_is_help=True, help="The toybox: a world of toys in which everything is known exactly.")
app.add_typer(toybox_app, name="toybox")


def _print_version(wanted: bool) -> None:
    if wanted:
        from sfumato import __version__

        typer.echo(f"sfumato {__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


MODEL_HELP = "Built-in name, diffusers folder, .safetensors file or hub id. Default: toy-sd."
Model = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's own.")]
Scale = Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance. Default: the model's own.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Width x height in pixels. Default: the model's own.")]
Negative = Annotated[str | None, typer.Option(help="What the picture should not show.")]
Scheduler = Annotated[str | None, typer.Option(help="ddim, euler, dpm++, ... Default: the model's own.")]
Seed = Annotated[int | None, typer.Option(help="Where the noise comes from. Default: 0.")]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="KEY:name=value,...",
        help="A system that takes part; repeatable. Lists: words=[red cube|ball].",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]


Ray = Annotated[bool, typer.Option("--ray", help="Spread the work over Ray workers; the result is the same.")]
NWorkers = Annotated[int | None, typer.Option("--workers", help="How many with --ray. Default: one per CPU there.")]


@app.command()
def make(
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures. Default: 1.")] = None,
    model: Model = None,
    steps: Steps = None,
    guidance: Scale = None,
    negative: Negative = None,
    size: Size = None,
    seed: Seed = None,
    scheduler: Scheduler = None,
    with_: With = None,
    out: Out = Path("out"),
    like: Annotated[
        Path | None, typer.Option(help="Repeat this picture by its recipe; other options override it.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A JSONL file with one {prompt, negative, seed, n} per line. Goes on where it was stopped."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin from instead of noise.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --image is drawn anew, 0 to 1.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also write all pictures as one.")] = False,
    ray: Ray = False,
    workers: NWorkers = None,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Make pictures from a prompt. Each PNG carries its recipe."""
    from sfumato import app

    if sum(source is not None for source in (prompts, like)) == 2:
        raise BadInput("--like and --prompts cannot be given together.")
    if prompt is not None and prompts is not None:
        raise BadInput("give the prompt or --prompts, not both.")
    if ray and prompts is None:
        raise BadInput("--ray spreads the lines of a prompts file: give --prompts.")
    if workers is not None and not ray:
        raise BadInput("--workers are Ray's: give --ray too.")
    if prompt is None and prompts is None and like is None:
        raise BadInput('nothing to make: give a prompt, such as sfumato make "a red cube", or --like or --prompts.')
    typed: dict[str, Any] = {
        "prompt": prompt,
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "size": None if size is None else _size(size),
        "seed": seed,
        "scheduler": scheduler,
        "strength": strength,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    order = app.Order([], model, with_ or [], dtype, device, image)
    if like is not None:
        order = app.like(like, typed, order)
    elif prompts is not None:
        _deliver_lines(prompts, typed, order, out, grid, ray, workers)
        return
    else:
        order.jobs = [app.JobOptions(**typed)]
    _deliver(order, out, grid)


@app.command()
def explain(
    what: Annotated[
        str,
        typer.Argument(help="A prompt to make a picture from, a picture file, or a net; for conceptor also a folder."),
    ],
    prompt: Annotated[str | None, typer.Option(help="What the picture file shows. Default: the prompt in it.")] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="A word or phrase to look for; repeatable. Default: every word.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="KEY:name=value,...", help="The system that explains.")] = "daam",
    maps: Annotated[bool, typer.Option("--maps", help="Also write the maps as numbers (.safetensors).")] = False,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures to make. Default: 1.")] = None,
    model: Model = None,
    steps: Steps = None,
    guidance: Scale = None,
    size: Size = None,
    seed: Seed = None,
    scheduler: Scheduler = None,
    out: Out = Path("out"),
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Show where words are: in a picture made from a prompt, or in one that exists. Or what a net's layers know
    (--by shape_texture), or what words a concept is made of (--by conceptor)."""
    from sfumato import app, cards

    typed: dict[str, Any] = {
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else _size(size),
        "seed": seed,
        "scheduler": scheduler,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    order = app.Order([], model, [], dtype, device, maps=maps)
    words = [word for text in words or [] for word in text.split("|")]
    if hasattr(cards.method(cards.parse_with(by)[0]), "explain_model"):
        if typed or words or prompt is not None or maps or model is not None:
            raise BadInput(
                f"{by.partition(':')[0]} explains a net: give its name and the parameters of --by, nothing else."
            )
        lines, paths = app.explain_net(what, by, order, out)
        for line in (*lines, *paths):
            typer.echo(line)
        return
    if app.examines(by):
        unused = [f"--{name}" if len(name) > 1 else f"-{name}" for name in ("n", "size") if name in typed]
        if unused or words or maps:
            named = " and ".join(unused + ["--words"] * bool(words) + ["--maps"] * maps)
            raise BadInput(f"{named} cannot be given with --by {by.partition(':')[0]}; see: sfumato methods {by}.")
        with _bar("steps") as show:
            for path in app.examine_into(what, prompt, by, order, out, typed, show):
                typer.echo(path)
        return
    if prompt is None and not app.is_picture(what) and not app.is_read(by, order):
        key, params = cards.parse_with(by)
        order.with_ = [{"method": key, "params": {**params, **({"words": words} if words else {})}}]
        order.jobs = [app.JobOptions(prompt=what, **typed)]
        _deliver(order, out)
        return
    unused = [f"--{name}" if len(name) > 1 else f"-{name}" for name in ("n", "guidance") if name in typed]
    if unused:
        raise BadInput(f"{' and '.join(unused)} cannot be given for a picture that exists; it is not made anew.")
    text = prompt is None and not app.is_picture(what)
    for path in app.explain_file(Path(what), prompt, by, words, order, out, typed, text):
        typer.echo(path)


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="A PNG made by sfumato, or any other picture together with --from.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What it shall show; several make several pictures.")
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", help="What it shows now. Default: the prompt in it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture that is white where this one may change.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --with inpaint: where the noise comes from.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="replace (word for word) or refine (words added). Default: by the prompts.")
    ] = None,
    reweight: Annotated[
        list[str] | None, typer.Option(metavar="WORD=FACTOR", help="Turn a word up or down; repeatable.")
    ] = None,
    blend: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="Change the picture only where these words act; repeatable."),
    ] = None,
    with_: With = None,
    model: Model = None,
    steps: Steps = None,
    guidance: Scale = None,
    size: Size = None,
    inner: Annotated[
        int | None, typer.Option(help="Null-text iterations per step for an inverted picture, 0 none. Default: 10.")
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Fixed-point iterations per step of inversion. Default: 0.")
    ] = None,
    invert: Annotated[bool, typer.Option("--invert", help="Invert the picture even if it carries its recipe.")] = False,
    like: Annotated[Path | None, typer.Option(help="Repeat this edit of IMAGE by its recipe.")] = None,
    out: Out = Path("out"),
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Change a picture by its words and keep the rest of it. The PNG carries its recipe.

    With --mask and an inpainting model (--with inpaint: toy-sd-inpaint) the region is drawn anew from the prompt alone.
    """
    from sfumato import app

    typed: dict[str, Any] = {
        "prompt": prompt or None,
        "from_": from_,
        "mode": mode,
        "reweight": reweight,
        "blend": [word for text in blend or [] for word in text.split("|")] or None,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else _size(size),
        "inner": inner,
        "refine": refine,
        "invert": invert or None,
        "seed": seed,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    with_ = with_ or []
    if like is not None:
        if typed or with_:
            raise BadInput("--like repeats an edit as it was; give only IMAGE, --mask, --model and -o with it.")
        typed = app.edit_like(like, image, mask)
        with_ = typed.pop("with_")
    elif not prompt:
        raise BadInput('nothing to do: say what the picture shall show, such as sfumato edit toys.png "a blue cube".')
    order = app.Order([], model, with_, dtype, device)
    with _bar("steps") as show:

        def heard(step: Any) -> None:
            show(step.i + 1, step.total)

        for path in app.edit_file(image, mask, typed, order, out, heard):
            typer.echo(path)


@app.command()
def segment(
    what: Annotated[str, typer.Argument(help="The name of an object; or a segmenter.safetensors made before.")],
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Pictures or a folder of them. None: pictures are made.")
    ] = None,
    model: Model = None,
    remover: Annotated[
        str | None, typer.Option(help="The model that redraws pictures without it. Default: toy-sd-inpaint.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the pictures show, {} for the name. Default: a {}")] = None,
    background: Annotated[
        list[str] | None, typer.Option(help="What is there without the object; repeatable. Default: the remover's own.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures to make. Default: 200.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Training steps of the segmenter. Default: 400.")] = None,
    steps: Steps = None,
    guidance: Scale = None,
    size: Size = None,
    seed: Seed = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that is empty or not there yet.")] = Path(
        "segmented"
    ),
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Type the name of an object, get masks of it and a network that segments it. No mask is drawn by anybody."""
    from sfumato import app

    if n is not None and pictures:
        raise BadInput("-n is how many pictures to make; it cannot be given with pictures.")
    typed: dict[str, Any] = {
        "prompt": prompt,
        "background": background,
        "n": n,
        "iterations": iterations,
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else _size(size),
        "seed": seed,
    }
    typed = {name: value for name, value in typed.items() if value is not None}
    with _bar("steps") as show:

        def told(stage: str, done: int, total: int) -> None:
            show(done, total, 0.0, f"{done}/{total} {stage}")

        for path in app.segment_files(what, pictures or [], out, model, remover, dtype, device, told, **typed):
            typer.echo(path)


@app.command()
def judge(
    folder: Annotated[Path, typer.Argument(help="The pictures; or the real ones, when a second folder follows.")],
    fake: Annotated[Path | None, typer.Argument(help="The pictures to judge against the first folder.")] = None,
    reference: Annotated[Path | None, typer.Option(help="A folder of real pictures to compare with.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="What the pictures show: JSONL, one object per line.")] = None,
    attributes: Annotated[
        str | None, typer.Option(help="A file with an attribute per line, or 'captions': the captions' own.")
    ] = None,
    attribute: Annotated[list[str] | None, typer.Option(help="One attribute; repeatable.")] = None,
    oracle: Annotated[bool, typer.Option("--oracle", help="The toy-judge, not CLIP, says what is shown.")] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="presence, clip_score, frechet, kernel, manifold, attributes; repeatable. Default: all."),
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
    seed: Seed = None,
    batch: Annotated[int | None, typer.Option(help="Pictures looked at together. Default: 32.")] = None,
    ray: Ray = False,
    workers: NWorkers = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and its state.")] = Path("judged"),
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Measure a folder of pictures: against its captions, and against real pictures. Goes on where it was stopped."""
    from sfumato import app

    if fake is not None:
        if reference is not None:
            raise BadInput("give the reference once: as the first of two folders, or as --reference.")
        folder, reference = fake, folder
    given = {"metrics": metric, "net": net, "clip": clip, "template": template, "draws": draws, "cap": cap,
             "seed": seed, "batch": batch, "dtype": dtype, "ray": ray or None, "workers": workers}  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if attributes is not None and attribute:
        raise BadInput("give --attributes or --attribute, not both.")
    if attributes == "captions":
        options["attributes"] = ["captions"]
    elif attributes is not None:
        from sfumato.bench.judge import read_attributes

        options["attributes"] = read_attributes(Path(attributes))
    elif attribute:
        options["attributes"] = attribute
    options |= {"oracle": oracle, "captions": captions, "pairs": pairs, "device": device}
    try:
        with _bar("pictures") as show:
            report = app.judge(folder, reference, prompts=prompts, out=out, on_progress=show, **options)
    except KeyboardInterrupt:
        raise WorkInterrupted(f"interrupted; the state is in {out}, the same command goes on from it.") from None
    _tell(report, json_)


@app.command()
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
    n: Annotated[int | None, typer.Option("-n", help="Pictures of each prompt; prompts of each --task.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Real pictures; each side's distance to them.")] = None,
    steps: Steps = None,
    guidance: Scale = None,
    size: Size = None,
    seed: Seed = None,
    scheduler: Scheduler = None,
    net: Annotated[str | None, typer.Option(help="Net of the distances. Default: toy-clip.")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP of the scores. Default: toy-clip.")] = None,
    shown: Annotated[int | None, typer.Option(help="Pairs on the page. Default: 40.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and pictures.")] = Path("compared"),
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
) -> None:
    """Compare two models, settings or folders on the same prompts and seeds. Goes on where it was stopped."""
    from sfumato import app

    if sum(bool(source) for source in (prompts, prompt, task)) > 1:
        raise BadInput("give one of --prompts, --prompt and --task.")
    source: Any = prompts or prompt
    if task:
        from sfumato.toybox.oracle.prompts import prompt_set, write_prompts

        out.mkdir(parents=True, exist_ok=True)
        source, n = write_prompts(out / "prompts.jsonl", prompt_set(task, n or 20, seed or 0)), None
        seed = None  # every prompt of the set has its own
    settings = {"steps": steps, "guidance": guidance, "scheduler": scheduler, "size": size and _size(size)}
    measuring = {"reference": reference, "net": net, "clip": clip, "shown": shown}
    try:
        with _bar("pairs") as show:
            report = app.compare(
                first, second, prompts=source, n=n, seed=seed, out=out, dtype=dtype, device=device, on_progress=show,
                options={name: value for name, value in settings.items() if value is not None},
                **{name: value for name, value in measuring.items() if value is not None},
            )  # fmt: skip
    except (KeyboardInterrupt, WorkInterrupted):
        raise WorkInterrupted(f"interrupted; what is made is in {out}, the same command goes on from it.") from None
    _tell(report, json_)


def _tell(report: Any, json_: bool) -> None:
    """A report on stdout, and where its files are."""
    if json_:
        _print_json(report.to_json())
        return
    for line in report.lines():
        typer.echo(line)
    for path in report.files:
        typer.echo(path)


def _deliver(order: Any, out: Path, grid: bool = False) -> None:
    """Carry out an order: a bar on the terminal, each file's path on stdout as soon as the file is whole."""
    from sfumato import app, files

    finished: list[Path] = []
    try:
        with _bar("pictures") as show:
            for paths in app.carry_out(order, out, show):
                finished.append(paths[0])
                for path in paths:
                    typer.echo(path)
    except (KeyboardInterrupt, WorkInterrupted):
        kept = f"{len(finished)} finished pictures are in {out}" if finished else "no picture was finished"
        raise WorkInterrupted(f"interrupted; {kept}, nothing half-written is left.") from None
    if grid and finished:
        typer.echo(files.save_grid(files.free_name(out, f"{finished[0].stem}-grid"), finished))


def _deliver_lines(
    prompts: Path, typed: dict[str, Any], order: Any, out: Path, grid: bool, ray: bool, workers: int | None
) -> None:
    """The same for a prompts file: what is there already is not made again, bad lines are told at the end."""
    from sfumato import app, files

    total = sum(1 for line in prompts.open("rb") if line.strip())
    spread: dict[str, Any] = {"ray": True, "workers": workers} if ray else {}
    finished: list[Path] = []
    made = there = 0
    try:
        with _bar("lines") as show:
            for picture in app.carry_out_lines(app.read_prompts(prompts, typed), order, out, show, total, **spread):
                there += picture.there
                if grid:
                    finished.append(picture.paths[0])
                if not picture.there:
                    made += 1
                    for path in picture.paths:
                        typer.echo(path)
    except (KeyboardInterrupt, WorkInterrupted):
        told = f"{made + there} finished pictures are in {out}, the same command goes on from there"
        raise WorkInterrupted(f"interrupted; {told}.") from None
    finally:
        if there:
            typer.echo(f"{there} pictures were there already.", err=True)
    if grid and finished:
        typer.echo(files.save_grid(files.free_name(out, f"{finished[0].stem}-grid"), finished))


@contextlib.contextmanager
def _bar(unit: str) -> Iterator[Any]:
    """A progress bar for work of more than two seconds, on a terminal only.

    Yields ``show(done, total, share, note="")``: ``done`` of ``total`` units are finished, and ``share`` of the next.
    """
    start, bar, task = time.monotonic(), None, None  # type: Any, Any, Any

    def show(done: int, total: int, share: float = 0.0, note: str = "") -> None:
        nonlocal bar, task
        if bar is None and sys.stderr.isatty() and time.monotonic() - start > 2:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            bar.start()
            task = bar.add_task("", total=total, said="")
        if bar is not None:
            bar.update(task, total=total, completed=done + share, said=note or f"{done}/{total} {unit}")

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def _size(text: str) -> tuple[int, int]:
    width, x, height = text.lower().partition("x")
    if not (x and width.strip().isdecimal() and height.strip().isdecimal()):
        raise BadInput(f"--size is {text!r}; write width x height in pixels, such as 64x64.")
    return int(width), int(height)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Show one model in full.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the model NAME as a whole folder for diffusers or transformers.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the cards as JSON.")] = False,
) -> None:
    """List the built-in models, show one, or write one as a folder that other programs load."""
    from sfumato import app, registry

    if export is not None:
        if name is None:
            raise BadInput("--export needs the name of a model, such as sfumato models toy-sd --export toy-sd.")
        typer.echo(registry.export(name, export))
    elif name is not None:
        _print_json(registry.card(name))
    elif json_:
        _print_json(app.models())
    else:
        rows = [
            (key, card.get("pipeline", card.get("objective", "")), card.get("summary", ""))
            for key, card in app.models().items()
        ]
        _print_table(("name", "kind", "what it is"), rows)


@app.command()
def methods(
    key: Annotated[str | None, typer.Argument(help="Show one system with its parameters.")] = None,
    verb: Annotated[
        str | None, typer.Option(help="Only those of one verb: explain, steer, edit, teach, animate, judge.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print cards as JSON.")] = False,
) -> None:
    """List the systems that --with knows."""
    import dataclasses

    from sfumato import cards

    if key is not None:
        cls: Any = cards.method(key)
        if json_:
            _print_json({**dataclasses.asdict(cls.CARD), "parameters": cls.Params.model_json_schema()["properties"]})
            return
        for field, value in dataclasses.asdict(cls.CARD).items():
            if value:
                typer.echo(f"{field.replace('_', ' ')}: {', '.join(value) if isinstance(value, tuple) else value}")
        typer.echo()
        _print_table(("parameter", "default", "meaning"), cards.parameter_rows(cls.Params))
        return
    found = cards.methods(verb)
    if json_:
        _print_json({name: dataclasses.asdict(card) for name, card in found.items()})
    else:
        rows = [(name, card.verb, card.summary, f"{_brief(card.authors)} {card.year}") for name, card in found.items()]
        _print_table(("key", "verb", "what it does", "paper"), rows)


def _brief(authors: str) -> str:
    names = authors.split(", ")
    return authors if len(names) < 3 else f"{names[0]} et al."


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _print_table(titles: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Stop after so much time with a resumable checkpoint.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the exported model.")] = None,
) -> None:
    """Train a recipe; Ctrl-C or --minutes leave a checkpoint that --resume goes on from."""
    from sfumato import app

    with _bar("steps") as show:

        def told(progress: Any) -> None:
            loss = progress.logs.get("loss")
            note = f"{progress.step}/{progress.steps} steps" + (f", loss {loss:.4g}" if loss is not None else "")
            show(progress.step, progress.steps, 0.0, note)

        result = app.train(recipe, resume=resume, minutes=minutes, out=out, on_progress=told)
    for complaint in result.complaints:
        typer.echo(f"warning: {complaint}", err=True)
    if result.interrupted:
        raise WorkInterrupted(
            f"interrupted after step {result.step}, checkpoint in {result.folder}; "
            f"go on with: sfumato train {recipe} --resume"
        )
    if result.finished:
        typer.echo(result.exported)
    else:
        typer.echo(f"stopped after step {result.step}; go on with: sfumato train {recipe} --resume")


@app.command()
def teach(
    by: Annotated[str, typer.Argument(metavar="KEY:name=value,...", help="The system that teaches: robust_vit.")],
    model: Annotated[str, typer.Option(help="A classifier: a built-in name or a transformers folder.")],
    data: Annotated[
        str, typer.Option(help="A folder whose metadata.jsonl has file_name, mask and label, or toybox.")
    ] = "toybox",
    per_class: Annotated[int, typer.Option(min=1, max=20, help="toybox: how many pictures of each shape.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="toybox: another seed, other pictures.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the taught model.")] = Path("taught"),
) -> None:
    """Teach a classifier, from a few masked pictures, to look at the thing instead of its surroundings."""
    from sfumato import app

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"output folder {str(out)!r} is not empty; name a new one.")
    with _bar("epochs") as show:

        def told(epoch: int, epochs: int, log: dict[str, float]) -> None:
            show(epoch, epochs, 0.0, f"{epoch}/{epochs} epochs, loss {log['loss']:.4g}")

        app.teach(by, model, data, per_class=per_class, seed=seed, out=out, on_progress=told)
    typer.echo(out)


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

    with _bar("scenes") as show:
        typer.echo(export_imagefolder(out, n=n, size=size, seed=seed, split=split, on_progress=show))


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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def claims(
    context: typer.Context,
    keys: Annotated[list[str] | None, typer.Argument(help="Which claims; all when none is named.")] = None,
) -> None:
    """Measure the claims again and write their table (needs the repository, not only the package)."""
    import runpy

    root = next(
        (folder for folder in (Path.cwd(), Path(__file__).parents[2]) if (folder / "claims" / "__main__.py").is_file()),
        None,
    )
    if root is None:
        raise NotSupported(
            "claims are part of the repository, not of the installed package: clone it and run this inside."
        )
    sys.path.insert(0, str(root))
    arguments, sys.argv = sys.argv, ["claims", *(keys or []), *context.args]
    try:
        runpy.run_module("claims", run_name="__main__")
    finally:
        sys.argv = arguments
        sys.path.remove(str(root))


def main() -> None:
    """The entry point ``sfumato``."""
    # threads that wait for each other sleep instead of spinning: on a busy machine that is many times faster
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()
