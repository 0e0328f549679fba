"""The command group: what goes wrong on purpose is one line on stderr and exit code 2; ``--debug`` shows the traceback
instead. Ctrl-C, SIGTERM and SIGHUP keep what is finished and leave with 130."""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from sfumato.app.cli import options
from sfumato.errors import BadInput, SfumatoError, UnknownName, WorkInterrupted, is_out_of_memory
from sfumato.interrupts import interruptions_raised, stopped_by_signals

HERE = Path(__file__).parent
#: the commands in the order in which help lists them; each is the module of this name, read when it is called
COMMANDS: tuple[str, ...] = (
    "make",
    "explain",
    "edit",
    "segment",
    "judge",
    "compare",
    "models",
    "methods",
    "adapters",
    "train",
    "teach",
)
COMMANDS += ("toybox", "claims")
_loaded: dict[str, Any] = {}


def command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function the command of its name; its help is the text at the top of its module."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        name, about = function.__name__, sys.modules[function.__module__].__doc__
        alone.command(name=name, help=options.literal(about or ""), **settings)(function)
        _loaded[name] = typer.main.get_command(alone)
        return function

    return add


def group(name: str, commands: typer.Typer) -> None:
    """Makes several commands known under one ``name``."""
    _loaded[name] = typer.main.get_command(commands)


def loaded(name: str) -> Any:
    """A command with its options: its module is imported."""
    importlib.import_module(f"sfumato.app.cli.{name}")
    return _loaded[name]


class _LazyGroup(TyperGroup):
    """The command group whose errors are one line each, and whose commands are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command for help: its name and first lines only."""
        if cmd_name in _loaded or cmd_name not in COMMANDS:
            return _loaded.get(cmd_name)
        about = ast.get_docstring(ast.parse((HERE / f"{cmd_name}.py").read_text(encoding="utf-8")))
        return TyperCommand(cmd_name, help=options.literal(about or ""))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in COMMANDS:
            loaded(args[0])
        elif not args[0].startswith("-"):
            raise UnknownName("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        options = args[: args.index("--")] if "--" in args else args
        debug = "--debug" in options
        if debug:  # accepted before and after the command
            args.remove("--debug")
        for stream in (sys.stdout, sys.stderr):  # names of files may be no text, and terminals know few letters
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            if any("\0" in arg for arg in args):
                raise BadInput("an argument holds a zero byte, which no text and no name of a file can.")
            with warnings.catch_warnings(), stopped_by_signals(), interruptions_raised():
                warnings.simplefilter("always")
                warnings.showwarning = _warn_once()
                code = super().main(args=args, prog_name="sfumato", **{**extra, "standalone_mode": False})
            if code == WorkInterrupted.exit_code:  # some versions of typer turn Ctrl-C into this
                code = _report(KeyboardInterrupt())
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                raise
            code = _report(error)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException) -> int:
    """Say what went wrong in one line on stderr; returns the exit code."""
    if type(error).__name__ == "Abort" and isinstance(error.__cause__, EOFError):
        error = error.__cause__  # typer takes the end of any file for Ctrl-D; nobody is asked anything here
    if isinstance(error, SfumatoError):
        message, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # the latter is typer's
        message, code = "interrupted; nothing half-written is left.", WorkInterrupted.exit_code
    elif is_out_of_memory(error):
        message, code = (
            "it does not fit into memory; make less at once (-n, --batch), smaller, or in --dtype bfloat16.",
            2,
        )
    elif isinstance(error, OSError):
        message, code = _os_error(error), 2
    elif hasattr(error, "format_message"):  # a wrong option or command, whichever parser typer carries
        text = error.format_message()
        if not text:  # the bare command: its help is on the screen already
            return 2
        message, code = f"{text.rstrip('.')}. Try --help.", 2
    else:
        message = f"unexpected {type(error).__name__}: {error}. Please report it with what --debug shows."
        code = 1
    with contextlib.suppress(OSError):  # the terminal may be gone
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
        errno.EMFILE: "this process may open no more files: raise the limit (ulimit -n 1024)",
        errno.ENFILE: "the system can open no more files: close other programs",
        errno.ENOMEM: "it does not fit into memory: make less at once, or smaller",
    }.get(error.errno or 0, "check the path and the disk")
    return f"{error.filename or 'a file'}: {error.strerror or str(error)[:300]}; {remedy}."


def _warn_once() -> Any:
    """Prints each of our own warnings once, in one line; those of the libraries below are not the user's to act on."""
    shown = set()

    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        if category.__module__.startswith("sfumato.") and line not in shown:
            shown.add(line)
            typer.echo(f"warning: {line}", err=True)

    return show


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make, look inside, steer, teach, animate and judge generative image and video models.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from sfumato.version import __version__

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
