# SPDX-License-Identifier: Apache-2.0
"""How many layers, and the reasons given."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbl_modifier.search.budget import count_layers, explain


def test_reasons_say_rank_criterion_and_limit() -> None:
    choices = explain([3, 1, 2, 0], {3, 2}, "nmse", "num_layers=2", {1: "too bad"})
    assert [choice.index for choice in choices] == [3, 1, 2, 0]
    assert [choice.rank for choice in choices] == [1, 2, 3, 4]
    assert [choice.selected for choice in choices] == [True, False, True, False]
    assert choices[1].reason == "rank 2 of 4 by nmse, too bad"
    assert choices[2].reason == "rank 3 of 4 by nmse, num_layers=2"


def count(**fields: Any) -> tuple[int, str]:
    fields = {"total": 16, "linear": 0, "available": 16} | fields
    return count_layers(
        fields.pop("num_layers", None), fields.pop("kv_cache_reduction", None), **fields
    )


def test_count_and_where_it_comes_from() -> None:
    assert count(num_layers=3) == (3, "num_layers=3")
    expected = 6, "num_layers=6 from kv_cache_reduction=0.375"
    assert count(kv_cache_reduction=0.375) == expected
    assert count(kv_cache_reduction=0.375, linear=2, available=14)[0] == 4
    assert count(available=5) == (5, "all 5 candidates")


@given(st.integers(1, 200), st.data())
def test_fractions_of_layers_are_exact(total: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, total))
    fields = {"total": total, "available": total}
    assert count(kv_cache_reduction=wanted / total, **fields)[0] == wanted
    if wanted < total:
        above = wanted / total + 1e-6
        assert count(kv_cache_reduction=above, **fields)[0] == wanted + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 5, "available": 4}, r"num_layers: there are 4 .* got 5"),
        (
            {"kv_cache_reduction": 0.5, "linear": 8, "available": 8},
            r"8 of 16 layers, of which 8 are linear already .* above 0\.5, up to 1\.",
        ),
        (
            {"kv_cache_reduction": 0.5, "available": 4},
            r"8 of 16 layers.* above 0, up to 0\.25\.",
        ),
    ],
)
def test_more_than_there_are(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(**fields)
