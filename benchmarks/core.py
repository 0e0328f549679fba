"""What every benchmark shares: interleaved timing, ratios with their spread, fresh processes, the table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import SfumatoError
from sfumato.metrics import stats
from sfumato.writing import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass
class Figure:
    """One measured figure. ``aim`` is the bar in words, ``met`` the verdict (None: only reported)."""

    name: str
    value: str
    aim: str
    met: bool | None
    detail: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """From the values of all rounds."""
        kept = list(values)
        return cls(*stats.spread(kept), len(kept))

    def text(self, digits: int = 3) -> str:
        """``1.012 [1.008, 1.020]``: median [first, third quartile]."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def interleaved(
    contestants: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one after the other in every round, the order turning by one each round.

    Interleaving shares whatever else the machine does among all; ratios are taken within a round.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contestants[name]()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> Spread:
    """Ratio of two contestants round by round."""
    return Spread.of(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def fresh(*arguments: str) -> Callable[[], Any]:
    """A contestant: a fresh interpreter with these arguments, from start to exit."""
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, check=True, capture_output=True, cwd=HERE.parent)


def in_process(code: str, *arguments: str, threads: int | None = None) -> dict[str, Any]:
    """Runs ``code`` in a fresh interpreter and returns the JSON object it prints on its last line.

    Raises SfumatoError with the last line of its complaint when it fails.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=HERE.parent
    )
    if done.returncode:
        raise SfumatoError(f"benchmark process failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """What it ran on."""
    import diffusers
    import torch

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "torch": torch.__version__.split("+")[0],
        "diffusers": diffusers.__version__,
    }


def store(key: str, title: str, figures: list[Figure], seconds: float) -> None:
    """Writes ``results/<key>.json`` beside and renames."""
    record = {
        "key": key,
        "title": title,
        "machine": machine(),
        "seconds": round(seconds, 1),
        "figures": [asdict(figure) for figure in figures],
    }
    _write(RESULTS / f"{key}.json", json.dumps(record, indent=1) + "\n")


def write_table(keys: Iterable[str]) -> Path:
    """Writes the table of every stored record, those of ``keys`` first; returns its path."""
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks`. Contestants take turns within one run on one machine; a ratio is the median"
        " over rounds with its quartiles. Below 1 is faster, or smaller, than the peer.",
    ]
    for key in dict.fromkeys([*keys, *sorted(path.stem for path in RESULTS.glob("*.json"))]):
        path = RESULTS / f"{key}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        about = record["machine"]
        rows = [
            f"| {f['name']} | {f['value']} | {f['aim']} | {_met(f['met'])} | {f['detail']} |" for f in record["figures"]
        ]
        parts.append(
            f"## {key}: {record['title']}\n\n| figure | measured | aim | | detail |\n|---|---|---|---|---|\n"
            + "\n".join(rows)
        )
        parts.append(
            f"{record['seconds']:.0f} seconds on {about['threads']} of {about['cores']} cores ({about['processor']}),"
            f" torch {about['torch']}, diffusers {about['diffusers']}."
        )
    target = HERE / "README.md"
    _write(target, "\n\n".join(parts) + "\n")
    return target


def _met(met: bool | None) -> str:
    return {True: "**met**", False: "**not met**", None: ""}[met]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
