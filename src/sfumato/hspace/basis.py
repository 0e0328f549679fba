"""The local geometry of latents: which small changes of x_t change a denoiser's features most, and how that bends.

With h = f(x_t) the features of a layer and J = df/dx, the *local basis* at x_t is the singular value decomposition
J = U S V^T: v_k are directions among the latents, u_k those they cause among the features, s_k by how much (Park, Kwon,
Choi, Jo, Uh 2023, section 3.2). J is never formed: subspace iteration needs the products J v and J^T u only. The span
of u_1 ... u_n is the *tangent space*; tangent spaces are compared by their principal angles
(:mod:`sfumato.metrics.geometry`).

Latents are in unit scaling here, ``alpha x0 + sigma eps``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato import files
from sfumato.errors import BadInput, SfumatoError
from sfumato.hspace.tap import tapped
from sfumato.markup import described
from sfumato.metrics.geometry import principal_angles
from sfumato.models import Condition, Layer, Model

__all__ = [
    "Basis",
    "Directions",
    "Encoder",
    "Jacobian",
    "local_basis",
]

FORMAT = "sfumato-directions-1"
OVERSAMPLING = 4  # further vectors carried along, so that the last ones asked for converge as well


class Encoder:
    """f: latents (b c h w) of one sample, in unit scaling, to the features (b d) of a layer.

    ``condition`` holds one sample; its conditional branch is used. ``chunk``: the most rows in a denoiser call that is
    differentiated. Attention runs in the explicit kernel, which alone has a second derivative. ``cost``:
    forward-equivalents so far.
    """

    def __init__(self, model: Model, layer: Layer, t: Any, condition: Condition, chunk: int = 8):
        self.model, self.layer, self.t, self.condition, self.chunk = model, layer, t, condition, chunk
        names = [each.name for each in model.layers]
        self._share = (names.index(layer.name) + 1) / len(names)
        self.cost = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        with tapped(self.model, self.layer, found.append, stop=True), sdpa_kernel(SDPBackend.MATH):
            self.model.predict(x, self.t, self.condition.rows([0] * len(x)), "cond")
        self.add_cost(len(x))
        return found[0].flatten(1)

    def add_cost(self, rows: int) -> None:
        """Count a pass with ``rows`` rows, there or back."""
        self.cost += self._share * rows


class Jacobian:
    """J = df/dx of an encoder at ``x`` (1 c h w), as products with vectors; ``width``: how many features there are.

    J^T u is a backward pass. It is linear in u, and its derivative with respect to u, applied to v, is J v. So one
    forward pass, kept with its graph, serves all products, ``rows`` of them at a time.
    """

    def __init__(self, encoder: Encoder, x: Tensor, rows: int):
        self._encoder = encoder
        self._rows = max(1, min(rows, encoder.chunk))
        with torch.enable_grad():
            self._x = x.detach().expand(self._rows, *x.shape[1:]).contiguous().requires_grad_(True)
            self._h = encoder(self._x)
            self._u = torch.zeros_like(self._h, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self._h, self._x, self._u, create_graph=True)
        encoder.add_cost(self._rows)
        self.width = self._h.shape[1]

    def jvp(self, v: Tensor) -> Tensor:
        """J v_k for directions ``v`` (n d_x): (n d_h) in float32."""
        return self._products(self._pulled, self._u, v)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u_k for features ``u`` (n d_h): (n d_x) in float32."""
        return self._products(self._h, self._x, u)

    def _products(self, of: Tensor, to: Tensor, vectors: Tensor) -> Tensor:
        found = []
        for part in vectors.split(self._rows):
            whole = torch.zeros_like(of)
            whole[: len(part)] = part.view(-1, *of.shape[1:])
            (product,) = torch.autograd.grad(of, to, whole, retain_graph=True)
            self._encoder.add_cost(self._rows)
            found.append(product[: len(part)].flatten(1).float())
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Basis:
    """The local basis at one x_t: ``v`` (n c h w) and ``u`` (n d) orthonormal, ``s`` (n) singular values from the
    largest, with J v_k = s_k u_k. ``iterations`` it took; ``converged``: whether they met the tolerance."""

    v: Tensor
    u: Tensor
    s: Tensor
    iterations: int
    converged: bool
    cost: float

    __repr__ = described

    def __len__(self) -> int:
        return len(self.s)

    def carried(self, u: Tensor, exact: bool = False) -> Tensor:
        """A direction ``u`` (d) among the features, found at another x_t, as a unit direction (c h w) here: parallel
        transport (section 3.3). V U^T u as published; ``exact``: V S^-1 U^T u, whose image under J is u's part in the
        tangent space. Raises SfumatoError where u has no part in it."""
        parts = self.u @ u.to(self.u)
        if exact:
            parts = parts / self.s.clamp_min(torch.finfo(self.s.dtype).tiny)
        return _unit(torch.tensordot(parts, self.v, 1), "the direction has no part in the tangent space here")

    def projected(self, v: Tensor) -> Tensor:
        """A direction (c h w) among the latents, projected onto this basis and made a unit again."""
        flat = self.v.flatten(1)
        return _unit((flat.T @ (flat @ v.flatten().to(flat))).view_as(v), "the direction has no part in the basis here")


