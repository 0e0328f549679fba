"""Files that are whole or absent, and pictures and clips that carry their recipe.

A picture's recipe travels in two text chunks of the PNG: ``sfumato`` (our JSON, exact) and ``parameters`` (the dialect
of AUTOMATIC1111's web UI, which other tools read). Clips (:mod:`sfumato.clips`) have no such chunks: there our JSON
stands in the comment of an MP4 or GIF and in the EXIF description of a WebP, and A1111's text in the WebP's EXIF
comment. What is read back is untrusted data: sizes are limited, nothing is executed, and every value passes the
same checks as one typed by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sfumato import valid
from sfumato.dialects import a1111_text, parse_a1111, parse_comfy, parse_json
from sfumato.errors import BadInput
from sfumato.writing import VIDEOS, atomic_write

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

CHUNK = "sfumato"
A1111_CHUNK = "parameters"
COMFY_CHUNK = "prompt"
INVOKE_CHUNK = "invokeai_metadata"
LONGEST_RECIPE = 1_000_000  # characters of one chunk; Pillow itself stops at a megabyte per compressed chunk
LARGEST_PICTURE = 256 * 2**20  # bytes
LARGEST_VIDEO = 4 * 2**30
MOST_PIXELS = 2**26
ROUNDING = 1e-3  # by which floats of a picture may leave [0, 1]: half precision and resizing do so


# --- pictures with their recipe ------------------------------------------------------------------------------------


def save_png(path: Path | str, image: Image.Image, recipe: dict[str, Any], new: bool = False) -> Path:
    """Write ``image`` with its recipe to ``path``, whole or not at all; ``new`` as for :func:`atomic_write`.

    ``recipe`` holds plain JSON values; :func:`.dialects.a1111_text` says which keys A1111's dialect has a word for.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt(CHUNK, valid.json_text(recipe))
    chunks.add_itxt(A1111_CHUNK, valid.shown(a1111_text(recipe)))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=chunks)
    with atomic_write(path, new) as file:
        file.write(encoded.getbuffer())
    return Path(path)


def recipe_text(recipe: dict[str, Any]) -> str:
    """A recipe as one ASCII text that says whose it is, for files that have no named texts."""
    return f"{CHUNK} {valid.json_text(recipe, ascii_only=True)}"


def recipe_exif(text: str, recipe: dict[str, Any]) -> Any:
    """EXIF data with :func:`recipe_text` as description and A1111's text as comment."""
    from PIL import Image

    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = text
    exif.get_ifd(_EXIF_IFD)[_EXIF_COMMENT] = b"UNICODE\0" + valid.shown(a1111_text(recipe)).encode("utf-16-be")
    return exif


_EXIF_DESCRIPTION, _EXIF_ORIENTATION, _EXIF_IFD, _EXIF_COMMENT = 0x010E, 0x0112, 0x8769, 0x9286


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write tensors and what is to be known about them to one safetensors file, whole or not at all. Raises OSError."""
    import safetensors.torch

    with atomic_write(path) as file:
        file.write(safetensors.torch.save({name: each.contiguous() for name, each in tensors.items()}, metadata))
    return Path(path)


@contextlib.contextmanager
def reading_tensors(path: Path | str, form: str, what: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file that :func:`save_tensors` wrote, open, and its metadata, whose ``format`` has to be ``form``.

    Raises BadInput for any other file, and for whatever goes wrong within because of its content: ``what`` says what it
    should hold. OSError when it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise BadInput(f"{path} holds no {what} of this version ({form}).")
            yield file, metadata
    except BadInput:
        raise
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise BadInput(f"{path} holds no {what}, or it is damaged.") from None


def regular(path: Path | str) -> Path:
    """``path``, unless it is a named pipe, a device or a socket: opening one may wait for ever, or do something.

    Raises BadInput. OSError where there is nothing.
    """
    if "\0" in str(path):
        raise BadInput(f"{str(path)!r} cannot be the name of a file: it holds a zero byte.")
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BadInput(f"{path} is no ordinary file but a named pipe, device or socket; it is not opened.")
    return Path(path)


def inside(name: str) -> bool:
    """Whether a name in a list of files stays in the folder of the list, as it is written; where links lead is their
    owner's matter."""
    parts = name.replace("\\", "/").split("/")
    return not (os.path.isabs(name) or name.startswith(("/", "\\")) or ".." in parts)


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, without the mark that some programs write at its beginning. Raises BadInput for another
    encoding, OSError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; save it as that.") from None


