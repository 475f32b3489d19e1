from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.frontend.stop_strings import StopStrings


def stream(strings: list[str], parts: list[str]) -> tuple[list[str], str | None]:
    """What is delivered after each part, the flush included if nothing was found."""
    stop_strings = StopStrings(strings)
    delivered: list[str] = []
    for part in parts:
        text, found = stop_strings.feed(part)
        delivered.append(text)
        if found is not None:
            return delivered, found
    return [*delivered, stop_strings.flush()], None


def reference(strings: list[str], text: str) -> tuple[str, str | None]:
    """By definition: the first prefix that ends with a stop string; the longest of those."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text(alphabet="ab", min_size=1, max_size=5)


@settings(max_examples=500, deadline=None)
@given(st.lists(letters, min_size=1, max_size=3), st.lists(st.text("ab", max_size=4), max_size=10))
def test_equals_definition_however_the_text_is_cut(strings: list[str], parts: list[str]) -> None:
    delivered, found = stream(strings, parts)
    assert ("".join(delivered), found) == reference(strings, "".join(parts))


@settings(max_examples=300, deadline=None)
@given(st.lists(letters, min_size=1, max_size=3), st.lists(st.text("ab", max_size=4), max_size=10))
def test_holds_back_no_more_than_may_become_a_stop_string(
    strings: list[str], parts: list[str]
) -> None:
    delivered, found = stream(strings, parts)
    so_far = ""
    for index in range(len(parts) if found is None else len(delivered) - 1):
        so_far += parts[index]
        suffixes = (so_far[i:] for i in range(len(so_far) + 1))
        held = next(s for s in suffixes if any(string.startswith(s) for string in strings))
        assert "".join(delivered[: index + 1]) == so_far[: len(so_far) - len(held)]


def test_match_across_parts_is_cut_and_the_rest_dropped() -> None:
    assert stream(["END"], ["one E", "N", "D two"]) == (["one ", "", ""], "END")


def test_half_match_is_released_when_it_fails_and_at_the_end() -> None:
    assert stream(["END"], ["an E", "x", "E"]) == (["an ", "Ex", "", "E"], None)


def test_first_complete_match_wins() -> None:
    assert stream(["abcd", "bc"], ["xabcd"]) == (["xa"], "bc")
    assert stream(["b", "ab"], ["xab"]) == (["x"], "ab")


def test_texts_are_searched_apart() -> None:
    first = StopStrings(["END"])
    assert first.feed("one EN") == ("one ", None)
    second = first.fresh()
    assert second.feed("D") == ("D", None)
    assert first.feed("D") == ("", "END")
    assert second.flush() == ""


def test_many_texts_with_long_strings_are_cheap() -> None:
    strings = StopStrings(["a" * 100_000])
    assert [strings.fresh().feed("aa")[0] for _ in range(10_000)] == [""] * 10_000


def test_long_repetitive_strings_are_cheap() -> None:
    strings = ["a" * 5000 + "b"] * 16
    delivered, found = stream(strings, ["a"] * 20_000)
    assert (len("".join(delivered)), found) == (20_000, None)
