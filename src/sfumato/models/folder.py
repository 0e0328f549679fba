"""Diffusers folders: every part checked before it is trusted, whichever spelling its weight files have."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sfumato import registry
from sfumato.checkpoints import is_pipeline
from sfumato.errors import BadInput, BadWeights, NotSupported
from sfumato.models.families import Family, families, family_of, served_as
from sfumato.models.families.base import accepted_by
from sfumato.models.model import Model
from sfumato.models.processors import Processor
from sfumato.models.quiet import quiet
from sfumato.models.weights import check_numbers, find_weights, read_header, read_json
from sfumato.valid import first_line

#: parts of a pipeline that sfumato does not use: a folder may lack them
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
#: tensors that old checkpoints carry and no current architecture has; harmless
_LEGACY_TENSORS = re.compile(r"(^|\.)position_ids$")
#: tokens that T5 reads where neither it nor its tokenizer says
_T5_LENGTH = 512


class LoadedOtherwise(UserWarning):
    """A model is loaded in another way than its folder or file says; the message names what is not followed."""


def pipeline_of(index: dict[str, Any], where: Path) -> tuple[Any, type[Family]]:
    """The diffusers class as which the pipeline of a model_index.json is loaded, and the family that serves it: its
    own, or that of a known family whose parts it has. Raises NotSupported."""
    import diffusers

    name = index.get("_class_name")
    if not isinstance(name, str):
        raise NotSupported(f"{where} names no diffusers pipeline but {name!r}; custom pipeline code is never run.")
    name, _ = served_as(name, index)
    family = family_of(name, index)
    with quiet():
        pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        raise NotSupported(f"{where} is a {name}, which the installed diffusers does not have.")
    return pipeline, family


def load_folder(folder: Path, dtype: torch.dtype | None, device: torch.device) -> Model:
    """The model in a diffusers folder. Raises BadInput, BadWeights, NotSupported."""
    if not is_pipeline(folder):
        raise BadInput(f"{folder} is not a diffusers model: it has no model_index.json.")
    index = read_json(folder / "model_index.json")
    pipeline, family = pipeline_of(index, folder)
    if lost := served_as(index["_class_name"], index)[1]:
        message = f"{folder} is loaded as {pipeline.__name__}: {lost}."
        warnings.warn(LoadedOtherwise(message), stacklevel=3)
    parts, files = load_parts(folder, index, pipeline, dtype or default_dtype(family, device))
    return build(pipeline, parts, device, folder, files)


def load_parts(
    folder: Path, index: dict[str, Any], pipeline: Any, dtype: torch.dtype
) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
    """The arguments of a pipeline class from a folder, and the weight files (component, file)."""
    wanted = accepted_by(pipeline.__init__) - {"self"}
    parts: dict[str, Any] = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    files: list[tuple[str, Path]] = []
    for name in sorted(wanted):
        entry = index.get(name)
        if name in UNUSED or entry == [None, None]:
            parts[name] = None
        elif isinstance(entry, list):
            parts[name], own = load_part(registry.part(folder, name), entry, dtype)
            files += [(name, path) for path in own]
        elif entry is not None:  # a setting of the pipeline rather than a part
            parts.setdefault(name, entry)
    return parts, files


def build(pipeline: Any, parts: dict[str, Any], device: torch.device, where: Path, files: list[Any]) -> Model:
    """The model of these parts, checked to be whole. ``where``: its folder or file, for messages and its card."""
    _limit_tokenizers(parts)
    try:
        with quiet():
            pipe = pipeline(**parts)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{where} is not a whole {pipeline.__name__}: {first_line(error)}.") from error
    card = read_json(where / "sfumato.json") if (where / "sfumato.json").is_file() else {}
    model = Model(pipe, card=card, files=files)
    needed = [model.family.denoiser_name, *model.family.components]
    lacking = [name for name in needed if name != "tokenizer" and getattr(pipe, name, None) is None]
    if "tokenizer" in needed and not model.tokenizers:
        lacking.append("tokenizer")
    if lacking:
        raise BadInput(f"{where} is not a whole {pipeline.__name__}: it has no {' and no '.join(lacking)}.")
    _refuse_further_inputs(model, where)
    for name, module in model.modules.items():
        check_numbers(name, module)
        module.eval().requires_grad_(False)
    return model.to(device)


def default_dtype(family: type[Family], device: torch.device) -> torch.dtype:
    """float32 on the CPU, the family's half precision elsewhere."""
    return torch.float32 if device.type == "cpu" else family.half


def _refuse_further_inputs(model: Model, where: Path) -> None:
    further = model.family.further_channels
    if not further:
        return
    of_masks = [
        name
        for name, family in families().items()
        if family.inpaints and issubclass(family, type(model.family)) and family(model.pipe).takes_mask
    ]
    hint = "load a text-to-image checkpoint, with which blend redraws regions"
    if model.clips:
        hint = "load a text-to-video checkpoint"
    if of_masks:
        hint = f"say {of_masks[0]} as _class_name in its model_index.json"
    raise NotSupported(
        f"{where} has a denoiser that reads {further} channels beside the latents, a mask or another picture, which "
        f"{type(model.pipe).__name__} does not give it; {hint}, or attach systems to a pipeline of your own."
    )


def _limit_tokenizers(parts: dict[str, Any]) -> None:
    """Tokenizers that state no length, or more than their encoder reads, cut texts where it stops reading."""
    for name, tokenizer in parts.items():
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None or not name.startswith("tokenizer"):
            continue
        most = int(getattr(encoder.config, "max_position_embeddings", None) or _T5_LENGTH)
        unsaid = tokenizer.model_max_length > 10**9  # transformers puts 10**30 there
        if unsaid or (encoder.config.model_type.startswith("clip") and tokenizer.model_max_length > most):
            tokenizer.model_max_length = most


