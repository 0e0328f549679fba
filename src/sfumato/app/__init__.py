"""The verbs of the public face: what ``sfumato.make(...)`` and the command line do, one module a verb.

Each name is loaded on first use, so that the command line may import this and show its help at once.
"""

from __future__ import annotations

from sfumato.startup import lazy

MODULES = {
    "attaching": ("attached",),
    "jobs": ("DEFAULT_MODEL", "JobOptions", "LONGEST_PROMPT", "MakeOptions", "PICTURES", "build_all", "load", "make")
    + ("models", "offers", "suitable_model"),
    "pictures": ("fitting_size", "is_picture"),
    "batch": ("JobBatch", "RecipeDiffers", "like", "make_files", "write", "write_grid"),
    "prompts_file": ("ANNOTATIONS", "BadPrompts", "PromptLine", "MadeFiles", "make_prompts", "read_prompts"),
    "explaining": ("ExplainJob", "Explanation", "explain", "explain_files", "open_net"),
    "editing": ("EditOptions", "EditResult", "edit", "edit_file", "edit_like"),
    "segmenting": ("segment", "segment_files"),
    "judging": ("PromptsSkipped", "Side", "beside", "compare", "judge", "judges_sets", "side"),
    "teaching": ("teach", "train"),
    "adapting": ("adapters", "convert"),
}
_HOME = {name: module for module, names in MODULES.items() for name in names}
__all__ = list(_HOME)  # noqa: PLE0605


__getattr__, __dir__ = lazy(__name__, _HOME)
