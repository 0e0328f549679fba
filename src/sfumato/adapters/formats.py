"""What an adapter file holds, from its header alone: no tensor is read and nothing is unpickled."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import files, registry, valid
from sfumato.adapters.naming import DENOISER, LDM, FileKey, Index, Place, places, read_key
from sfumato.errors import BadInput, BadWeights, nearest
from sfumato.models.weights import TensorEntry, read_header, read_json, read_metadata
from sfumato.valid import brief, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.adapters.layers import Scaling

__all__ = ["Contents", "FileModule", "content_hash", "fit", "find_file", "picture_word", "read_contents"]

ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers: settings of peft, as JSON
_IN_FOLDERS = (
    "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "pytorch_custom_diffusion_weights.safetensors",
    "learned_embeds.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors",
)  # fmt: skip
A1111 = "string_to_param."  # of its .pt and those of the original code, once their tensors are taken out
MODIFIER = "modifier_token."  # of Custom Diffusion's delta.bin, likewise
BUNDLE = "bundle_emb."  # of words that A1111 packs into the file of a LoRA: bundle_emb.WORD.clip_l, or A1111's key
EMBED = "embed"  # of its delta in the names of LDM: a vector a row, without the words
WORDS = "sfumato.words"  # ... which stand here: word -> rows, as JSON
_ENCODER_KEYS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "clip_h": "text_encoder",
    "t5": "text_encoder_3",
    "t5xxl": "text_encoder_3",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
    "text_encoders_2": "text_encoder_3",
}
"""Keys of textual inversions for several encoders (ComfyUI, kohya; pivotal tuning) -> component."""
_PARAMETER = re.compile(r"(^|[._])(weight|bias)$|\.(scale_shift_table|freqs|gamma)$")
_NETWORK = re.compile(
    r"(unet|transformer|text_encoder(_\d)?)\.|(down|up|mid)_blocks?\.|(single_)?transformer_blocks\.|text_model\."
)
_ARCHITECTURES = (
    (re.compile(r"stable-diffusion-xl|sdxl", re.I), "SDXL"),
    (re.compile(r"stable-diffusion-v?3|sd3", re.I), "SD 3"),
    (re.compile(r"stable-diffusion-v?2|sd_v2|sd2", re.I), "SD 2"),
    (re.compile(r"stable-diffusion-v?1|sd_v1|sd1|sd_1", re.I), "SD 1"),
    (re.compile(r"flux", re.I), "Flux"),
)


def find_file(name: str) -> Path:
    """The file of an adapter: a path, or the name of one in the ``adapters`` folder of the cache, with or without its
    ``.safetensors``. A folder that peft or diffusers wrote stands for the weights in it. Raises BadInput."""
    try:
        given = Path(name).expanduser()
    except RuntimeError:
        raise BadInput(f"file is {name!r}, but this user has no home folder.") from None
    shelves = registry.in_cache("adapters")  # at most one
    tries = [given, given.with_name(f"{given.name}.safetensors")] if given.name else []
    tries += [shelf / each for shelf in shelves for each in (name, f"{name}.safetensors") if given.name == name]
    for path in tries:
        if os.path.isdir(path):
            for inside in _IN_FOLDERS:
                if os.path.isfile(path / inside):
                    return path / inside
        elif os.path.isfile(path):
            return path
    known = [path.stem for path in registry.in_cache("adapters/*.safetensors")]
    close = nearest(name, known)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise BadInput(f"no adapter file {brief(name, 300)}, here or in {registry.cache_folder() / 'adapters'}.{hint}")


def content_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, as model sites and webui show it."""
    facts = path.stat()
    return _hash(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)


