# SPDX-License-Identifier: Apache-2.0
"""``nbl report`` refuses a bad output at once."""

from pathlib import Path

import pytest

from nbl_modifier.cli import main


@pytest.mark.parametrize(
    ("output", "message"),
    [("report.txt", "must end in .html"), ("no/such/report.html", "no folder")],
)
def test_bad_output_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    assert main(["report", "nowhere", "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err
