"""Adapter files from one dialect into another, value for value.

==============  ===================================================  =============================================
dialect         LoRA                                                 textual inversion
==============  ===================================================  =============================================
diffusers       ``unet.<path>.lora_A.weight``: load_lora_weights     one key, the word: load_textual_inversion
kohya           ``lora_unet_<path>.lora_down.weight`` with alpha:    ``emb_params``, the file's name is the word:
                webui, ComfyUI, Civitai                              webui, ComfyUI
comfyui         as kohya                                             ``clip_l``, ``clip_g``, ``t5xxl``
old-diffusers   ``...lora.down.weight``: diffusers before 0.26       -
attn-procs      ``...attn1.processor.to_q_lora.down.weight``:        -
                load_attn_procs of 2023
peft            a folder with ``adapter_config.json``                -
pivotal         -                                                    ``text_encoders_0``: .pti files
==============  ===================================================  =============================================

Whole weights: :mod:`sfumato.adapters.whole`. What a dialect cannot say is an error: diffusers has no LoHa and no LoKr.
Alphas are kept where the dialect has them (kohya, peft) and multiplied into the way up where it has none, so that no
program applies the file at another strength.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import files, writing
from sfumato.adapters.formats import Contents, FileModule, find_file, fit, read_contents
from sfumato.adapters.layers import algebra_of, with_rows, with_tucker_core
from sfumato.adapters.lora import refuse_lost
from sfumato.adapters.naming import DENOISER, Index
from sfumato.adapters.spelling import dotted, original_names, published_path, underscored, unet_shapes
from sfumato.adapters.whole import convert_whole, save_words_beside
from sfumato.adapters.word import Word
from sfumato.errors import BadInput, NoMatch, NotSupported, UnknownName
from sfumato.markup import described

__all__ = ["DIALECTS", "Module", "convert", "modules_of"]

DIALECTS = {
    "lora": ("diffusers", "kohya", "comfyui", "old-diffusers", "attn-procs", "peft"),
    "word": ("diffusers", "kohya", "comfyui", "pivotal"),
    "weights": ("diffusers", "custom-diffusion", "delta", "compvis"),
}


@dataclass(frozen=True, eq=False)
class Module:
    """One adapted module at its place in a model: ``parts`` as named by
    :class:`~sfumato.adapters.layers.AdaptedModule`, and its alpha (None: equal to the rank)."""

    component: str
    path: str
    parts: dict[str, Tensor]
    alpha: float | None = None
    rslora: bool = False

    __repr__ = described

    @property
    def rank(self) -> int:
        names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((int(self.parts[name].shape[0]) for name in names if name in self.parts), 1)

    @property
    def factor(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)


def convert(source: str | Path, target: str | Path, to: str, index: Index | None = None, name: str = "") -> list[Path]:
    """Writes the adapter in file ``source`` to ``target`` in another dialect; returns the files.

    Args:
        to: a dialect of the table above.
        index: the model that it is for (:func:`~sfumato.adapters.lora.index_of`); needed where names of the original
            code are read or written and the file alone does not tell the places.
        name: of a word, another one.

    Raises UnknownName, BadInput, BadWeights; NotSupported for what the dialect cannot hold; NoMatch for modules whose
    place is not known.
    """
    path, target = find_file(str(source)), Path(target)
    held = read_contents(path)
    if held.kind not in DIALECTS:
        what = "a whole model: sfumato make --model reads it" if held.kind == "checkpoint" else "no known adapter"
        raise BadInput(f"{path} is {what}; {', '.join(DIALECTS)} can be converted.")
    if to not in DIALECTS[held.kind]:
        raise UnknownName(f"dialect of a {held.kind}", to, DIALECTS[held.kind])
    if target.exists():
        raise BadInput(f"{target} exists; name a new one.")
    if to != "peft" and target.suffix != ".safetensors":
        raise BadInput(f"{target} must end in .safetensors.")
    if held.kind == "word":
        dialect: Any = to
        return [Word(file=str(path), name=name).save(target, dialect)]
    if held.kind == "weights":
        return convert_whole(held, target, to, index)
    found = modules_of(held, index)
    if to == "peft":
        return [*_to_peft(found, target), *save_words_beside(held, target.with_name(f"{target.name}.safetensors"))]
    if to in ("kohya", "comfyui"):
        tensors, more = _kohya(found, held, index)
        metadata = {**held.metadata, **more}
    else:
        metadata = {key: value for key, value in held.metadata.items() if key != "lora_adapter_metadata"}
        tensors = _diffusers(found) if to == "diffusers" else _old_diffusers(found, to)
    return [files.save_tensors(target, tensors, metadata or None), *save_words_beside(held, target)]


# --- reading ---------------------------------------------------------------------------------------------------------


def modules_of(held: Contents, index: Index | None = None) -> list[Module]:
    """The modules of a low-rank file at their places: by the model's index, or by their names alone. Raises NoMatch."""
    from safetensors.torch import load_file

    refuse_lost(held, way=" A file without them can be converted.")
    tensors = load_file(held.path)
    if index is not None:
        found = fit(held.modules, index)
        if found.missing or found.misshapen:
            first = found.missing[0] if found.missing else found.misshapen[0][0]
            raise NoMatch(f"{held.path} fits {len(found.found)} of {found.total} modules of the model; not {first}.")
        placed = [(module, place.component, place.path, place.rows) for module, at in found.found for place in at]
    else:
        placed = [(module, *_place(module, held), ()) for module in held.modules]
    parts = [_module(held, module, component, path, rows, tensors) for module, component, path, rows in placed]
    return [each for each in parts if each is not None]