# --- parts ------------------------------------------------------------------------------------------------------------


def load_part(folder: Path, entry: list[Any], dtype: torch.dtype) -> tuple[Any, list[Path]]:
    """One component: a network with its checked weight files, or a tokenizer or scheduler."""
    import diffusers
    import transformers
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    library, class_name = (str(entry[0]), str(entry[1])) if len(entry) == 2 else ("", str(entry))
    if library == "transformers" and class_name.endswith("Processor") and folder.is_dir():
        return _processor(folder, class_name), []
    with quiet():
        source = {"diffusers": diffusers, "transformers": transformers}.get(library)
        kind = getattr(source, class_name, None)
        models = (ModelMixin, transformers.PreTrainedModel)
        others = (SchedulerMixin, transformers.PreTrainedTokenizerBase)
    if not (isinstance(kind, type) and issubclass(kind, models + others)):
        raise NotSupported(
            f"{folder} is declared as {library}.{class_name}, which is no model, scheduler or tokenizer"
            " of the installed diffusers or transformers."
        )
    if not folder.is_dir():
        raise BadInput(f"{folder} is missing although model_index.json names it.")
    settings: dict[str, Any] = {"local_files_only": True}
    files: list[Path] = []
    weighted = issubclass(kind, models)
    if weighted:
        _refuse_quantized(folder)
        files = find_weights(folder)
        for path in files:
            read_header(path)
        settings |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        settings["torch_dtype" if library == "diffusers" else "dtype"] = dtype
    elif issubclass(kind, transformers.PreTrainedTokenizerBase):
        _refuse_unsaid_padding(folder)
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    try:
        with quiet(), _spelt(folder, files, stem) as readable:
            part: Any = getattr(kind, "from_pretrained")(str(readable), **settings)  # noqa: B009
    except Exception as error:  # both libraries raise whatever the broken file made them stumble over
        kind_of_error = BadWeights if weighted else BadInput
        message = first_line(error).replace(str(readable), str(folder))
        raise kind_of_error(f"cannot load {folder} as {class_name}: {message}.") from error
    if weighted:
        part, report = part
        refuse_misfit(folder, report)
    return part, files


def _processor(folder: Path, class_name: str) -> Processor:
    try:
        with quiet():
            return Processor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever the broken file made it stumble over
        raise BadInput(f"cannot load {folder} as {class_name}: {first_line(error)}.") from error


def _refuse_unsaid_padding(folder: Path) -> None:
    """A tokenizer of words alone pads as its class does by default, which for a second CLIP is another way than its
    encoder was trained with: other pictures, without a word."""
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "special_tokens_map.json")):
        raise BadInput(
            f"{folder} does not say how texts are padded; put tokenizer_config.json beside its words, from where the "
            "model is from."
        )


def _refuse_quantized(folder: Path) -> None:
    """Weights in the codes of bitsandbytes, torchao, GGUF ...: adapters and gradients would meet codes, not weights."""
    try:
        said = read_json(folder / "config.json").get("quantization_config")
    except (OSError, BadInput):
        return  # what is missing or broken is reported where the folder is read
    if said:
        method = said.get("quant_method", "by an unnamed method") if isinstance(said, dict) else said
        raise NotSupported(
            f"{folder} is quantized ({method}); only whole weights are read: get the folder in bf16, fp16 or fp32."
        )


@contextlib.contextmanager
def _spelt(folder: Path, files: list[Path], stem: str) -> Iterator[Path]:
    """A folder with these weight files under the names that the library looks for: the folder itself where it has them,
    else links. Variants and shards are spelt in several ways, of which each release knows some."""
    plain = folder / f"{stem}.safetensors"
    index = folder / f"{plain.name}.index.json"
    known = index.is_file() and set(read_json(index).get("weight_map", {}).values()) == {path.name for path in files}
    if not files or files == [plain] or known:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sfumato-") as made:
        beside = Path(made)
        for path in folder.iterdir():
            if path.suffix == ".json" and ".index." not in path.name:
                (beside / path.name).symlink_to(path.resolve())
        if len(files) == 1:
            (beside / plain.name).symlink_to(files[0].resolve())
        else:
            names = {path: f"{stem}-{i:05}-of-{len(files):05}.safetensors" for i, path in enumerate(files, 1)}
            for path, name in names.items():
                (beside / name).symlink_to(path.resolve())
            held = {entry.name: name for path, name in names.items() for entry in read_header(path)}
            total = sum(path.stat().st_size for path in files)
            table = {"metadata": {"total_size": total}, "weight_map": held}
            (beside / index.name).write_text(json.dumps(table), encoding="utf-8")
        yield beside


def refuse_misfit(where: Path, report: Any) -> None:
    """Both libraries fill what does not fit with random numbers and say so in a log line; here it is an error."""
    for problem, remark in (
        ("mismatched_keys", ""),
        ("missing_keys", "is missing from the weights"),
        ("unexpected_keys", "is in the weights but not in the architecture"),
    ):
        keys = [key for key in report.get(problem) or () if not _LEGACY_TENSORS.search(str(key))]
        if not keys:
            continue
        first = min(keys, key=str)
        if problem == "mismatched_keys":
            key, given, expected = first
            remark = f"has shape {tuple(given)}, but config.json asks for {tuple(expected)}"
            first = key
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise BadWeights(f"{where}: tensor {first} {remark}{more}.")
