# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints as oneshot() and save_pretrained() write them: they load as the model in
memory, never as another one, whole or not at all.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.transformers.compression import compressed_tensors_utils
from torch import Tensor
from transformers import AutoModelForCausalLM

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.hf.checkpoint import check_output_directory
from nbl_modifier.hf.configuration_nbl import REFUSED_BY_STOCK_CLASSES
from nbl_modifier.records.compression import NBLReport
from nbl_modifier.report.collect import _FILE_NAMES
from tests.tiny_llama import (
    FOUR_BITS,
    VOCAB_SIZE,
    Model,
    compress,
    demo_tokenizer,
    linearized,
    load,
    logits_of,
    save_llama,
    tensors_in,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [0, 2]
KILL_SAVE = Path(__file__).with_name("kill_save.py")
# Of 170 kB (untied, dense): six files.
SMALL_SHARDS = "30KB"

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "w4a16"])


@pytest.fixture(autouse=True)
def registered() -> None:
    nbl_modifier.hf.register()


def linearize(
    folder: Path, rows: Dataset, packed: bool = False, **kwargs: Any
) -> Model:
    """Run NBL, and 4-bit GPTQ if ``packed``, on the model in ``folder``."""
    recipe: list[Any] = [NBLModifier(layers=LAYERS)]
    if packed:
        recipe.append(
            GPTQModifier(
                config_groups=FOUR_BITS, targets=["Linear"], ignore=["lm_head"]
            )
        )
    return compress(load(folder), recipe, rows, **kwargs)


@pytest.fixture
def base(tied: bool, llama: Path, tied_llama: Path) -> Path:
    return tied_llama if tied else llama


