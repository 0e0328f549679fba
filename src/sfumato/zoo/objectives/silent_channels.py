"""Channels of an autoencoder's latents that say nothing of a picture, and the same autoencoder without them.

The KL term makes an autoencoder give up the channels it can do without: their posterior is the prior whatever is seen,
and the decoder does not listen. Of their means a trace is left. Standardised, it would be as strong as any channel: for
a generator so many more channels of noise to foretell.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

LEAST = 0.005  # variance of a mean over pictures and places, as a share of the posterior's: 0.0025 nats


def telling(mean: Tensor, logvar: Tensor) -> Tensor:
    """Which channels (c) of posteriors (b c h w) tell pictures apart; all of them if none does."""
    found = mean.var((0, 2, 3)) > LEAST * logvar.exp().mean((0, 2, 3))
    return found if found.any() else torch.ones_like(found)


@torch.no_grad()
def without_silent(vae: AutoencoderKL, keep: Tensor, mean: Tensor) -> AutoencoderKL:
    """An autoencoder with the channels ``keep`` (c) only, the others held at their ``mean`` (c): reconstructions are
    the same but for what the others say. Its 1x1 convolution of the encoder is the identity.

    What the others add to the decoder is a constant. The part of it that no kept channel can carry goes into the
    decoder's first bias, which is exact but for the outermost latents, next to the padding.
    """
    narrow = AutoencoderKL.from_config({**vae.config, "latent_channels": int(keep.sum())}).to(vae.device).eval()
    state = vae.state_dict()
    inner, outer = state["quant_conv.weight"][:, :, 0, 0], state["post_quant_conv.weight"][:, :, 0, 0]
    both = torch.cat([keep, keep])
    first, last = "encoder.conv_out", "decoder.conv_in"
    made = {
        f"{first}.weight": torch.einsum("ij,jkhw->ikhw", inner, state[f"{first}.weight"])[both],
        f"{first}.bias": (inner @ state[f"{first}.bias"] + state["quant_conv.bias"])[both],
        "quant_conv.weight": torch.eye(int(both.sum())).to(inner)[..., None, None],
        "quant_conv.bias": torch.zeros_like(state["quant_conv.bias"][both]),
    }
    constant = outer[:, ~keep] @ mean[~keep] + state["post_quant_conv.bias"]
    read = outer[:, keep]
    carried = torch.linalg.lstsq(read, constant[:, None]).solution[:, 0]
    made |= {
        "post_quant_conv.weight": torch.eye(read.shape[1]).to(read)[..., None, None],
        "post_quant_conv.bias": carried,
        f"{last}.weight": torch.einsum("ochw,ck->okhw", state[f"{last}.weight"], read),
        f"{last}.bias": state[f"{last}.bias"]
        + torch.einsum("ochw,c->o", state[f"{last}.weight"], constant - read @ carried),
    }
    narrow.load_state_dict({**state, **made})
    return narrow
