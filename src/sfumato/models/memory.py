"""Lower bounds of the memory that a picture takes, from configurations, before weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato import registry, valid
from sfumato.errors import OutOfMemory

__all__ = ["decoder_bytes", "free_bytes", "refuse_unaffordable", "refuse_unaffordable_at"]

_GIB = 2**30


def decoder_bytes(config: Mapping[str, Any], width: int, height: int, itemsize: int = 4) -> int:
    """Bytes that the autoencoder (diffusers' ``AutoencoderKL``, ``VQModel``) holds at the least while it decodes one
    picture: what goes into and what comes out of the convolution behind its last upsampling, in full size. 0 where the
    configuration does not tell."""
    channels = config.get("block_out_channels")
    if not isinstance(channels, list | tuple) or len(channels) < 2 or config.get("use_tiling"):
        return 0
    return 2 * int(channels[1]) * width * height * itemsize


def free_bytes(device: Any = "cpu") -> int | None:
    """Bytes that are free on a device; None where it is unknown."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if str(device) != "cpu":
        return None
    found = [_available(), *(_left(*each) for each in _GROUPS)]
    known = [each for each in found if each is not None]
    return min(known) if known else None


def refuse_unaffordable(
    config: Mapping[str, Any], size: tuple[int, int], rows: int, itemsize: int, device: Any, who: str
) -> None:
    """Raises OutOfMemory where ``rows`` pictures of ``size`` (width, height) surely do not fit into what is free."""
    need, left = rows * decoder_bytes(config, *size, itemsize), free_bytes(device)
    if left is None or need <= left:
        return
    side = 64
    while side < 4096 and rows * decoder_bytes(config, 2 * side, 2 * side, itemsize) <= left / 4:
        side *= 2
    fewer = "draw fewer at once, or " if rows > 1 else ""
    raise OutOfMemory(
        f"{rows} of {size[0]}x{size[1]} at once take at least {need / _GIB:.1f} GiB in the autoencoder of {who}, and "
        f"{left / _GIB:.1f} GiB are free; {fewer}make it smaller, such as size {side}x{side}."
    )


def refuse_unaffordable_at(folder: Path | str, size: tuple[int, int], rows: int, itemsize: int, device: Any) -> None:
    """The same for a model that is not loaded yet; nothing is said of what is no diffusers folder."""
    path = registry.part(Path(folder), "vae") / "config.json"
    try:
        config = valid.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading will say what is wrong
        return
    if isinstance(config, dict):
        refuse_unaffordable(config, size, rows, itemsize, device, Path(folder).name)


#: limit and use of the group that a container runs in
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _left(limit: str, used: str) -> int | None:
    try:
        return max(int(Path(limit).read_text(encoding="utf-8")) - int(Path(used).read_text(encoding="utf-8")), 0)
    except (OSError, ValueError):  # there is none, or it is "max"
        return None