def read_picture(path: Path | str | IO[bytes]) -> Image.Image:
    """A picture from a file (or an open one with a ``name``), upright and in RGB: turned as its EXIF says, transparent
    parts on white, deep greys (16 bit and more) brought to 8 bit by their range.

    Raises:
        BadInput: the file is no picture, is damaged or too large. OSError: it cannot be opened.
    """
    return as_rgb(read_upright(path))


def fitted(image: Image.Image, size: tuple[int, int], smooth: bool = True) -> Image.Image:
    """``image`` at exactly ``size`` (width, height) without distortion: scaled until it covers it, then cut at equal
    parts from both sides. ``smooth=False`` takes the nearest pixel, for masks."""
    from PIL import Image, ImageOps

    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return image if image.size == size else ImageOps.fit(image, size, method)


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 (hex) of a picture's size and RGB pixels."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}".encode() + rgb.tobytes()).hexdigest()


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture upright and in RGB, whatever it was: the rules of :func:`read_picture` for one that is open already.
    Raises BadInput for deep greys out of range or not finite."""
    import numpy as np
    from PIL import Image

    image = upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # Pillow itself would cut these off at 255
        grey = np.asarray(image).astype(np.float64)
        full = full_scale(image.mode, grey)
        if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= full):
            raise BadInput(
                f"a picture of mode {image.mode} holds values from {grey.min():g} to {grey.max():g}; they must be "
                f"finite and in [0, {full:g}]."
            )
        image = Image.fromarray((grey / full * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def full_scale(mode: str, grey: Any) -> float:
    """What stands for white in a picture of deep greys: of 32-bit numbers and floats (as ``convert("I")`` and
    ``convert("F")`` make them of bytes as well as of 16 bits) the least that holds them."""
    if mode == "F":
        return 255.0 if grey.max() > 1 else 1.0
    return 255.0 if mode == "I" and grey.max() <= 255 else 65535.0


def read_upright(path: Path | str | IO[bytes]) -> Image.Image:
    """A picture from a file, upright, in its own mode (masks and label maps); errors as for :func:`read_picture`."""
    path = Path(path) if isinstance(path, str) else path
    with opened_picture(path) as image:
        if image.width * image.height > MOST_PIXELS:
            name = path if isinstance(path, Path) else path.name
            raise BadInput(f"{name} has {image.width}x{image.height} pixels; the most is {MOST_PIXELS} in all.")
        image.load()
        return upright(image)


def orientation(image: Image.Image) -> int:
    """How a picture lies, 1 to 8 as EXIF counts; 1 where it does not say or its EXIF data are damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # Pillow's readers of EXIF raise whatever a damaged byte leads to, SyntaxError among it
        return 1


def upright(image: Image.Image) -> Image.Image:
    """A copy of a picture turned as its EXIF data say, without them: a second look shall not turn it again.
    Premultiplied grey (La) becomes LA, all that Pillow can turn it into."""
    from PIL import Image

    turn = Image.Transpose
    turns = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_270,
             turn.TRANSVERSE, turn.ROTATE_90)  # fmt: skip
    said = orientation(image)
    found = image.transpose(turns[said - 2]) if 2 <= said <= 8 else image.copy()
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        found.info.pop(name, None)
    return found.convert("LA") if found.mode == "La" else found


