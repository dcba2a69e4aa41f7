# SPDX-License-Identifier: Apache-2.0
"""The colours of figures, and the CSS variables that stand for them on a page."""

__all__ = ["CHOSEN", "CSS_VARIABLES", "GRID", "KEPT", "SERIES", "TEXT"]

CHOSEN, KEPT, TEXT, GRID = "#c2410c", "#94a3b8", "#334155", "#e2e8f0"
# Of lines in one figure, told apart by people who do not see red or green, too.
SERIES = (
    "#0b61a4",
    "#d9480f",
    "#0a8f6a",
    "#b5489a",
    "#c98a00",
    "#3aa6d8",
    "#6b5b4d",
    "#7a5cd6",
)
# A page that shows a figure inline defines these, for light and for dark.
CSS_VARIABLES = {
    CHOSEN: "var(--chosen)",
    KEPT: "var(--kept)",
    TEXT: "var(--text)",
    GRID: "var(--grid)",
    **{color: f"var(--series{i})" for i, color in enumerate(SERIES, start=1)},
}
