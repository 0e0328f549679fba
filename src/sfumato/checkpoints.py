"""Where a model is that somebody named: built in, a folder, a file, or on the Hugging Face Hub. Nothing heavy is
imported here, so that a wrong name is answered before torch is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sfumato import registry
from sfumato.errors import BadInput, UnknownName

PATIENCE = 5.0  # seconds within which a reachable Hub answers; refused connections and unknown hosts show at once
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk. Of a Hub id ``path`` is the folder of its index, the only file that is here for sure;
    ``commit`` its commit, ``repo`` its name, ``online`` whether more of it can be downloaded now."""

    path: Path
    commit: str | None = None
    repo: str | None = None
    online: bool = False


def is_pipeline(folder: Path | None) -> bool:
    """Whether a folder holds a diffusers pipeline."""
    return folder is not None and (folder / "model_index.json").is_file()


def find(name: str, revision: str | None = None) -> Checkpoint:
    """What a name stands for.

    Raises:
        UnknownName: nothing of this name. BadInput: a path that leads nowhere, ``revision`` of what is local, a Hub id
        that is neither here nor within reach.
    """
    path = Path(name)
    try:
        path = path.expanduser()
        local = path if name and path.exists() else registry.find(name)
    except (OSError, RuntimeError, ValueError) as error:  # too long for a path, a zero byte, an unknown home
        why = " ".join(str(error).split())[:80]
        raise BadInput(f"{name[:60]!r}... cannot be the name of a model: {why}.") from error
    if local is not None:
        if revision is not None:
            raise BadInput(f"revision={revision!r} only applies to a Hub id; {name} is local.")
        return Checkpoint(Path(local))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith(_WEIGHTS):
        return _on_hub(name, revision)
    if "/" in name or "\\" in name or path.suffix in _WEIGHTS:
        raise BadInput(f"no file or folder {name!r}.")
    raise UnknownName("model", name, [known for known in registry.names() if is_pipeline(registry.find(known))])


def _on_hub(repo: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import errors as hub

    where = repo if revision is None else f"{repo} at {revision!r}"
    online = not constants.HF_HUB_OFFLINE and reachable(constants.ENDPOINT)
    try:
        index = Path(hf_hub_download(repo, "model_index.json", revision=revision, local_files_only=not online))
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError) as error:
        raise BadInput(
            f"{where} is not in the local cache and the Hugging Face Hub cannot be reached; connect, or give a folder."
        ) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise BadInput(
            f"{where} is not on the Hugging Face Hub, or is private (log in with `hf auth login`)."
        ) from error
    except hub.EntryNotFoundError as error:
        raise BadInput(f"{where} holds no model_index.json: it is not a diffusers pipeline.") from error
    except Exception as error:  # the client of the day (httpx, requests) raises errors of its own
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"cannot get {where} from the Hugging Face Hub: {why}.") from error
    return Checkpoint(index.parent, index.parent.name, repo, online)


def reachable(endpoint: str, patience: float = PATIENCE) -> bool:
    """Whether anything answers at an address, through the proxies that the environment names. The Hub's own client
    would try six times, for 25 seconds, before it says that there is no connection."""
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=patience).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:  # a certificate that only the Hub's client knows is an answer too
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False
    return True
