"""``python -m sfumato.training RECIPE``: the trainer without the command line of the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sfumato.errors import SfumatoError, WorkInterrupted
from sfumato.interrupts import stopped_by_signals


def main() -> int:
    """Trains one recipe; prints a line per logged step. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sfumato.training", description=__doc__)
    parser.add_argument("recipe", help="TOML file, or the name of a shipped recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes with a resumable checkpoint")
    parser.add_argument("--out", type=Path, help="folder of the exported model")
    parser.add_argument(
        "--snapshots", type=Path, help="folder replaced now and then by an export of the averaged weights"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args()

    from sfumato.training import Progress, run

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)

    def show(progress: Progress) -> None:
        logs = "  ".join(f"{key} {value:.4g}" for key, value in progress.logs.items())
        said = progress.doing or logs
        print(f"{progress.step}/{progress.steps}  {progress.seconds:.0f} s  {said}", flush=True)

    try:
        result = run(options.recipe, options.resume, options.minutes, options.out, show, options.snapshots)
    except SfumatoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; go on with --resume", file=sys.stderr)
        return WorkInterrupted.exit_code
    print(result, flush=True)
    return WorkInterrupted.exit_code if result.interrupted else 0


if __name__ == "__main__":
    with stopped_by_signals():
        raise SystemExit(main())
