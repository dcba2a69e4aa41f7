# SPDX-License-Identifier: Apache-2.0
"""Statistics saved by one run and used by others, in real llm-compressor runs."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modifiers.quantization import GPTQModifier

from nbl_modifier import NBLModifier
from nbl_modifier.layer_statistics.fingerprint import (
    sampled_model_digest,
)
from nbl_modifier.layer_statistics.moments import LayerStatistics
from nbl_modifier.layer_statistics.store import StatisticsStore
from nbl_modifier.records.compression import NBLReport
from tests.layer_statistics.test_store import make_version_2, rewrite
from tests.tiny_llama import (
    FOUR_BITS,
    Model,
    compress,
    linearized,
    load,
    save_llama,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., tuple[NBLModifier, Model]]


@pytest.fixture(scope="module")
def run(llama: Path) -> Run:
    """Return a function that runs NBL with the fields given."""

    def call(rows: Any = None, model: Path = llama, **fields: Any) -> Any:
        modifier = NBLModifier(**fields)
        return modifier, compress(load(model), [modifier], rows)

    return call


@pytest.fixture(scope="module")
def saved(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the statistics of all four layers, of 16 windows."""
    folder = tmp_path_factory.mktemp("statistics")
    run(token_rows(), num_layers=1, statistics=str(folder))
    return folder


def maps(model: Model) -> dict[int, torch.Tensor]:
    layers = model.model.layers
    return {i: layers[i].self_attn.linear.weight for i in linearized(model)}


