"""The verbs of the public face: what ``sfumato.make(...)`` and the command line do, one module a verb. Each name is
loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.app.editing import EditOptions, Edits, edit, edit_file, edit_like
    from sfumato.app.explaining import (
        Explanation,
        examine_into,
        examines,
        explain,
        explain_file,
        explain_net,
        is_read,
        open_net,
    )
    from sfumato.app.jobs import (
        DEFAULT_MODEL,
        INPAINT_MODEL,
        LONGEST_PROMPT,
        PICTURES,
        JobOptions,
        MakeOptions,
        Order,
        RecipeDiffers,
        build_all,
        carry_out,
        fitting_size,
        is_picture,
        like,
        load,
        make,
        models,
        write,
    )
    from sfumato.app.judging import LinesLeftOut, Side, compare, judge, side
    from sfumato.app.lines import ANNOTATIONS, BadLines, Line, Made, carry_out_lines, read_prompts
    from sfumato.app.segmenting import segment, segment_files
    from sfumato.app.teaching import teach, train

__all__ = [
    "ANNOTATIONS",
    "BadLines",
    "DEFAULT_MODEL",
    "EditOptions",
    "Edits",
    "Explanation",
    "INPAINT_MODEL",
    "JobOptions",
    "LONGEST_PROMPT",
    "Line",
    "LinesLeftOut",
    "Made",
    "MakeOptions",
    "Order",
    "PICTURES",
    "RecipeDiffers",
    "Side",
    "build_all",
    "carry_out",
    "carry_out_lines",
    "compare",
    "edit",
    "edit_file",
    "edit_like",
    "examine_into",
    "examines",
    "explain",
    "explain_file",
    "explain_net",
    "fitting_size",
    "is_picture",
    "is_read",
    "judge",
    "like",
    "load",
    "make",
    "models",
    "open_net",
    "read_prompts",
    "segment",
    "segment_files",
    "side",
    "teach",
    "train",
    "write",
]

_MODULES = {
    "lines": (
        "ANNOTATIONS",
        "BadLines",
        "Line",
        "Made",
        "carry_out_lines",
        "read_prompts",
    ),
    "jobs": (
        "DEFAULT_MODEL",
        "INPAINT_MODEL",
        "JobOptions",
        "LONGEST_PROMPT",
        "MakeOptions",
        "Order",
        "PICTURES",
        "RecipeDiffers",
        "build_all",
        "carry_out",
        "fitting_size",
        "is_picture",
        "like",
        "load",
        "make",
        "models",
        "write",
    ),
    "editing": (
        "EditOptions",
        "Edits",
        "edit",
        "edit_file",
        "edit_like",
    ),
    "explaining": (
        "Explanation",
        "examine_into",
        "examines",
        "explain",
        "explain_file",
        "explain_net",
        "is_read",
        "open_net",
    ),
    "judging": (
        "LinesLeftOut",
        "Side",
        "compare",
        "judge",
        "side",
    ),
    "segmenting": (
        "segment",
        "segment_files",
    ),
    "teaching": (
        "teach",
        "train",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato.app' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sfumato.app.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