@torch.no_grad()
def local_basis(
    encoder: Encoder,
    x: Tensor,
    n: int = 50,
    *,
    iterations: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
    begin: Basis | None = None,
) -> Basis:
    """The ``n`` strongest directions at ``x`` (1 c h w) by subspace iteration (appendix D of the paper).

    Stops when the largest principal angle between the ``n`` leading directions and those of the iteration before is
    below ``tolerance`` radians; signs and equal singular values do not disturb that. Ends with an exact Rayleigh-Ritz
    step, so that U, S and V belong together. ``begin``: another basis to start from in place of random directions.
    The largest entry of each v_k is positive. Raises BadInput for more directions than there are latents or features.
    """
    jacobian = Jacobian(encoder, x, n + OVERSAMPLING)
    size, width = x[0].numel(), jacobian.width
    most = min(size, width)
    if not 1 <= n <= most:
        raise BadInput(f"n is {n}; here are {size} latents and {width} features, so it must be from 1 to {most}.")
    rank = min(most, n + OVERSAMPLING)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(size, rank, generator=generator).to(x.device)
    if begin is not None:
        v = torch.cat([begin.v.flatten(1).T.to(v), v], 1)[:, :rank]
    v = torch.linalg.qr(v).Q.T
    converged, done = False, 0
    while done < iterations and not converged:
        done += 1
        w = jacobian.vjp(jacobian.jvp(v))
        if not torch.isfinite(w).all():
            raise SfumatoError(f"the derivative of {encoder.layer.name} is not finite; use dtype float32.")
        _, _, turned = torch.linalg.svd(w, full_matrices=False)
        converged = bool(principal_angles(turned[:n], v).max() < tolerance)
        v = turned
    u, s, rotation = torch.linalg.svd(jacobian.jvp(v).T, full_matrices=False)
    v = (rotation @ v)[:n]
    sign = torch.where(v.gather(1, v.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    basis_u = u.T[:n] * sign
    return Basis((v * sign).view(n, *x.shape[1:]), basis_u, s[:n], done, converged, encoder.cost)


# -- directions for many samples ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions ``u`` (n d) among the features of ``layer`` that serve many samples; ``facts``: plain JSON values."""

    u: Tensor
    layer: str
    facts: dict[str, Any] = field(default_factory=dict)

    __repr__ = described

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, whole or not at all."""
        record = json.dumps({"layer": self.layer, "facts": self.facts}, ensure_ascii=False)
        return files.save_tensors(path, {"u": self.u}, {"format": FORMAT, "directions": record})

    @classmethod
    def load(cls, path: Path | str) -> Directions:
        """What :meth:`save` wrote. Raises BadInput for any other file."""
        try:
            with files.reading_tensors(path, FORMAT, "directions") as (file, metadata):
                record, u = json.loads(metadata["directions"]), file.get_tensor("u")
                if u.dim() != 2:
                    raise ValueError("shapes")
                return cls(u, str(record["layer"]), dict(record["facts"]))
        except OSError:
            raise BadInput(f"{path} cannot be read; give a file that latent_geometry wrote.") from None


def _unit(v: Tensor, otherwise: str) -> Tensor:
    length = v.norm()
    if not length > 0:
        raise SfumatoError(f"{otherwise}.")
    return v / length