def read_recipe(path: Path | str) -> tuple[dict[str, Any], bool]:
    """The recipe in a picture or clip, and whether it is our exact one. Otherwise it was read from A1111's
    ``parameters`` (in JPEG, WebP and AVIF an EXIF comment), ComfyUI's ``prompt`` or InvokeAI's ``invokeai_metadata``;
    ``dropped`` then lists what has no counterpart here.

    Raises:
        BadInput: the file is no picture or clip, is too large, carries no recipe, or one that cannot be read.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    texts = _texts_of_video(path) if path.suffix.lower() in VIDEOS else _texts_of_picture(path)
    for text in texts.values():
        if len(text) > LONGEST_RECIPE:
            raise BadInput(f"{path} carries a recipe of more than {LONGEST_RECIPE} characters; it is not read.")
    if CHUNK in texts:
        try:
            recipe = valid.parsed_json(texts[CHUNK], names=True)
        except ValueError:
            recipe = None
        if not isinstance(recipe, dict):
            raise BadInput(f"{path} carries a damaged recipe; give the prompt and settings yourself.")
        return recipe, True
    for name in (A1111_CHUNK, INVOKE_CHUNK):  # Fooocus and SwarmUI write JSON into A1111's
        if name in texts and (read := parse_json(texts[name])) is not None:
            return read, False
    if A1111_CHUNK in texts:
        return parse_a1111(texts[A1111_CHUNK]), False
    if COMFY_CHUNK in texts and (read := parse_comfy(texts[COMFY_CHUNK])) is not None:
        return read, False
    raise BadInput(
        f"{path} carries no recipe: no {CHUNK!r}, {A1111_CHUNK!r}, {INVOKE_CHUNK!r} or ComfyUI {COMFY_CHUNK!r} text "
        "that can be read was found in it."
    )


def _comment(raw: bytes) -> str:
    """The text of an EXIF UserComment: eight bytes name its encoding; UTF-16 of either byte order."""
    code, body = raw[:8], raw[8:]
    if not code.startswith(b"UNICODE"):
        return (body if code.startswith(b"ASCII") else raw).decode("utf-8", errors="replace").strip("\0")
    big = body[0:2] == b"\xfe\xff" or (body[0:2] != b"\xff\xfe" and body[0:1] == b"\0")
    return body.decode("utf-16-be" if big else "utf-16-le", errors="replace").strip("\ufeff\0")


def _texts_of_picture(path: Path) -> dict[str, str]:
    """The recipes in a picture, by the name of their chunk."""
    with opened_picture(path) as image:
        texts = _chunks(image)
        if not texts and image.width * image.height <= MOST_PIXELS:  # chunks behind the pixels are found by load() only
            image.load()
            texts = _chunks(image)
        comment = image.info.get("comment", b"")  # of a GIF
        ours = [comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)]
        exif: Any = image.getexif() if image.format in ("JPEG", "WEBP", "AVIF") else {}
        if exif:
            ours.append(str(exif.get(_EXIF_DESCRIPTION, "")))
            theirs = exif.get_ifd(_EXIF_IFD).get(_EXIF_COMMENT, b"")
            texts.setdefault(A1111_CHUNK, _comment(theirs) if isinstance(theirs, bytes) else str(theirs))
            for tag in (0x010F, 0x0110, _EXIF_DESCRIPTION):  # Make and Model too: where ComfyUI writes
                text = exif.get(tag)
                if isinstance(text, str) and text.lower().startswith("prompt:"):
                    texts[COMFY_CHUNK] = text[len("prompt:") :]
    for text in ours:
        if text.startswith(f"{CHUNK} "):
            texts[CHUNK] = text[len(CHUNK) + 1 :]
    return {name: text for name, text in texts.items() if text.strip()}


def _chunks(image: Image.Image) -> dict[str, str]:
    names = (CHUNK, A1111_CHUNK, COMFY_CHUNK, INVOKE_CHUNK)
    return {name: str(text) for name, text in dict(getattr(image, "text", {})).items() if name in names}


def _texts_of_video(path: Path) -> dict[str, str]:
    with opened_video(path) as container:
        comment = str(container.metadata.get("comment", ""))
    return {CHUNK: comment[len(CHUNK) + 1 :]} if comment.startswith(f"{CHUNK} ") else {}


@contextlib.contextmanager
def opened_video(path: Path) -> Iterator[Any]:
    """An untrusted video, open (an ``av`` container); what is wrong about it is said in one line. Raises BadInput,
    OSError when it cannot be opened."""
    import av

    if regular(path).stat().st_size > LARGEST_VIDEO:
        raise BadInput(f"{path} is larger than {LARGEST_VIDEO >> 20} MB, the most that is read.")
    try:
        with open(path, "rb") as file, av.open(file, "r") as container:
            yield container
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as a video: {_line(error)}.") from None


@contextlib.contextmanager
def opened_picture(path: Path | IO[bytes]) -> Iterator[Image.Image]:
    """An untrusted picture, open, with whatever is wrong about it said in one line. Raises BadInput, OSError when it
    cannot be opened."""
    from PIL import Image, UnidentifiedImageError

    name = path if isinstance(path, Path) else path.name
    if isinstance(path, Path) and regular(path).stat().st_size > LARGEST_PICTURE:
        raise BadInput(f"{path} is larger than {LARGEST_PICTURE >> 20} MB, the most that is read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures are refused here by their own limit
            with Image.open(path) as image:
                yield image
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError, OSError) as error:
        if isinstance(error, BadInput) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise BadInput(f"{name} cannot be read as a picture: {_line(error)}.") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
