"""What a result depends on: files found through imports, hashes that comments do not change."""

from __future__ import annotations

import json

from claims import sources
from claims.core import HERE


def names(*files):
    return {sources._module(path) for path in sources.dependencies(*files)}


def test_imports_are_followed_into_the_library():
    found = names(HERE / "attend_excite.py", sources.system_files("attend_excite"))
    assert {"claims.attend_excite", "claims.common", "claims.core", "sfumato.steer.attend_excite.word_maps"} <= found
    assert {"sfumato.sampling.loop", "sfumato.attention.seam", "sfumato.metrics.stats"} <= found
    assert not {name for name in found if name.startswith(("sfumato.edit", "sfumato.bench", "sfumato.app"))}
    assert "sfumato.sampling.loop" not in names(HERE / "sources.py")


def test_a_system_known_by_its_key_only_counts_too():
    assert sources.system_files("prompt_to_prompt") and not sources.system_files("zoo")
    assert "sfumato.edit.prompt_to_prompt.values" in names(HERE / "core.py", sources.system_files("prompt_to_prompt"))


def test_code_counts_and_words_about_it_do_not(tmp_path):
    def hashed(text):
        (tmp_path / "a.py").write_text(text)
        sources.code_hash.cache_clear()
        return sources.code_hash(str(tmp_path / "a.py"))

    first = hashed('"""Doc."""\ndef f(x):\n    """More."""\n    return x + 1\n')
    assert hashed('"""Other."""\n\n\ndef f(x):  # said\n    return x + 1\n') == first
    assert hashed("def f(x):\n    return x + 2\n") != first

    error = hashed("def f(x):\n    if x < 0:\n        raise BadInput(f'{x} is small.')\n")
    assert hashed("def f(x):\n    if x < 0:\n        raise BadInput('give more', x) from None\n") != error  # from
    assert hashed("def f(x):\n    if x < 0:\n        raise BadInput(f'{x} is too small; give more.')\n") == error
    assert hashed("def f(x):\n    if x < 0:\n        raise ValueError(f'{x} is small.')\n") != error
    assert hashed("def f(x):\n    if x < 1:\n        raise BadInput(f'{x} is small.')\n") != error

    field = hashed("x: int = Field(default=2, ge=1, description='how many')\n")
    assert hashed("x: int = Field(default=2, ge=1, description='how many of them')\n") == field
    assert hashed("x: int = Field(default=3, ge=1, description='how many')\n") != field


def test_supervision_is_read_from_the_cards(tmp_path):
    for name, loss in (("one", {"align": 0.1, "edge": 2}), ("two", {"align": 0.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sfumato.json").write_text(json.dumps({"recipe": {"loss": loss}}))
    said = sources.supervision([tmp_path / "one", tmp_path / "two", tmp_path / "none"])
    assert said == "one: align 0.1 (attention maps drawn to each word's true cells)"
