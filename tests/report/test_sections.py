# SPDX-License-Identifier: Apache-2.0
"""Each section has the numbers of the JSON files, or says why it has none."""

import json
from pathlib import Path

import pytest

from nbl_modifier.criteria import CRITERIA, TRIED
from nbl_modifier.records.compression import NBLReport
from tests.report.pages import BASE, run
from tests.report.report_factory import BOUNDS, write_checkpoint, write_measurements


def test_numbers_are_those_of_the_files(complete: Path, tmp_path: Path) -> None:
    page, markdown = run(tmp_path / "r.html", complete)
    report = NBLReport.load(complete / "nbl2" / "nbl_report.json")
    rows = [row for row in page.rows["Ranking"] if row[0] != "rank"][4:]
    assert [(int(r[0]), int(r[1])) for r in rows] == [(1, 2), (2, 0), (3, 3), (4, 1)]
    for row, layer in zip(rows, report.ranking, strict=True):
        assert [float(cell) for cell in row[2:6]] == pytest.approx(
            [layer.cca_bound, layer.nmse, layer.residual_nmse, layer.score], abs=5e-4
        )
    assert page.marked["Ranking"] == [1, 6, 7]
    assert page.rows["Quality"] == [
        ["model", "held-out perplexity, times base", "piqa", "arc"],
        ["some-model", "1.0000", "0.8000 ± 0.0100", "0.6000 ± 0.0100"],
        ["nbl1", "1.0500 ± 0.0125", "0.7800 ± 0.0100", "0.5700 ± 0.0100"],
        ["nbl2", "1.0500 ± 0.0125", "0.7000 ± 0.0100", "0.5000 ± 0.0100"],
    ]
    # The mean of two tasks; its error is sqrt(2) x 0.01 / 2.
    header, *rows = page.rows["Quality against KV cache"]
    assert header[1:] == [
        "KV cache, times base",
        "mean accuracy over 2 tasks",
    ]
    assert rows[:3] == [
        ["some-model", "1.0000", "0.7000 ± 0.0071"],
        ["nbl1", "0.7500", "0.6750 ± 0.0071"],
        ["nbl2", "0.5000", "0.6000 ± 0.0071"],
    ]
    assert rows[4:] == [
        ["some-model", "1.0000", "1.0000"],
        ["nbl1", "0.7500", "1.0500 ± 0.0125"],
        ["nbl2", "0.5000", "1.0500 ± 0.0125"],
    ]
    assert page.rows["Quality against speed"][1:4] == [
        ["some-model", "1.0000", "0.7000 ± 0.0071"],
        ["nbl1", "1.2500 ± 0.0500", "0.6750 ± 0.0071"],
        ["nbl2", "1.2500 ± 0.0500", "0.6000 ± 0.0071"],
    ]
    assert page.rows["Speed"][1] == [
        "prefill, 8 x 512 tokens, vllm",
        *["1.2500 ± 0.0500"] * 2,
    ]
    assert page.rows["Canonical correlations"][1] == [
        *("0", "0.80000", "0.81000", "0.85000", "0.90000", "0.95000", "1.00000")
    ]
    # keys and values: 2 x 2 heads x 64 x 2 bytes = 512 bytes per layer and token
    header, first, *_ = page.rows["KV-cache size"]
    assert header == ["batch", "context", "base", "nbl1", "nbl2"]
    assert first == ["1", "512", "1 MiB", "768 KiB", "512 KiB"]
    in_text = [
        [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("| ")
    ]
    assert in_text == [row for section in page.rows.values() for row in section]


def test_each_criterion_has_its_layers(complete: Path, tmp_path: Path) -> None:
    page, _ = run(tmp_path / "r.html", complete / "nbl2")
    order = ", ".join(map(str, sorted(BOUNDS, key=BOUNDS.__getitem__)))
    assert page.rows["Layers chosen by each criterion"][1:] == [
        [name, "0, 2", "2 of 2", order]
        for name in ("cca_bound", "nmse", "residual_nmse")
    ]
    assert page.marked["Layers chosen by each criterion"] == [1]


def test_absent_sections_say_why(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "nbl", [2], evaluation=None)
    (tmp_path / "nbl" / "config.json").unlink()
    page, markdown = run(tmp_path / "r.html", tmp_path / "nbl")
    reasons = {
        "Canonical correlations": "nbl rank --canonical-correlations",
        "Quality": "No quality was measured",
        "Quality of methods": "benchmarks/paper_table.py",
        "Quality against speed": "nbl_benchmark.json",
        "Quality against KV cache": "no quality was measured on two models",
        "Speed": "nbl_benchmark.json",
        "KV-cache size": "no config.json",
    }
    assert page.absent.keys() == reasons.keys()
    for title, reason in reasons.items():
        assert reason in page.absent[title]
        assert reason in markdown


def test_measurements_alone_make_a_page(tmp_path: Path) -> None:
    path = tmp_path / "nbl_measurements.json"
    write_measurements(path, {BASE: {"piqa": 0.8}, "other": {"piqa": 0.7}})
    page, _ = run(tmp_path / "r.html", path)
    assert "nbl_report.json" in page.absent["Checkpoints"]
    assert len(page.rows["Quality"]) == 3


def test_what_was_measured_in_addition_has_its_column(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", [2])
    path = tmp_path / "a" / "nbl_report.json"
    fields = json.loads(path.read_text())
    for layer in fields["layers"]:
        layer |= {"cosine": 0.25, "loss": 0.5 if layer["index"] == 2 else None}
    path.write_text(json.dumps(fields))
    page, _ = run(tmp_path / "r.html", tmp_path)
    header, *rows = page.rows["Ranking"]
    columns = header.index("cosine"), header.index("loss")
    assert [[row[column] for column in columns] for row in rows] == [
        ["0.25000", "0.50000"],
        *[["0.25000", ""]] * 3,
    ]
    criteria = [row[0] for row in page.rows["Layers chosen by each criterion"][1:]]
    assert criteria == [name for name in CRITERIA if name not in TRIED]


def test_departures_from_the_paper_are_named(tmp_path: Path) -> None:
    fields = {"criterion": "loss", "selection": "greedy", "refit": True}
    write_checkpoint(tmp_path / "a", [2])
    write_checkpoint(tmp_path / "b", [0, 2], **fields)
    page, _ = run(tmp_path / "r.html", tmp_path)
    criteria = [row[3] for row in page.rows["Checkpoints"][1:]]
    assert criteria == ["cca_bound", "loss, greedy, refit"]


def test_same_ranking_is_said_once(tmp_path: Path) -> None:
    for name in ("dense", "quantized"):
        write_checkpoint(tmp_path / name, [2])
    page, markdown = run(tmp_path / "r.html", tmp_path)
    assert page.svgs["Ranking"] == 1
    assert "`quantized`: the same as `dense`." in markdown
