"""The sandbox's memory of verdicts: bounded by bytes, whatever the texts are."""

from hypothesis import given
from hypothesis import strategies as st

from azr_async.adapters.sandbox.recent import ENTRY_BYTES, Recent, digest


def test_the_oldest_entries_make_room() -> None:
    recent: Recent[str] = Recent(3 * (ENTRY_BYTES + 10))
    for name in "abc":
        recent.put(digest(name), name, 10)
    assert recent.get(digest("a")) == "a"  # used last, from now on
    recent.put(digest("d"), "d", 10)
    assert [recent.get(digest(name)) for name in "abcd"] == ["a", None, "c", "d"]


def test_a_large_entry_costs_as_many_as_it_takes() -> None:
    recent: Recent[str] = Recent(10 * ENTRY_BYTES)
    for name in "abcd":
        recent.put(digest(name), name, 0)
    recent.put(digest("large"), "large", 7 * ENTRY_BYTES)
    assert [recent.get(digest(name)) for name in ("a", "b", "c", "d", "large")] == [None, None, "c", "d", "large"]
    recent.put(digest("too large"), "too large", 100 * ENTRY_BYTES)
    assert recent.get(digest("too large")) is None


def test_an_entry_that_is_put_again_counts_once() -> None:
    recent: Recent[int] = Recent(2 * ENTRY_BYTES)
    recent.put(digest("kept"), 0, 0)
    for number in range(5):
        recent.put(digest("again"), number, 0)
    assert (recent.get(digest("kept")), recent.get(digest("again"))) == (0, 4)


@given(st.text(st.characters()), st.text(st.characters()))
def test_a_digest_stands_for_its_text(first: str, second: str) -> None:
    assert (digest(first) == digest(second)) == (first == second)
    assert len(digest(first + "\ud800")) == 16
