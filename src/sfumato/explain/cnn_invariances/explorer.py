"""What a layer cannot tell apart: a conditional flow from the layer's output to the codes of an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.layers import features, stages
from sfumato.models.modes import evaluation
from sfumato.models.readers import PictureNet
from sfumato.translation.networks import HEADS, Network
from sfumato.translation.translator import FitRecord, FlowParams, Translator, fit_translator

__all__ = [
    "LOGITS",
    "PROBABILITIES",
    "InvarianceExplorer",
    "decided",
    "default_layers",
    "fgsm",
    "logits_of",
    "reader_input",
]

LOGITS = "logits"
PROBABILITIES = "probabilities"  # what a classifier decides, and little else: how sure it is hides in the logits


def reader_input(net: nn.Module, pixels: Tensor) -> Tensor:
    """Pictures (b 3 h w) in [-1, 1] in the size that a net reads: its preprocessing belongs to what is explained."""
    size = net.preprocessing.size if isinstance(net, PictureNet) else None
    if size is None or pixels.shape[-2:] == tuple(size):
        return pixels
    return F.interpolate(pixels, tuple(size), mode="bilinear", antialias=True, align_corners=False)


def logits_of(net: nn.Module, pixels: Tensor) -> Tensor:
    """Logits (b k) of pictures (b 3 h w) in [-1, 1]; gradients flow. Raises NotSupported for nets without."""
    with evaluation(net):
        out = net(reader_input(net, pixels))
    found = getattr(out, "logits", out)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise NotSupported(f"{type(net).__name__} gives no logits (b, k); name a layer of it instead.")
    return found


def several_labels(net: nn.Module) -> bool:
    """Whether a classifier names several things at once, each label by itself."""
    return getattr(getattr(net, "config", None), "problem_type", None) == "multi_label_classification"


@torch.no_grad()
def decided(net: nn.Module, pixels: Tensor) -> Tensor:
    """What a classifier decides for pictures (b 3 h w), as numbers to be compared (b k): the best label (k = 1), or of
    every label whether it is there. Raises NotSupported."""
    found = torch.cat([logits_of(net, chunk) for chunk in pixels.split(64)])
    return (found > 0).long() if several_labels(net) else found.argmax(1, keepdim=True)


def default_layers(net: nn.Module) -> list[str]:
    """The stages of a net, and its logits where it is a classifier."""
    classifies = getattr(getattr(net, "config", None), "num_labels", 0) and any(hasattr(net, name) for name in HEADS)
    found = [name for name in stages(net) if not classifies or name not in HEADS]
    return [*found, *([LOGITS] if classifies else [])]


def fgsm(net: nn.Module, pixels: Tensor, eps: float = 0.04) -> Tensor:
    """Pictures moved by ``eps`` along the sign of the gradient that makes the net's own answers less likely
    (Goodfellow et al. 2015, equation 1); 0.04 of [-1, 1] is 0.02 of [0, 1], as in the authors' demo."""
    if not eps >= 0:
        raise BadInput(f"eps must be 0 or more, got {eps}.")
    x = pixels.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = logits_of(net, x)
        loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
        (slope,) = torch.autograd.grad(loss, x)
    return (pixels + eps * slope.sign()).clamp(-1, 1)


