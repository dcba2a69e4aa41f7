# SPDX-License-Identifier: Apache-2.0
"""How many logits are in float32 at a time."""

from __future__ import annotations

__all__ = ["positions_at_a_time"]

# 16 MB. Memory for all of a window's, 2 GB of 2,048 positions with 262,144 tokens each,
# would come anew from the system each time, and its pages take longer to come than what
# is computed in them: benchmarks/logits.py.
LOGITS_AT_A_TIME = 2**22


def positions_at_a_time(vocabulary: int) -> int:
    """
    Return for how many positions logits are turned to float32 together.

    :param vocabulary: logits of each position
    """
    return max(1, LOGITS_AT_A_TIME // vocabulary)
