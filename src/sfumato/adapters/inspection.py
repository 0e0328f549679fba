"""What adapter files hold and which models they fit, as plain values; models are read by their headers too."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from sfumato import registry, valid
from sfumato.adapters.formats import Contents, content_hash, find_file, fit, read_contents
from sfumato.adapters.naming import Index, parameters_of_ldm
from sfumato.errors import BadInput, SfumatoError
from sfumato.models.weights import find_weights, read_header, read_json

__all__ = ["described", "fits", "index_of_folder"]

_NETWORKS = re.compile(r"unet|transformer|text_encoder(_\d)?")
_TABLE = re.compile(r"(^|\.)(token_embedding|shared|embed_tokens)$")
#: metadata of trainers and model sites that a person wants to see
_METADATA = (
    "sfumato.word", "modelspec.title", "modelspec.author", "modelspec.date", "modelspec.license",
    "modelspec.trigger_phrase", "modelspec.usage_hint", "ss_output_name", "ss_sd_model_name", "ss_network_module",
    "ss_num_train_images", "ss_steps", "ss_learning_rate",
)  # fmt: skip


def described(file: str) -> dict[str, Any]:
    """``path``, ``hash``, ``kind``, ``dialects``, ``base`` and, by kind, ``algebras``, ``ranks``, ``alphas`` and
    ``modules`` (by network), ``words``, or ``parameters``; and chosen ``metadata``. Raises what
    :func:`~sfumato.adapters.formats.read_contents` raises."""
    path = find_file(file)
    held = read_contents(path)
    out: dict[str, Any] = {
        "path": str(path), "hash": content_hash(path), "kind": held.kind, "dialects": list(held.dialects),
        "base": held.base,
    }  # fmt: skip
    if held.kind == "lora":
        networks = dict(sorted(Counter(module.network or "not said" for module in held.modules).items()))
        ranks = {str(rank): count for rank, count in held.ranks.items()}
        out |= {"algebras": held.algebras, "ranks": ranks, "alphas": _alphas(held), "modules": networks}
    elif held.kind == "word":
        out["words"] = {
            word: {place or "one text encoder": [k, d] for place, (_, k, d) in each.items()}
            for word, each in held.words.items()
        }
    else:
        out["parameters"] = len(held.entries)
    if held.kind == "lora" and held.rest:
        out["other keys"] = list(held.rest[:6])
    metadata = {key: held.metadata[key] for key in _METADATA if held.metadata.get(key)}
    if tags := _tags(held.metadata.get("ss_tag_frequency", "")):
        metadata["captions said most"] = ", ".join(tags)
    return {**out, "metadata": metadata}


def _tags(text: str, most: int = 8) -> list[str]:
    """The words that kohya's trainer counted most often in the captions of all its folders."""
    counts: Counter[str] = Counter()
    try:
        for folder in valid.loads(text or "{}").values():
            counts.update({str(tag).strip(): int(n) for tag, n in folder.items()})
    except (ValueError, TypeError, AttributeError):
        return []
    return [tag for tag, _ in counts.most_common(most)]


def _alphas(held: Contents) -> list[float]:
    """The values of alpha in the file; none where it has none."""
    from safetensors import safe_open

    keys = [module.keys["alpha"] for module in held.modules if "alpha" in module.keys]
    with safe_open(str(held.path), framework="pt") as file:
        return sorted({float(file.get_tensor(key).item()) for key in keys})


def index_of_folder(folder: Path) -> Index:
    """The networks of a diffusers folder by the headers of their weights. Raises BadInput for another folder,
    BadWeights."""
    if not (folder / "model_index.json").is_file():
        raise BadInput(f"{folder} is not a diffusers model: it has no model_index.json.")
    index: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in read_json(folder / "model_index.json").items():
        if not _NETWORKS.fullmatch(name) or not isinstance(entry, list) or entry[0] is None:
            continue
        index[name] = {
            tensor.name.removesuffix(".weight").removeprefix("text_model."): tensor.shape
            for file in find_weights(registry.part(folder, name))
            for tensor in read_header(file)
            if tensor.name.endswith(".weight") and len(tensor.shape) > 1
        }
    return index


def fits(file: str, index: Index) -> str:
    """In a few words, whether a file fits the model that ``index`` describes: begins with "yes", "in part" or "no"."""
    try:
        held = read_contents(find_file(file))
    except SfumatoError as error:
        return f"no: {error}"
    if held.kind == "lora":
        found = fit(held.modules, index)
        if found.misshapen:
            module, place, shape = found.misshapen[0]
            return f"no: {place} is {'x'.join(map(str, shape[:2]))}, not {'x'.join(map(str, module.size or ()))}"
        return _share(len(found.found), found.total, "modules")
    if held.kind == "word":
        widths = {
            shape[1] for network, shapes in index.items() if network.startswith("text_encoder")
            for path, shape in shapes.items() if _TABLE.search(path)
        }  # fmt: skip
        wanted = {d for each in held.words.values() for _, _, d in each.values()}
        return _share(len(wanted & widths), len(wanted), "widths") + f"; its text encoders read {_listed(widths)}"
    if held.kind == "weights":
        known = {f"{network}.{path}" for network, shapes in index.items() for path in shapes}
        denoiser = next((network for network in index if not network.startswith("text_encoder")), "")
        renamed = parameters_of_ldm(held.rest, index.get(denoiser, {}))
        matrices = [key for key in held.rest if len(held.entries[key].shape) > 1]
        names = [renamed.get(key, key).removesuffix(".weight") for key in matrices]
        names = [re.sub(r"\.processor\.(.*)_custom_diffusion", r".\1", name) for name in names]
        return _share(sum(n in known or f"{denoiser}.{n}" in known for n in names), len(names), "matrices")
    return f"no: it is {'a whole model: give it as --model' if held.kind == 'checkpoint' else 'no adapter'}"


def _listed(widths: set[int]) -> str:
    return ", ".join(map(str, sorted(widths))) or "nothing"


def _share(found: int, total: int, what: str) -> str:
    if not found:
        return f"no: none of its {total} {what}"
    return f"yes: all {total} {what}" if found == total else f"in part: {found} of {total} {what}"


def headline(each: dict[str, Any]) -> str:
    """One line about what :func:`described` says."""
    parts = [f"{each['kind']} ({', '.join(each['dialects'])})" if each["dialects"] else each["kind"]]
    if each["kind"] == "lora":
        parts[0] = f"{'/'.join(each['algebras'])} ({', '.join(each['dialects'])})"
        parts.append(f"rank {'/'.join(each['ranks']) or 'whole'}")
        parts += [f"alpha {'/'.join(f'{alpha:g}' for alpha in each['alphas'])}"] if each["alphas"] else []
        parts.append(", ".join(f"{count} modules of {network}" for network, count in each["modules"].items()))
    elif each["kind"] == "word":
        for word, places in each["words"].items():
            parts.append(f"{word} = " + ", ".join(f"{k} x {d} for {place}" for place, (k, d) in places.items()))
    else:
        parts.append(f"{each['parameters']} tensors")
    return "; ".join(parts + ([f"made for {each['base']}"] if each["base"] else []))