@functools.lru_cache(maxsize=64)
def _hash(path: Path, *_changes: int) -> str:
    """Of a file that is read once for all the pictures that are made with it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileModule:
    """One adapted module of a file: key and shape of each tensor by its part (``down``, ``up``, ``alpha`` ...)."""

    network: str
    name: str
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        return f"{self.network or 'a network'}: {self.name}"

    @property
    def rank(self) -> int | None:
        for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if part in self.shapes:
                return self.shapes[part][0]
        return None

    @property
    def size(self) -> tuple[int, int] | None:
        """(rows, columns) of the weight it was made for, for plain low-rank factors."""
        if "down" not in self.shapes or "up" not in self.shapes:
            return None
        return self.shapes["up"][0], self.shapes["down"][1]


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    ``kind``: ``lora`` (any low-rank adapter), ``word`` (a textual inversion), ``weights`` (whole parameters of
    networks), ``checkpoint`` (a whole model in LDM's layout), or ``unknown``. ``modules`` of a low-rank adapter;
    ``words``: word -> component ("" where the file does not say) -> (key, k, d), words that share a key having
    consecutive rows of it; ``rest``: keys that are none of these.
    """

    path: Path
    kind: str
    dialects: tuple[str, ...]
    entries: dict[str, TensorEntry]
    modules: tuple[FileModule, ...] = ()
    words: dict[str, dict[str, tuple[str, int, int]]] = field(default_factory=dict)
    rest: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def vectors(self) -> dict[str, dict[str, Tensor]]:
        """The words' vectors: word -> component -> (k d). Raises BadWeights for numbers that are not finite."""
        import torch
        from safetensors import safe_open

        out: dict[str, dict[str, Tensor]] = {}
        if self.path.suffix.lower() == ".png":
            tensors = {"": torch.tensor(picture_word(self.path)[1])} if self.words else {}
        else:
            with safe_open(str(self.path), framework="pt") as file:
                keys = {key for held in self.words.values() for key, _, _ in held.values()}
                tensors = {key: file.get_tensor(key) for key in keys}
        taken: Counter[str] = Counter()
        for word, held in self.words.items():
            for place, (key, k, d) in held.items():
                if not tensors[key].isfinite().all():
                    what = f"{self.path}: {key} holds values that are no finite numbers"
                    raise BadWeights(f"{what}; the file is damaged.")
                rows = tensors[key].reshape(-1, d)[taken[key] : taken[key] + k]
                taken[key] += k
                out.setdefault(word, {})[place] = rows.clone()
        return out

    @property
    def algebras(self) -> list[str]:
        from sfumato.adapters.layers import algebra_of

        return list(dict.fromkeys(algebra_of(module.keys) for module in self.modules))

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Rank -> number of modules that have it."""
        return dict(sorted(Counter(m.rank for m in self.modules if m.rank is not None).items()))

    @property
    def base(self) -> str:
        """The architecture that it was made for, as its metadata or its shapes tell; empty where they do not."""
        architecture = " ".join(
            self.metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")
        )
        for pattern, name in _ARCHITECTURES:
            if pattern.search(architecture):
                return name
        names = [module.name for module in self.modules]
        if any(name.startswith(("double_blocks", "single_blocks", "single_transformer_blocks")) for name in names):
            return "Flux"
        if any("joint_blocks" in name or "add_k_proj" in name for name in names):
            return "SD 3"
        widths = {m.size[1] for m in self.modules if m.size and m.name.endswith("attn2_to_k")}
        widths |= {d for word in self.words.values() if len(word) == 1 for _, _, d in word.values()}
        several = any(len(word) > 1 for word in self.words.values())
        return {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}.get(min(widths, default=0), "SDXL" if several else "")

    def scaling(self, module: FileModule, component: str, path: str, tensors: Mapping[str, Tensor]) -> Scaling:
        """Of a module at its place: from its own alpha among the file's ``tensors``, else from peft's settings."""
        from sfumato.adapters.layers import Scaling

        if "alpha" in module.keys:
            return Scaling(float(tensors[module.keys["alpha"]].item()))
        settings = self.settings.get(component) or self.settings.get("") or {}
        alpha, rank = settings.get("lora_alpha", settings.get("alpha")), settings.get("r")
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.search(rf"(^|.*\.){pattern}$", path):
                alpha = value
        return Scaling(None if alpha is None else float(alpha), bool(settings.get("use_rslora")), rank)


def read_contents(path: Path) -> Contents:
    """What the file holds. Raises BadWeights for pickles (with the way out), other formats and damaged files, OSError
    where it cannot be read."""
    if path.suffix.lower() == ".png":
        name, rows = picture_word(path)
        return Contents(path, "word", ("A1111 picture",), {}, words={name: {"": ("", len(rows), len(rows[0]))}})
    try:
        entries = {entry.name: entry for entry in read_header(path)}
    except BadWeights as error:
        if "is a pickle" not in str(error):
            raise
        raise BadWeights(
            f"{path} is a pickle, which can run code when read; sfumato never opens one. Get the .safetensors of this "
            "adapter, or take its tensors out with the lines under 'Pickles' in docs/adapters.md: torch.load with "
            "weights_only=True, which runs no code, then safetensors.torch.save_file."
        ) from None
    metadata = read_metadata(path)
    read = {key: read_key(key) for key in entries}
    found: dict[tuple[str, str], dict[str, tuple[str, FileKey]]] = {}
    for key, each in read.items():
        if each is not None:
            found.setdefault((each.network, each.name), {})[each.part] = (key, each)
    modules = tuple(
        FileModule(
            network,
            name,
            {part: key for part, (key, _) in parts.items()},
            {part: entries[key].shape for part, (key, _) in parts.items()},
        )
        for (network, name), parts in found.items()
        if set(parts) != {"alpha"}
    )
    ldm = [key for key in entries if key.startswith(LDM)]
    added = {
        key: entry for key, entry in entries.items()
        if key.startswith(MODIFIER) or _bundled(key) or (ldm and key == EMBED)
    }  # fmt: skip
    rest = tuple(key for key, each in read.items() if each is None and key not in added)
    about: dict[str, Any] = {"path": path, "entries": entries, "metadata": metadata}
    if modules:
        dialects = dict.fromkeys(each.dialect for each in read.values() if each is not None)
        settings = _settings(path, metadata)
        words = _modifiers(added, metadata)
        return Contents(
            kind="lora", dialects=tuple(dialects), modules=modules, rest=rest, settings=settings, words=words, **about
        )
    if words := _words(path, entries, metadata):
        dialect = (
            "ComfyUI" if set(entries) <= set(_ENCODER_KEYS) else "kohya" if "emb_params" in entries
            else "A1111" if any(key.startswith(A1111) for key in entries) else "diffusers"
        )  # fmt: skip
        return Contents(kind="word", dialects=(dialect,), words=words, **about)
    if ldm and rest and all(key.startswith(LDM) and ".attn2." in key for key in rest):
        words = _modifiers(added, metadata)
        return Contents(kind="weights", dialects=("Custom Diffusion (LDM)",), rest=rest, words=words, **about)
    if any(key.startswith((LDM, "first_stage_model.")) for key in entries):
        return Contents(kind="checkpoint", dialects=("LDM",), rest=rest, **about)
    if all(_PARAMETER.search(key) for key in rest) and any(_NETWORK.match(key) for key in rest):
        custom = added or any("_custom_diffusion." in key for key in entries)
        dialect = "Custom Diffusion" if custom else "diffusers"
        return Contents(kind="weights", dialects=(dialect,), rest=rest, words=_modifiers(added, metadata), **about)
    return Contents(kind="unknown", dialects=(), rest=rest, **about)


def picture_word(path: Path) -> tuple[str, list[list[float]]]:
    """Name and vectors (k d) of the textual inversion that A1111 writes into a PNG as text. Raises BadWeights for one
    without, or with it hidden in the pixels; BadInput for no picture."""
    with files.opened_picture(path) as image:
        image.load()
        text = getattr(image, "text", {}).get("sd-ti-embedding")
    if text is None:
        raise BadWeights(
            f"{path} carries no textual inversion as text (sd-ti-embedding); those that A1111 hid in the pixels "
            "are not read. Get the .safetensors."
        )
    try:
        held = valid.loads(base64.b64decode(text))
        rows = [[float(x) for x in row] for row in held["string_to_param"]["*"]["TORCHTENSOR"]]
        if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
            raise ValueError("no rows of one width")
        return str(held.get("name") or path.stem), rows
    except (ValueError, KeyError, TypeError) as error:
        raise BadWeights(f"{path} carries a damaged textual inversion ({error}).") from None


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings of each network, by component ("": of all), from the metadata or the folder's config. Raises
    BadWeights where they are damaged: an adapter without its alpha is another one."""
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return {"": _checked(read_json(beside), beside)}
    where = f"{path}: its metadata {ADAPTER_METADATA}"
    try:
        flat = valid.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except ValueError as error:
        raise BadWeights(f"{where} cannot be read ({first_line(error)}).") from None
    out: dict[str, Any] = {}
    for key, value in _table(flat, where).items():
        component, _, name = key.partition(".")
        out.setdefault(component, {})[name] = value
    return {component: _checked(settings, where) for component, settings in out.items()}


