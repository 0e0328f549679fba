"""Results in few words, for ``repr``, and as a piece of a page, for notebooks and reports. Pictures are embedded."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

LARGEST = 256  # pixels; embedded pictures are shrunk to it
MOST = 16  # pictures of a result that a notebook shows
LONGEST = 240  # characters of a repr


def described(record: Any) -> str:
    """A dataclass in one short line: arrays by their shape, networks and other records by their class."""
    parts = [f"{each.name}={_short(getattr(record, each.name))}" for each in dataclasses.fields(record)]
    text = f"{type(record).__name__}({', '.join(parts)})"
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + "...)"


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__}({' '.join(map(str, shape))})"
    if isinstance(value, dict | list | tuple | set | frozenset) and len(value) > 3:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_short(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        return opening + ", ".join(map(_short, value)) + closing
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if value is None or isinstance(value, bool | int | float):
        return f"{value:.4g}" if isinstance(value, float) else repr(value)
    if hasattr(value, "size") and hasattr(value, "convert"):
        return f"Image({value.size[0]}x{value.size[1]})"
    return getattr(value, "name", None) or type(value).__name__


def text(value: Any) -> str:
    """Text that cannot be taken for markup."""
    return html.escape(str(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def encoded(image: Any, largest: int | None) -> bytes:
    """A PIL picture as PNG, no larger than ``largest`` pixels a side."""
    image = image.convert("RGB")
    if largest is not None and max(image.size) > largest:
        image = image.copy()
        image.thumbnail((largest, largest))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def picture(image: Any, about: str, largest: int | None = LARGEST) -> str:
    """A PIL picture inside the page."""
    data = base64.b64encode(encoded(image, largest)).decode()
    return f'<img alt="{text(about)}" src="data:image/png;base64,{data}">'


def figures(pictures: Iterable[tuple[str, Any]], largest: int | None = LARGEST) -> str:
    """Pictures (caption, PIL) beside each other."""
    return "".join(
        f"<figure>{picture(image, caption, largest)}<figcaption>{text(caption)}</figcaption></figure>"
        for caption, image in pictures
    )


def gallery(title: str, pictures: Sequence[tuple[str, Any]]) -> str:
    """What a notebook shows of a result: its line, and up to :data:`MOST` of its pictures (caption, PIL)."""
    more = f"<p>and {len(pictures) - MOST} more</p>" if len(pictures) > MOST else ""
    style = "display:flex;flex-wrap:wrap;gap:.6rem"
    return f'<p>{text(title)}</p><div style="{style}">{figures(pictures[:MOST])}</div>{more}'
