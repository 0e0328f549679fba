"""The source of an edit: whether a recording of it fits the run, and its attention for every edited row."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.attention.call import Call
from sfumato.attention.sites import Site
from sfumato.errors import BadInput
from sfumato.sampling import Run
from sfumato.sampling.recording import Recording


def prompts_of(recording: Recording, run: Run) -> list[str]:
    """The source prompt of every sample. Raises BadInput where the recording is of another kind of run."""
    if recording.model != run.model.name or recording.size != run.size:
        made = f"{recording.size[0]}x{recording.size[1]} with {recording.model}"
        raise BadInput(f"the recording is of {made}, this run is {run.size[0]}x{run.size[1]} with {run.model.name}.")
    if recording.begin != run.begin or not torch.equal(recording.timesteps.cpu(), run.timesteps.cpu()):
        raise BadInput("the recording was made with other steps or another scheduler than this run.")
    if recording.facts.get("text", run.model.text_length) != run.model.text_length:
        raise BadInput(
            f"the recording has {recording.facts['text']} text positions and this run {run.model.text_length}, as its "
            f"prompt takes more chunks; shorten the prompt, or give source, which is then drawn anew, for a recording."
        )
    if len(recording) not in (1, len(run)):
        raise BadInput(f"the recording has {len(recording)} samples for {len(run)}; one for all, or one each.")
    return recording.prompts * (len(run) if len(recording) == 1 else 1)


def attention_of(recording: Recording, i: int, site: Site, rows: int, like: Tensor) -> Call:
    """The source's attention at a site in step ``i``, one row for each of so many edited ``rows``."""
    call = recording.call(i, site, like[:1])
    if call.q.shape[0] != rows:
        call.q, call.k = (tensor.expand(rows, -1, -1, -1) for tensor in (call.q, call.k))
    return call
