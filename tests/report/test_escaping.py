# SPDX-License-Identifier: Apache-2.0
"""What stands between fences stays as it is, whatever is in it."""

import pytest

from nbl_modifier.report.escaping import (
    code,
    escape_cell,
    escape_markdown,
    fenced,
    html_paragraph,
    markdown_paragraph,
)


@pytest.mark.parametrize("text", ["a", "a`b", "``x``", "`", "a ``` b"])
def test_fences_are_longer_than_any_in_the_text(text: str) -> None:
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark").render
    shown = render(fenced(text, "yaml"))
    assert shown == f'<pre><code class="language-yaml">{text}\n</code></pre>\n'
    assert render(code(text)) == f"<p><code>{text}</code></p>\n"
    assert html_paragraph(code(text)) == f"<code>{text}</code>"


def test_only_the_beginning_of_a_line_opens_a_list() -> None:
    assert escape_markdown("1. item") == "1\\. item"
    assert escape_markdown("- item") == "\\- item"
    assert escape_cell("1. item") == "1. item"
    assert escape_markdown("0.7529") == "0\\.7529"


def test_lines_are_joined() -> None:
    assert escape_markdown("a\n\n# b") == "a \\# b"
    assert code("a\nb") == "`a b`"


def test_a_paragraph_keeps_its_code() -> None:
    assert markdown_paragraph("*a* `b*c` <d>") == "\\*a\\* `b*c` \\<d\\>"
    assert html_paragraph("<a> `b<c` & d") == "&lt;a&gt; <code>b&lt;c</code> &amp; d"
