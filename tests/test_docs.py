"""The documentation keeps up with the code: every error and every system has its page, and links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from docs import generate
from sfumato import app, cards, errors

ROOT = Path(__file__).parents[1]
ERRORS = [
    name for name, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.SfumatoError) and cls is not errors.SfumatoError
]  # fmt: skip
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_has_a_page(name):
    page = (ROOT / "docs" / "errors" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n") and all(f"**{part}**" in page for part in ("Symptom", "Cause", "Fix"))
    assert f"({name}.md)" in (ROOT / "docs" / "errors" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(generate.tables()), ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_code(page):
    blocks = generate.tables()[page]
    assert page.read_text(encoding="utf-8") == generate.written(page, blocks), "stale: run python -m docs.generate"


def test_a_stale_table_is_noticed(tmp_path):
    page = tmp_path / "daam.md"
    page.write_text("# DAAM\n\n<!-- generated: system -->\nold\n<!-- end of generated -->\n\nThe rest.\n")
    text = generate.written(page, {"system": generate.system})
    assert "old" not in text and "| `words` | `[]` |" in text and text.endswith("\nThe rest.\n")
    page.write_text(text.replace("`words`", "`wrods`"))
    assert generate.written(page, {"system": generate.system}) == text != page.read_text()


def test_no_page_is_of_a_system_that_is_gone():
    pages = {path.stem for path in (ROOT / "docs" / "systems").glob("*.md")} - {"README"}
    assert pages == set(cards._shipped())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "index.md"], ids=lambda page: page.name)
def test_examples_of_with_parse(page):
    for text in re.findall(r"--with \"([^\"]+)\"|with_=\[\"([^\"]+)\"\]", page.read_text(encoding="utf-8")):
        assert [type(each).CARD.key for each in app.build_all(["".join(text)])]
