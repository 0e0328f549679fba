"""The order of an autoencoder's channels: first those that hold what neighbouring latents share, then details.

A codec of many channels spends most of them on details that nothing foretells. As strong as the others, they are most
of the noise and of the loss where a generator decides what lies where. A linear map of the channels, undone by the
decoder's first layer, loses nothing and gives each kind a strength of its own: the coarse are made out at noise levels
where the details have drowned, and drawing goes from the one to the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import BadInput

SHARED = 2 / 3  # of a coarse direction's variance, what squares of 2 x 2 latents have in common


def coarse_first(z: Tensor, coarse: float, fine: float) -> tuple[Tensor, int]:
    """The map (c c) of the channels of centred latents z (b c h w) that makes them uncorrelated, with the deviation
    ``coarse`` for the first ones and ``fine`` for the rest; and how many the first are.

    The directions are those of the largest share of variance between squares of 2 x 2 latents in all variance (Fisher's
    criterion): a generalised eigenproblem, in float64. Raises BadInput: channels that say nothing of their own.
    """
    height, width = (side // 2 * 2 for side in z.shape[-2:])
    z = z[..., :height, :width].double()
    whole, between = _covariance(z), _covariance(F.avg_pool2d(z, 2))
    spread = torch.linalg.eigvalsh(whole)
    if not spread[0] > 1e-9 * spread[-1]:
        raise BadInput("recipe key model.strengths: channels of the latents say nothing of their own; leave it out.")
    root = torch.linalg.cholesky(whole)
    whitened = torch.linalg.solve(root, torch.linalg.solve(root, between).T)
    shares, directions = torch.linalg.eigh((whitened + whitened.T) / 2)
    turn = torch.linalg.solve(root.T, directions).flip(1).T  # of deviation 1 each
    turn = torch.where(turn.sum(1, keepdim=True) < 0, -turn, turn)  # of a direction's two signs always the same
    first = int((shares > SHARED).sum())
    strength = torch.full((len(shares),), fine, dtype=turn.dtype)
    strength[:first] = coarse
    return strength[:, None] * turn, first


def _covariance(z: Tensor) -> Tensor:
    return torch.cov(z.transpose(0, 1).flatten(1), correction=0)
