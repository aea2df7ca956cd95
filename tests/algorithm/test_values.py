"""Values: equality is canonical text, whatever the process, and nothing malformed is read."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azr_async.algorithm.values import (
    MAX_DEPTH,
    MAX_NODES,
    TooLarge,
    Unanswerable,
    decode,
    encode,
    encode_in_order,
    equal,
    literal,
    read,
)

ROOT = Path(__file__).parents[2]

atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False, allow_infinity=False).filter(lambda z: "-0" not in repr(z))
)
hashables = st.recursive(atoms, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=6)
values = st.recursive(
    atoms | st.just(math.nan),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
        | st.frozensets(hashables, max_size=4)
    ),
    max_leaves=20,
)


Plain = Any


def shape(value: Plain) -> Plain:
    """An independent, slow meaning of strict equality: comparable with == ."""
    kind = type(value).__name__
    if isinstance(value, float | complex):
        return (kind, repr(value))
    if isinstance(value, list | tuple):
        return (kind, tuple(shape(item) for item in value))
    if isinstance(value, set | frozenset):
        return (kind, frozenset(shape(item) for item in value))
    if isinstance(value, dict):
        return (kind, frozenset((shape(key), shape(item)) for key, item in value.items()))
    return (kind, value)


@given(values)
def test_a_value_survives_encoding(value: object) -> None:
    assert shape(decode(encode(value))) == shape(value)


@given(values, values)
def test_encodings_are_equal_exactly_if_the_values_are(first: object, second: object) -> None:
    assert (encode(first) == encode(second)) == (shape(first) == shape(second))


@given(values)
def test_equality_is_reflexive_and_survives_a_copy(value: object) -> None:
    assert equal(encode(value), encode(decode(encode(value))))


@given(values, values, st.sampled_from([0.0, 1e-9, 0.5]))
def test_equality_is_symmetric(first: object, second: object, tolerance: float) -> None:
    assert equal(encode(first), encode(second), tolerance) == equal(encode(second), encode(first), tolerance)


@given(values)
def test_a_tolerance_never_separates_what_is_equal(value: object) -> None:
    assert equal(encode(value), encode(value), 0.5)


@given(values)
def test_what_a_child_sends_unsorted_is_read_as_the_canonical_text(value: object) -> None:
    assert read(encode_in_order(value)) == (encode(value), literal(value))


@given(values)
def test_reading_is_idempotent(value: object) -> None:
    assert read(encode(value)).canonical == encode(value)


@given(values)
def test_a_literal_means_the_value(value: object) -> None:
    names = {"nan": math.nan, "inf": math.inf, "frozenset": frozenset, "set": set}
    meaning = eval(literal(value), {"__builtins__": {}}, names)  # our own text
    assert encode(meaning) == encode(value)


@given(st.text())
def test_arbitrary_text_is_refused_or_read_back_the_same(text: str) -> None:
    try:
        canonical = read(text).canonical
    except ValueError:
        return
    assert read(canonical).canonical == canonical


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("tdszbcfx"), inner, max_size=2),
    max_leaves=20,
)


@given(json_trees)
def test_arbitrary_json_is_refused_or_read_back_the_same(tree: object) -> None:
    try:
        canonical = read(json.dumps(tree)).canonical
    except ValueError:
        return
    assert read(canonical).canonical == canonical


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, True),
        (1, 1.0),
        (0, False),
        ([1], (1,)),
        ({1}, frozenset({1})),
        (0.0, -0.0),
        ("1", 1),
        (b"a", "a"),
        ({1: 2}, {1.0: 2}),
        ({1: 2}, {True: 2}),
        ({1}, {True}),
        ([[1]], [[1.0]]),
        (1, 1 + 0j),
        (None, "None"),
        (0.1 + 0.2, 0.3),
        (math.inf, -math.inf),
        (math.inf, math.nan),
    ],
)
def test_values_of_different_types_or_signs_differ(first: object, second: object) -> None:
    assert encode(first) != encode(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1, 2, 3}, {3, 2, 1}),
        (math.nan, -math.nan),
        ([math.nan], [float("nan")]),
        ({frozenset({1, 2})}, {frozenset({2, 1})}),
    ],
)
def test_order_and_identity_do_not_matter(first: object, second: object) -> None:
    assert encode(first) == encode(second)


def test_a_literal_of_a_negative_imaginary_number_means_it() -> None:
    assert literal(complex(0.0, -1.0)) == "(0-1j)"
    assert encode(0 - 1j) == encode(complex(0.0, -1.0))


def test_a_literal_keeps_the_order_of_a_dict() -> None:
    assert literal({"b": 1, "a": 2}) == "{'b': 1, 'a': 2}"


def test_a_literal_writes_numbers_of_a_set_by_size() -> None:
    assert literal({10, 9, 100, 0.5}) == "{0.5, 9, 10, 100}"


def test_encodings_do_not_depend_on_the_hash_seed() -> None:
    script = (
        "from azr_async.algorithm.values import encode, literal;"
        "v = {'s': {str(i) for i in range(50)}, 'z': frozenset({b'x', 'x', (1, 'y')})}; print(encode(v), literal(v))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": os.fspath(ROOT)},
            capture_output=True,
            check=True,
            timeout=30,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(texts) == 1


def test_a_tolerance_applies_to_floats_and_to_nothing_else() -> None:
    assert equal(encode([1.0, {"a": (2.0,)}]), encode([1.0 + 1e-12, {"a": (2.0 - 1e-12,)}]), 1e-9)
    assert not equal(encode(1.0), encode(1.1), 1e-9)
    assert not equal(encode(1.0), encode(1), 1e-9)
    assert not equal(encode(10**12), encode(10**12 + 1), 1e-3)
    assert not equal(encode([1.0]), encode([1.0, 1.0]), 1e-3)


class Everything:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        Everything(),
        Text("a"),
        [Everything()],
        {Text("k"): 1},
        range(3),
        bytearray(b"a"),
        object,
        len,
        ...,
        {math.nan},
        {math.nan: 1},
        {(1, math.nan)},
        complex(0.0, -0.0),
        complex(math.inf, 1),
        "\ud83d\ude00",
        ["a\ud800"],
        {"\udfff": 1},
    ],
)
def test_what_nobody_could_write_as_an_answer_is_refused(value: object) -> None:
    with pytest.raises(Unanswerable):
        encode(value)


def test_library_containers_are_refused() -> None:
    from collections import Counter, OrderedDict, defaultdict, deque
    from decimal import Decimal
    from fractions import Fraction

    for value in (Counter("a"), OrderedDict(a=1), defaultdict(int), deque([1]), Decimal(1), Fraction(1, 2)):
        with pytest.raises(Unanswerable):
            encode(value)


def test_values_beyond_the_limits_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    shared: list[Any] = [0]
    for _ in range(40):
        shared = [shared, shared]
    circular: list[Any] = []
    circular.append(circular)
    for value in (deep, shared, circular, [0] * MAX_NODES, 10**4300):
        with pytest.raises(TooLarge):
            encode(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NaN",
        "1e999",
        "[1,",
        "[" * 100_000,
        "{}",
        '{"t":[1],"s":[2]}',
        '{"x":[]}',
        '{"t":1}',
        '{"f":"1"}',
        '{"f":{}}',
        '{"b":"0g"}',
        '{"b":"AA"}',
        '{"b":"a a"}',
        '{"c":[1,2]}',
        '{"c":[1.0]}',
        '{"d":[[1]]}',
        '{"d":[[[1],2]]}',
        '{"s":[[1]]}',
        '{"s":[{"s":[]}]}',
        '{"s":[{"d":[]}]}',
        '{"s":[{"f":"nan"}]}',
        '{"z":[{"t":[[]]}]}',
        "9" * 5000,
        "[" + "0," * MAX_NODES + "0]",
    ],
)
def test_malformed_or_unbounded_encodings_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the promise is ValueError, whatever the message
        decode(text)
    with pytest.raises(ValueError):  # noqa: PT011
        read(text)


TWICE = [
    '{"s":[1,1]}',
    '{"z":["a","a"]}',
    '{"s":[1,true]}',
    '{"s":[0,-0.0]}',
    '{"s":[1,{"c":[1.0,0.0]}]}',
    '{"s":[null,null]}',
    '{"s":[{"b":"00"},{"b":"00"}]}',
    '{"s":[{"t":[1,2]},{"t":[1.0,2]}]}',
    '{"s":[{"z":[1,2]},{"z":[2,true]}]}',
    '{"d":[[1,2],[1.0,3]]}',
    '{"d":[["a",2],["b",2],["a",3]]}',
]


@pytest.mark.parametrize("text", TWICE)
def test_a_member_cannot_be_there_twice(text: str) -> None:
    for take in (decode, read):
        with pytest.raises(ValueError, match="twice"):
            take(text)


@given(st.lists(hashables, max_size=6))
def test_members_are_the_same_exactly_if_python_says_so(members: list[object]) -> None:
    text = f'{{"s":[{",".join(map(encode, members))}]}}'
    if len(set(members)) == len(members):
        assert read(text).canonical == encode(set(members))
    else:
        with pytest.raises(ValueError, match="twice"):
            read(text)


@pytest.mark.parametrize("text", ['"\\ud800"', '["\\udc00a"]', '{"s":["\\ud83d"]}', '{"d":[["\\ud83d",1]]}'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        read(text)


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert read('"\\ud83d\\ude00"') == ('"\\ud83d\\ude00"', "'\U0001f600'")
