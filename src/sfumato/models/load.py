"""`load`: a checkpoint by name, folder, file or Hub id; checked before it is trusted, no network unless asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from sfumato import checkpoints, files, registry
from sfumato.checkpoints import Checkpoint
from sfumato.errors import BadInput, UnknownName, within_memory
from sfumato.models.families import Family, families
from sfumato.models.families.base import accepted_by
from sfumato.models.folder import UNUSED, load_folder, pipeline_of
from sfumato.models.model import Model
from sfumato.models.quiet import quiet
from sfumato.models.single_file import file_family, load_file
from sfumato.models.weights import read_json
from sfumato.valid import first_line

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def load(
    name_or_path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    *,
    config: str | Path | None = None,
    found: Checkpoint | None = None,
) -> Model:
    """A model from a built-in name, a diffusers folder, a single-file ``.safetensors`` checkpoint, or a Hub id.

    Only a Hub id (``owner/name``) may use the network, and works from the cache when offline. ``dtype``: a torch dtype
    or its name; by default float32 on the CPU and the family's half precision elsewhere. ``revision``: branch, tag or
    commit of a Hub id; the commit is kept in ``model.revision``. ``config``: for a single file, the folder (or built-in
    name) of a diffusers model of the same architecture, whose configuration, tokenizers and, where the file lacks them,
    networks are used; what such a folder lacks is as in the known families. ``found``: what :func:`.checkpoints.find`
    says of the name and revision, for callers that have asked.

    All weights are checked to be there, of the right shape and finite; none is ever initialised at random or unpickled.

    Raises `UnknownName`, `BadInput` (nothing there, no connection), `NotSupported` (family), `BadWeights`.
    """
    where = _device(device)
    precision = _dtype(dtype)
    name = str(name_or_path)
    found = found or checkpoints.find(name, revision)
    source = _downloaded(found)
    if source.exists():
        files.regular(source)
    with within_memory(f"the model {name}", "load it in dtype bfloat16, or take a smaller one"):
        if source.is_file():
            model = load_file(source, precision, where, config)
        else:
            if config is not None:
                raise BadInput(f"config={str(config)!r} only applies to a single-file checkpoint; {name} is a folder.")
            model = load_folder(source, precision, where)
    model.name, model.revision = name, found.commit
    return model


def family_at(name_or_path: str | Path) -> type[Family] | None:
    """The family of a built-in model or a local folder, read from its index, or of a single file, read from its header;
    None where only loading will tell."""
    folder = registry.find(str(name_or_path)) or Path(name_or_path).expanduser()
    if folder.is_file():
        wanted = file_family(folder)
        return next((each for each in families().values() if each.name == wanted), None)
    return pipeline_of(read_json(folder / "model_index.json"), folder)[1] if checkpoints.is_pipeline(folder) else None


# --- where ----------------------------------------------------------------------------------------------------------


def _downloaded(source: Checkpoint) -> Path:
    """The folder of a model, after getting what is missing of it from the Hub."""
    if source.repo is None:
        return source.path
    pipeline, _ = pipeline_of(read_json(source.path / "model_index.json"), source.path / "model_index.json")
    skipped = {part: None for part in UNUSED if part in accepted_by(pipeline.__init__)}
    here = {} if source.online else {"local_files_only": True}
    try:
        with quiet(bars=True):
            found = pipeline.download(source.repo, revision=source.commit, use_safetensors=True, **here, **skipped)
    except Exception as error:  # the client of the day (httpx, requests) raises errors of its own
        raise BadInput(f"cannot get {source.repo} from the Hugging Face Hub: {first_line(error)}.") from error
    return Path(found)


# --- how --------------------------------------------------------------------------------------------------------------


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
