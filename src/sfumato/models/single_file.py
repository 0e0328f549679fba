"""Single-file checkpoints: recognised by their header, described by a given folder or by the shipped architectures."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sfumato import registry
from sfumato.checkpoints import is_pipeline
from sfumato.errors import BadInput, BadWeights, NotSupported, SfumatoError
from sfumato.models import architectures
from sfumato.models.families import Family
from sfumato.models.families.base import accepted_by
from sfumato.models.folder import UNUSED, LoadedOtherwise, build, default_dtype, load_part, pipeline_of
from sfumato.models.kinds import FileKind, kind_of_file
from sfumato.models.markers import Markers, beside, marked, read_markers, refuse_contradiction
from sfumato.models.model import Model
from sfumato.models.quiet import quiet
from sfumato.models.schedulers import is_flow_config
from sfumato.models.weights import read_header, read_json, read_metadata
from sfumato.valid import first_line

#: where the cache of the Hub may hold a tokenizer: (repository, folder in it)
_TOKENIZERS = {
    "CLIPTokenizer": (
        ("openai/clip-vit-large-patch14", "."), ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
        ("runwayml/stable-diffusion-v1-5", "tokenizer"), ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
        ("black-forest-labs/FLUX.1-dev", "tokenizer"), ("black-forest-labs/FLUX.1-schnell", "tokenizer"),
    ),
    "T5Tokenizer": (
        ("google/t5-v1_1-xxl", "."), ("black-forest-labs/FLUX.1-dev", "tokenizer_2"),
        ("black-forest-labs/FLUX.1-schnell", "tokenizer_2"), ("lodestones/Chroma1-HD", "tokenizer"),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3"),
    ),
}  # fmt: skip
#: a bias whose spread tells the two predictions of Stable Diffusion 2 apart, as ComfyUI found
_TELLING, _SPREAD = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09


def file_family(path: Path) -> str:
    """Name of the family that serves a single file; empty where none does. Raises BadWeights for what is no file of
    weights."""
    return kind_of_file(read_header(path)).family


def load_file(path: Path, dtype: torch.dtype | None, device: torch.device, config: str | Path | None) -> Model:
    """The model in a single file. Raises BadInput, BadWeights, NotSupported."""
    entries = read_header(path)
    kind = kind_of_file(entries)
    if kind.refusal:
        raise NotSupported(f"{path} {kind.refusal}")
    said = {**beside(path), **read_metadata(path)}
    source = _Source(path, kind, _folder(config), read_markers((each.name for each in entries), said))
    pipeline, family = pipeline_of(source.index, source.where)
    if not kind.serves(family.name):
        raise BadWeights(
            f"{path} is {kind.title} and does not fit the {pipeline.__name__} described in {source.where}."
        )
    return source.load(pipeline, family, dtype or default_dtype(family, device), device)


def _folder(config: str | Path | None) -> Path | None:
    """The folder that is given to describe a file: a whole model, or some of its parts."""
    if config is None:
        return None
    folder = registry.find(str(config)) or Path(config).expanduser()
    if is_pipeline(folder) or any((folder / part).is_dir() for part in ("tokenizer", "tokenizer_2", "scheduler")):
        return folder
    raise BadInput(
        f"config={str(config)!r} is not the folder of a diffusers model: neither model_index.json nor tokenizer/ there."
    )


def _tokenizer_class(entry: list[Any]) -> str:
    return str(entry[1]).removesuffix("Fast")


@dataclass(frozen=True)
class _Source:
    """A file, what it is, and what describes it: the folder ``given`` where it does, else what ships."""

    path: Path
    kind: FileKind
    given: Path | None
    markers: Markers

    @property
    def where(self) -> Path:
        return self.path if self.given is None else self.given

    @cached_property
    def shipped(self) -> str:
        """The architecture that ships for this kind of file. Raises BadInput where none does."""
        name = self.kind.name
        if name == "sd2" and self._predicts_velocity():
            name = "sd2-v"
        if name not in architectures.known():
            raise BadInput(
                f"{self.path} is {self.kind.title}, whose configuration does not ship; give config=<folder of a "
                "diffusers model of the same architecture>."
            )
        return name

    @cached_property
    def index(self) -> dict[str, Any]:
        if self.given is not None and is_pipeline(self.given):
            return read_json(self.given / "model_index.json")
        return architectures.index_of(self.shipped)

    def load(self, pipeline: Any, family: type[Family], dtype: torch.dtype, device: torch.device) -> Model:
        parts: dict[str, Any] = {}
        files = [("file", self.path)]
        lacking: list[str] = []
        index = self.index
        wanted = accepted_by(pipeline.__init__) - {"self"}
        settings = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
        tokenizers: list[str] = []
        for name in sorted(wanted):
            entry = index.get(name)
            if name in UNUSED or entry == [None, None]:
                parts[name] = None
            elif not isinstance(entry, list):
                settings |= {name: entry} if entry is not None and name not in settings else {}
            elif name == "scheduler" and self._schedule_is_told():
                parts[name] = self._scheduler(entry, dtype)
            elif name.startswith("tokenizer"):
                tokenizers.append(name)
            elif name in self.kind.parts:
                continue
            elif self.given is not None and (
                any(self._own(name).glob("*.safetensors")) or (name == "processor" and self._own(name).is_dir())
            ):
                parts[name], own = load_part(self._own(name), entry, dtype)
                files += [(name, each) for each in own]
            else:
                lacking.append(name)
        if (
            lacking == ["text_encoder_3"] and family.name == "sd3"
        ):  # Stable Diffusion 3 is shared without its T5 as well, and draws without
            parts |= {"text_encoder_3": None, "tokenizer_3": None}
            tokenizers.remove("tokenizer_3")
            message = f"{self.path} holds no T5, so its CLIPs alone read the text; config=<folder> may bring one."
            warnings.warn(LoadedOtherwise(message), stacklevel=4)
        elif lacking:
            lacking += [each for each in tokenizers if not self._tokenizer_folders(each, _tokenizer_class(index[each]))]
            raise BadInput(
                f"{self.path} is {self.kind.title} without its {', '.join(lacking)}; give config=<folder of a whole "
                "diffusers model of the same architecture>, whose parts are then used."
            )
        parts |= {name: self._tokenizer(name, index[name], dtype) for name in tokenizers}
        with tempfile.TemporaryDirectory(prefix="sfumato-") as made:
            self._describe(Path(made), index)
            try:
                with quiet():
                    parts |= self._networks(pipeline, made, {**parts, **settings}, dtype)
            except SfumatoError:
                raise
            except Exception as error:  # diffusers raises whatever the file made it stumble over
                where = "its architecture" if self.given is None else str(self.given)
                raise BadWeights(
                    f"{self.path} does not fit the {pipeline.__name__} described in {where}: {first_line(error)}."
                ) from error
        return build(pipeline, {**parts, **settings}, device, self.where, files)

    def _networks(self, pipeline: Any, config: str, parts: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The networks that the file holds."""
        import diffusers

        options: dict[str, Any] = {"config": config, "local_files_only": True, "torch_dtype": dtype}
        if hasattr(pipeline, "from_single_file"):
            return dict(pipeline.from_single_file(str(self.path), **options, **parts).components)
        found = {}
        for name in self.kind.parts:  # of younger families diffusers reads the denoiser alone
            library, class_name = self.index[name]
            network = getattr(diffusers, class_name, None) if library == "diffusers" else None
            if not hasattr(network, "from_single_file"):
                raise NotSupported(f"{self.path}: no library reads a {class_name} from such a file; give its folder.")
            found[name] = getattr(network, "from_single_file")(str(self.path), subfolder=name, **options)  # noqa: B009
        return found

    def _schedule_is_told(self) -> bool:
        """Whether a scheduler is given, or ships for such a file."""
        given = self.given is not None and (self._own("scheduler") / "scheduler_config.json").is_file()
        return given or (
            self.kind.name in architectures.known() and architectures.has_config(self.shipped, "scheduler")
        )

    def _own(self, part: str) -> Path:
        assert self.given is not None
        return registry.part(self.given, part)

    def _describe(self, folder: Path, index: dict[str, Any]) -> None:
        """Write the configuration of the networks in the file, as diffusers wants it beside a single file."""
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        for part in self.kind.parts:
            config = None if self.given is None else self._own(part) / "config.json"
            if config is not None and config.is_file():
                (folder / part).mkdir()
                shutil.copyfile(config, folder / part / "config.json")
            elif isinstance(index.get(part), list):
                more = self.kind.settings if part == "transformer" else {}
                architectures.write_config(self.shipped, part, folder / part, more)

    # --- what no file holds ------------------------------------------------------------------------------------------

    def _scheduler(self, entry: list[Any], dtype: torch.dtype) -> Any:
        """The scheduler of the given folder, else the one that ships, made to follow what the file says."""
        config = None if self.given is None else self._own("scheduler") / "scheduler_config.json"
        if config is not None and config.is_file():
            own, source = {"_class_name": entry[1], **read_json(config)}, str(self.given)
        else:
            own, source = architectures.config_of(self.shipped, "scheduler"), ""
        flow = is_flow_config(own, str(own.get("_class_name")))  # of which no marker says anything
        if not source and not flow:
            refuse_contradiction(self.markers, self.path)
        follow = own if flow or self.markers.contradiction else marked(own, self.markers)
        with tempfile.TemporaryDirectory(prefix="sfumato-") as made:
            folder = Path(made)
            (folder / "scheduler_config.json").write_text(json.dumps(follow), encoding="utf-8")
            scheduler, _ = load_part(folder, ["diffusers", str(follow["_class_name"])], dtype)
        before = str(own.get("prediction_type", "epsilon")), bool(own.get("rescale_betas_zero_snr"))
        after = str(follow.get("prediction_type", "epsilon")), bool(follow.get("rescale_betas_zero_snr"))
        if source and before != after:
            description = after[0] + (" at zero terminal signal-to-noise ratio" if after[1] else "")
            message = (
                f"{self.path} is marked as {description}, which is followed although the scheduler of {source} differs."
            )
            warnings.warn(LoadedOtherwise(message), stacklevel=5)
        return scheduler

    def _predicts_velocity(self) -> bool:
        """Whether a Stable Diffusion 2 without configuration predicts v: as it says, else as a bias tells."""
        if self.markers.prediction is not None:
            return self.markers.prediction == "v_prediction"
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as file:
            if _TELLING in file.keys():  # noqa: SIM118 - no mapping
                return bool(file.get_tensor(_TELLING).float().std() > _SPREAD)
        message = (
            f"nothing in {self.path} says whether it predicts noise or v; v is taken. config=<folder> says otherwise."
        )
        warnings.warn(LoadedOtherwise(message), stacklevel=6)
        return True

    def _tokenizer(self, name: str, entry: list[Any], dtype: torch.dtype) -> Any:
        """From the given folder, else from the cache of the Hub. CLIP's words are the same in every model, what it pads
        with is not."""
        class_name = _tokenizer_class(entry)
        for folder in self._tokenizer_folders(name, class_name):
            tokenizer, _ = load_part(folder, entry, dtype)
            whole = self.given is not None and folder == self._own(name)
            if class_name == "CLIPTokenizer" and not whole and self.kind.name in architectures.known():
                tokenizer.pad_token = architectures.config_of(self.kind.name, name).get("pad_token", "<|endoftext|>")
            return tokenizer
        repo = _TOKENIZERS.get(class_name, (("", ""),))[0][0]
        fetch = f", or fetch it once: hf download {repo} --include '*.json' '*.txt' '*.model'" if repo else ""
        raise BadInput(
            f"{self.path} is {self.kind.title}; its {name} ({class_name}) is not in the file and not in the local "
            f"cache: give config=<folder of a diffusers model of this kind, or one with {name}/ alone>{fetch}."
        )

    def _tokenizer_folders(self, name: str, class_name: str) -> list[Path]:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        folders = []
        if self.given is not None:
            folders.append(self._own(name))
            if class_name == "CLIPTokenizer":
                folders.append(self._own("tokenizer"))
        for repo, inside in _TOKENIZERS.get(class_name, ()):
            try:
                folders.append(Path(snapshot_download(repo, local_files_only=True)) / inside)
            except LocalEntryNotFoundError:
                continue
        marks = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer_config.json")
        return [folder for folder in folders if any((folder / mark).is_file() for mark in marks)]
