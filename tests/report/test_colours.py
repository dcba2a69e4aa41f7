# SPDX-License-Identifier: Apache-2.0
"""Colours of figures are those of the page, which has each for light and dark."""

import re
from pathlib import Path

from nbl_modifier import report
from nbl_modifier.report.colours import CSS_VARIABLES, SERIES

STYLE = (Path(report.__file__).parent / "templates" / "style.css").read_text()


def test_each_colour_is_a_variable_of_the_page() -> None:
    light = dict(re.findall(r"(--\w+): (#[0-9a-f]{6})", STYLE.partition("@media")[0]))
    for color, variable in CSS_VARIABLES.items():
        (name,) = re.findall(r"var\((--\w+)\)", variable)
        assert light[name] == color
        assert STYLE.count(f"{name}:") == 2  # light and dark


def test_lines_are_told_apart() -> None:
    assert len(set(SERIES)) == len(SERIES)
    assert len(CSS_VARIABLES) == len(SERIES) + 4
