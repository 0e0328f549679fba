"""Cards, parameters, and the ``--with`` grammar."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import cards
from sfumato.cards import (
    Card,
    Field,
    Params,
    build,
    from_recipe,
    method,
    methods,
    parameter_rows,
    parse_with,
    register,
    to_recipe,
)
from sfumato.errors import BadInput, Conflict, UnknownName


class Brush:
    """A pretend system outside the package."""

    CARD = Card(
        key="test_brush",
        title="Brush",
        authors="A. Painter",
        year=1503,
        verb="steer",
        needs=("linear_text_values",),
        defaults_from="section 2",
        cost="none",
        summary="Paints.",
    )

    class Params(Params):
        words: list[str] = Field(default=[], description="what to paint")
        strength: float = Field(
            default=1.0, ge=0.0, le=2.0, description="how hard", json_schema_extra={"unit": "brush"}
        )
        mix: float | list[float] = Field(default=0.5, description="one weight or one per word")
        boxes: list[tuple[float, float, float, float]] = Field(default=[], description="left, top, right, bottom")
        layers: int | None = Field(default=None, description="how many layers")
        wet: bool = Field(default=False, description="leave it wet")

    def __init__(self, **given):
        self.params = self.Params(**given)


@pytest.fixture
def brush(monkeypatch):
    monkeypatch.setattr(cards, "_registered", dict(cards._registered))
    return register(Brush)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("daam", ("daam", {})),
        ("daam:", ("daam", {})),
        (" daam : words=ball", ("daam", {"words": "ball"})),
        ("daam:words=red cube", ("daam", {"words": "red cube"})),
        ("daam:words=[red cube|ball]", ("daam", {"words": ["red cube", "ball"]})),
        ("daam:words=red cube|ball", ("daam", {"words": ["red cube", "ball"]})),
        ("daam:words=[ball]", ("daam", {"words": ["ball"]})),
        ("daam:words=[]", ("daam", {"words": []})),
        ("a:x=1,y=2.5,z=none", ("a", {"x": "1", "y": "2.5", "z": None})),
        ("a:x='none'", ("a", {"x": "none"})),
        ("a:x=\"a, b | [c] = 'd'\",y=2", ("a", {"x": "a, b | [c] = 'd'", "y": "2"})),
        (r"a:x='it\'s'", ("a", {"x": "it's"})),
        ("a:x=''", ("a", {"x": ""})),
        ("a:b=[[0|1]|[2|3]]", ("a", {"b": [["0", "1"], ["2", "3"]]})),
        ("a: x = [ p q | 'r,s' ] , y = 1 ", ("a", {"x": ["p q", "r,s"], "y": "1"})),
        ("a:x=b:c=d", ("a", {"x": "b:c=d"})),
    ],
)
def test_grammar(text, expected):
    assert parse_with(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "name of a system is missing"),
        (":x=1", "name of a system is missing"),
        ("a:x", "expected name=value"),
        ("a:x=", "a value is missing"),
        ("a:x=1,", "expected name=value"),
        ("a:x=1,,y=2", "expected name=value"),
        ("a:=1", "expected name=value"),
        ("a:x=[p,q]", "parted by |"),
        ("a:x=[p|q", "ends without"),
        ("a:x=p]", "found ']'"),
        ("a:x='p", "never closed"),
        ("a:x='p'q", "found 'q'"),
        ("a:x=1,x=2", "given twice"),
        ("a:x=p|", "a value is missing"),
        ("a:x=" + "[" * 5000, "nested"),
    ],
)
def test_grammar_refuses(text, says):
    with pytest.raises(BadInput) as caught:
        parse_with(text)
    message = str(caught.value)
    assert says in message and "\n" not in message and "Write KEY:name=value" in message and len(message) < 400


words = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
values = st.recursive(words, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


def _quote(value):
    if isinstance(value, list):
        return "[" + "|".join(map(_quote, value)) + "]"
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, min_size=1, max_size=4))
def test_anything_survives_quoting(parameters):
    text = "key:" + ",".join(f"{name}={_quote(value)}" for name, value in parameters.items())
    assert parse_with(text) == ("key", parameters)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parse_with(text)
    except BadInput as error:
        assert "\n" not in str(error)


def test_build_turns_text_into_typed_values(brush):
    system = build("test-brush:words=red cube|ball,strength=0.25,mix=[0.1|0.9],layers=3,wet=true,boxes=[[0|0|1|0.5]]")
    assert system.params.words == ["red cube", "ball"]
    assert (system.params.strength, system.params.mix, system.params.layers) == (0.25, [0.1, 0.9], 3)
    assert system.params.wet is True and system.params.boxes == [(0.0, 0.0, 1.0, 0.5)]
    assert build("test_brush:words=ball,mix=0.3,layers=none").params.model_dump(include={"words", "mix", "layers"}) == {
        "words": ["ball"],
        "mix": 0.3,
        "layers": None,
    }


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"strenght": 1}, UnknownName, ["unknown parameter of test_brush 'strenght'", "'strength'"]),
        ({"strength": 3}, BadInput, ["strength of test_brush is 3", "less than or equal to 2", "unit: brush"]),
        ({"strength": "hard"}, BadInput, ["strength of test_brush is 'hard'", "valid number", "how hard"]),
        ({"strength": math.nan}, BadInput, ["strength of test_brush is nan", "finite"]),
        ({"strength": math.inf}, BadInput, ["finite"]),
        ({"words": [1, "ball"]}, BadInput, ["words[0] of test_brush is 1"]),
        ({"layers": 2.5}, BadInput, ["layers of test_brush is 2.5"]),
        ({"words": ["x" * 5000, 3]}, BadInput, ["words[1]"]),
    ],
)
def test_wrong_parameters_are_one_line(brush, given, kind, says):
    with pytest.raises(kind) as caught:
        brush(**given)
    message = str(caught.value)
    assert all(part in message for part in says), message
    assert "\n" not in message and len(message) < 400


def test_rows_for_tables_tell_units_and_limits(brush):
    rows = {name: (default, meaning) for name, default, meaning in parameter_rows(brush.Params)}
    assert rows["strength"] == ("1.0", "how hard (unit: brush, >= 0.0, <= 2.0)")
    assert rows["words"] == ("[]", "what to paint")


def test_recipe_round_trip(brush):
    import json

    system = brush(words=["ball"], strength=0.5)
    again = from_recipe(json.loads(json.dumps(to_recipe(system))))
    assert type(again) is brush and again.params == system.params


def test_recipes_with_older_names_of_parameters_are_read(brush, monkeypatch):
    monkeypatch.setattr(brush.Params, "RENAMED", {"force": "strength"})
    assert from_recipe({"method": "test_brush", "params": {"force": 0.5, "wet": True}}).params.strength == 0.5
    with pytest.raises(UnknownName, match="'frce'"):
        from_recipe({"method": "test_brush", "params": {"frce": 0.5}})


def test_unknown_method_names_the_nearest(brush):
    with pytest.raises(UnknownName, match="Did you mean 'test_brush'"):
        method("test_brus")
    with pytest.raises(UnknownName, match="unknown verb 'stir'"):
        methods("stir")


def test_a_key_belongs_to_one_class(brush):
    assert register(brush) is brush
    with pytest.raises(Conflict, match="already taken"):
        register(type("Other", (), {"CARD": brush.CARD, "Params": brush.Params}))
    with pytest.raises(BadInput, match="needs CARD"):
        register(type("Bare", (), {}))
    with pytest.raises(BadInput, match="nested class Params"):
        register(type("Bare", (), {"CARD": brush.CARD}))


def test_methods_by_verb(brush):
    assert methods("steer")["test_brush"] is brush.CARD
    assert "test_brush" not in methods("explain")


def test_cards_as_read_from_source_are_the_cards_of_the_classes(tmp_path, monkeypatch):
    from tests.examples import write_adapters

    monkeypatch.setenv("SFUMATO_CACHE", str(write_adapters(tmp_path)))
    for key, card in cards._shipped().items():
        cls = method(key)
        assert cls.CARD == card and card.key == key == cls.__module__.rsplit(".", 1)[-1]
        assert cls.__module__ == f"sfumato.{card.verb}.{key}"
        for name, field in cls.Params.model_fields.items():
            assert field.description, f"{key}: parameter {name} has no description"
        assert type(build(card.example)) is cls and card.example.startswith(key)


def test_a_system_is_a_file_or_a_folder(tmp_path):
    card = """CARD = Card(key="{}", title="", authors="", year=1503, verb="{}", needs=(), defaults_from="", cost="",
    summary="")"""
    for key, verb, place in (("one", "steer", "one.py"), ("two", "explain", "two/__init__.py")):
        path = tmp_path / verb / place
        path.parent.mkdir(parents=True)
        path.write_text(card.format(key, verb))
    (tmp_path / "explain/two/part.py").write_text("PART = 1")
    assert {key: card.verb for key, card in cards._cards_under(tmp_path).items()} == {"one": "steer", "two": "explain"}


def test_parameters_are_read_from_the_source_as_importing_gives_them():
    for key in methods():
        assert cards.parameters(key) == cards.parameters_of(method(key).Params)


def test_listing_methods_and_their_parameters_imports_no_torch_and_no_system():
    code = """import sys, sfumato.cards as cards
for key, card in cards.methods().items():
    cards.parameters(key)
print(sorted({"torch", "diffusers", *(f"sfumato.{card.verb}" for card in cards.methods().values())} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(cards.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
