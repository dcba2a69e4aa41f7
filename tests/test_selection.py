# SPDX-License-Identifier: Apache-2.0
"""Ranking and choice of layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbl_modifier.selection import Choice, choose_layers

SCORES = {0: 2.5, 1: 0.5, 2: 1.5, 3: 0.1}


def selected(choices: list[Choice]) -> set[int]:
    return {choice.index for choice in choices if choice.selected}


def test_lowest_scores_are_chosen() -> None:
    choices = choose_layers(SCORES, "nmse", num_layers=2)
    assert [choice.index for choice in choices] == [3, 1, 2, 0]
    assert [choice.rank for choice in choices] == [1, 2, 3, 4]
    assert selected(choices) == {3, 1}


def test_reasons_say_rank_criterion_and_budget() -> None:
    choices = choose_layers(SCORES, "cca_bound", num_layers=1)
    assert choices[0].reason == "rank 1 of 4 by cca_bound, num_layers=1"
    assert choices[3].reason == "rank 4 of 4 by cca_bound, num_layers=1"
    choices = choose_layers(SCORES, "nmse", num_layers=1, budget="limit=0.25")
    assert choices[0].reason == "rank 1 of 4 by nmse, num_layers=1 from limit=0.25"


def test_named_layers_are_chosen_whatever_their_rank() -> None:
    choices = choose_layers(SCORES, "nmse", layers=[0, 3])
    assert selected(choices) == {0, 3}
    reasons = {choice.index: choice.reason for choice in choices}
    assert reasons[0] == "named in layers (rank 4 of 4 by nmse)"
    assert reasons[1] == "not in layers (rank 2 of 4 by nmse)"


def test_equal_scores_are_ranked_by_index() -> None:
    choices = choose_layers({7: 1.0, 2: 1.0, 5: 1.0}, "nmse", num_layers=2)
    assert [choice.index for choice in choices] == [2, 5, 7]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_layers": 1, "layers": [0]},
        {"num_layers": 5},
        {"layers": [0, 4]},
    ],
)
def test_impossible_choices_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="choose_layers"):
        choose_layers(SCORES, "nmse", **fields)


@given(st.dictionaries(st.integers(0, 80), st.floats(0, 1e6), min_size=1), st.data())
def test_no_kept_layer_scores_below_a_chosen_one(
    scores: dict[int, float], data: st.DataObject
) -> None:
    num_layers = data.draw(st.integers(1, len(scores)))
    choices = choose_layers(scores, "nmse", num_layers=num_layers)
    chosen = selected(choices)
    assert len(chosen) == num_layers
    assert {choice.index for choice in choices} == set(scores)
    worst = max(scores[index] for index in chosen)
    assert all(scores[index] >= worst for index in set(scores) - chosen)


@given(st.dictionaries(st.integers(0, 80), st.floats(0, 1e6), min_size=2))
def test_order_of_the_scores_does_not_matter(scores: dict[int, float]) -> None:
    backwards = dict(reversed(scores.items()))
    expected = choose_layers(scores, "nmse", num_layers=1)
    assert choose_layers(backwards, "nmse", num_layers=1) == expected
