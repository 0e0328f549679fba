"""Cases of advice: a call that fails, and the same one changed as its message says."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato import cards
from sfumato.errors import SfumatoError
from sfumato.models import Model
from sfumato.sampling import generate
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
LEFT = {"box": [[0.0, 0.0, 0.5, 1.0]]}
SAID: list[str] = []
#: fragments of advice that tests outside of tables follow -> the test
FOLLOWED: dict[str, str] = {}


def draw(model, prompt=PROMPT, **options):
    system = options.pop("by", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(model, prompt, **{"steps": 2, "decode": False, **options}, interventions=system or ())


def message(call) -> str:
    with pytest.raises(SfumatoError) as caught:
        call()
    SAID.append(str(caught.value))
    return SAID[-1]


def fresh(kind: str) -> Model:
    return tiny_model(kind, fresh=True)


def method(key: str, **params: Any) -> Any:
    return cards.method(key)(**params)


def named(pattern: str, said: str) -> str:
    """What a message names."""
    found = re.search(pattern, said)
    assert found, f"{pattern!r} is not in {said!r}"
    return found[1]


def follows(*fragments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test that meets messages with each of ``fragments`` and does what they say."""

    def add(test: Callable[..., None]) -> Callable[..., None]:
        FOLLOWED.update(dict.fromkeys(fragments, test.__name__))

        @functools.wraps(test)
        def run(*args: Any, **options: Any) -> None:
            SAID.clear()
            test(*args, **options)
            for fragment in fragments:
                assert any(fragment in said for said in SAID), f"no message with {fragment!r}: {SAID}"

        return run

    return add


def follow(table: dict[str, tuple[Any, ...]], fragment: str) -> None:
    """Meets the message of a case of a table, on the tiny model that it names, and does what it says."""
    kind, fails, helps = table[fragment]
    given = () if kind is None else (tiny_model(kind),)
    said = message(lambda: fails(*given))
    assert fragment in said
    helps(*given, said)
