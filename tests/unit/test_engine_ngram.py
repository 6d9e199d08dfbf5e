"""What the copy model expects, and how sure it is."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine.ngram import CopyModel


def model_of(tokens: list[int], n_given: int) -> CopyModel:
    """Fed one token after the other beyond what is given."""
    model = CopyModel(n_given)
    for n in range(n_given, len(tokens) + 1):
        model.update(tokens[:n])
    return model


def text(n: int, seed: int, n_words: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(n_words) for _ in range(n)]


def test_what_followed_the_last_three_tokens_is_expected() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    model = model_of(tokens, len(tokens))
    assert model.draft(tokens, 3) == [4, 5, 6]
    assert model_of([1, 2, 3, 4, 9, 9, 2, 3], 8).draft(tokens, 3) == []


def test_the_place_that_agrees_longest_wins_then_the_latest() -> None:
    tokens = [7, 1, 2, 3, 50, 9, 8, 1, 2, 3, 60, 4, 7, 1, 2, 3]
    assert model_of(tokens, len(tokens)).draft(tokens, 1) == [50]
    tokens = [1, 2, 3, 50, 0, 1, 2, 3, 60, 5, 1, 2, 3]
    assert model_of(tokens, len(tokens)).draft(tokens, 1) == [60]


def test_a_loop_goes_round_again() -> None:
    tokens = [9, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]
    assert model_of(tokens, len(tokens)).draft(tokens, 10) == [4, 1, 2, 3, 4, 1, 2, 3, 4, 1]
    tokens = [5, 5, 5, 5]
    assert model_of(tokens, 4).draft(tokens, 4) == [5, 5, 5, 5]


def test_a_replaced_word_does_not_lose_the_place() -> None:
    source = text(40, seed=1)
    tokens = [*source, 5000, *source[:12], 6000]  # the 13th token was replaced
    model = model_of(tokens, 41)
    assert model.draft(tokens, 4) == source[13:17]
    assert model.chances(1)[0] < 0.6
    tokens += source[13:20]
    model.update(tokens)
    assert model.draft(tokens, 3) == source[20:23]


def test_guesses_that_come_true_raise_the_chances_and_others_lower_them() -> None:
    source = text(300, seed=2)
    copied = [*source, *source[:200]]
    sure = model_of(copied, 300).chances(8)
    # Three tokens agree again and again, and then something else follows.
    misled = text(300, seed=3)
    for i in range(60):
        misled += [*source[4 * i : 4 * i + 3], 2000 + i]
    misled = [*source, *misled, *source[250:253]]
    unsure = model_of(misled, 300).chances(8)
    assert sure[0] > 0.95 and sure[7] > 0.8
    assert unsure[0] < 0.15
    assert sure == sorted(sure, reverse=True)


def test_no_repeat_no_guess() -> None:
    tokens = list(range(500))
    model = model_of(tokens, 100)
    assert model.draft(tokens, 5) == []
    assert model.chances(5) == []


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
    assert at_once.draft(tokens, 7) == piecewise.draft(tokens, 7)
    assert at_once.chances(7) == piecewise.chances(7)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 60), st.integers(1, 40))
def test_guesses_are_what_once_followed(tokens: list[int], n_given: int, n: int) -> None:
    model = model_of(tokens, min(n_given, len(tokens)))
    draft = model.draft(tokens, n)
    chances = model.chances(n)
    assert len(draft) == len(chances) == (n if draft else 0)
    assert all(0 < chance < 1 for chance in chances)
    if draft:
        grown = tokens + draft
        shifts = [
            shift
            for shift in range(1, len(tokens))
            if all(grown[i] == grown[i - shift] for i in range(len(tokens), len(grown)))
        ]
        assert shifts
