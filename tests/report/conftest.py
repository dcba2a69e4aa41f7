# SPDX-License-Identifier: Apache-2.0
"""What several tests of this folder start from."""

from pathlib import Path

import pytest

from tests.report.pages import write_everything


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A folder with everything a report can show."""
    write_everything(tmp_path / "out")
    return tmp_path / "out"
