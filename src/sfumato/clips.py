"""Clips in files: MP4 (H.264), animated GIF and animated WebP, each with its recipe inside.

MP4 plays everywhere and is small, but lossy; WebP keeps every bit; GIF keeps 256 colours a frame. The recipe is our
exact JSON, in the comment of an MP4 or GIF and in the EXIF data of a WebP; :func:`sfumato.files.read_recipe` finds it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sfumato import files, writing
from sfumato.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FORMATS", "FPS", "read_clip", "save_clip"]

FORMATS = (".mp4", ".gif", ".webp")
FPS = 8.0
"""Frames per second where neither the user nor the model says otherwise; AnimateDiff was trained with it."""
FASTEST = 50.0  # of a GIF, whose unit of time is 10 ms: browsers slow shorter frames than 20 ms down
MOST_FRAMES = 4096
#: encoders of what every browser plays, the best first; which of them there are depends on how FFmpeg was built
_ENCODERS = ("libx264", "libopenh264", "mpeg4")


def save_clip(
    path: Path | str, frames: np.ndarray, recipe: dict[str, Any], fps: float = FPS, new: bool = False
) -> Path:
    """Write ``frames`` (f h w 3) uint8 with their recipe to ``path``, whole or not at all; the suffix names the format,
    ``new`` as for :func:`.writing.atomic_write`.

    Raises BadInput for another suffix, frames of another kind, or a speed that the format does not know. OSError where
    it cannot be written.
    """
    path = Path(path)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp}.get(path.suffix.lower())
    if write is None:
        raise BadInput(f"a clip cannot be written as {path.name!r}; its name must end in {', '.join(FORMATS)}.")
    if getattr(frames, "ndim", 0) != 4 or frames.shape[-1] != 3 or str(frames.dtype) != "uint8" or not len(frames):
        given = f"{getattr(frames, 'dtype', type(frames).__name__)} {tuple(getattr(frames, 'shape', ()))}"
        raise BadInput(f"frames of a clip are {given}; they must be bytes (f h w 3).")
    fastest = FASTEST if path.suffix.lower() == ".gif" else 1000.0
    if not 0 < fps <= fastest:
        raise BadInput(f"fps is {fps:g}; {path.suffix[1:]} takes above 0 and up to {fastest:g}.")
    encoded = io.BytesIO()
    write(encoded, frames, files.recipe_text(recipe), recipe, fps)
    with writing.atomic_write(path, new) as file:
        file.write(encoded.getbuffer())
    return path


def read_clip(path: Path | str) -> tuple[np.ndarray, float]:
    """The frames (f h w 3) uint8 of a clip in any format that FFmpeg or Pillow reads, and its frames per second.

    Raises BadInput for what is no clip, is damaged or too large. OSError when it cannot be opened.
    """
    path = Path(path)
    return _read_animation(path) if path.suffix.lower() in (".gif", ".webp", ".png") else _read_video(path)


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_mp4(out: IO[bytes], frames: np.ndarray, text: str, recipe: dict[str, Any], fps: float) -> None:
    import av
    import numpy as np

    h, w = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), "edge")  # its colours are half as fine
    with av.open(out, "w", format="mp4") as container:
        container.metadata["comment"] = text
        stream: Any = container.add_stream(_encoder(), rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14"} if stream.codec_context.name == "libx264" else {"qscale": "2"}
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _encoder() -> str:
    import av

    for name in _ENCODERS:
        if name in av.codecs_available:
            return name
    raise BadInput(f"this FFmpeg encodes none of {', '.join(_ENCODERS)}; write the clip as .webp or .gif.")


def _write_gif(out: IO[bytes], frames: np.ndarray, text: str, recipe: dict[str, Any], fps: float) -> None:
    ends = [round(100 * (i + 1) / fps) for i in range(len(frames))]  # in units of 10 ms, none of them lost by rounding
    durations = [10 * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
    first, *rest = _pictures(frames)
    first.save(
        out, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, comment=text.encode()
    )  # fmt: skip


def _write_webp(out: IO[bytes], frames: np.ndarray, text: str, recipe: dict[str, Any], fps: float) -> None:
    ends = [round(1000 * (i + 1) / fps) for i in range(len(frames))]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    first, *rest = _pictures(frames)
    exif = files.recipe_exif(text, recipe)
    first.save(
        out, format="WEBP", save_all=True, append_images=rest, duration=durations, loop=0, lossless=True, exif=exif
    )  # fmt: skip


def _pictures(frames: np.ndarray) -> Sequence[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames]


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_animation(path: Path) -> tuple[np.ndarray, float]:
    import numpy as np
    from PIL import ImageSequence

    with files.opened_picture(path) as image:
        _refuse_large(path, image.width, image.height, getattr(image, "n_frames", 1))
        frames, seconds = [], 0.0
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            seconds += frame.info.get("duration", 0) / 1000
    return np.stack(frames), len(frames) / seconds if seconds else FPS


def _read_video(path: Path) -> tuple[np.ndarray, float]:
    import numpy as np

    with files.opened_video(path) as container:
        if not container.streams.video:
            raise BadInput(f"{path} holds no video.")
        stream = container.streams.video[0]
        frames: list[Any] = []
        for frame in container.decode(stream):
            _refuse_large(path, frame.width, frame.height, len(frames) + 1)
            frames.append(frame.to_ndarray(format="rgb24"))
        if not frames:
            raise BadInput(f"{path} holds no frame of video.")
        return np.stack(frames), float(stream.average_rate or FPS)


def _refuse_large(path: Path, width: int, height: int, frames: int) -> None:
    if width * height * frames > 8 * files.MOST_PIXELS or frames > MOST_FRAMES:
        raise BadInput(f"{path} has more than {MOST_FRAMES} frames or {8 * files.MOST_PIXELS} pixels in all.")
