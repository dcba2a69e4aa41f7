# SPDX-License-Identifier: Apache-2.0
"""How many logits are in float32 at a time."""

from __future__ import annotations

import pytest

from nbl_modifier.numerics.logits import LOGITS_AT_A_TIME, positions_at_a_time


@pytest.mark.parametrize("vocabulary", [1, 512, 49_152, 262_144, 2**22, 2**31])
def test_as_many_as_fit_and_at_least_one(vocabulary: int) -> None:
    positions = positions_at_a_time(vocabulary)
    assert positions == 1 or positions * vocabulary <= LOGITS_AT_A_TIME
    assert (positions + 1) * vocabulary > LOGITS_AT_A_TIME
