"""Whether a change of the code changed any number: every system's example, on every model it runs on, as hashes.

    python -m benchmarks.identity record before.json     # on the old tree
    python -m benchmarks.identity compare before.json    # on the new one; lists what differs, exit code 1

For each system that takes part in drawing, on every built-in generator and on one tiny genuine model of each family:
the final latents (SHA-256 of their bytes), coverage and cost. Comparable on one machine, with the same library
versions, the same tiny models (`tests/`) and one thread; the record belongs to that machine and is kept out of the
package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = "a red cube and a blue ball"
BUILT_IN = ("toy-sd", "toy-sd3", "toy-sd-inpaint")


def digest(latents: Any) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(latents.detach().contiguous().cpu().numpy().tobytes()).hexdigest()[:24]


def entry(model: Any, systems: Any, steps: int) -> dict[str, Any]:
    """What one run leaves: latents, coverage, cost; or the kind of error and its text."""
    from sfumato.errors import SfumatoError
    from sfumato.sampling import generate

    try:
        result = generate(model, PROMPT, interventions=systems, steps=steps, guidance=3.0, seed=5, decode=False)
    except SfumatoError as error:
        return {"error": type(error).__name__, "text": str(error)}
    coverage = hashlib.sha256(json.dumps(result.coverage, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return {"latents": digest(result.latents), "coverage": coverage, "cost": round(result.cost, 9)}


def record() -> dict[str, Any]:
    """All entries by "system | model"."""
    import torch

    from sfumato.cards import build, methods
    from sfumato.errors import SfumatoError
    from sfumato.sampling import Intervention
    from tests.examples import write_examples
    from tests.tiny import tiny_model

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    kinds = ("sd", "inpaint", "sd2", "sdxl", "sd3", "sd35", "flux", "pixart")
    write_examples(Path(os.environ["SFUMATO_CACHE"]))
    import sfumato

    models = {f"tiny-{kind}": (lambda kind=kind: tiny_model(kind), 2) for kind in kinds}
    models |= {name: (lambda name=name: sfumato.load(name), 4) for name in BUILT_IN}
    for name, (load, steps) in models.items():
        model = load()
        found[f"plain | {name}"] = entry(model, (), steps)
        for key, card in sorted(methods().items()):
            try:
                system = build(card.example)
            except SfumatoError as error:
                found[f"{key} | {name}"] = {"error": type(error).__name__, "text": str(error)}
                continue
            if isinstance(system, Intervention):
                found[f"{key} | {name}"] = entry(model, system, steps)
                print(f"{key} | {name}", file=sys.stderr, flush=True)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for every entry that is missing or not the same. An error may say the same in other words."""
    lines = []
    for key, old in before.items():
        new = after.get(key)
        if new is None:
            lines.append(f"{key}: missing")
            continue
        names = [name for name in ("error", "latents", "coverage", "cost") if old.get(name) != new.get(name)]
        if names:
            lines.append(f"{key}: " + "; ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in names))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SFUMATO_CACHE"] = cache
        found = record()
    if given.what == "record":
        given.file.write_text(json.dumps(found, indent=1, sort_keys=True))
        print(f"{len(found)} entries in {given.file}")
        return
    before = json.loads(given.file.read_text())
    lines = differences(before, found)
    print("\n".join(lines) or f"all {len(before)} entries of {given.file} are the same; {len(found)} were made")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
