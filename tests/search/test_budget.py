# SPDX-License-Identifier: Apache-2.0
"""How many layers, and the reasons given."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbl_modifier.kv_cache import KVCache, LayerCache
from nbl_modifier.search.budget import (
    Budget,
    count_for_kv_cache,
    count_layers,
    explain,
    frees_nothing,
)


def test_reasons_say_rank_criterion_and_limit() -> None:
    choices = explain([3, 1, 2, 0], {3, 2}, "nmse", "num_layers=2", {1: "too bad"})
    assert [choice.index for choice in choices] == [3, 1, 2, 0]
    assert [choice.rank for choice in choices] == [1, 2, 3, 4]
    assert [choice.selected for choice in choices] == [True, False, True, False]
    assert choices[1].reason == "rank 2 of 4 by nmse, too bad"
    assert choices[2].reason == "rank 3 of 4 by nmse, num_layers=2"


def test_count_and_where_it_comes_from() -> None:
    assert count_layers(3, 16) == (3, "num_layers=3")
    assert count_layers(None, 5) == (5, "all 5 candidates")
    with pytest.raises(ValueError, match=r"num_layers: there are 4 .* got 5"):
        count_layers(5, 4)


def count(reduction: float, base: KVCache, **fields: Any) -> tuple[int, str, Any]:
    arguments: dict[str, Any] = {
        "cache": base,
        "available": range(len(base.layers)),
        "length": 8192,
    } | fields
    return count_for_kv_cache(reduction, base=base, **arguments)


def alike(total: int) -> KVCache:
    return KVCache((LayerCache(4096.0),) * total, 16)


FULL, SLIDING = LayerCache(4096.0), LayerCache(4096.0, 4096)
GEMMA_2 = KVCache((SLIDING, FULL) * 21, 16)


def test_layers_alike_are_counted() -> None:
    base = alike(16)
    expected = 6, "num_layers=6 from kv_cache_reduction=0.375", {FULL: 6}
    assert count(0.375, base) == expected
    earlier = base.without([0, 1])
    assert count(0.375, base, cache=earlier, available=range(2, 16))[0] == 4


@given(st.integers(1, 200), st.data())
def test_fractions_of_layers_are_exact(total: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, total))
    assert count(wanted / total, alike(total))[0] == wanted
    if wanted < total:
        assert count(wanted / total + 1e-6, alike(total))[0] == wanted + 1


def test_layers_of_two_kinds_are_counted_as_vllm_allots_them() -> None:
    number, reason, quota = count(0.1, GEMMA_2)
    assert (number, quota) == (6, {SLIDING: 3, FULL: 3})
    assert reason == (
        "num_layers=6 from kv_cache_reduction=0.1: 3 with sliding-window attention and "
        "3 with full attention, for sequences of 8192 tokens"
    )
    freed = 1 - GEMMA_2.without(range(6)).allotted(8192) / GEMMA_2.allotted(8192)
    assert freed >= 0.1


def test_quota_ends_with_each_kind() -> None:
    kinds = dict(enumerate(GEMMA_2.layers))
    budget = Budget(6, "why", kinds=kinds, quota={SLIDING: 3, FULL: 1})
    assert budget.spent([]) == {}
    spent = budget.spent([1, 0])
    assert spent.keys() == set(range(3, 42, 2))
    assert spent[3] == "no more with full attention: why"
    assert Budget(6, "why").spent(range(6)) == {}


def test_choice_that_frees_nothing_is_told() -> None:
    six = range(1, 12, 2)
    found = frees_nothing(GEMMA_2, six, range(42), 8192)
    assert found is not None
    assert re.search(
        r"layers \[1, 3, 5, 7, 9, 11\]: .* sequences of 8192 tokens \(1\.000 times .* "
        r"fewest that free some are 1 with sliding-window attention and 1 with full",
        found,
    )
    assert frees_nothing(GEMMA_2, range(6), range(42), 8192) is None
    # no way out
    alone = frees_nothing(GEMMA_2, [1], [1], 8192)
    assert alone is not None
    assert "fewest" not in alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cache": alike(16).without(range(8)), "available": range(8, 16)},
            r"0\.5 are free already, and the 8 layers .* above 0\.5, up to 1\.",
        ),
        ({"available": range(4)}, r"4 layers .* got 0\.5. .* above 0, up to 0\.25\."),
    ],
)
def test_more_than_there_are(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(0.5, alike(16), **fields)