def _place(module: FileModule, held: Contents) -> tuple[str, str]:
    network, name = module.network, module.name
    original = re.match(
        r"(input|output|middle)_block|double_blocks|single_blocks|joint_blocks|layers_\d+_(?!self)", name
    )
    if original and not name.startswith("encoder"):
        raise NoMatch(f"{held.path} has names of the original code, such as {name}: say for which model, with --model.")
    unet = re.search(r"(^|_)(down_blocks|up_blocks|mid_block)_|^time_embedding|^add_embedding|^conv_(in|out)$", name)
    if network in (DENOISER, ""):
        text = name.startswith("encoder_layers")
        component = "text_encoder" if text else "unet" if unet or _is_unet(held) else "transformer"
        return component, dotted(name)
    path = dotted(name)
    return network, path


def _is_unet(held: Contents) -> bool:
    return any(re.match(r"(down|up)_blocks_|mid_block_", each.name) for each in held.modules)


def _module(
    held: Contents, module: FileModule, component: str, path: str, rows: Any, tensors: Mapping[str, Tensor]
) -> Module | None:
    """One module; of a fused one its part, without the factors that belong to others, or None where none is left."""
    parts = {part: tensors[key] for part, key in module.keys.items() if part != "alpha"}
    if "mid" in parts:
        parts["down"] = with_tucker_core(parts.pop("mid"), parts["down"])
    if rows:
        parts = with_rows(parts, rows)
    rank = module.rank
    if rows and "up" in parts:
        live = parts["up"].flatten(1).any(0)
        if not live.any():
            return None
        parts["up"], parts["down"] = parts["up"][:, live], parts["down"][live].clone()
    scaling = held.scaling(module, component, path, tensors)
    alpha = scaling.alpha
    if alpha is not None and "alpha" in module.keys and rows and rank:
        alpha = alpha * parts["down"].shape[0] / rank
    return Module(component, path, parts, alpha, scaling.rslora)


# --- writing ---------------------------------------------------------------------------------------------------------


