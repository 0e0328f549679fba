"""The documentation keeps up with the code: every error and every system has its page, and links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("key", sorted(cards._shipped()))
def test_every_system_has_a_page_and_a_row(key):
    assert (ROOT / "docs" / "systems" / f"{key}.md").is_file()
    assert f"({key}.md)" in (ROOT / "docs" / "systems" / "README.md").read_text(encoding="utf-8")
    assert f"| `{key}` |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "index.md"], ids=lambda page: page.name)
def test_examples_of_with_parse(page):
    for text in re.findall(r"--with \"([^\"]+)\"|with_=\[\"([^\"]+)\"\]", page.read_text(encoding="utf-8")):
        assert [type(each).CARD.key for each in app.build_all(["".join(text)])]
