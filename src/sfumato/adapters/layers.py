"""What one adapted module adds to its output, held by the layers of peft.

The model's modules are left where they are: a peft layer stands beside its module (knows it as ``base_layer``, and is
known to nobody), and a forward hook adds what the layer would add. The numbers are peft's to the last bit, the module
tree stays as it is, and taking the hook away is all there is to detaching.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadWeights, NotSupported
from sfumato.models.offloading import execution_device
from sfumato.valid import first_line

__all__ = ["ALGEBRAS", "AdaptedModule", "Scaling", "algebra_of", "adapt_module"]

NAME = "default"  # of the only adapter in each peft layer

ALGEBRAS = {
    "LoRA": "W + a/r B A (Hu et al. 2021, arXiv 2106.09685)",
    "DoRA": "LoRA that learns the rows' lengths apart (Liu et al. 2024, arXiv 2402.09353)",
    "LoHa": "W + a/r (B1 A1) * (B2 A2), Hadamard (Hyeon-Woo et al. 2021, arXiv 2108.06098)",
    "LoKr": "W + a/r C (x) B A, Kronecker (Yeh et al. 2023, arXiv 2309.14859)",
}
_REFUSED = {
    "glora": "GLoRA",
    "oft": "OFT",
    "ia3": "(IA)^3",
    "diff": "full differences of weights",
    "diff_b": "full differences of biases",
    "up_bias": "LoRA with biases",
}


def algebra_of(parts: Mapping[str, Any]) -> str:
    """The algebra whose tensors these are: a key of :data:`ALGEBRAS`, or the name of one that is not supported."""
    for part, name in _REFUSED.items():
        if part in parts:
            return name
    if any(part.startswith("hada_") for part in parts):
        return "LoHa"
    if any(part.startswith("lokr_") for part in parts):
        return "LoKr"
    return "DoRA" if "magnitude" in parts else "LoRA"


class AdaptedModule:
    """A module and the peft ``layer`` beside it, whose parameters may be trained."""

    def __init__(self, module: nn.Module, layer: Any):
        self.module, self.layer = module, layer

    @property
    def rank(self) -> int:
        return int(self.layer.r[NAME])

    @property
    def alpha(self) -> float:
        held = self.layer.lora_alpha if self.is_lora else self.layer.alpha
        return float(held[NAME])

    @property
    def is_lora(self) -> bool:
        """LoRA or DoRA, which are applied factor by factor."""
        return hasattr(self.layer, "lora_A")

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own, by part (``down``, ``up``, ``magnitude``, ``hada_w1_a`` ...)."""
        if not self.is_lora:
            names = [name for name in self.layer.adapter_layer_names if NAME in getattr(self.layer, name)]
            return {name: getattr(self.layer, name)[NAME] for name in names}
        found = {"down": self.layer.lora_A[NAME].weight, "up": self.layer.lora_B[NAME].weight}
        if NAME in self.layer.lora_magnitude_vector:
            found["magnitude"] = self.layer.lora_magnitude_vector[NAME].weight
        return found

    def added(self, x: Tensor, output: Tensor, scale: float) -> Tensor:
        """The module's output with what the adapter adds, for its input ``x``: peft's forward pass without the
        module's own."""
        layer = self.layer
        if not self.is_lora:
            return output + self._through(x, layer.get_delta_weight(NAME) * scale)
        down, up, factor = layer.lora_A[NAME], layer.lora_B[NAME], self._factor(scale)
        if NAME in layer.lora_magnitude_vector:
            more = {"lora_A": down, "lora_B": up, "scaling": factor, "base_layer": self.module, "base_result": output}
            return output + layer.lora_magnitude_vector[NAME](x, **more).to(output.dtype)
        more = up(down(x.to(down.weight.dtype)))
        return output + (more if factor == 1 else more * factor).to(output.dtype)

    def delta(self, scale: float) -> Tensor:
        """What the adapter adds to the module's weight, of its shape."""
        layer, weight = self.layer, self.module.weight
        assert isinstance(weight, Tensor)
        if not self.is_lora:
            return layer.get_delta_weight(NAME) * scale
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        added = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * self._factor(scale)
        if NAME not in layer.lora_magnitude_vector:
            return added
        moved = weight + added
        length = moved.flatten(1).norm(dim=1)
        ratio = layer.lora_magnitude_vector[NAME].weight.flatten() / length
        return moved * ratio.reshape(-1, *[1] * (weight.ndim - 1)) - weight

    @property
    def delta_factor(self) -> float:
        """alpha / r, or alpha / sqrt(r): what the factors are multiplied with at scale 1."""
        return self._factor(1.0)

    def _factor(self, scale: float) -> float:
        # in the order of peft's set_scale, for equal bits
        return scale * self.layer.scaling[NAME] if self.layer.use_rslora[NAME] else scale * self.alpha / self.rank

    def _through(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            m = self.module
            return F.conv2d(x, weight, None, m.stride, m.padding, m.dilation, m.groups)  # type: ignore[arg-type]
        return F.linear(x, weight)


@dataclass(frozen=True)
class Scaling:
    """``alpha`` of a module (None: equal to the rank), whether the ``rank`` counts by its root, and the rank itself
    where the factors are whole matrices (LoKr) that do not tell it."""

    alpha: float | None = None
    rslora: bool = False
    rank: int | None = None


def adapt_module(
    module: nn.Module, parts: Mapping[str, Tensor], scaling: Scaling, where: str, dtype: torch.dtype | None = None
) -> AdaptedModule:
    """A file's tensors beside their module, on its device and in its precision, or in ``dtype``.

    Raises NotSupported for an algebra or a kind of module that cannot be adapted, quantized ones too, BadWeights for
    tensors that do not fit; ``where`` names the module in messages.
    """
    algebra = algebra_of(parts)
    if algebra not in ALGEBRAS:
        raise NotSupported(f"{where} is adapted by {algebra}, which is not supported; {', '.join(ALGEBRAS)} are.")
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise NotSupported(f"{where} is a {type(module).__name__}; only Linear and Conv2d modules can be adapted.")
    weight = module.weight
    if not weight.is_floating_point():  # the codes of a quantizer
        raise NotSupported(
            f"{where} is quantized ({type(module).__name__}, {weight.dtype}); adapters take whole weights: load the "
            "model in bf16, fp16 or fp32."
        )
    if weight.is_meta and algebra == "DoRA":
        raise NotSupported(f"{where} is offloaded, and DoRA needs its weights at hand; attach it without offloading.")
    cast = {part: tensor.to(device=device_of(module), dtype=dtype or weight.dtype) for part, tensor in parts.items()}
    try:
        if algebra in ("LoHa", "LoKr"):
            adapted = _lycoris(algebra, module, cast, scaling)
        else:
            adapted = _lora(module, cast, scaling)
        with torch.no_grad():
            _check_shapes(adapted, where)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise BadWeights(f"the {algebra} of {where} does not fit its weight {tuple(weight.shape)}: {reason}.") from None
    return adapted


def device_of(module: Any) -> torch.device:
    """Where a Linear or Conv2d computes; its weights may rest elsewhere meanwhile."""
    own = module.weight.device
    return own if own.type != "meta" else execution_device([module]) or own


def _check_shapes(adapted: AdaptedModule, where: str) -> None:
    weight = adapted.module.weight
    assert isinstance(weight, Tensor)
    if adapted.is_lora:
        down, up = (adapted.parameters()[part] for part in ("down", "up"))
        shape = (up.shape[0], *down.shape[1:])
        if tuple(shape) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            raise ValueError(f"it has down {tuple(down.shape)} and up {tuple(up.shape)}")
    else:
        delta = adapted.layer.get_delta_weight(NAME)
        if delta.shape != weight.shape:
            raise ValueError(f"it makes {tuple(delta.shape)}")


def with_rows(parts: Mapping[str, Tensor], rows: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The tensors of a fused module as one of its parts has them: its rows (from, to) of the way up, the way down as
    it is."""
    cut = {part: torch.cat([parts[part][a:b] for a, b in rows]) for part in ("up", "magnitude") if part in parts}
    return {**parts, **cut}


def with_tucker_core(mid: Tensor, down: Tensor) -> Tensor:
    """Tucker's core between 1x1 factors, and the way down before it: one convolution of the module's size."""
    return torch.einsum("rshw,si->rihw", mid, down.flatten(1))


@functools.cache
def _config(rank: int, alpha: Any, rslora: bool) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=False)


def _lora(module: Any, parts: Mapping[str, Tensor], scaling: Scaling) -> AdaptedModule:
    from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
    from peft.tuners.lora.layer import Conv2d, Linear

    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = with_tucker_core(parts["mid"], down)
    convolves = isinstance(module, nn.Conv2d)
    if convolves and down.ndim == 2:
        down, up = down[..., None, None], up[..., None, None]
    elif not convolves and down.ndim == 4:  # a 1x1 convolution in one library, a linear map in the other
        down, up = down.flatten(1), up.flatten(1)
    rank = int(down.shape[0])
    alpha: Any = rank if scaling.alpha is None else scaling.alpha
    config = _config(rank, alpha, scaling.rslora)
    with torch.device("meta"):  # nothing is drawn, nothing allocated
        layer: Any = (Conv2d if convolves else Linear)(module, NAME, config, r=rank, lora_alpha=alpha)
    layer.lora_A[NAME].weight = nn.Parameter(down.contiguous(), requires_grad=False)
    layer.lora_B[NAME].weight = nn.Parameter(up.contiguous(), requires_grad=False)
    if "magnitude" in parts:
        magnitude = parts["magnitude"]
        if magnitude.numel() != up.shape[0]:
            raise ValueError(f"its dora_scale {tuple(magnitude.shape)} is not one number for each row")
        dora = DoraConv2dLayer(fan_in_fan_out=False) if convolves else DoraLinearLayer(fan_in_fan_out=False)
        flat = magnitude.flatten()
        dora.weight = nn.Parameter(flat.reshape(1, -1, 1, 1) if convolves else flat, requires_grad=False)
        layer.lora_magnitude_vector[NAME] = dora
    return AdaptedModule(module, layer)


def _lycoris(algebra: str, module: nn.Module, parts: Mapping[str, Tensor], scaling: Scaling) -> AdaptedModule:
    from peft import LoHaConfig, LoKrConfig
    from peft.tuners.loha import layer as loha
    from peft.tuners.lokr import layer as lokr

    made, config = (loha, LoHaConfig) if algebra == "LoHa" else (lokr, LoKrConfig)
    kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
    factors = [parts[name] for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in parts]
    rank = int(factors[0].shape[0]) if factors else scaling.rank
    # Kronecker factors that are both whole are scaled by peft, but not by LyCORIS, whose files do not tell a rank
    alpha: Any = 1 if rank is None else rank if scaling.alpha is None else scaling.alpha
    settings = {"r": rank or 1, "alpha": alpha}
    with torch.device("meta"):
        layer: Any = getattr(made, kind)(module, NAME, config=config(**settings), **settings)
    for name in layer.adapter_layer_names:
        slots = getattr(layer, name)
        if NAME in slots:
            del slots[NAME]
        if name in parts:
            slots[NAME] = nn.Parameter(parts[name].contiguous(), requires_grad=False)
    return AdaptedModule(module, layer)
