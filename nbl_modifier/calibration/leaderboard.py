"""What was measured of each layer, and the best of the replacements."""

from __future__ import annotations

from nbl_modifier.criteria import CRITERIA, Criterion
from nbl_modifier.layer_statistics.processes import Ranks
from nbl_modifier.replacement.surgery import Replacement

from .solver import Measurement

__all__ = ["Leaderboard"]


class Leaderboard:
    """
    All measurements, and the replacements of the layers that lead.

    Of these only the best are held, on the CPU, in the dtype of the model: all of an
    80-layer model's would take more memory than its statistics.

    :param criterion: a key of :data:`CRITERIA` that statistics alone answer decides
        which are best; by one that is tried, ``keep`` has to be all layers
    :param keep: how many replacements to hold
    """

    def __init__(self, criterion: str, keep: int) -> None:
        self.measured: dict[int, Measurement] = {}
        self.replacements: dict[int, Replacement] = {}
        self._criterion = CRITERIA[criterion]
        self._keep = keep
        self._shared: set[int] = set()  # layers that all processes know of

    def scores(self, criterion: Criterion | None = None) -> dict[int, float]:
        """
        Return a criterion's value by layer index, of layers that have one.

        :param criterion: None: the one that decides which replacements are held
        """
        row = criterion or self._criterion
        scores = {i: row.of(m) for i, m in self.measured.items()}
        return {i: score for i, score in scores.items() if score is not None}

    def add(
        self, index: int, measurement: Measurement, replacement: Replacement
    ) -> None:
        """
        Enter a layer, and drop the worst replacement if there is one too many.

        :param index: of the decoder layer
        :param measurement: how linear it is
        :param replacement: what would replace it
        """
        self.measured[index] = measurement
        self.replacements[index] = replacement
        if len(self.replacements) > self._keep:
            scores = self.scores()
            worst = max(self.replacements, key=lambda i: (scores[i], i))
            del self.replacements[worst]

    def merge(self, ranks: Ranks) -> None:
        """
        Let every process know what all of them measured, and hold the best of it.

        May be called again when more was measured.

        :param ranks: the processes of the run
        """
        if ranks.alone:
            return
        mine = {i: m for i, m in self.measured.items() if i not in self._shared}
        owners = ranks.merge(dict.fromkeys(mine, ranks.rank))
        measured = self.measured | ranks.merge(mine)
        self.measured = {i: measured[i] for i in sorted(measured)}
        self._shared |= owners.keys()
        scores = self.scores()
        # by what is tried there are none yet, and all are held
        best = sorted(self.measured, key=lambda i: (scores.get(i, 0.0), i))
        held = self.replacements
        self.replacements = {
            i: ranks.send(held.get(i), owners[i]) if i in owners else held[i]
            for i in best[: self._keep]
        }