class InvarianceExplorer:
    """``net``'s ``layer`` z = Phi(x), and the flow that gives the code zbar = t^-1(v | z) for v normal.

    >>> explorer = InvarianceExplorer(net, "logits", network_of(load_autoencoder("toy-ae")))
    >>> explorer.fit(pixels)
    >>> pictures = explorer.pictures(explorer.samples(x, n=8))   # the layer cannot tell these from x
    """

    def __init__(self, net: nn.Module, layer: str, autoencoder: Network, translator: Translator | None = None):
        if autoencoder.decode is None:
            raise NotSupported(f"{autoencoder.name} decodes nothing; give an autoencoder of vectors (toy-ae).")
        self.net, self.layer, self.autoencoder = net, layer, autoencoder
        self.translator: Any = translator

    def condition(self, pixels: Tensor) -> Tensor:
        """What the layer says of pictures: vectors (b d) or maps (b c h w); log-probabilities of logits, which do not
        saturate, and probabilities, which do. Tokens (b n d) become maps of the patches with the class token beside
        each."""
        found = self._read(pixels)
        wrong = int((~torch.isfinite(found).flatten(1)).any(1).sum())
        if wrong:
            raise BadInput(f"layer {self.layer!r} gives values that are not finite for {wrong} pictures.")
        again = self._read(pixels[:2])
        if not torch.allclose(again, found[: len(again)], rtol=1e-2, atol=1e-3 * float(found.abs().mean() + 1e-12)):
            raise BadInput(f"layer {self.layer!r} gives other values for the same pictures; it must not be random.")
        return found

    def _read(self, pixels: Tensor) -> Tensor:
        if self.layer not in (LOGITS, PROBABILITIES):
            try:
                found = features(self.net, reader_input(self.net, pixels), [self.layer], None)
            except UnknownName as error:
                answers = [LOGITS, PROBABILITIES] if LOGITS in default_layers(self.net) else []
                raise UnknownName(error.kind, error.given, [*error.candidates, *answers]) from None
            return as_condition(found[self.layer])
        with torch.no_grad():
            found = torch.cat([logits_of(self.net, chunk) for chunk in pixels.split(64)]).float().cpu()
        if self.layer == PROBABILITIES:
            return found.sigmoid() if several_labels(self.net) else found.softmax(1)
        return found if several_labels(self.net) else found.log_softmax(1)

    def fit(
        self,
        pixels: Tensor,
        params: FlowParams,
        on_progress: Callable[..., None] | None = None,
        codes: tuple[Tensor, Tensor | None] | None = None,
    ) -> FitRecord:
        """Fits the flow on pictures (m 3 h w): condition from the picture itself, code from the posterior. ``codes``:
        codes and spreads that are known already, in place of the pictures'."""
        z, spread = self.autoencoder.vectors(pixels) if codes is None else codes
        about = {"layer": self.layer, "autoencoder": self.autoencoder.name}
        found = fit_translator(
            z, self.condition(pixels), params=params, spread=spread, about=about, on_progress=on_progress,
            name="cnn_invariances",
        )  # fmt: skip
        self.translator = found.translator
        return found

    def _fitted(self) -> Translator:
        if self.translator is None:
            raise BadInput("this explorer has no flow yet; call fit(pictures), or give a translator.")
        return self.translator

    def samples(self, pixels: Tensor, n: int = 8, seed: int = 0, temperature: float = 1.0) -> Tensor:
        """Codes (b n d) of pictures that the layer should not tell from these."""
        return self._fitted().sample(self.condition(pixels), n, seed, temperature)

    def pictures(self, z: Tensor) -> Tensor:
        """Codes (... d) decoded (... 3 h w)."""
        return self.autoencoder.pictures(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def residual(self, pixels: Tensor) -> Tensor:
        """v (b m): what pictures are beyond the layer."""
        return self._fitted().residual(self.autoencoder.vectors(pixels)[0], self.condition(pixels))

    def exchange(self, representation: Tensor, invariance: Tensor) -> Tensor:
        """Codes (b d) with the layer's output of the one pictures and what it ignores of the others."""
        return self._fitted().vectors(self.residual(invariance), self.condition(representation))

    def attack_view(self, pixels: Tensor, attacked: Tensor) -> Tensor:
        """Codes (b d) of the pictures as the layer sees them after an attack: its output then, their own residual."""
        return self._fitted().vectors(self.residual(pixels), self.condition(attacked))

    def fidelity(self, pixels: Tensor, n: int = 4, seed: int = 0) -> dict[str, float]:
        """How far to trust what is seen: cosine of the layer's outputs (centred on their mean) for samples and their
        pictures, the same for reconstructions and for other pictures, and how often the decision stays.

        ``decision`` and ``decision_reconstruction`` are there for nets with logits only.
        """
        seen = self.condition(pixels)
        own = seen.flatten(1)
        centre = own.mean(0)
        drawn = self.pictures(self._fitted().sample(seen, n, seed)).flatten(0, 1)
        again = self.condition(drawn).flatten(1)
        rebuilt = self.autoencoder.pictures(self.autoencoder.vectors(pixels)[0])

        def cosine(a: Tensor, b: Tensor) -> float:
            return float(F.cosine_similarity(a - centre, b - centre, dim=1).mean())

        found = {
            "cosine": cosine(again, own.repeat_interleave(n, 0)),
            "cosine_reconstruction": cosine(self.condition(rebuilt).flatten(1), own),
            "cosine_others": cosine(own.roll(1, 0), own),
        }
        try:
            decisions = decided(self.net, pixels)
        except NotSupported:
            return found
        same = (decided(self.net, drawn) == decisions.repeat_interleave(n, 0)).all(1)
        rebuilt_same = (decided(self.net, rebuilt) == decisions).all(1)
        return found | {
            "decision": float(same.float().mean()),
            "decision_reconstruction": float(rebuilt_same.float().mean()),
        }


def as_condition(found: Tensor) -> Tensor:
    """A layer's output as vectors or maps; see :meth:`InvarianceExplorer.condition`. Raises NotSupported."""
    if found.ndim in (2, 4):
        return found
    if found.ndim == 3:
        n = found.shape[1]
        side = math.isqrt(n)
        if side * side == n:
            return found.transpose(1, 2).unflatten(2, (side, side))
        side = math.isqrt(n - 1)
        if side * side == n - 1:
            patches = found[:, 1:].transpose(1, 2).unflatten(2, (side, side))
            return torch.cat([patches, found[:, 0, :, None, None].expand(-1, -1, side, side)], 1)
        return found.flatten(1)
    raise NotSupported(f"a layer that puts out {tuple(found.shape)} is neither a vector, maps nor tokens.")
