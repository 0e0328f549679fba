"""Attention that would never reach the seam is refused instead of yielding nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sfumato.errors import NotSupported

#: diffusers' own backends that still end in scaled_dot_product_attention.
_SEEN_BACKENDS = {"native", "_native_math", "_native_efficient", "_native_flash", "_native_cudnn"}
#: hooks that replace a module's forward and always run it: that of peft's layers under layerwise casting
_ALWAYS_RUN = {"PeftInputAutocastDisableHook"}


def refuse_bypassing_attention(module: nn.Module, wanted: dict[str, nn.Module]) -> None:
    """Raise NotSupported where attention at a wanted site would never reach the seam, or may be skipped or computed in
    vain."""
    if wanted:
        _refuse_caches(module)
    for path, target in wanted.items():
        for above, part in _ancestors(module, path):
            _refuse_compiled(above, part)
        processor = getattr(target, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            raise NotSupported(f"context-parallel attention at {path} bypasses attention taps; run it on one device.")
        if processor is not None and hasattr(processor, "_attention_backend"):
            backend = processor._attention_backend or _default_backend()
            name = str(getattr(backend, "value", backend))
            if name not in _SEEN_BACKENDS:
                raise NotSupported(
                    f"attention backend {name!r} at {path} bypasses attention taps; "
                    f"call model.denoiser.set_attention_backend('native') first."
                )
        implementation = getattr(getattr(target, "config", None), "_attn_implementation", None)
        if implementation not in (None, "sdpa"):
            raise NotSupported(
                f"attention implementation {implementation!r} at {path} bypasses attention taps; "
                f"call set_attn_implementation('sdpa') of the model that holds it."
            )


def _refuse_caches(module: nn.Module) -> None:
    """A hook that may put an earlier output in the place of a part's own makes maps of what did not happen, wherever it
    sits: above an attention it is skipped, below it is computed and thrown away."""
    for path, part in module.named_modules():
        registry = getattr(part, "_diffusers_hook", None)
        for name, hook in getattr(registry, "hooks", {}).items():
            # hooks before and behind (offloading, casting) are harmless, replacements are not
            if hasattr(hook, "new_forward") and type(hook).__name__ not in _ALWAYS_RUN:
                raise NotSupported(
                    f"the diffusers hook {name!r} on {path or type(part).__name__} may skip attention, of which no map "
                    f"would tell; call model.denoiser.disable_cache(), or load the model without it."
                )


def refuse_compiled(module: nn.Module) -> None:
    """Raise NotSupported where a module or a part of it is compiled: what runs then is a copy made before."""
    for path, part in module.named_modules():
        _refuse_compiled(path, part)


def _refuse_compiled(path: str, part: nn.Module) -> None:
    whole = hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
    if whole or hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
        raise NotSupported(
            f"{path or type(part).__name__} is compiled by torch.compile, which hides attention from taps; "
            + ("use its _orig_mod." if hasattr(part, "_orig_mod") else "load the model again.")
        )


def _ancestors(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield "", module
    names = path.split(".") if path else []
    for i, name in enumerate(names):
        module = getattr(module, name)
        yield ".".join(names[: i + 1]), module


def _default_backend() -> Any:
    from diffusers.models import attention_dispatch

    return attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
