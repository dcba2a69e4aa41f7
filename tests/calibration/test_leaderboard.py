# SPDX-License-Identifier: Apache-2.0
"""Only the best replacements stay; every measurement does."""

from __future__ import annotations

import torch

from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.solver import Measurement
from nbl_modifier.hf.configuration_nbl import LinearizedLayer
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.replacement.surgery import Replacement

SPEC = LinearizedLayer("residual", "attention", "linear", None)


def filled(scores: list[float], keep: int, criterion: str = "nmse") -> Leaderboard:
    """Return a board on which layer i has ``scores[i]``, entered in order."""
    board = Leaderboard(criterion, keep)
    for index, score in enumerate(scores):
        measurement = Measurement(
            num_tokens=10,
            nmse=score,
            expected_nmse=None,
            heldout_nmse=None,
            residual_nmse=score,
            cca_bound=-score,
            cosine=0.0,
            dampening_frac=0.0,
            seconds=0.0,
        )
        weight = torch.full((1, 1), float(index))
        board.add(index, measurement, Replacement(SPEC, weight, torch.zeros(1)))
    return board


def test_the_worst_goes_as_soon_as_there_is_one_too_many() -> None:
    scores = [0.5, 0.1, 0.9, 0.3]
    for count in range(1, 5):
        board = filled(scores[:count], keep=2)
        best = sorted(range(count), key=scores.__getitem__)[:2]
        assert sorted(board.replacements) == sorted(best)
        assert board.scores() == dict(enumerate(scores[:count]))
        assert len(board.measured) == count


def test_of_equal_ones_the_deeper_goes() -> None:
    assert sorted(filled([0.2, 0.2, 0.2], keep=2).replacements) == [0, 1]


def test_the_criterion_decides() -> None:
    scores = [0.5, 0.1, 0.9]
    assert sorted(filled(scores, 1).replacements) == [1]
    assert sorted(filled(scores, 1, "cca_bound").replacements) == [2]


def test_one_process_has_nothing_to_hear_of() -> None:
    board = filled([0.5, 0.1, 0.9], keep=2)
    before = dict(board.replacements)
    board.merge(Ranks())
    assert board.replacements == before
