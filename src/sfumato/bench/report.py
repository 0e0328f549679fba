"""A report: figures with intervals, notes on what was left out, tables and pictures; as lines, JSON or one HTML file.

The HTML needs nothing beside it: pictures are embedded, there is no script and no link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato import markup, valid, writing
from sfumato.metrics.stats import Interval

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Figure:
    """One measured number: an interval, or a number that has none. ``about`` says what it is, in a few words."""

    name: str
    value: Interval | float
    about: str = ""
    percent: bool = False

    def text(self) -> str:
        """The figure as it is printed."""
        if not isinstance(self.value, Interval):
            return f"{self.value:.4g}"
        digits = None if self.percent else max(0, 3 - math.floor(math.log10(max(abs(self.value.value), 1e-12))) - 1)
        bounded = math.isfinite(self.value.low) and math.isfinite(self.value.high)
        text = self.value.text(self.percent, None if digits is None else min(digits, 8))
        return text if bounded else text.split(" [")[0]

    def to_json(self) -> Any:
        """Plain numbers."""
        return self.value.to_json() if isinstance(self.value, Interval) else self.value


@dataclass(frozen=True)
class Table:
    """Rows of texts under heads."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Report:
    """What was measured.

    Attributes:
        title: what of.
        figures: the headline figures, in order.
        notes: what a reader must know: files that were skipped, sizes, caps, seeds.
        tables: further tables.
        plots: name -> picture, written beside the report and embedded.
        gallery: (heading, pictures with a caption each) to embed.
        data: everything as plain values.
        pictures: files that were written before; files: these, and what :meth:`save` wrote.
    """

    title: str
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: dict[str, Image] = field(default_factory=dict)
    gallery: list[tuple[str, list[tuple[str, Image]]]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def __getitem__(self, name: str) -> Interval | float:
        """The value of a figure by its name, such as ``report["all_bound"]``."""
        from sfumato.errors import UnknownName

        for figure in self.figures:
            if figure.name == name:
                return figure.value
        raise UnknownName("figure", name, [figure.name for figure in self.figures])

    def to_json(self) -> dict[str, Any]:
        """Figures, notes and data as plain values."""
        return {
            "title": self.title,
            "figures": {figure.name: figure.to_json() for figure in self.figures},
            "notes": self.notes,
            **self.data,
        }

    def lines(self) -> list[str]:
        """The figures and notes for a terminal."""
        width = max((len(figure.name) for figure in self.figures), default=0)
        lines = [
            f"{each.name:<{width}}  {each.text()}{'  ' + each.about if each.about else ''}" for each in self.figures
        ]
        for table in self.tables:
            columns = [max(len(cell) for cell in column) for column in zip(table.heads, *table.rows, strict=True)]
            lines += ["", table.title]
            lines += [
                "  ".join(cell.ljust(columns[i]) for i, cell in enumerate(row)).rstrip()
                for row in (table.heads, *table.rows)
            ]
        return lines + ([""] if self.notes else []) + [f"note: {note}" for note in self.notes]

    def __repr__(self) -> str:
        shown = ", ".join(f"{each.name} {each.text()}" for each in self.figures[:4])
        more = f", and {len(self.figures) - 4} more" if len(self.figures) > 4 else ""
        return f"Report({self.title}: {shown}{more})"

    def _repr_html_(self) -> str:
        return self.body()

    def html(self) -> str:
        """The report as one page."""
        return _PAGE.format(title=markup.text(self.title), body=self.body())

    def body(self) -> str:
        """What the page holds."""
        parts = [f"<h1>{markup.text(self.title)}</h1>"]
        if self.figures:
            heads = ("figure", "value [95 % interval]", "n", "what it is")
            rows = [
                (each.name, each.text(), str(each.value.n) if isinstance(each.value, Interval) else "", each.about)
                for each in self.figures
            ]
            parts.append(markup.table(heads, rows))
        if self.notes:
            parts.append("<ul>" + "".join(f"<li>{markup.text(note)}</li>" for note in self.notes) + "</ul>")
        parts += [
            f"<h2>{markup.text(name)}</h2>{markup.picture(image, name, None)}" for name, image in self.plots.items()
        ]
        for table in self.tables:
            parts.append(f"<h2>{markup.text(table.title)}</h2>{markup.table(table.heads, table.rows)}")
        for heading, pictures in self.gallery:
            parts.append(f"<h2>{markup.text(heading)}</h2><div class=row>{markup.figures(pictures)}</div>")
        return "\n".join(parts)

    def save(self, folder: Path, name: str = "report") -> list[Path]:
        """Writes ``name.json``, ``name.html`` and the plots into ``folder``; returns and keeps the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        self.files = list(self.pictures)
        for suffix, text in (
            (".json", valid.json_text(self.to_json(), indent=1, ascii_only=True) + "\n"),
            (".html", valid.shown(self.html())),
        ):
            writing.write_text(folder / f"{name}{suffix}", text)
            self.files.append(folder / f"{name}{suffix}")
        for plot, image in self.plots.items():
            path = folder / f"{name}-{writing.slug(plot)}.png"
            with writing.atomic_write(path) as file:
                file.write(markup.encoded(image, None))
            self.files.append(path)
        return self.files


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }}
.row {{ display: flex; flex-wrap: wrap; gap: .6rem }}
figure {{ margin: 0; max-width: 16rem }}
figure img {{ min-width: 8rem; image-rendering: pixelated }}
figcaption {{ font-size: .8rem; color: #555 }}
</style></head><body>
{body}
</body></html>
"""
