# SPDX-License-Identifier: Apache-2.0
"""Speeds as a table: medians, their range, and what was not run."""

import dataclasses
from pathlib import Path

from nbl_modifier.records.speed import SPEED_FILE_NAME, Capacity, SpeedReport
from nbl_modifier.report.speed_table import speed_summary, speed_table

GOLDEN = Path(__file__).parents[1] / "data" / "records"
REPORT = SpeedReport.load(GOLDEN / SPEED_FILE_NAME)


def test_rows_are_medians_with_their_range() -> None:
    assert speed_table(REPORT).rows == [
        (
            *("prefill", "512", "8", "150 (100..200)", "190 (120..260)"),
            *("1.250 (1.200..1.300)", "1.250", "1.00"),
        ),
        (
            *("decode", "512", "8", "150 (100..200)", "300 (200..400)"),
            *("2.000 (2.000..2.000)", "2.000", "1.00"),
        ),
    ]
    assert speed_table(REPORT).is_numeric == [False, *[True] * 7]


def test_one_round_has_no_range() -> None:
    row = dataclasses.replace(REPORT.rows[0], base=[99.5], compressed=[199.0])
    (cells,) = speed_table(dataclasses.replace(REPORT, rows=[row])).rows
    assert cells[3:6] == ("99.50", "199", "2.000")


def test_what_was_not_run_has_its_reason() -> None:
    table = speed_table(REPORT, with_skipped=True)
    assert len(table.rows) == 3
    assert table.rows[-1] == ("not run: does not fit", "4,096", "8", *[""] * 5)
    assert table.is_numeric == [False, *[True] * 7]


def test_summary_names_models_machine_and_cache() -> None:
    first, base, compressed, cache, batches = speed_summary(REPORT).splitlines()
    assert first == (
        "vllm, float32, cpu, 2 threads, 2 rounds; peaks measured: 10 GFLOP/s, 20.0 GB/s"
    )
    assert "base (LlamaForCausalLM): 4 of 4 layers with attention, 1.00 MB" in base
    assert "out (LlamaForCausalLM): 2 of 4 layers with attention" in compressed
    assert "1,024 -> 2,048 tokens, 2.000 times (predicted 2.000)" in cache
    assert "largest batch at 512 tokens: 2 -> 4" in batches


def test_cache_without_a_limit_is_as_it_was_measured() -> None:
    models = [
        dataclasses.replace(model, measured_kv_bytes_per_token=512.0 / n)
        for n, model in ((1, REPORT.base), (2, REPORT.compressed))
    ]
    report = dataclasses.replace(
        REPORT,
        base=models[0],
        compressed=models[1],
        capacity=Capacity(None, None, None, {}),
    )
    last = speed_summary(report).splitlines()[-1]
    assert last == "KV cache   512 -> 256 bytes per token, measured"