def _low_rank(module: Module, dialect: str) -> tuple[Tensor, Tensor]:
    """(down, up) with the factor in the way up. Raises NotSupported for another algebra."""
    algebra = algebra_of(module.parts)
    if algebra not in ("LoRA", "DoRA"):
        raise NotSupported(f"{module.path} is a {algebra}, which {dialect} cannot hold; kohya and peft can.")
    up = module.parts["up"]
    return module.parts["down"], up if module.factor == 1 else up * module.factor


def _diffusers(modules: list[Module]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for each in modules:
        stem = f"{each.component}.{published_path(each.component, each.path)}"
        out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = _low_rank(each, "diffusers")
        if "magnitude" in each.parts:
            out[f"{stem}.lora_magnitude_vector"] = each.parts["magnitude"].flatten()
    return out


def _old_diffusers(modules: list[Module], to: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for each in modules:
        if "magnitude" in each.parts:
            raise NotSupported(f"{each.path} is a DoRA, which {to} cannot hold; diffusers can.")
        stem = _processor(each) if to == "attn-procs" else f"{each.component}.{_layer(each)}"
        out[f"{stem}.down.weight"], out[f"{stem}.up.weight"] = _low_rank(each, to)
    return out


def _layer(each: Module) -> str:
    infix = "lora_linear_layer" if each.component.startswith("text_encoder") else "lora"
    return f"{published_path(each.component, each.path)}.{infix}"


_OF_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _processor(each: Module) -> str:
    """Its name within the processor of an attention layer; of other modules the text encoder's alone have one. Raises
    NotSupported."""
    stem, _, last = published_path(each.component, each.path).removesuffix(".0").rpartition(".")
    if each.component.startswith("text_encoder"):
        return (
            f"{each.component}.{stem}.{_OF_TEXT[last]}_lora" if last in _OF_TEXT else f"{each.component}.{_layer(each)}"
        )
    if last not in _OF_TEXT.values():
        raise NotSupported(f"{each.path} is no projection of attention; attn-procs holds nothing else.")
    return f"{each.component}.{stem}.processor.{last}_lora"


def _kohya(modules: list[Module], held: Contents, index: Index | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and ``ss_*`` metadata. U-Nets of SD 1 and 2 are spelt as diffusers has them, all others as their original
    code; modules that are one there are put together, a block for each."""
    texts = {each.component for each in modules if each.component.startswith("text_encoder")}
    denoiser = [each for each in modules if not each.component.startswith("text_encoder")]
    names, shapes = _names(denoiser, held, index)
    several = bool(texts - {"text_encoder"}) or bool(names) or any(each.component != "unet" for each in denoiser)
    out: dict[str, Tensor] = {}
    fused: dict[str, list[tuple[Module, Any]]] = {}
    for each in modules:
        if each.component not in texts and each.path in names and names[each.path][1].rows:
            fused.setdefault(names[each.path][0], []).append((each, names[each.path][1].rows))
            continue
        path = names[each.path][0] if each.component not in texts and each.path in names else each.path
        t5 = each.component in texts and ".block." in f".{each.path}"
        _kohya_keys(out, underscored(each.component, path, several, t5), each)
    for name, members in fused.items():
        whole = [path for path, (other, _) in names.items() if other == name]
        _kohya_keys(out, underscored("denoiser", name, several, False), _together(members, whole, shapes))
    ranks = {each.rank for each in modules}
    alphas = {each.factor * each.rank for each in modules}
    more = {
        "ss_network_module": "networks.lora" if all("down" in each.parts for each in modules) else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    return out, more


def _names(modules: list[Module], held: Contents, index: Index | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(path -> name in the original code and its rows there, path -> shape of the weight); no names for SD 1 and 2."""
    if not modules:
        return {}, {}
    component = modules[0].component
    shapes = dict(index[component]) if index is not None and component in index else {}
    if component == "unet":
        wide = [shape[1] for path, shape in shapes.items() if path.endswith("attn2.to_k")]
        wide += [
            each.parts["down"].shape[1] for each in modules if each.path.endswith("attn2.to_k") and "down" in each.parts
        ]
        texts = index is not None and "text_encoder_2" in index
        if not (texts or held.base == "SDXL" or (wide and min(wide) == 2048)):
            return {}, shapes
        shapes = shapes or unet_shapes(each.path for each in modules)
    elif not shapes:
        shapes = {each.path: (each.parts["up"].shape[0], each.parts["down"].shape[1]) for each in modules
                  if "up" in each.parts}  # fmt: skip
    return original_names(shapes), shapes


def _together(members: list[tuple[Module, Any]], whole: list[str], shapes: Mapping[str, Any]) -> Module:
    """Low-rank changes of the parts of one fused weight as one: ways down below each other, ways up as blocks in the
    rows of their part; parts that have none get zeros."""
    if len(members) < len(whole) and any(path not in shapes for path in whole):
        raise NoMatch(f"{members[0][0].path} is part of a larger module there: say for which model, with --model.")
    height = max(stop for each, rows in members for _, stop in rows)
    height = max(height, sum(shapes[path][0] for path in whole)) if len(whole) > 1 else height
    downs, ups = [], []
    for each, rows in members:
        if "magnitude" in each.parts:
            raise NotSupported(f"{each.path} is a DoRA, and part of a larger module there; peft and diffusers hold it.")
        down, up = _low_rank(each, "kohya")
        tall, start = up.new_zeros(height, up.shape[1]), 0
        for a, b in rows:
            tall[a:b] = up[start : start + b - a]
            start += b - a
        downs.append(down)
        ups.append(tall)
    return Module(members[0][0].component, "", {"down": torch.cat(downs), "up": torch.cat(ups, 1)})


_KOHYA_PARTS = {"down": "lora_down.weight", "up": "lora_up.weight"}


def _kohya_keys(out: dict[str, Tensor], stem: str, module: Module) -> None:
    for part, tensor in module.parts.items():
        if part == "magnitude":
            out[f"{stem}.dora_scale"] = tensor.reshape(tensor.numel(), *[1] * (module.parts["up"].ndim - 1))
        else:
            out[f"{stem}.{_KOHYA_PARTS.get(part, part)}"] = tensor
    out[f"{stem}.alpha"] = torch.tensor(module.factor * module.rank)


def _to_peft(modules: list[Module], target: Path) -> list[Path]:
    """A folder as ``PeftModel.save_pretrained`` writes it; a folder for each network where there are several."""
    by_network: dict[str, list[Module]] = {}
    for each in modules:
        by_network.setdefault(each.component, []).append(each)
    written = []
    for component, several in by_network.items():
        folder = target if len(by_network) == 1 else target / component
        with writing.output_folder(folder):
            tensors: dict[str, Tensor] = {}
            for each in several:
                for part, tensor in each.parts.items():
                    named = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
                    tensors[f"base_model.model.{each.path}.{named.get(part, part)}"] = (
                        tensor.flatten() if part == "magnitude" else tensor
                    )
            writing.write_text(folder / "adapter_config.json", json.dumps(_peft_settings(several), indent=1))
            written.append(files.save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"}))
    return written


def _peft_settings(modules: list[Module]) -> dict[str, Any]:
    algebras = {algebra_of(each.parts) for each in modules}
    if len(algebras - {"LoRA"}) > 1 or ("LoRA" in algebras and algebras & {"LoHa", "LoKr"}):
        raise NotSupported(f"one folder of peft holds one algebra; this file has {', '.join(sorted(algebras))}.")
    ranks, alphas = {e.path: e.rank for e in modules}, {e.path: e.factor * e.rank for e in modules}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    low = algebras <= {"LoRA", "DoRA"}
    settings: dict[str, Any] = {
        "peft_type": "LORA" if low else algebras.pop().upper(), "r": rank, ("lora_alpha" if low else "alpha"): alpha,
        "target_modules": sorted(ranks), "inference_mode": True,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
    }  # fmt: skip
    if "DoRA" in algebras:
        settings["use_dora"] = True
    return settings