FIELDS = [
    {"num_layers": 2},
    {"layers": [1, 3]},
    {"kv_cache_reduction": 0.5, "criterion": "nmse"},
    {"num_layers": 3, "criterion": "residual_nmse", "dampening_frac": 0.01},
    {"num_layers": 1, "criterion": "cosine"},
    {"max_nmse": 1.0},
    {"num_layers": 2, "criterion": "loss"},
    {"max_perplexity_increase": 0.5},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_same_result_as_calibrating(
    run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Whatever is asked for, without calibration data, and without looking at any."""
    fresh, expected = run(token_rows(), **fields)
    monkeypatch.setattr(LayerStatistics, "update", None)
    modifier, model = run(None, statistics=str(saved), **fields)
    assert linearized(model) == linearized(expected)
    for index, weight in maps(expected).items():
        # Both halves of the windows were merged: another order of the same additions.
        torch.testing.assert_close(maps(model)[index], weight, rtol=1e-5, atol=1e-6)
    assert modifier.report is not None
    assert fresh.report is not None
    for mine, theirs in zip(modifier.report.ranking, fresh.report.ranking, strict=True):
        assert mine.index == theirs.index
        assert mine.num_tokens == theirs.num_tokens
        assert mine.score == pytest.approx(theirs.score, rel=1e-6)
        assert mine.cosine == pytest.approx(theirs.cosine, rel=1e-6)
        assert (mine.heldout_nmse is None) == (theirs.heldout_nmse is None)
        if theirs.heldout_nmse is not None:
            assert mine.heldout_nmse == pytest.approx(theirs.heldout_nmse, rel=1e-6)


def test_saving_changes_nothing(run: Run, tmp_path: Path) -> None:
    _, plain = run(token_rows(), num_layers=2)
    _, saving = run(token_rows(), num_layers=2, statistics=str(tmp_path))
    assert linearized(plain) == linearized(saving)
    for index, weight in maps(plain).items():
        torch.testing.assert_close(maps(saving)[index], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [{"selection": "greedy"}, {"refit": True}, {"distill": {"epochs": 1}}]
)
def test_what_runs_the_model_again_needs_the_data(
    run: Run, saved: Path, fields: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="Pass the dataset, too"):
        run(None, statistics=str(saved), num_layers=2, **fields)
    _, expected = run(token_rows(), num_layers=2, **fields)
    _, model = run(token_rows(), statistics=str(saved), num_layers=2, **fields)
    assert linearized(model) == linearized(expected)
    for index, weight in maps(expected).items():
        torch.testing.assert_close(maps(model)[index], weight, rtol=1e-4, atol=1e-5)


def test_normalized_statistics_serve_both_inputs(run: Run, tmp_path: Path) -> None:
    run(token_rows(), num_layers=1, input="normalized", statistics=str(tmp_path))
    for kind in ("residual", "normalized"):
        _, expected = run(token_rows(), num_layers=2, input=kind)
        _, model = run(None, num_layers=2, input=kind, statistics=str(tmp_path))
        for index, weight in maps(expected).items():
            torch.testing.assert_close(maps(model)[index], weight, rtol=1e-5, atol=1e-6)


def test_a_quantizer_after_it_still_sees_the_data(llama: Path, saved: Path) -> None:
    """NBL reads statistics; GPTQ has a calibration epoch of its own."""
    recipe = [
        NBLModifier(num_layers=2, statistics=str(saved)),
        GPTQModifier(config_groups=FOUR_BITS, ignore=["lm_head"]),
    ]
    model = compress(load(llama), recipe, token_rows())
    assert len(linearized(model)) == 2
    for index in linearized(model):
        linear = model.model.layers[index].self_attn.linear
        assert linear.quantization_scheme is not None


@pytest.mark.parametrize("finished", [0, 2, 4])
def test_an_interrupted_calibration_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    """Killed after so many layers: their statistics are not taken again."""
    fields: dict[str, Any] = {"num_layers": 2, "statistics": str(tmp_path)}
    _, expected = run(token_rows(), **fields)
    for index in range(finished, 4):
        (tmp_path / f"layer-{index:05d}.safetensors").unlink()
    if finished < 4:  # what a kill in the middle of writing leaves behind
        unfinished = tmp_path / f"layer-{finished:05d}.123.unfinished"
        unfinished.write_bytes(b"half a file")
    seen = set()
    update = LayerStatistics.update

    def watch(self: LayerStatistics, *args: Any) -> None:
        seen.add(self.name)
        update(self, *args)

    monkeypatch.setattr(LayerStatistics, "update", watch)
    _, model = run(token_rows(), **fields)
    assert seen == {f"model.layers.{index}.self_attn" for index in range(finished, 4)}
    assert linearized(model) == linearized(expected)
    for index, weight in maps(expected).items():
        torch.testing.assert_close(maps(model)[index], weight, rtol=0, atol=0)


def test_another_model_is_refused(run: Run, saved: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="model_digest .* model .*other has"):
        run(None, model=other, num_layers=1, statistics=str(saved))


def test_one_changed_weight_is_another_model(llama: Path, saved: Path) -> None:
    model = load(llama)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1.0
    with pytest.raises(ValueError, match="model_digest"):
        compress(model, [NBLModifier(num_layers=1, statistics=str(saved))], None)


@pytest.mark.parametrize(
    "rows", [token_rows(seed=1), token_rows(15), token_rows(16, 63)], ids=str
)
def test_other_data_are_refused(run: Run, saved: Path, rows: Any) -> None:
    with pytest.raises(ValueError, match="data_digest .* calibration data has"):
        run(rows, num_layers=1, statistics=str(saved))


def test_layers_that_are_missing_are_named(run: Run, tmp_path: Path) -> None:
    run(token_rows(), layers=[0, 1], statistics=str(tmp_path))
    message = r"none of model\.layers\.2\.self_attn \(2 such layers\)\. Pass the data"
    with pytest.raises(ValueError, match=message):
        run(None, num_layers=1, statistics=str(tmp_path))
    _, model = run(None, layers=[1], statistics=str(tmp_path))
    assert linearized(model) == [1]
    # with the data they are measured, and need none any more
    run(token_rows(), num_layers=1, statistics=str(tmp_path))
    run(None, num_layers=1, statistics=str(tmp_path))


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_neither_statistics_nor_data_is_refused(
    run: Run, tmp_path: Path, folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{folder}: there are none, and no calibrat"):
        run(None, num_layers=1, statistics=str(tmp_path / folder))
    assert not (tmp_path / "absent").exists()


def test_complete_statistics_are_only_read(run: Run, saved: Path) -> None:
    """Data or not: they may lie where nothing can be written."""
    before = {path: path.stat() for path in saved.iterdir()}
    run(token_rows(), num_layers=1, criterion="loss", statistics=str(saved))
    assert {path: path.stat().st_ino for path in saved.iterdir()} == {
        path: stat.st_ino for path, stat in before.items()
    }


def test_less_than_the_other_layers_have_is_not_added(run: Run, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"num_layers": 1, "statistics": str(tmp_path)}
    run(token_rows(), layers=[0], input="normalized", statistics=str(tmp_path))
    with pytest.raises(ValueError, match="3 layers are missing.*got input: residual"):
        run(token_rows(), **fields)
    run(token_rows(), **fields, input="normalized")
    run(token_rows(), **fields)


def test_normalized_input_from_residual_statistics_is_refused(
    run: Run, saved: Path
) -> None:
    with pytest.raises(ValueError, match="says nothing about the output of the input"):
        run(None, num_layers=1, input="normalized", statistics=str(saved))


def edited_embedding(llama: Path) -> Model:
    """Return the model with one element that version 2 does not look at edited."""
    model = load(llama)
    weight = model.get_input_embeddings().weight
    seen = torch.linspace(0, weight.numel() - 1, 32).long()
    unseen = next(i for i in range(weight.numel()) if i not in seen)
    with torch.no_grad():
        weight.view(-1)[unseen] += 1.0
    return model


def test_an_edited_embedding_is_another_model(llama: Path, saved: Path) -> None:
    modifier = NBLModifier(num_layers=1, statistics=str(saved))
    with pytest.raises(ValueError, match="model_digest"):
        compress(edited_embedding(llama), [modifier], None)


@pytest.fixture
def of_version_2(saved: Path, llama: Path, tmp_path: Path) -> Path:
    """Return the statistics as commit 0f3852f would have written them."""
    folder = tmp_path / "version-2"
    shutil.copytree(saved, folder)
    path = folder / "statistics.json"
    digest = sampled_model_digest(load(llama))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_digest": digest}))
    make_version_2(folder)
    return folder


def test_statistics_of_version_2_are_used_with_a_warning(
    run: Run, saved: Path, of_version_2: Path, llama: Path, logged: list[str]
) -> None:
    _, expected = run(None, num_layers=2, statistics=str(saved))
    assert not any("format version" in message for message in logged)
    _, model = run(token_rows(), num_layers=2, statistics=str(of_version_2))
    assert sum("of format version 2, which has" in message for message in logged) == 1
    assert linearized(model) == linearized(expected)
    for index, weight in maps(expected).items():
        torch.testing.assert_close(maps(model)[index], weight, rtol=0, atol=0)
    # what it could not see it still does not
    modifier = NBLModifier(num_layers=2, statistics=str(of_version_2))
    compress(edited_embedding(llama), [modifier], None)
    with pytest.raises(ValueError, match="model_digest"):
        run(
            None,
            model=save_llama(of_version_2 / "other", seed=1),
            num_layers=1,
            statistics=str(of_version_2),
        )


def test_an_interrupted_calibration_of_version_2_goes_on(
    run: Run, saved: Path, of_version_2: Path
) -> None:
    (of_version_2 / "layer-00002.safetensors").unlink()
    _, model = run(token_rows(), num_layers=2, statistics=str(of_version_2))
    _, expected = run(None, num_layers=2, statistics=str(saved))
    assert linearized(model) == linearized(expected)
    run(None, num_layers=2, statistics=str(of_version_2))


@pytest.mark.parametrize("interrupted", [False, True])
def test_changed_files_are_refused_before_calibration(
    run: Run,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: bool,
) -> None:
    folder = tmp_path / "statistics"
    shutil.copytree(saved, folder)
    path = folder / "layer-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if interrupted:  # layer 2 is to be measured
        (folder / "layer-00002.safetensors").unlink()
    monkeypatch.setattr(LayerStatistics, "update", None)
    rows = token_rows() if interrupted else None
    with pytest.raises(ValueError, match=r"layer-00001\.safetensors: has been changed"):
        run(rows, num_layers=1, statistics=str(folder))


def test_other_held_out_windows_are_refused(
    run: Run, saved: Path, tmp_path: Path
) -> None:
    folder, other = tmp_path / "statistics", tmp_path / "other"
    shutil.copytree(saved, folder)
    run(token_rows(seed=1), num_layers=1, statistics=str(other))
    name = "heldout_windows.safetensors"
    shutil.copy(other / name, folder / name)
    with pytest.raises(
        ValueError, match=r"heldout_windows\.safetensors: has been chan"
    ):
        run(None, num_layers=1, criterion="loss", statistics=str(folder))


def test_losses_on_windows_that_were_fitted_on_are_refused(
    run: Run, saved: Path, tmp_path: Path
) -> None:
    """Several processes of an earlier version held nothing out."""
    folder = tmp_path / "statistics"
    shutil.copytree(saved, folder)
    manifest = folder / "statistics.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"held_out": 0}))
    for asked in ({"criterion": "loss"}, {"max_nmse": 1.0}):
        with pytest.raises(ValueError, match="without held-out tokens"):
            run(None, num_layers=1, statistics=str(folder), **asked)


def test_home_is_expanded(
    run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    modifier, _ = run(None, num_layers=1, statistics=f"~/{saved.name}")
    assert modifier.report is not None
    # kept as it was written, for another home to replay
    assert modifier.statistics == f"~/{saved.name}"


def test_full_disk_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write more than 9 kB into a file, as a full disk would."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"statistics.*cannot be.*Make room"):
            run(token_rows(), num_layers=1, statistics=str(tmp_path / "s"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "s").glob("*.unfinished"))


MASKS = [[1, 1, 0, 1] * 16] * 16


def masked_rows() -> Any:
    return token_rows().add_column("loss_mask", MASKS)


def run_masked(llama: Path, rows: Any, counts: bool, **fields: Any) -> NBLReport:
    """Return the report of a run that ranks by losses on held-out windows."""
    modifier = NBLModifier(num_layers=1, criterion="loss", **fields)
    compress(load(llama), modifier, rows, use_loss_mask=counts)
    assert modifier.report is not None
    return modifier.report


@pytest.mark.parametrize("counts", [False, True])
def test_masks_count_as_the_run_says(llama: Path, tmp_path: Path, counts: bool) -> None:
    """Losses too, whether the pass was made before or not."""
    rows, folder = masked_rows(), str(tmp_path)
    fresh = run_masked(llama, rows, counts)
    # four of 16 windows are held out
    assert fresh.num_tokens == (sum(map(sum, MASKS[:12])) if counts else 12 * 64)
    run_masked(llama, rows, counts, statistics=folder)
    again = run_masked(llama, rows, counts, statistics=folder)
    # without data the call's default can mean no masks of its own
    alone = run_masked(llama, None, False, statistics=folder)
    for report in (again, alone):
        assert report.heldout == fresh.heldout
        assert report.num_tokens == fresh.num_tokens


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("measured", [False, True])
def test_statistics_with_and_without_masks_are_told_apart(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: bool,
    complete: bool,
) -> None:
    run_masked(llama, masked_rows(), measured, statistics=str(tmp_path))
    if not complete:
        (tmp_path / "layer-00002.safetensors").unlink()
    monkeypatch.setattr(LayerStatistics, "update", None)  # before calibration
    message = (
        f"statistics {tmp_path}: taken with use_loss_mask={measured}, but this run has "
        f"use_loss_mask={not measured}, and other tokens count. Pass "
        f"use_loss_mask={measured} to oneshot()"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run_masked(llama, masked_rows(), not measured, statistics=str(tmp_path))


def test_masks_that_statistics_have_not_used_are_refused_without_data(
    llama: Path, tmp_path: Path
) -> None:
    run_masked(llama, masked_rows(), False, statistics=str(tmp_path))
    with pytest.raises(ValueError, match="taken with use_loss_mask=False"):
        run_masked(llama, None, True, statistics=str(tmp_path))


def test_data_without_masks_are_the_same_with_and_without_them(
    llama: Path, tmp_path: Path
) -> None:
    """llm-compressor counts every token then, and the statistics say nothing of it."""
    fresh = run_masked(llama, token_rows(), False, statistics=str(tmp_path))
    assert "loss_masks" not in json.loads((tmp_path / "statistics.json").read_text())
    assert run_masked(llama, token_rows(), True).heldout == fresh.heldout
    for rows in (token_rows(), None):
        again = run_masked(llama, rows, True, statistics=str(tmp_path))
        assert again.heldout == fresh.heldout


@pytest.mark.parametrize("measured", [False, True])
def test_statistics_that_do_not_say_whether_masks_count_are_used(
    llama: Path, tmp_path: Path, measured: bool
) -> None:
    """As they were written before they said it."""
    run_masked(llama, masked_rows(), measured, statistics=str(tmp_path))
    forget_masks(tmp_path)
    assert StatisticsStore.open(tmp_path).origin.loss_masks is None
    fresh = run_masked(llama, masked_rows(), measured)
    again = run_masked(llama, masked_rows(), measured, statistics=str(tmp_path))
    assert again.heldout == fresh.heldout
    assert again.num_tokens == fresh.num_tokens
    run_masked(llama, None, False, statistics=str(tmp_path))


def forget_masks(folder: Path) -> None:
    """Take out of a folder what it says of masks."""
    fields = json.loads((folder / "statistics.json").read_text())
    del fields["loss_masks"]
    rewrite(folder, fields)


def test_masks_that_do_not_count_refuse_no_windows(llama: Path) -> None:
    """Whatever is in a column that the run does not use."""
    rows = token_rows().add_column("loss_mask", [[0] * 64] * 16)
    run_masked(llama, rows, False)
    with pytest.raises(ValueError, match="held-out"):
        run_masked(llama, rows, True)