def generated(model: Model) -> list[int]:
    tokens = torch.randint(
        2, VOCAB_SIZE, (1, 8), generator=torch.Generator().manual_seed(1)
    )
    mask = torch.ones_like(tokens)
    output = model.generate(
        tokens, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    new: list[int] = output[0, 8:].tolist()
    return new


def assert_loads_as(folder: Path, logits: Tensor, tokens: list[int]) -> Model:
    """Assert that ``folder`` holds the model with these logits and nothing else."""
    loaded: Any = load(folder, output_loading_info=True)
    model, info = loaded
    assert type(model).__name__ == "NBLLlamaForCausalLM"
    assert {name: found for name, found in info.items() if found} == {}
    assert linearized(model) == LAYERS
    assert torch.equal(logits_of(model), logits)
    assert generated(model) == tokens
    return model


def saved_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


# --- loads as what was saved ----------------------------------------------------------


@TIED
@PACKED
def test_saved_by_oneshot(
    base: Path, rows: Dataset, tmp_path: Path, tied: bool, packed: bool
) -> None:
    unsaved = linearize(base, rows, packed)
    expected = logits_of(unsaved), generated(unsaved)
    out = tmp_path / "out"
    linearize(base, rows, packed, output_dir=str(out))
    model = assert_loads_as(out, *expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in tensors_in(out)) == (not tied)
    assert saved_config(out)["tie_word_embeddings"] == tied


@TIED
@PACKED
@pytest.mark.parametrize("shard", [None, SMALL_SHARDS], ids=["whole", "sharded"])
def test_saved_later(
    base: Path,
    rows: Dataset,
    tmp_path: Path,
    tied: bool,
    packed: bool,
    shard: str | None,
) -> None:
    model = linearize(base, rows, packed)
    logits, tokens = logits_of(model), generated(model)
    out = tmp_path / "new" / "out"
    model.save_pretrained(out, max_shard_size=shard or "1GB")
    assert_loads_as(out, logits, tokens)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    index = out / "model.safetensors.index.json"
    assert index.exists() == (shard is not None)
    if shard is None:
        assert shards == ["model.safetensors"]
    else:
        assert len(shards) > 1
        weight_map = json.loads(index.read_text())["weight_map"]
        assert sorted(set(weight_map.values())) == shards
        assert weight_map.keys() == tensors_in(out).keys()
    # Saving leaves the model in memory as it was, and can be repeated.
    assert torch.equal(logits_of(model), logits)
    model.save_pretrained(tmp_path / "again")
    assert_loads_as(tmp_path / "again", logits, tokens)


def test_replaced_layers_hold_nothing_but_the_map(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    linearize(llama, rows, output_dir=str(tmp_path / "out"))
    names = tensors_in(tmp_path / "out").keys()
    for index in range(4):
        prefix = f"model.layers.{index}.self_attn."
        found = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if index in LAYERS:
            assert found == {"linear.weight", "linear.bias"}
        else:
            assert found == {f"{projection}_proj.weight" for projection in "qkvo"}


@pytest.mark.parametrize("shard", ["20KB", "60KB", None])
def test_no_shard_of_an_earlier_save_stays(
    llama: Path, rows: Dataset, tmp_path: Path, shard: str | None
) -> None:
    model = linearize(llama, rows)
    out = tmp_path / "out"
    model.save_pretrained(out, max_shard_size="20KB")
    many = len(list(out.glob("*.safetensors")))
    (out / "notes.txt").write_text("precious")
    model.save_pretrained(out, max_shard_size=shard or "1GB")
    few = len(list(out.glob("*.safetensors")))
    assert few < many or shard == "20KB"
    assert (out / "model.safetensors.index.json").exists() == (shard is not None)
    assert tensors_in(out).keys() == model.state_dict().keys()
    assert_loads_as(out, logits_of(model), generated(model))
    assert (out / "notes.txt").read_text() == "precious"


def test_dtype(rows: Dataset, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", dtype=torch.bfloat16)
    model = linearize(folder, rows)
    model.save_pretrained(tmp_path / "out")
    assert saved_config(tmp_path / "out")["dtype"] == "bfloat16"
    found = {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()}
    assert found == {torch.bfloat16}
    assert_loads_as(tmp_path / "out", logits_of(model), generated(model))


# --- config.json and the other files --------------------------------------------------


@PACKED
def test_config(llama: Path, rows: Dataset, tmp_path: Path, packed: bool) -> None:
    model = linearize(llama, rows, packed, output_dir=str(tmp_path / "out"))
    config = saved_config(tmp_path / "out")
    assert config["model_type"] == "nbl_llama"
    assert config["architectures"] == ["NBLLlamaForCausalLM"]
    layer = {"input": "residual", "kind": "attention", "method": "linear", "rank": None}
    assert config["nbl_config"] == {
        "version": 1,
        "layers": {"0": layer, "2": layer},
        "criterion": "cca_bound",
    }
    assert ("quantization_config" in config) == packed
    assert model.config.model_type == "nbl_llama"
    assert model.config.nbl_config == config["nbl_config"]
    # where the model came from is still known, and still loads for a later oneshot()
    assert model.config._name_or_path == model.name_or_path == str(llama)


def test_base_models_spelling_is_kept(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    """Other readers know the original file, not always transformers' rendering."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    original = saved_config(folder)
    del original["rope_parameters"]
    original |= {"rope_theta": 10000.0, "a_field_of_ones_own": 7}
    (folder / "config.json").write_text(json.dumps(original))
    model = linearize(folder, rows)
    for out in (tmp_path / "out", tmp_path / "again"):
        model.save_pretrained(out)
        config = saved_config(out)
        ours = ("nbl_config", "auto_map", *REFUSED_BY_STOCK_CLASSES)
        for name in ("model_type", "architectures", *ours):
            config.pop(name)
        assert config == {
            name: value
            for name, value in original.items()
            if name not in ("model_type", "architectures")
        }
        assert_loads_as(out, logits_of(model), generated(model))


def test_report_card_and_recipe(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    linearize(llama, rows, output_dir=str(out))
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "architectures.py",  # for trust_remote_code
        "cache_nbl.py",
        "config.json",
        "configuration_nbl.py",
        "generation_config.json",
        "loading_nbl.py",
        "model.safetensors",
        "modeling_nbl.py",
        "nbl_report.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    report = NBLReport.load(out / "nbl_report.json")
    assert report.selected_layers == LAYERS
    assert report.model == str(llama)
    assert report.model_type == "llama"
    assert report.num_hidden_layers == 4
    assert report.num_calibration_samples == 16
    assert report.num_tokens == 16 * 64
    assert report.recipe == (out / "recipe.yaml").read_text()
    card = (out / "README.md").read_text()
    assert "layers replaced: 0, 2" in card
    assert "NBLLlamaForCausalLM" in card
    assert str(llama.parent) not in card  # nothing about the machine it was made on


STOCK = """
import sys
import torch
from transformers import AutoModelForCausalLM
from tests.tiny_llama import logits_of

folder, logits = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print(error)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.save(logits_of(model), logits)
assert "nbl_modifier" not in sys.modules
"""


def test_stock_transformers(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    """Without nbl_modifier it is refused, or loaded by the code beside the weights."""
    out, logits = tmp_path / "out", tmp_path / "logits.pt"
    model = linearize(llama, rows, output_dir=str(out))
    run = subprocess.run(
        [sys.executable, "-c", STOCK, str(out), str(logits)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "contains custom code" in run.stdout
    assert "trust_remote_code=True" in run.stdout
    # one thread or several: sums in another order
    torch.testing.assert_close(torch.load(logits), logits_of(model), rtol=0, atol=1e-4)


# --- where it may write ---------------------------------------------------------------


def test_save_refuses_the_directory_of_another_model(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model = linearize(folder, rows)
    with pytest.raises(FileExistsError, match="holds another model"):
        model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_upload_of_an_unfinished_checkpoint_is_refused(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    model = linearize(llama, rows)
    with pytest.raises(NotImplementedError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


def test_through_a_link(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = linearize(llama, rows)
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_loads_as(tmp_path / "real", logits_of(model), generated(model))


@pytest.mark.parametrize("name", ["out", "new/er/out"])
def test_directory_that_is_to_be_made(tmp_path: Path, name: str) -> None:
    check_output_directory(tmp_path / name, ARCHITECTURES["llama"])
    assert list(tmp_path.iterdir()) == []


def test_relative_directory(
    llama: Path, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linearize(llama, rows)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("out")
    assert_loads_as(tmp_path / "out", logits_of(model), generated(model))


# --- failures -------------------------------------------------------------------------


def loads(folder: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


def test_save_that_fails_at_the_end_keeps_the_old_checkpoint(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    model = linearize(llama, rows)
    out = tmp_path / "out"
    model.save_pretrained(out)
    (out / "README.md").unlink()
    (out / "README.md").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError, match=r"README\.md is a directory"):
        model.save_pretrained(out)
    assert loads(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_named_and_keeps_the_old_checkpoint(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    """The system refuses to write more than 20 kB into a file, as a full disk would."""
    model = linearize(llama, rows)
    out = tmp_path / "out"
    model.save_pretrained(out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"directory .*out: .* GB are free.*room"):
            model.save_pretrained(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what an earlier checkpoint leaves behind -----------------------------------------


def test_nothing_of_an_earlier_checkpoint_stays(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    """Scores of the old weights would be shown as the new ones'."""
    out = tmp_path / "out"
    linearize(llama, rows, output_dir=str(out))
    old = {path.name for path in out.iterdir()}
    measured = {*_FILE_NAMES, "nbl_benchmark.md", "nbl_ranking.png"}
    tokenizer = {"added_tokens.json", "chat_template.jinja", "vocab.json"}
    for name in measured | tokenizer:
        (out / name).write_text("{}")
    (out / "notes.txt").write_text("precious")
    linearize(llama, rows, output_dir=str(out))
    assert {path.name for path in out.iterdir()} == old | {"notes.txt"}
    NBLReport.load(out / "nbl_report.json")  # the new one


def test_tokenizer_that_was_saved_before_the_model_stays(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = linearize(llama, rows)
    demo_tokenizer().save_pretrained(out)
    names = {path.name for path in out.iterdir()}
    assert "tokenizer.json" in names
    model.save_pretrained(out)
    model.save_pretrained(out)
    assert names < {path.name for path in out.iterdir()}


def test_save_that_fails_early_keeps_the_old_checkpoint(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    model = linearize(llama, rows)
    out = tmp_path / "out"
    model.save_pretrained(out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(Exception, match="nonsense"):
        model.save_pretrained(out, max_shard_size="nonsense")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert model.config.nbl_config["layers"].keys() == {"0", "2"}
    assert model.config._name_or_path == str(llama)


def test_base_models_config_is_never_published(
    llama: Path, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later llm-compressor may find the base model's file in another way."""

    def resave(config: Any, save_directory: str) -> None:
        shutil.copy(llama / "config.json", save_directory)

    model = linearize(llama, rows)
    monkeypatch.setattr(compressed_tensors_utils, "resave_config", resave)
    with pytest.raises(RuntimeError, match="model_type 'llama'"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_save_can_be_repeated(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    """What a kill leaves is not taken for another model."""
    model = linearize(llama, rows)
    out = tmp_path / "out"
    (out / ".nbl-incomplete").mkdir(parents=True)
    (out / ".nbl-incomplete" / "generation_config.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"half")
    model.save_pretrained(out)
    assert_loads_as(out, logits_of(model), generated(model))
    assert not (out / ".nbl-incomplete").exists()
    assert len(list(out.glob("*.safetensors"))) == 1


# what the target may load as after a kill, by scenario: each of it was met
SCENARIOS = {
    "new": {"nothing", "new"},
    "packed": {"nothing", "new"},
    "overwrite": {"old", "new"},
    "inside": {"old", "new"},
}


@pytest.fixture(scope="module")
def kills(
    llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Return what kill_save.py reports, by scenario."""
    folder = tmp_path_factory.mktemp("kills")
    run = subprocess.run(
        [sys.executable, KILL_SAVE, llama, folder, *SCENARIOS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_any_moment(kills: dict[str, dict[str, Any]], scenario: str) -> None:
    """Every directory, after every kill: what it was before, or the new checkpoint."""
    result = kills[scenario]
    assert result["wrong"] == []
    # before each of the files is opened, renamed or removed
    assert result["kills"] > 15
    assert sum(result["seen"].values()) == result["kills"]
    assert result["finished"] == "new"
    assert set(result["seen"]) == SCENARIOS[scenario]
