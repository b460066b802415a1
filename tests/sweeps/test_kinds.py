"""Kinds of parameters: what a text means as one, and what is refused."""

import pytest

from samlib.sweeps.kinds import ANYTHING, NONE, Kind, load_yaml, union
from samlib.sweeps.notebooks import Parameter


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("float", "1e-3", 0.001),
        ("float", 2, 2.0),
        ("int", "1e3", 1000),
        ("int", "12345678901234567890", 12345678901234567890),
        ("number", "3", 3),
        ("number", 0.5, 0.5),
        ("bool", "False", False),
        ("str", "real", "real"),
        ("list", "[0.1, 1e-3]", [0.1, 0.001]),
        ("dict", {"a": ["1e2"]}, {"a": [100.0]}),
        ("", "1e-3", 0.001),
        ("", "word", "word"),
    ],
)
def test_values_become_what_they_mean(kind, value, expected):
    converted = Kind(kind).convert(value)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("float", "x"), ("float", True), ("float", None), ("int", 0.5), ("int", "nan"), ("bool", 2)),
        *(("bool", "maybe"), ("str", 1), ("list", "1"), ("list", "[1"), ("dict", [1]), ("number", "x")),
    ],
)
def test_values_of_the_wrong_type_are_named(kind, value):
    with pytest.raises(ValueError, match=r"^x must be .*, got "):
        Parameter("x", Kind(kind)).convert(value)


def test_none_is_for_optional_parameters():
    optional = Parameter("x", union(Kind("int"), NONE))
    assert optional.convert("None") is None
    with pytest.raises(ValueError, match=r"^x must be a whole number or None, got 'x'"):
        optional.convert("x")


def test_zero_has_no_sign_and_a_whole_number_one_form():
    for kind in ("float", "number", ""):
        for zero in ("-0.0", -0.0):
            assert str(Kind(kind).convert(zero)) in ("0.0", "0")
    assert Kind("list").convert("[-0.0, {a: -0.0}]") == [0.0, {"a": 0.0}]
    assert "-" not in str(Kind("dict").convert({"a": [-0.0]}))
    for three in ("3", "3.0", 3.0, "3e0", 3):
        assert repr(Kind("number").convert(three)) == "3"
    assert [Kind("number").convert(v) for v in ("inf", "0.5")] == [float("inf"), 0.5]


def test_a_union_takes_what_any_of_its_kinds_takes_the_narrowest_first():
    several = union(Kind("str"), Kind("float"), Kind("bool"), NONE)
    for value, expected in [("0.5", 0.5), ("true", True), (True, True), ("auto", "auto"), ("None", None), (None, None)]:
        converted = several.convert(value)
        assert converted == expected
        assert type(converted) is type(expected)
    assert repr(union(Kind("float"), Kind("int")).convert("3")) == "3"
    assert union(Kind("int"), ANYTHING) == ANYTHING
    assert union(Kind("int"), union(Kind("int"), NONE), NONE) == Kind("union", (Kind("int"), NONE))
    with pytest.raises(ValueError, match="must be a number or None, got 'abc'"):
        union(Kind("float"), NONE).convert("abc")


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0"])
def test_a_choice_is_found_by_what_a_text_means(value):
    assert repr(Kind("choice", choices=("a", 2, 1, True)).convert(value)) == "1"


def test_what_is_no_choice_is_refused():
    choice = Kind("choice", choices=("relu", 1, False, None))
    assert [choice.convert(v) for v in ("relu", "false", "None", None)] == ["relu", False, None, None]
    for value in ("sigmoid", 2, True, "true", 0.5, ["relu"]):
        with pytest.raises(ValueError, match="must be 'relu' or 1 or False or None, got"):
            choice.convert(value)


def test_entries_of_lists_and_dicts_are_checked():
    numbers = Kind("list", (Kind("float"),))
    assert numbers.convert("[1, 1e-3]") == [1.0, 0.001]
    assert Kind("dict", (numbers,)).convert("{a: [1]}") == {"a": [1.0]}
    with pytest.raises(ValueError, match=r"must be a list, each entry a number, got '\[1, x\]'"):
        numbers.convert("[1, x]")


def test_only_what_json_knows_is_a_value():
    assert ANYTHING.convert("2024-01-01") == "2024-01-01"  # a text, no date
    assert ANYTHING.convert("{1: 2}") == {"1": 2}
    assert [ANYTHING.convert(text) for text in ("&amp;", "@home", "a: b: c", "\x00")] == [
        "&amp;",
        "@home",
        "a: b: c",
        "\x00",
    ]
    for value in ("!!set {a}", "!!binary aGk=", object(), "[!!set {a}]", "[1", "{a: 1, a: 2}"):
        with pytest.raises(ValueError, match="must be a number, text, truth value, list or dict"):
            ANYTHING.convert(value)


def test_a_name_stands_once_in_yaml():
    assert load_yaml("a: &base {b: 1}\nc: {<<: *base, b: 2}") == {"a": {"b": 1}, "c": {"b": 2}}
    for text in ("{a: 1, a: 1}", "x: {b: 1, 'b': 2}"):
        with pytest.raises(Exception, match="is given twice"):
            load_yaml(text)
    with pytest.raises(ValueError, match="must be a dict"):
        Kind("dict").convert("{a: 1, a: 2}")
