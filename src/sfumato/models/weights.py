"""Weight files: what may be read, whether it is whole, and its hash. Pickles are recognised and never opened."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfumato import valid
from sfumato.errors import BadInput, BadWeights
from sfumato.models.offloading import fetched
from sfumato.valid import first_line

#: a header longer than this is refused by every safetensors reader
_MAX_HEADER = 100_000_000
_PICKLE_SUFFIXES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
_STEMS = ("diffusion_pytorch_model", "model")
_NAME = f"({'|'.join(_STEMS)})"
_SINGLE = re.compile(rf"{_NAME}(\.(?P<variant>[\w-]+))?\.safetensors")
_INDEX = re.compile(rf"{_NAME}(\.(?P<a>[\w-]+))?\.safetensors(\.(?P<b>[\w-]+))?\.index(\.(?P<c>[\w-]+))?\.json")
_SHARD = re.compile(rf"{_NAME}(\.(?P<before>\w+))?-(?P<i>\d+)-of-(?P<of>\d+)(\.(?P<after>\w+))?\.safetensors")
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: ``start`` and ``stop`` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, after checking that the file is one and is whole.

    Raises `BadWeights` for pickles (whatever their name says), other formats, and corrupt or truncated files.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        _refuse_other_formats(path, start)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise BadWeights(
                f"{path} is no safetensors file, or is cut off in its header; get it again from its source."
            )
        file.seek(8)
        header = file.read(length)
    try:
        table = valid.loads(header)
        entries = [
            TensorEntry(
                name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                *(8 + length + int(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in table.items()
            if name != "__metadata__"
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadWeights(f"{path} has a corrupt safetensors header; get the file again from its source.") from error
    end = max((entry.stop for entry in entries), default=8 + length)
    if end > size:
        raise BadWeights(f"{path} is cut off: {size} of {end} bytes are there; get the file again from its source.")
    _library_check(path)
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_header` has found whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = valid.loads(file.read(length)).get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _library_check(path: Path) -> None:
    """Overlaps, holes, trailing bytes and sizes that do not match shapes are found by the reference reader."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        remark = first_line(error)
        raise BadWeights(f"{path} is a corrupt safetensors file ({remark}); get it again from its source.") from error


def _refuse_other_formats(path: Path, start: bytes) -> None:
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if pickled or start[:4] == b"PK\x03\x04" or start[257:262] == b"ustar":
        raise BadWeights(
            f"{path} is a pickle or an archive of pickles, which can run code when read; sfumato never opens one."
            " Use the model's .safetensors files, or convert it on a machine you can lose."
        )
    if start[:4] == b"GGUF":
        raise BadWeights(f"{path} is a GGUF file; only safetensors are read.")
    if start.startswith(b"version https://git-lfs"):
        raise BadWeights(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository.")


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files of one component's folder: of several variants those of none, or of the first by name.

    Shards are found by their index, wherever in its name the variant stands, or by their numbers where there is none.
    Raises `BadWeights` where there are only pickles, or nothing, or some shards are missing.
    """
    found: dict[str | None, list[Path]] = {}
    numbered: dict[tuple[str | None, int], dict[int, Path]] = {}
    broken: list[BadWeights] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _INDEX.fullmatch(path.name):
            try:
                found[match["a"] or match["b"] or match["c"]] = _shards(path)
            except BadWeights as error:  # all indices, but one variant's shards, are a common download
                broken.append(error)
        elif match := _SHARD.fullmatch(path.name):
            key = match["before"] or match["after"], int(match["of"])
            numbered.setdefault(key, {})[int(match["i"])] = path
        elif match := _SINGLE.fullmatch(path.name):
            found.setdefault(match["variant"], [path])
    for (variant, n), shards in numbered.items():
        if variant not in found and len(shards) == n:
            found[variant] = [shards[i] for i in sorted(shards)]
    if found:
        return found[min(found, key=lambda name: name or "")]
    if broken:
        raise broken[0]
    if numbered:
        (_, n), shards = next(iter(numbered.items()))
        raise BadWeights(f"{folder} holds {len(shards)} of {n} shards of its weights; get the missing ones.")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in _PICKLE_SUFFIXES)
    if pickles:
        raise BadWeights(
            f"{folder} holds its weights only as pickles ({', '.join(pickles[:3])}), which sfumato never opens;"
            " get the .safetensors files of this model."
        )
    if coded := sorted(path.name for path in folder.glob("*.gguf")):
        names = ", ".join(coded[:3])
        raise BadWeights(
            f"{folder} holds its weights only as GGUF ({names}); get the .safetensors files of this model."
        )
    raise BadWeights(f"{folder} holds no weights: {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors is missing.")


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    paths = [index.parent / name for name in names if Path(name).name == name]
    missing = [name for name in names if not (index.parent / Path(name).name).is_file()]
    if missing or not paths or len(paths) != len(names):
        raise BadWeights(
            f"{index} names shards that are not there: {', '.join(map(str, missing[:3])) or 'none listed'}."
        )
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `BadInput` where it is missing or not one."""
    try:
        data = valid.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({first_line(error)}).") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path} must hold a JSON object.")
    return data


def check_numbers(component: str, module: nn.Module) -> None:
    """Raise `BadWeights` if a tensor was never filled or holds NaN or infinite values."""
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise BadWeights(f"{component}: tensor {name} is missing from the weights.")
        # a sum in float32 is finite if and only if all terms are, bar an overflow that the second look settles
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            if not tensor.isfinite().all():
                raise BadWeights(f"{component}: tensor {name} holds NaN or infinite values; the file is damaged.")


def hash_files(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over the tensors of (component, file) pairs, independent of order, metadata and sharding."""
    found = [(component, entry, path) for component, path in files for entry in read_header(path)]
    digest = hashlib.sha256()
    for component, entry, path in sorted(found, key=lambda item: (item[0], item[1].name)):
        _head(digest, component, entry.name, entry.dtype, entry.shape)
        with path.open("rb") as file:
            file.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                block = file.read(min(left, 1 << 20))
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()


def hash_modules(modules: Mapping[str, nn.Module]) -> str:
    """The same over tensors in memory, or where offloaded ones rest."""
    digest = hashlib.sha256()
    for component in sorted(modules):
        state = modules[component].state_dict()
        for name in sorted(state):
            with fetched(modules[component], name) if state[name].is_meta else nullcontext(state[name]) as own:
                for path, tensor in _plain(name, own):
                    shape = tuple(tensor.shape)
                    _head(digest, component, path, _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), shape)
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or those that it is made of, as codes and scales of a quantized one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _head(digest: Any, component: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    digest.update(json.dumps([component, name, dtype, list(shape)]).encode())
