"""``python -m benchmarks [KEY...]``: measures, writes ``results/*.json`` and the table ``README.md``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from benchmarks import core
from sfumato.errors import BadInput, SfumatoError, UnknownName, WorkInterrupted
from sfumato.interrupts import interruptions_raised, stopped_by_signals

# key -> (module, title); imported only when asked for
BENCHMARKS = {
    "toybox": ("benchmarks.toybox", "rendering"),
    "loop": ("benchmarks.loop", "our sampling loop against the diffusers pipeline, same weights"),
    "daam": ("benchmarks.daam", "word maps on a full-size SD1.5 U-Net, randomly initialised, 64x64 latents"),
    "word_maps": ("benchmarks.word_maps", "word maps in our loop and in a pipeline's own, on U-Nets of full size"),
    "attend_excite": (
        "benchmarks.attend_excite",
        "a step altered by Attend-and-Excite on a full-size SD1.5 U-Net, randomly initialised, 64x64 latents",
    ),
    "prompt_to_prompt": ("benchmarks.prompt_to_prompt", "editing against drawing anew"),
    "dreambooth": (
        "benchmarks.dreambooth",
        "a LoRA step on SD1.5 of full size, randomly initialised, against the loop of diffusers' script",
    ),
    "memory": ("benchmarks.memory", "peak memory with word maps"),
    "imports": ("benchmarks.imports", "start-up"),
    "equal_runs": ("benchmarks.equal_runs", "how many different results equal runs have"),
    "one_picture": ("benchmarks.one_picture", "one picture from the command line"),
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 on bad input, 130 when interrupted (finished keys are kept)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help=f"which: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    asked = parser.parse_args(arguments)
    try:
        for key in asked.keys:
            if key not in BENCHMARKS:
                raise UnknownName("benchmark", key, BENCHMARKS)
        if asked.threads is not None:
            if asked.threads < 1:
                raise BadInput(f"--threads must be at least 1, got {asked.threads}.")
            import torch

            torch.set_num_threads(asked.threads)
        for key in asked.keys or BENCHMARKS:
            module, title = BENCHMARKS[key]
            start = time.perf_counter()
            figures = importlib.import_module(module).run()
            core.store(key, title, figures, time.perf_counter() - start)
            for figure in figures:
                print(
                    f"{key}: {figure.name}: {figure.value} (aim: {figure.aim}) {figure.detail}",
                    file=sys.stderr,
                    flush=True,
                )
        print(core.write_table(BENCHMARKS))
    except SfumatoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished benchmarks are kept", file=sys.stderr)
        return WorkInterrupted.exit_code
    return 0


if __name__ == "__main__":
    with stopped_by_signals(), interruptions_raised():
        raise SystemExit(main())
