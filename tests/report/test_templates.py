# SPDX-License-Identifier: Apache-2.0
"""Templates escape what goes into HTML, and miss nothing silently."""

import jinja2
import pytest

from nbl_modifier.report.table import Table
from nbl_modifier.report.templates import render


def test_html_is_escaped_and_markdown_is_not() -> None:
    table = Table(("<b>",), [("a & b",)])
    assert "<th>&lt;b&gt;</th>" in render("table.html", table=table)
    text = render("page.md", title="a & b", groups=[], footer="<end>")
    assert text == "# a \\& b\n\n<end>\n"


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="footer"):
        render("page.md", title="x", groups=[])
