"""The record of claims: parts that are run, written at once, and kept as long as the weights they measured and the code
they depend on stay the same, so that an interrupted run goes on where it stopped.

No claim imports this file: what is measured does not depend on how it is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from claims import sources
from claims.core import HERE, Context, Experiment, Part
from sfumato import registry
from sfumato.errors import UnknownName
from sfumato.locks import lock
from sfumato.writing import write_text

RESULTS = HERE / "results"


def run(experiment: Experiment, context: Context, fresh: bool = False, only: str = "") -> dict[str, Any]:
    """Runs an experiment's parts, skipping those whose result is still valid, and returns its record.

    The record is written after every part, and pictures made so far outlive an interruption (:func:`halfway`). Runs of
    other parts of the same experiment may go on beside this one. A part whose model is missing is left out with a line
    saying so. With ``only``, the part of this name is run, or those whose name contains it; the others stay as they are
    on record. UnknownName if it is in none.
    """
    chosen = [part for part in experiment.parts if part.name == only]
    chosen = chosen or [part for part in experiment.parts if only in part.name]
    if not chosen:
        raise UnknownName(f"part of {experiment.key}", only, [part.name for part in experiment.parts])
    code = code_of(experiment)
    for part in chosen:
        missing = [name for name in part.models if not has(context, name)]
        if missing:
            context.report(f"{experiment.key} / {part.name}: left out, no weights of {', '.join(missing)}")
            continue
        mark = fingerprint(code, part, context)
        kept = read_record(target(experiment, context)).get("parts", {}).get(part.name)
        if kept and kept["fingerprint"] == mark and not fresh:
            context.report(f"{experiment.key} / {part.name}: kept")
            continue
        context.report(f"{experiment.key} / {part.name}")
        if fresh:
            shutil.rmtree(halfway(experiment, context), ignore_errors=True)
        start = time.perf_counter()
        context.halfway, context.shared = halfway(experiment, context), partial(shared, context)
        try:
            rows = part.run(context)
        finally:
            context.halfway = context.shared = None
        seconds = time.perf_counter() - start
        for row in rows:
            row.seconds = row.seconds or round(seconds / len(rows), 1)
            context.report(f"  {verdict(row.to_json())}: {row.claim}: {row.measured}; baseline {row.baseline}")
        found = {
            "fingerprint": mark,
            "seconds": round(seconds, 1),
            "supervision": sources.supervision(context.folder(name) for name in part.models),
            "rows": [row.to_json() for row in rows],
        }
        put(experiment, context, {part.name: found})
    record = put(experiment, context, {})
    if not stale(experiment, context):
        shutil.rmtree(halfway(experiment, context).parent, ignore_errors=True)
    return record


def put(experiment: Experiment, context: Context, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Writes the results of parts beside those on record, with what other runs have put there meanwhile; returns the
    record. Parts that the experiment does not have any more are left out."""
    path = target(experiment, context)
    with _alone(path.parent):
        before = read_record(path)
        parts = before.get("parts", {}) | found
        record = {
            "key": experiment.key,
            "title": experiment.title,
            "intro": experiment.intro,
            "quick": context.quick,
            "machine": machine() if found else before.get("machine") or machine(),  # of the newest figures
            "parts": {part.name: parts[part.name] for part in experiment.parts if part.name in parts},
        }
        write(path, json.dumps(record, indent=1) + "\n")
    return record


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other run writes into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    while (held := lock(folder)) is None:
        time.sleep(0.02)
    try:
        yield
    finally:
        held.release()


def target(experiment: Experiment, context: Context) -> Path:
    """The file of an experiment's record."""
    return results_folder(context.quick) / f"{experiment.key}.json"


def halfway(experiment: Experiment, context: Context) -> Path:
    """Where what an experiment has made waits until all its parts are on record, so that an interrupted run
    does not make it twice. Another folder for other code or weights; those of before are removed."""
    names = {name for part in experiment.parts for name in part.models if has(context, name)}
    return _waiting(context, experiment.key, code_of(experiment), names)


def shared(context: Context, file: str, models: Sequence[str]) -> Path:
    """The same for what experiments make alike by a ``file`` among the claims from some models. It waits until code or
    weights change: nobody knows which experiment is the last to want it."""
    path = Path(file).resolve()
    name = "-".join(["shared", path.stem, *models])
    return _waiting(context, name, sources.code_fingerprint(path, path.stem), models)


def _waiting(context: Context, name: str, code: str, models: Iterable[str]) -> Path:
    depends = [code, {model: _weights_hash(str(context.folder(model))) for model in sorted(models)}]
    home = registry.cache_folder() / "claims" / (name + ("-quick" if context.quick else ""))
    folder = home / hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
    for other in home.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def results_folder(quick: bool) -> Path:
    """Where records live."""
    return RESULTS / "quick" if quick else RESULTS


def read_record(path: Path) -> dict[str, Any]:
    """A record, or an empty one when the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def write(path: Path, text: str) -> None:
    """Writes beside and renames: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def has(context: Context, name: str) -> bool:
    """Whether a model's weights are there."""
    try:
        return context.folder(name).is_dir()
    except UnknownName:
        return False


def code_of(experiment: Experiment) -> str:
    """Of all code that an experiment's results depend on."""
    return sources.code_fingerprint(Path(experiment.file).resolve(), experiment.key)


def fingerprint(code: str, part: Part, context: Context) -> dict[str, Any]:
    """What a part's result depends on: changes with the ``code`` that makes it, the weights it measures, the sizes."""
    return {
        "code": code,
        "weights": {name: _weights_hash(str(context.folder(name)))[:16] for name in part.models},
        "quick": context.quick,
    }


def stale(experiment: Experiment, context: Context) -> dict[str, str]:
    """Parts that must run again, and why: part -> reason, with those on record that the experiment has no more. Parts
    whose models are missing are left out."""
    record = read_record(target(experiment, context))
    found, code = {}, code_of(experiment)
    for part in experiment.parts:
        if any(not has(context, name) for name in part.models):
            continue
        kept = record.get("parts", {}).get(part.name)
        reason = (
            "never measured" if kept is None else _difference(kept["fingerprint"], fingerprint(code, part, context))
        )
        if reason:
            found[part.name] = reason
    gone = record.get("parts", {}).keys() - {part.name for part in experiment.parts}
    return found | dict.fromkeys(sorted(gone), "other parts have taken its place")


def _difference(before: Any, now: dict[str, Any]) -> str:
    """Why a kept result with another fingerprint is not valid any more; empty where it is."""
    if before == now:
        return ""
    if not isinstance(before, dict):
        return "measured before the record knew the code it depends on"
    changed = [name for name, found in now["weights"].items() if before["weights"].get(name) != found]
    reasons = [f"other weights of {', '.join(changed)}"] if changed else []
    return "; ".join(reasons + (["other code"] if before["code"] != now["code"] else [])) or "other sizes"


@cache
def _weights_hash(folder: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        # cards and pictures may be rewritten without the model changing
        if path.suffix in (".safetensors", ".json", ".txt") and path.name != "sfumato.json":
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    import diffusers
    import torch
    import transformers

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def verdict(row: dict[str, Any]) -> str:
    """The verdict of a row of the record in words."""
    if row.get("void"):
        return "void"
    return {True: "holds", False: "does not hold", None: "reported"}[row["holds"]]
