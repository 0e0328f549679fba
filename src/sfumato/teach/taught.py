"""What teaching gives back: adapters that can be used at once or written to files, and the record of how it went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sfumato import files, writing
from sfumato.adapters.lora import save_lora
from sfumato.adapters.metadata import training_metadata
from sfumato.adapters.naming import word_beside
from sfumato.adapters.word import save_word
from sfumato.errors import BadInput
from sfumato.markup import described
from sfumato.models import Model
from sfumato.models.text_towers import text_towers

__all__ = ["Taught"]


@dataclass(eq=False)
class Taught:
    """What was learnt.

    ``words``: word -> text encoder -> vectors (k d); ``lora``: adapted modules by ``component.path``; ``weights``:
    whole parameters by ``component.path``. ``model`` is the model that was taught, as it was before. ``log``: figures
    of every step; ``facts``: plain values about the run; ``step``: steps done; ``interrupted``: it can be resumed.
    ``pictures``: what is worth looking at, by name; ``files``: where it was written.
    """

    model: Model
    method: str
    words: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    interrupted: bool = False
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    __repr__ = described

    def metadata(self, words: Mapping[str, Any] | None = None) -> dict[str, str]:
        """The strings that every file carries; see :func:`sfumato.adapters.metadata.training_metadata`."""
        kind = "lora" if self.lora else "textual-inversion" if self.words and not self.weights else "weights"
        return training_metadata(
            self.model, self.method, kind, {**self.facts, "steps": self.step}, words=list(words or self.words)
        )

    def save(self, path: str | Path) -> list[Path]:
        """Writes ``path``, a .safetensors file; words beside weights or a LoRA as ``NAME-word.safetensors``, pictures
        as ``NAME-KIND.png``: all of them or, where one cannot be written, none. Returns the files. Raises BadInput for
        another ending and for files that exist."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise BadInput(f"-o {str(path)!r} must end in .safetensors: that is what every program reads.")
        writers = {free(each): write for each, write in self._writers(path).items()}
        written: list[Path] = []
        try:
            for each, write in writers.items():
                write(each)
                written.append(each)
        except BaseException:
            for each in written:
                each.unlink(missing_ok=True)
            raise
        return written

    def _writers(self, path: Path) -> dict[Path, Callable[[Path], object]]:
        """Every file, in order, and what writes it."""
        out: dict[Path, Callable[[Path], object]] = {}
        metadata = self.metadata()
        if self.lora:
            out[path] = lambda at: save_lora(at, self.lora, metadata)
        elif self.weights:
            out[path] = lambda at: files.save_tensors(at, self.weights, metadata)
        t5 = [
            tower.name for tower in text_towers(self.model) if getattr(tower.encoder.config, "model_type", "") == "t5"
        ]
        for number, (word, vectors) in enumerate(self.words.items(), 1):
            named = word_beside(path, number) if out else path
            told = self.metadata({word: vectors})
            out[named] = partial(save_word, word=word, vectors=vectors, t5=t5, metadata=told)
        for name, picture in self.pictures.items():
            out[path.with_name(f"{path.stem}-{name}.png")] = partial(_save_picture, picture)
        return out


def free(path: Path) -> Path:
    """``path``, if nothing is there. Raises BadInput."""
    if path.exists():
        raise BadInput(f"{path} exists; name a new file.")
    return path


def _save_picture(picture: Image.Image, at: Path) -> None:
    with writing.atomic_write(at) as file:
        picture.save(file, format="PNG")
