"""This tree beside another one, as two contestants in fresh interpreters that take turns.

    git worktree add --detach ../old REVISION
    python -m benchmarks.beside ../old [loop idle daam memory imports] [--rounds 9]

Time is CPU time on one thread, so that it may run on a machine that does something else. Both trees do what
``benchmarks/workloads.py`` says; a ratio is the geometric mean over rounds with its 95 % interval, above 1: this tree
takes more.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks import core
from benchmarks.__main__ import BENCHMARKS
from benchmarks.core import Figure
from sfumato.errors import BadInput, SfumatoError, UnknownName
from sfumato.metrics import stats

AIM, WORST = "not above 1.03 by more than its interval", 1.03
WORKLOADS = Path(__file__).with_name("workloads.py")
COMMANDS = {
    "`import sfumato`": ("-c", "import sfumato"),
    "`sfumato --help`": ("-m", "sfumato", "--help"),
    "`sfumato make --help`": ("-m", "sfumato", "make", "--help"),
    "`sfumato methods`": ("-m", "sfumato", "methods"),
}
Trees = dict[str, Path]  # "old" and "new" -> the root of each
Paired = dict[str, list[float]]  # "old" and "new" -> a value of each round


def ratio(values: Paired) -> stats.Interval:
    """new / old: the geometric mean of the rounds' ratios with its t interval."""
    logs = stats.mean([math.log(new / old) for old, new in zip(values["old"], values["new"], strict=True)])
    return stats.Interval(*(math.exp(each) for each in (logs.value, logs.low, logs.high)), logs.n)


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int, warmup: int = 1) -> Paired:
    """What the contestants measure, one after the other; every second round the other way round."""
    values: Paired = {name: [] for name in contestants}
    for turn in range(-warmup, rounds):
        for name in sorted(contestants, reverse=turn % 2 == 0):
            value = contestants[name]()
            if turn >= 0:
                values[name].append(value)
    return values


def interpreter(tree: Path, *arguments: str) -> list[str]:
    """The command of a fresh interpreter that finds the package of one tree."""
    return ["env", f"PYTHONPATH={tree / 'src'}", "OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", sys.executable, *arguments]


def cpu_seconds(tree: Path, *arguments: str) -> float:
    """CPU seconds of a fresh interpreter from start to exit."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(interpreter(tree, *arguments), check=True, capture_output=True, cwd=tree)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak(tree: Path, *arguments: str) -> float:
    """MiB of a fresh interpreter's peak."""
    command = interpreter(tree, str(WORKLOADS), "peak", *arguments)
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=tree).stdout)


@contextmanager
def serving(tree: Path) -> Iterator[Callable[[str], float]]:
    """Within: a function that has a job done in one interpreter of the tree, and returns its CPU seconds."""
    process = subprocess.Popen(
        interpreter(tree, str(WORKLOADS), "serve"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tree,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None

    def work(job: str) -> float:
        print(job, file=process.stdin, flush=True)
        if not (answer := process.stdout.readline()):
            raise SfumatoError(f"{tree} failed at {job!r}: {process.stderr.read().strip().splitlines()[-1:]}")
        return float(json.loads(answer))

    try:
        yield work
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def verdict(name: str, values: Paired, unit: str) -> Figure:
    """One row: new / old."""
    found = ratio(values)
    old, new = (sum(each) / len(each) for each in (values["old"], values["new"]))
    detail = f"{old:.3g} and {new:.3g} {unit}; {found.n} rounds"
    return Figure(name, found.text(), AIM, found.low <= WORST, detail, {"values": values})


def measure(key: str, trees: Trees, rounds: int, work: dict[str, Callable[[str], float]]) -> list[Figure]:
    """The rows of one benchmark; ``work`` has jobs done in an interpreter of each tree that stays."""
    if key == "imports":
        return [
            verdict(
                name,
                in_turns({each: partial(cpu_seconds, tree, *code) for each, tree in trees.items()}, rounds),
                "s",
            )
            for name, code in COMMANDS.items()
        ]
    if key == "memory":
        return [
            verdict(
                f"peak, {steps} steps, word maps {maps}",
                in_turns({each: partial(peak, tree, steps, maps) for each, tree in trees.items()}, 3, warmup=0),
                "MiB",
            )
            for steps in ("8", "24")
            for maps in ("off", "on")
        ]
    kind = {"loop": "plain"}.get(key, key)
    names = ("toy-sd", "toy-sd3", *(("sd15",) if key == "daam" else ()))
    return [
        verdict(
            name,
            in_turns({each: partial(work[each], f"{name} {kind}") for each in trees}, rounds),
            "s",
        )
        for name in names
    ]


KEYS = ("loop", "idle", "daam", "memory", "imports")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 on bad input. Writes what was measured after every key."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside", description=__doc__)
    parser.add_argument("old", type=Path, metavar="TREE", help="the other tree")
    parser.add_argument("keys", nargs="*", metavar="KEY", help=f"which: {', '.join(KEYS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="measured pairs of each job (default: 9)")
    given = parser.parse_args(arguments)
    try:
        if not (given.old / "src" / "sfumato").is_dir():
            raise BadInput(f"{given.old} holds no src/sfumato; give the root of a tree.")
        for key in given.keys:
            if key not in KEYS:
                raise UnknownName("benchmark", key, KEYS)
        trees = {"old": given.old.resolve(), "new": core.HERE.parent}
        revision = [
            subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True
            ).stdout.strip()
            for tree in trees.values()
        ]
        title = f"this tree ({revision[1]}) / another one ({revision[0]}), CPU time on one thread"
        with ExitStack() as stack:
            work = {name: stack.enter_context(serving(tree)) for name, tree in trees.items()}
            for key in given.keys or KEYS:
                start = time.perf_counter()
                rows = measure(key, trees, given.rounds, work)
                for row in rows:
                    print(f"{key}: {row.name}: {row.value} {row.detail}", file=sys.stderr, flush=True)
                core.store(f"beside-{key}", title, rows, time.perf_counter() - start)
        print(core.write_table(BENCHMARKS))
    except SfumatoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
