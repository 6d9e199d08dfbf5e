"""What the copy model expects, and how sure it is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine.ngram import CopyModel


def model_of(tokens: list[int], n_given: int) -> CopyModel:
    """Fed one token after the other beyond what is given."""
    model = CopyModel(n_given)
    for n in range(n_given, len(tokens) + 1):
        model.update(tokens[:n])
    return model


def guesses(model: CopyModel, tokens: list[int], n: int) -> list[int]:
    return model.offer(tokens, n)[0]


def chances(model: CopyModel, tokens: list[int], n: int) -> list[float]:
    return model.offer(tokens, n)[1]


def text(n: int, seed: int, n_words: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(n_words) for _ in range(n)]


def test_what_followed_the_last_three_tokens_is_expected() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    model = model_of(tokens, len(tokens))
    assert guesses(model, tokens, 3) == [4, 5, 6]
    tokens = [1, 2, 3, 4, 9, 9, 2, 3]
    assert guesses(model_of(tokens, 8), tokens, 3) == []


def test_the_place_that_agrees_longest_wins_then_the_latest() -> None:
    tokens = [7, 1, 2, 3, 50, 9, 8, 1, 2, 3, 60, 4, 7, 1, 2, 3]
    assert guesses(model_of(tokens, len(tokens)), tokens, 1) == [50]
    tokens = [1, 2, 3, 50, 0, 1, 2, 3, 60, 5, 1, 2, 3]
    assert guesses(model_of(tokens, len(tokens)), tokens, 1) == [60]


def test_a_loop_goes_round_again() -> None:
    tokens = [9, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]
    assert guesses(model_of(tokens, len(tokens)), tokens, 10) == [4, 1, 2, 3, 4, 1, 2, 3, 4, 1]
    tokens = [5, 5, 5, 5]
    assert guesses(model_of(tokens, 4), tokens, 4) == [5, 5, 5, 5]


def test_a_replaced_word_does_not_lose_the_place() -> None:
    source = text(40, seed=1)
    tokens = [*source, 5000, *source[:12], 6000]  # the 13th token was replaced
    model = model_of(tokens, 41)
    assert guesses(model, tokens, 4) == source[13:17]
    assert chances(model, tokens, 1)[0] < 0.6
    tokens += source[13:20]
    model.update(tokens)
    assert guesses(model, tokens, 3) == source[20:23]


def test_guesses_that_come_true_raise_the_chances_and_others_lower_them() -> None:
    source = text(300, seed=2)
    copied = [*source, *source[:200]]
    sure = chances(model_of(copied, 300), copied, 8)
    # Three tokens agree again and again, and then something else follows.
    misled = text(300, seed=3)
    for i in range(60):
        misled += [*source[4 * i : 4 * i + 3], 2000 + i]
    misled = [*source, *misled, *source[250:253]]
    unsure = chances(model_of(misled, 300), misled, 8)
    assert sure[0] > 0.95 and sure[7] > 0.8
    assert unsure[0] < 0.15
    assert sure == sorted(sure, reverse=True)


def test_no_repeat_no_guess() -> None:
    tokens = list(range(500))
    model = model_of(tokens, 100)
    assert guesses(model, tokens, 5) == []
    assert chances(model, tokens, 5) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60), st.data())
def test_the_pieces_it_is_fed_in_do_not_matter(
    tokens: list[int], n_given: int, data: st.DataObject
) -> None:
    n_given = min(n_given, len(tokens))
    at_once, piecewise = CopyModel(n_given), CopyModel(n_given)
    at_once.update(tokens)
    n = n_given
    while n < len(tokens):
        n += data.draw(st.integers(1, 5))
        piecewise.update(tokens[:n])
    piecewise.update(tokens)
    assert at_once.offer(tokens, 7) == piecewise.offer(tokens, 7)


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 60), st.integers(1, 40))
def test_guesses_are_tokens_each_with_its_chance(tokens: list[int], n_given: int, n: int) -> None:
    model = model_of(tokens, min(n_given, len(tokens)))
    found, sure = model.offer(tokens, n)
    assert len(found) == len(sure) == (n if found else 0)
    assert all(0 < chance < 1 for chance in sure)
    assert sure == sorted(sure, reverse=True)
    assert all(0 <= token <= max(tokens) for token in found)
    assert model.offer(tokens, n) == (found, sure)  # to ask changes nothing


# ---- repeats that differ in places


def lines(numbers: range, common: list[int]) -> list[int]:
    """Each with its number, of two digits, at the beginning and in the middle. Digits are 0 … 9."""
    n = len(common) // 2
    found: list[int] = []
    for number in numbers:
        digits = [number // 10, number % 10]
        found += [*digits, *common[:n], *digits, *common[n:]]
    return found


def count_right(tokens: list[int], n_given: int, *, n_from: int) -> tuple[int, int]:
    """How many next tokens were guessed right, and how many there were, from `n_from` on."""
    model = CopyModel(n_given)
    n_right = 0
    for n in range(n_from, len(tokens)):
        model.update(tokens[:n])
        n_right += guesses(model, tokens[:n], 1) == [tokens[n]]
    return n_right, len(tokens) - n_from


def test_a_list_counts_on() -> None:
    common = [500 + token for token in text(16, seed=4)]
    tokens = lines(range(12, 29), common)
    model = model_of(tokens, 100)
    ahead = lines(range(29, 31), common)
    assert guesses(model, tokens, 19) == ahead[:19]  # a whole line with both its numbers
    assert chances(model, tokens, 19)[-1] > 0.4
    n_right, n = count_right(tokens, 100, n_from=140)
    assert n == 200 and n_right >= 190  # some are missed where twenty begins


def test_where_the_last_lines_differed_the_next_is_not_sure() -> None:
    rng = random.Random(5)
    common = [500 + token for token in text(16, seed=4)]
    tokens: list[int] = []
    for _ in range(12):
        tokens += [*common, 5000 + 10 * rng.randrange(200)]
    model = model_of([*tokens, *common[:8]], 17 * 3)
    sure = chances(model, [*tokens, *common[:8]], 16)
    assert sure[7] > 0.8  # up to the place
    assert sure[8] < 0.15 * sure[7]
    assert sure[15] > 0.8 * sure[8]
    # Behind it the line goes on as sure as before; nothing has to be learnt for that.
    assert chances(model_of(tokens, len(tokens)), tokens, 1)[0] > 0.9
    n_right, n = count_right([*tokens, *common], 17 * 3, n_from=17 * 3)
    assert n - n_right <= 10  # one in each line


def replaced_text(seed: int) -> tuple[list[int], list[int]]:
    """A text in which one token comes four times, and the same with another in its place."""
    source = text(90, seed=seed)
    for place in (20, 40, 60, 80):
        source[place] = 7000
    edited = [8000 if token == 7000 else token for token in source]
    return source, edited


def test_what_was_replaced_is_replaced_again() -> None:
    source, edited = replaced_text(seed=6)
    tokens = [*source, *edited[:30]]
    model = model_of(tokens, 90)
    assert guesses(model, tokens, 40) == edited[30:70]
    # Left as it is once, it is no longer expected to be replaced.
    tokens = [*source, *edited[:40], *source[40:50]]
    assert guesses(model_of(tokens, 90), tokens, 20) == source[50:70]


def test_a_word_put_in_or_left_out_does_not_lose_the_place() -> None:
    source = text(60, seed=7)
    source[30] = source[20]  # it was not replaced, so no more will be
    added = [*source, *source[:20], 5000, source[20]]
    assert guesses(model_of(added, 60), added, 15) == source[21:36]
    left_out = [*source, *source[:20], source[21]]
    assert guesses(model_of(left_out, 60), left_out, 5) == source[22:27]


def test_a_repeat_that_has_ended_is_given_up() -> None:
    source = text(60, seed=8)
    tokens = [*source, *source[:40], *(5000 + i for i in range(5))]
    model = model_of(tokens, 60)
    assert guesses(model, tokens, 5) == []
    # What comes behind a number too high for a token is not counted up to.
    tokens = [*source[:20], 998, *source[20:30], *source[:20], 999, *source[20:30], *source[:20]]
    highest = max(tokens)
    assert highest == 999
    assert max(guesses(model_of(tokens, 31), tokens, 12)) <= highest


def test_the_prompt_teaches_no_chances() -> None:
    source = text(40, seed=9)
    again = [*source, *source, *source[:10]]
    fresh = chances(model_of(again, len(again)), again, 3)
    taught = chances(model_of(again, 40), again, 3)
    assert fresh[0] == pytest.approx(0.97)
    assert taught[0] > fresh[0]


# ---- what a repeat is trusted with


def test_behind_a_difference_a_long_repeat_is_trusted_again_at_once() -> None:
    source = text(90, seed=10)
    tokens = [*source, *source[:40], 5000, source[41]]
    behind = chances(model_of(tokens, 90), tokens, 4)
    assert behind[0] > 0.9
    # Straight behind it, it is not; nor is a repeat as short as what agrees there.
    assert chances(model_of(tokens[:-1], 90), tokens[:-1], 1)[0] < 0.3
    young = [*source, 5000, *source[41:44]]
    assert chances(model_of(young, 90), young, 1)[0] <= 0.5


def test_behind_a_word_put_in_the_place_is_sure_again() -> None:
    source = text(90, seed=11)
    tokens = [*source, *source[:40], 5000, source[40]]
    model = model_of(tokens, 90)
    assert guesses(model, tokens, 3) == source[41:44]
    assert chances(model, tokens, 1)[0] > 0.8


def test_a_replacement_is_doubted_until_it_has_come_again() -> None:
    source, edited = replaced_text(seed=12)
    once = [*source, *edited[:40]]
    model = model_of(once, 90)
    assert guesses(model, once, 1) == [8000]
    assert chances(model, once, 1)[0] < 0.5
    twice = [*source, *edited[:60]]
    assert chances(model_of(twice, 90), twice, 1)[0] > 0.7
    # The model has not obeyed: it is what it was before, and where it comes once more, doubted.
    kept = [*source, *edited[:60], *source[60:80]]
    model = model_of(kept, 90)
    assert guesses(model, kept, 1) == [7000]
    assert chances(model, kept, 1)[0] > 0.9


def test_where_a_short_repeat_ended_a_long_one_is_not_doubted() -> None:
    """Three tokens agree by chance, and the fourth does not. A copy of that is like any other."""
    source = text(120, seed=13)
    source[60:63] = source[10:13]
    tokens = [*source, *source[:50]]
    sure = chances(model_of(tokens, 120), tokens, 20)
    assert guesses(model_of(tokens, 120), tokens, 20) == source[50:70]
    assert sure[19] > 0.7
