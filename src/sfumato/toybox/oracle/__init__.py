"""Judging: read a picture back into a scene, check it against a prompt, compare sets, put intervals on every figure."""

from __future__ import annotations

from sfumato.toybox.oracle.accuracy import Accuracy, measure
from sfumato.toybox.oracle.presence import Check, Rates, RequestedToy, check, find, rates, related, requested_toys
from sfumato.toybox.oracle.toy_judge import ObjectReading, SceneReading, ToyJudge, load_judge, read

__all__ = [
    "Accuracy",
    "Check",
    "ObjectReading",
    "Rates",
    "SceneReading",
    "ToyJudge",
    "RequestedToy",
    "check",
    "find",
    "load_judge",
    "measure",
    "rates",
    "read",
    "related",
    "requested_toys",
]
