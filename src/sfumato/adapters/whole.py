"""Whole weights and the words that belong to them in other dialects, value for value.

====================  ==================================================  =============================================
dialect               weights                                             words
====================  ==================================================  =============================================
diffusers             ``unet.<path>.weight``                              a file beside: load_textual_inversion
custom-diffusion      ``<path>.processor.to_k_custom_diffusion.weight``:  a file beside
                      load_attn_procs
delta                 ``unet.<path>.weight``: Custom Diffusion's code     ``modifier_token.<word>`` (d)
                      for diffusers
compvis               ``model.diffusion_model.<name>.weight``: its code   ``embed`` (k d)
                      for LDM
====================  ==================================================  =============================================

All but the first hold weights of cross-attention alone (Kumari et al. 2023, arXiv 2212.04488).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor
from torch import cat as joined

from sfumato import files
from sfumato.adapters.formats import EMBED, MODIFIER, WORDS, Contents, read_contents
from sfumato.adapters.naming import DENOISER, LDM, Index, parameters_of_ldm, word_beside
from sfumato.adapters.spelling import original_names, unet_shapes
from sfumato.adapters.word import save_word
from sfumato.errors import NoMatch, NotSupported

__all__ = ["convert_whole", "save_words_beside"]

_CROSS = re.compile(r"(.+\.attn2)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")


def convert_whole(held: Contents, target: Path, to: str, index: Index | None = None) -> list[Path]:
    """Writes whole weights to ``target``; returns the files. Words of a file that a taught one has beside it
    (``NAME-word.safetensors``) go into dialects that hold both.

    Raises NotSupported for what the dialect cannot hold; NoMatch for names of LDM whose place is not known.
    """
    from safetensors.torch import load_file

    tensors = {key: tensor for key, tensor in load_file(held.path).items() if key in held.rest}
    plain = _plain(held, index)
    if to == "diffusers":
        whole = {plain[key]: tensor for key, tensor in tensors.items()}
        return [files.save_tensors(target, whole, held.metadata or None), *save_words_beside(held, target)]
    crossing = {}
    for key, tensor in tensors.items():
        match = _CROSS.fullmatch(plain[key].removeprefix("unet."))
        if match is None:
            raise NotSupported(f"{key} is no weight of cross-attention; {to} holds nothing else.")
        crossing[match] = tensor
    if to == "custom-diffusion":
        named = {}
        for match, tensor in crossing.items():
            stem, which, end = match.groups()
            which = "to_out_custom_diffusion.0" if which == "to_out.0" else f"{which}_custom_diffusion"
            named[f"{stem}.processor.{which}.{end}"] = tensor
        return [files.save_tensors(target, named, held.metadata or None), *save_words_beside(held, target)]
    words, metadata = _words(held), dict(held.metadata)
    if to == "delta":
        out = {f"unet.{match[0]}": tensor for match, tensor in crossing.items()}
        if several := [word for word, rows in words.items() if len(rows) > 1]:
            raise NotSupported(f"{several[0]} has {len(words[several[0]])} vectors; delta holds one a word.")
        out |= {f"{MODIFIER}{word}": rows[0] for word, rows in words.items()}
    else:
        names = _ldm_names({match[0].rpartition(".")[0] for match in crossing}, held, index)
        out = {f"{LDM}{names[f'{m[1]}.{m[2]}']}.{m[3]}": tensor for m, tensor in crossing.items()}
        if words:
            out[EMBED] = joined(list(words.values()))
            metadata[WORDS] = json.dumps({word: len(rows) for word, rows in words.items()})
    return [files.save_tensors(target, out, metadata or None)]


def save_words_beside(held: Contents, target: Path) -> list[Path]:
    """The words that lie beside the weights in a file of Custom Diffusion's own code, each in a file of its own."""
    out = []
    for number, (word, places) in enumerate(held.vectors().items(), 1):
        (rows,) = places.values()
        out.append(save_word(word_beside(target, number), word, {"text_encoder": rows}))
    return out


def _plain(held: Contents, index: Index | None) -> dict[str, str]:
    """Keys of the file -> as diffusers names the parameter."""
    out = {key: key.replace(".processor.", ".").replace("_custom_diffusion.", ".") for key in held.rest}
    original = [key for key in held.rest if key.startswith(LDM)]
    if original:
        component = next((each for each in index or () if not each.startswith("text_encoder")), DENOISER)
        found = parameters_of_ldm(original, index[component]) if index else {}
        if len(found) < len(original):
            first = next(key for key in original if key not in found)
            raise NoMatch(f"{held.path} has names of the original code, such as {first}: say for which model, with "
                          "--model.")  # fmt: skip
        out |= {key: f"{component}.{path}" for key, path in found.items()}
    return out


def _words(held: Contents) -> dict[str, Tensor]:
    """Word -> (k d): those of the file, or of the files that were written beside it when it was taught."""
    sources = [held]
    if not held.words:
        beside = [word_beside(held.path, number) for number in range(1, 64)]
        sources = [read_contents(path) for path in beside if path.is_file()]
    out: dict[str, Tensor] = {}
    for source in sources:
        for word, places in source.vectors().items():
            if len(places) > 1:
                raise NotSupported(f"{word} has vectors for {len(places)} text encoders; this dialect holds one.")
            (out[word],) = places.values()
    return out


def _ldm_names(paths: set[str], held: Contents, index: Index | None) -> dict[str, str]:
    """Paths of a U-Net's modules -> their names in LDM's code. Where no model is at hand, the layers of a block are
    counted in the paths: a way up has one more than a way down."""
    if index is not None:
        shapes = dict(next((index[each] for each in index if not each.startswith("text_encoder")), {}))
    else:
        counted = {side: {int(n) for path in paths for n in re.findall(rf"{side}_blocks\.\d+\.attentions\.(\d+)", path)}
                   for side in ("down", "up")}  # fmt: skip
        layers = max(counted["up"], default=max(counted["down"], default=0) + 1)
        if counted["down"] and counted["up"] and max(counted["down"]) + 1 != layers:
            raise NoMatch(f"{held.path} has only some of the model's blocks: say for which model, with --model.")
        shapes = unet_shapes(paths, layers)
    names = {path: name for path, (name, _) in original_names(shapes).items()}
    if missing := sorted(paths - set(names)):
        raise NoMatch(f"{held.path} has {missing[0]}, which has no name in the original code.")
    return names
