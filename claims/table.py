"""The pages that show the record: one line a system, the details of each behind it, and what stands on its own page."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

from claims.record import verdict

BEGIN, END = "<!-- measured: written by python -m claims -->", "<!-- end of measured -->"
QUICK = "**A quick run on small samples: it shows that everything runs, and proves nothing.**"
RULE = (
    "*Ours* carries a 95 % interval; a size is asked of the estimate, a direction of the whole interval. Thresholds and"
    " guidance were chosen on other scenes and seeds than those reported. A verdict may well be *does not hold*."
)


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for part in record["parts"].values() for row in part["rows"]]


def headlines(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(part, row) of the rows that say whether a system does what it promises: those marked so, else the first, and of
    a record that was begun before rows were marked the first of those days."""
    rows = [(name, row) for name, part in record["parts"].items() for row in part["rows"]]
    marked = [each for each in rows if each[1].get("headline")]
    return marked or sorted(rows, key=lambda each: "headline" in each[1])[:1]


def overview(
    records: Iterable[dict[str, Any]], stale: Mapping[str, Collection[str]], details: str, pictures: str
) -> str:
    """One line a system: what it should do, ours, the baseline, the verdict. ``stale``: parts that must run again, by
    key; ``details``, ``pictures``: folders, from the page."""
    lines = []
    for record in records:
        key = record["key"]
        for k, (part, row) in enumerate(headlines(record)):
            picture = f"[picture]({pictures}/{row['picture']})" if row["picture"] else ""
            old = " (stale)" if part in stale.get(key, ()) else ""
            name = f"[{key}]({details}/{key}.md)" if k == 0 else ""
            cells = (name, row["claim"], row["measured"], row["baseline"], f"**{verdict(row)}**{old}", picture)
            lines.append(_line(cells))
    head = "| system | what it should do | ours | baseline | verdict | picture |\n|---|---|---|---|---|---|\n"
    waiting = sum(map(len, stale.values()))
    said = (
        f"\n\n{waiting} parts were measured with other code or weights than today's and must run again"
        " (`python -m claims --stale` lists them)."
        if waiting
        else ""
    )
    return (
        "# Claims, measured again\n\nWritten by `python -m claims`: the headline of each system; ablations, bars, power"
        f" and every number behind its name. {RULE}{said}\n\n" + head + "\n".join(lines) + "\n"
    )


def details(record: dict[str, Any], pictures: str, stale: Container[str] = ()) -> str:
    """Everything measured for one system. ``pictures``: their folder, from the page; ``stale``: parts that must run
    again."""
    about = record["machine"]
    out = [f"# {record['key']}: {record['title']}", record["intro"], RULE]
    if record["quick"]:
        out.append(QUICK)
    for name, part in record["parts"].items():
        out.append(f"## {name}")
        if name in stale:
            out.append("**Stale**: measured with other code or weights than today's.")
        if part.get("supervision"):
            out.append(f"Supervision that models of real pictures lack: {part['supervision']}.")
        for row in part["rows"]:
            out.append(_row(row, pictures))
    seconds = sum(part["seconds"] for part in record["parts"].values())
    out.append(
        f"{seconds / 60:.1f} minutes on {about['threads']} of {about['cores']} cores ({about['processor']}), torch"
        f" {about['torch']}, diffusers {about['diffusers']}, transformers {about['transformers']}."
    )
    return "\n\n".join(out) + "\n"


def _row(row: dict[str, Any], pictures: str) -> str:
    """One claim as a short list."""
    items = [
        ("ours", row["measured"]),
        ("baseline", row["baseline"]),
        *(("bar", bar["text"]) for bar in row.get("bars", ())),
        ("void", row.get("void", "")),
        ("source", row["source"]),
        ("n", str(row["n"])),
        ("leans on", row["leans_on"]),
    ]
    lines = [f"- {name}: {_plain(text)}" for name, text in items if text]
    if row["picture"]:
        lines.append(f"- [picture]({pictures}/{row['picture']})")
    mark = "" if not row.get("headline") else " (headline)"
    return f"**{verdict(row)}**{mark} - {_plain(row['claim'])}\n\n" + "\n".join(lines)


def page(text: str, record: dict[str, Any]) -> str:
    """A system's page with what was measured at the end of its section on claims, in place of what stood there."""
    lines = [f"- **{verdict(r)}** - {r['claim']}: {r['measured']} (n {r['n']})" for r in rows_of(record)]
    told = f"[which of it is stale](../../claims/details/{record['key']}.md)"
    block = "\n".join([BEGIN, f"Measured, with 95 % intervals ({told}):", "", *lines, END])
    if BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        return before + block + rest.split(END, 1)[1]
    before, heading, section = text.partition("## Its claims\n")
    if not heading:
        return text
    section, following, rest = section.partition("\n## ")
    return before + heading + section.rstrip() + "\n\n" + block + "\n" + following + rest


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    return text.replace("\n", " ")
