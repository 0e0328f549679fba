"""What cannot be the source of an edit."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.attention.call import Call
from sfumato.errors import BadInput, NotSupported
from sfumato.sampling.recording import Recording
from sfumato.text.weights import read_weights


def refuse_source(recording: Recording | None, source: str | None) -> None:
    """Raise BadInput where there is no source, or the recording shows another."""
    if recording is None and source is None:
        raise BadInput("prompt_to_prompt needs source, the prompt of the picture that is edited, or a recording.")
    if recording is not None and source is not None:
        if read_weights(source).text not in recording.prompts:
            raise BadInput(f"source is {source!r}, but the recording shows {recording.prompts[0]!r}.")


def refuse_other_noise(recording: Recording, x: Tensor) -> None:
    """Raise BadInput where the run begins with another noise (b c h w) than the recording."""
    if not torch.equal(recording.latents[0].to(x).expand_as(x), x):
        raise BadInput("an edit begins with the noise of its source; give the seed, or the latents, of the recording.")


def refuse_unequal_lengths(source: Call, call: Call) -> None:
    """Raise NotSupported where the edited prompt has more tokens than the source's, or fewer."""
    if source.k.shape[2] != call.k.shape[2]:
        raise NotSupported(
            f"{call.step.run.model.name} reads a text at its own length, and source and edited prompt differ by "
            f"{abs(source.k.shape[2] - call.k.shape[2])} tokens; give prompt_to_prompt prompts of equal length."
        )
