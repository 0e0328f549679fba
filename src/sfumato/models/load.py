"""`load`: a checkpoint by name, folder, file or Hub id; checked before it is trusted, no network unless asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from sfumato import checkpoints, files, registry
from sfumato.checkpoints import Checkpoint
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName, within_memory
from sfumato.models.families import Family, family_of
from sfumato.models.families.base import accepted_by
from sfumato.models.model import Model
from sfumato.models.quiet import quiet
from sfumato.models.weights import check_numbers, find_weights, first_line, read_header, read_json

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
#: parts of a pipeline that sfumato does not use: a folder may lack them
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
#: tensors that old checkpoints carry and no current architecture has; harmless
_LEGACY_TENSORS = re.compile(r"(^|\.)position_ids$")


def load(
    name_or_path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    *,
    config: str | Path | None = None,
) -> Model:
    """A model from a built-in name, a diffusers folder, a single-file ``.safetensors`` checkpoint, or a Hub id.

    Only a Hub id (``owner/name``) may use the network, and works from the cache when offline. ``dtype``: a torch dtype
    or its name; by default float32 on the CPU and the family's half precision elsewhere. ``revision``: branch, tag or
    commit of a Hub id; the commit is kept in ``model.revision``. ``config``: for a single file, the folder (or built-in
    name) of a diffusers model of the same architecture, whose configuration and tokenizers are used.

    All weights are checked to be there, of the right shape and finite; none is ever initialised at random or unpickled.

    Raises `UnknownName`, `BadInput` (nothing there, no connection), `NotSupported` (family), `BadWeights`.
    """
    where = _device(device)
    precision = _dtype(dtype)
    name = str(name_or_path)
    found = checkpoints.find(name, revision)
    source = _downloaded(found)
    if source.exists():
        files.regular(source)
    with within_memory(f"the model {name}", "load it in dtype bfloat16, or take a smaller one"):
        if source.is_file():
            model = _load_file(source, precision, where, config)
        else:
            if config is not None:
                raise BadInput(f"config={str(config)!r} only applies to a single-file checkpoint; {name} is a folder.")
            model = _load_folder(source, precision, where)
    model.name, model.revision = name, found.commit
    return model


def family_at(name_or_path: str | Path) -> type[Family] | None:
    """The family of a built-in model or a local folder, read from its index; None where only loading will tell."""
    folder = registry.find(str(name_or_path)) or Path(name_or_path).expanduser()
    return _pipeline(read_json(folder / "model_index.json"), folder)[1] if checkpoints.is_pipeline(folder) else None


# --- where ----------------------------------------------------------------------------------------------------------


def _downloaded(source: Checkpoint) -> Path:
    """The folder of a model, after getting what is missing of it from the Hub."""
    if source.repo is None:
        return source.path
    pipeline, _ = _pipeline(read_json(source.path / "model_index.json"), source.path / "model_index.json")
    skipped = {part: None for part in _UNUSED if part in accepted_by(pipeline.__init__)}
    here = {} if source.online else {"local_files_only": True}
    try:
        with quiet(bars=True):
            found = pipeline.download(source.repo, revision=source.commit, use_safetensors=True, **here, **skipped)
    except Exception as error:  # the client of the day (httpx, requests) raises errors of its own
        raise BadInput(f"cannot get {source.repo} from the Hugging Face Hub: {first_line(error)}.") from error
    return Path(found)


# --- diffusers folders ----------------------------------------------------------------------------------------------


def _load_folder(folder: Path, dtype: torch.dtype | None, device: torch.device) -> Model:
    if not checkpoints.is_pipeline(folder):
        raise BadInput(f"{folder} is not a diffusers model: it has no model_index.json.")
    index = read_json(folder / "model_index.json")
    pipeline, family = _pipeline(index, folder)
    dtype = dtype or _default_dtype(family, device)
    wanted = accepted_by(pipeline.__init__) - {"self"}
    parts: dict[str, Any] = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
    files: list[tuple[str, Path]] = []
    for name in sorted(wanted):
        entry = index.get(name)
        if name in _UNUSED or entry == [None, None]:
            parts[name] = None
        elif isinstance(entry, list):
            parts[name], own = _load_part(registry.part(folder, name), entry, dtype)
            files += [(name, path) for path in own]
        elif entry is not None:  # a setting of the pipeline rather than a part
            parts.setdefault(name, entry)
    try:
        with quiet():
            pipe = pipeline(**parts)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{folder} is not a whole {pipeline.__name__}: {first_line(error)}.") from error
    return _finish(pipe, device, folder, files)


def _load_part(folder: Path, entry: list[Any], dtype: torch.dtype) -> tuple[Any, list[Path]]:
    """One component: a network with its checked weight files, or a tokenizer or scheduler."""
    import diffusers
    import transformers
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    library, class_name = (str(entry[0]), str(entry[1])) if len(entry) == 2 else ("", str(entry))
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
        files, variant = find_weights(folder)
        for path in files:
            read_header(path)
        settings |= {
            "use_safetensors": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
            "variant": variant,
        }
        settings["torch_dtype" if library == "diffusers" else "dtype"] = dtype
    try:
        with quiet():
            part: Any = getattr(kind, "from_pretrained")(str(folder), **settings)  # noqa: B009
    except Exception as error:  # both libraries raise whatever the broken file made them stumble over
        kind_of_error = BadWeights if weighted else BadInput
        raise kind_of_error(f"cannot load {folder} as {class_name}: {first_line(error)}.") from error
    if weighted:
        part, report = part
        _refuse_misfit(folder, report)
    return part, files


def _refuse_misfit(folder: Path, report: Any) -> None:
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
        raise BadWeights(f"{folder}: tensor {first} {remark}{more}.")


def _pipeline(index: dict[str, Any], where: Path) -> tuple[Any, type[Family]]:
    """The diffusers class that a model_index.json names, and the family that serves it."""
    import diffusers

    name = index.get("_class_name")
    if not isinstance(name, str):
        raise NotSupported(f"{where} names no diffusers pipeline but {name!r}; custom pipeline code is never run.")
    family = family_of(name)
    with quiet():
        pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        raise NotSupported(f"{where} is a {name}, which the installed diffusers does not have.")
    return pipeline, family


# --- single files ---------------------------------------------------------------------------------------------------


def _load_file(path: Path, dtype: torch.dtype | None, device: torch.device, config: str | Path | None) -> Model:
    read_header(path)
    folder = _config_folder(path, config)
    pipeline, family = _pipeline(read_json(folder / "model_index.json"), folder)
    accepted = accepted_by(pipeline.__init__)
    unused: dict[str, Any] = {name: None for name in _UNUSED if name in accepted}
    if "requires_safety_checker" in accepted:
        unused["requires_safety_checker"] = False
    try:
        with quiet():
            pipe = pipeline.from_single_file(
                str(path),
                config=str(folder),
                local_files_only=True,
                torch_dtype=dtype or _default_dtype(family, device),
                **unused,
            )
    except Exception as error:
        raise BadWeights(
            f"{path} does not fit the {pipeline.__name__} described in {folder}: {first_line(error)}."
        ) from error
    return _finish(pipe, device, folder, [("file", path)])


def _config_folder(path: Path, config: str | Path | None) -> Path:
    """The folder whose configuration describes a single file: the one given, or the standard one if it is cached."""
    if config is not None:
        folder = registry.find(str(config)) or Path(config).expanduser()
        if not checkpoints.is_pipeline(folder):
            raise BadInput(f"config={str(config)!r} is not the folder of a diffusers model: no model_index.json there.")
        return folder
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from safetensors.torch import load_file

    repo = fetch_diffusers_config(load_file(path))["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise BadInput(
            f"{path} is a single file without configuration, and that of {repo} is not in the local cache;"
            " give config=<folder of a diffusers model of the same architecture>."
        ) from error


# --- common ---------------------------------------------------------------------------------------------------------


def _finish(pipe: Any, device: torch.device, folder: Path, files: list[tuple[str, Path]]) -> Model:
    card = read_json(folder / "sfumato.json") if (folder / "sfumato.json").is_file() else {}
    model = Model(pipe, card=card, files=files)
    needed = [model.family.denoiser_name, *model.family.components]
    lacking = [name for name in needed if name != "tokenizer" and getattr(pipe, name, None) is None]
    if "tokenizer" in needed and not model.tokenizers:
        lacking.append("tokenizer")
    if lacking:
        raise BadInput(f"{folder} is not a whole {type(pipe).__name__}: it has no {' and no '.join(lacking)}.")
    for name, module in model.modules.items():
        check_numbers(name, module)
        module.eval().requires_grad_(False)
    return model.to(device)


def _default_dtype(family: type[Family], device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else family.half


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if given is None or isinstance(given, torch.dtype):
        return given
    if given not in _DTYPES:
        raise UnknownName("dtype", str(given), _DTYPES)
    return _DTYPES[given]


def _device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise BadInput(f"device={str(given)!r} is not available here: {first_line(error)}.") from error
    return device