def _table(found: Any, where: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise BadWeights(f"{where} holds {brief(found)}, where a table is expected; the file is damaged.")
    return found


def _checked(given: Any, where: object) -> dict[str, Any]:
    """Settings whose numbers are numbers."""
    settings = _table(given, where)
    patterns = _table(settings.get("alpha_pattern") or {}, where)
    for name, value in {**patterns, **{each: settings.get(each) for each in ("lora_alpha", "alpha", "r")}}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadWeights(f"{where} says {brief(value)} of {name}, which is no number; the file is damaged.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise BadWeights(f"{where} has {brief(pattern)}, which is no regular expression ({error}).") from None
    return settings


def _words(
    path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]
) -> dict[str, dict[str, tuple[str, int, int]]]:
    """The words of a textual inversion, in any of its dialects; none where the file is something else."""
    sizes: dict[str, tuple[int, int]] = {}
    for key, entry in entries.items():
        if key.startswith("string_to_token."):  # the placeholder's number in the original code's tokenizer
            continue
        if len(entry.shape) not in (1, 2) or not entry.dtype.startswith(("F", "BF")):
            return {}
        k, d = (1, *entry.shape) if len(entry.shape) == 1 else entry.shape
        sizes[key] = (k, d)
    given = metadata.get("sfumato.word") or metadata.get("name") or path.stem
    if sizes and set(sizes) <= set(_ENCODER_KEYS):
        return {given: {_ENCODER_KEYS[key]: (key, *size) for key, size in sizes.items()}}
    if len(sizes) == 1 and (key := next(iter(sizes))).startswith(A1111):
        placeholder = key.removeprefix(A1111)
        return {given if placeholder == "*" else placeholder: {"": (key, *sizes[key])}}
    if set(sizes) == {"emb_params"}:
        return {given: {"": ("emb_params", *sizes["emb_params"])}}
    if not sizes or len(sizes) > 64 or any(key.endswith((".weight", ".bias")) for key in sizes):
        return {}
    return {key: {"": (key, *size)} for key, size in sizes.items()}


def _modifiers(
    added: Mapping[str, TensorEntry], metadata: Mapping[str, str]
) -> dict[str, dict[str, tuple[str, int, int]]]:
    """The words that lie beside weights: in a file of Custom Diffusion's own code, or in A1111's bundles. Those of
    ``embed`` have a row each and are called <new1>, <new2> ..., as there, where the file does not say."""
    out: dict[str, dict[str, tuple[str, int, int]]] = {}
    for key, entry in added.items():
        k, d = (1, *entry.shape) if len(entry.shape) == 1 else entry.shape[:2]
        if bundled := _bundled(key):
            word, component = bundled
            out.setdefault(word, {})[component] = (key, k, d)
            continue
        try:
            rows = {str(word): int(n) for word, n in valid.loads(metadata.get(WORDS, "{}")).items()}
        except (ValueError, TypeError, AttributeError):
            rows = {}
        if key != EMBED:
            rows = {key.removeprefix(MODIFIER): k}
        elif sum(rows.values()) != k or min(rows.values(), default=0) < 1:
            rows = {f"<new{i + 1}>": 1 for i in range(k)}
        out |= {word: {"": (key, n, d)} for word, n in rows.items()}
    return out


def _bundled(key: str) -> tuple[str, str] | None:
    """Word and component ("" where it does not say) of a key of A1111's bundles; None for another key."""
    word, _, held = key.removeprefix(BUNDLE).partition(".")
    if not key.startswith(BUNDLE) or not (held.startswith(A1111) or held in _ENCODER_KEYS):
        return None
    return word, _ENCODER_KEYS.get(held, "")


# --- what fits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How a low-rank adapter lies in a model: each module of the file that was found, and those that were not."""

    found: tuple[tuple[FileModule, tuple[Place, ...]], ...]
    missing: tuple[FileModule, ...]
    misshapen: tuple[tuple[FileModule, Place, tuple[int, ...]], ...]
    names: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.found) + len(self.missing) + len(self.misshapen)


def fit(modules: tuple[FileModule, ...], index: Index) -> Fit:
    """Where in the model ``index`` describes the modules of a file lie."""
    known = places(index)
    networks = list(dict.fromkeys(network for network, _ in known))
    found, missing, misshapen = [], [], []
    for module in modules:
        tries = [module.network] if module.network else networks
        at = next((known[network, module.name] for network in tries if (network, module.name) in known), None)
        if at is None:
            missing.append(module)
            continue
        wrong = _misfit(module, at, index)
        if wrong is not None:
            misshapen.append((module, wrong, index[wrong.component][wrong.path]))
        else:
            found.append((module, tuple(at)))
    names = tuple(name for network, name in known if network == DENOISER)
    return Fit(tuple(found), tuple(missing), tuple(misshapen), names)


def _misfit(module: FileModule, at: list[Place], index: Index) -> Place | None:
    if module.size is None:
        return None
    rows = sum(stop - start for place in at for start, stop in place.rows)
    for place in at:
        shape = index[place.component][place.path]
        if module.size[1] != shape[1] or module.size[0] != (rows or shape[0]):
            return place
    return None
