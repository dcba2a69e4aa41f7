"""A row is all that a criterion takes."""

import math
from types import SimpleNamespace

import pytest

import nbl_modifier.criteria
from nbl_modifier.criteria import CRITERIA, TRIED, Criterion
from nbl_modifier.report.tables import measured_columns, ranking_table
from tests.report.report_factory import make_report


def test_each_is_under_its_own_name() -> None:
    assert all(name == row.name for name, row in CRITERIA.items())
    assert len({row.heading for row in CRITERIA.values()}) == len(CRITERIA)
    assert TRIED == ("loss", "kl", "kl_angle")


def test_value_without_a_figure_is_none() -> None:
    figures = SimpleNamespace(kl=0.5, cosine=None)
    assert CRITERIA["kl_angle"].of(figures) is None
    assert CRITERIA["loss"].of(figures) is None
    assert CRITERIA["kl"].of(figures) == 0.5


@pytest.mark.parametrize(("cosine", "angle"), [(0.0, 0.0), (1.0, math.pi / 2)])
def test_divergence_is_weighed_by_the_angle(cosine: float, angle: float) -> None:
    figures = SimpleNamespace(kl=0.5, cosine=cosine)
    assert CRITERIA["kl_angle"].of(figures) == pytest.approx(0.5 * angle)


def test_rounding_past_opposite_directions_has_an_angle() -> None:
    figures = SimpleNamespace(kl=1.0, cosine=2.0 + 1e-9)
    assert CRITERIA["kl_angle"].of(figures) == pytest.approx(math.pi)


def test_new_row_has_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed from what records hold already, so old ones have it, too."""
    row = Criterion(
        *("doubled", "twice NMSE", "half as much", ("nmse",), ".3f", ".3f"),
        compute=lambda nmse: 2 * nmse,
    )
    monkeypatch.setitem(nbl_modifier.criteria.CRITERIA, "doubled", row)
    report = make_report()
    (column,) = (c for c in measured_columns(report) if c.heading == "twice NMSE")
    layer = report.layers[0]
    assert column.cell(layer) == f"{2 * layer.nmse:.3f}"
    assert "twice NMSE" in ranking_table(report)
