# SPDX-License-Identifier: Apache-2.0
"""
Bad input: a clear error before calibration, naming field or layer and the remedy, and
nothing written. Through real oneshot(), as a user meets it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    StableLmConfig,
    StableLmForCausalLM,
)

from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.layer_statistics import windows
from nbl_modifier.layer_statistics.windows import held_out_batches
from tests.tiny_llama import (
    FOUR_BITS,
    VOCAB_SIZE,
    Model,
    compress,
    linearized,
    load,
    logits_of,
    ragged_rows,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Snapshot = dict[Path, bytes | None]


def snapshot(folder: Path) -> Snapshot:
    """Return the content of every file below ``folder``, None for directories."""
    return {
        path: None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")
    }


@contextlib.contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before


def count_calls(model: Model) -> list[int]:
    """Return a list that grows with each batch that goes through ``model``."""
    calls: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda *_: calls.append(1))
    return calls


def refused(
    folder: Path,
    model: Model | Path,
    recipe: Any,
    rows: Dataset | DataLoader | None,
    error: type[Exception] = ValueError,
    **kwargs: Any,
) -> str:
    """
    Run oneshot(), which must refuse; return the message.

    :param folder: where nothing may be written
    :param kwargs: of oneshot; by default ``output_dir`` is new, in ``folder``
    """
    kwargs.setdefault("output_dir", str(folder / "out"))
    if isinstance(model, Path):
        model = load(model)
    calls = count_calls(model)
    with nothing_written(folder), pytest.raises(error) as caught:
        compress(model, recipe, rows, **kwargs)
    assert not calls  # refused before any of the data went through the model
    return str(caught.value)


def yaml_recipe(fields: str) -> str:
    return f"default_stage: {{default_modifiers: {{NBLModifier: {fields}}}}}"


def one_layer() -> NBLModifier:
    return NBLModifier(num_layers=1)


def gptq() -> GPTQModifier:
    return GPTQModifier(config_groups=FOUR_BITS, targets=["Linear"], ignore=["lm_head"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("{num_layer: 1}", ["no field num_layer.", "num_layers", "dampening_frac"]),
        ("{num_layers: 0}", ["num_layers", "greater than or equal to 1"]),
        ("{num_layers: -3}", ["num_layers", "greater than or equal to 1"]),
        ("{num_layers: 5}", ["num_layers", "got 5", "Use 4 or fewer"]),
        ("{num_layers: two}", ["num_layers", "valid integer"]),
        ("{}", ["num_layers", "layers", "got neither"]),
        (
            "{num_layers: 1, layers: [0]}",
            ["num_layers", "layers", "got num_layers and layers"],
        ),
        (
            "{kv_cache_reduction: 0.5, num_layers: 1}",
            ["got num_layers and kv_cache_reduction"],
        ),
        ("{kv_cache_reduction: 0}", ["kv_cache_reduction", "greater than 0"]),
        ("{kv_cache_reduction: 37.5}", ["kv_cache_reduction", "less than or equal"]),
        (
            "{kv_cache_reduction: 0.75, ignore: ['re:.*[23].self_attn']}",
            ["kv_cache_reduction", "2 layers to choose from", "got 0.75", "up to 0.5"],
        ),
        ("{layers: []}", ["layers", "at least one", "got []"]),
        ("{layers: [1, 1]}", ["layers", "distinct", "got [1, 1]"]),
        ("{layers: [-1]}", ["layers", ">= 0", "got [-1]"]),
        ("{layers: [0, 4]}", ["layers", "[4]", "[0, 1, 2, 3]"]),
        (
            "{layers: [0, 1], targets: ['re:.*[23].self_attn']}",
            ["layers", "[0, 1]", "[2, 3]"],
        ),
        (
            "{num_layers: 3, ignore: ['re:.*[23].self_attn']}",
            ["num_layers", "there are 2", "got 3"],
        ),
        (
            "{num_layers: 1, targets: ['re:.*mlp']}",
            ["targets", "re:.*mlp", "model.layers.0.self_attn", "layers.3.self_attn"],
        ),
        ("{num_layers: 1, targets: [Linear]}", ["targets", "Linear", "self_attn"]),
        ("{num_layers: 1, targets: []}", ["targets", "self_attn"]),
        (
            "{max_nmse: 0.5, ignore: ['re:.*']}",
            ["ignore", "re:.*", "leaves no attention module", "Ignore fewer"],
        ),
        ("{num_layers: 1, targets: ['re:(']}", ["targets", "'re:('", "regular expr"]),
        ("{num_layers: 1, ignore: ['re:[']}", ["ignore", "'re:['", "regular expr"]),
        ("{kv_cache_reduction: yes}", ["kv_cache_reduction", "got true", "number"]),
        ("{num_layers: 1, statistics: ''}", ["statistics", "a folder, got ''"]),
        ("{num_layers: 1, criterion: cca}", ["criterion", "cca_bound", "nmse"]),
        ("{num_layers: 1, input: norm}", ["input", "residual", "normalized"]),
        ("{num_layers: 1, dampening_frac: -0.1}", ["dampening_frac", "equal to 0"]),
        ("{num_layers: 1, dampening_frac: .inf}", ["dampening_frac", "finite"]),
    ],
)
def test_recipe_fields(
    llama: Path, rows: Dataset, tmp_path: Path, fields: str, words: list[str]
) -> None:
    message = refused(tmp_path, llama, yaml_recipe(fields), rows)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/dev/null", "File exists"), ("/dev/null/below", "Not a directory")],
)
def test_folder_for_statistics_that_cannot_be_one(
    llama: Path, rows: Dataset, tmp_path: Path, folder: str, reason: str
) -> None:
    recipe = NBLModifier(num_layers=1, statistics=folder)
    message = refused(tmp_path, llama, recipe, rows, OSError)
    for word in (f"NBLModifier.statistics: '{folder}'", reason, "Choose another"):
        assert word in message, message


def test_fields_are_checked_where_the_modifier_is_made() -> None:
    for fields in ({"num_layer": 1}, {"num_layers": 0}, {"layers": [0, 0]}, {}):
        with pytest.raises(ValueError, match="NBLModifier"):
            NBLModifier(**fields)


# --- models ---------------------------------------------------------------------------


def tiny_gpt2() -> Model:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


def tiny_stablelm() -> Model:
    """Its modules are called as Llama's are."""
    config = StableLmConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return StableLmForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (
            tiny_gpt2,
            "Architecture('gpt2', 'GPT2LMHeadModel', 'GPT2Model', "
            "layers='transformer.h', attention='attn', input_norm='ln_1')",
        ),
        (
            tiny_stablelm,
            "Architecture('stablelm', 'StableLmForCausalLM', 'StableLmModel')",
        ),
    ],
)
def test_unsupported_architecture(
    rows: Dataset,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make: Any,
    row: str,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    make().save_pretrained(folder)
    model = load(folder)
    message = refused(tmp_path, model, one_layer(), rows, NotImplementedError)
    assert repr(model.config.model_type) in message
    assert f"supported: {', '.join(sorted(ARCHITECTURES))}" in message
    assert f"By the names in this model it is {row}" in message


def test_nothing_left_to_linearize(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    model = compress(load(llama), NBLModifier(num_layers=4), rows)
    message = refused(tmp_path, model, one_layer(), rows)
    assert "no attention left" in message
    assert "Remove NBLModifier" in message


def test_layers_that_are_linear_already(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    model = compress(load(llama), NBLModifier(layers=[1]), rows)
    before = logits_of(model)
    for recipe, words in (
        (NBLModifier(layers=[1, 2]), ["layers", "[1]", "[0, 2, 3]"]),
        (NBLModifier(num_layers=4), ["num_layers", "there are 3", "got 4"]),
        (NBLModifier(num_layers=1, targets=["re:.*1.self_attn"]), ["targets"]),
    ):
        message = refused(tmp_path, model, recipe, rows)
        for word in words:
            assert word in message
    assert linearized(model) == [1]
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("from_disk", [False, True])
def test_quantized_model(
    llama: Path,
    rows: Dataset,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    from_disk: bool,
) -> None:
    recipe = QuantizationModifier(
        config_groups=FOUR_BITS, targets=["Linear"], ignore=["lm_head"]
    )
    model = compress(load(llama), recipe, None)
    if from_disk:
        folder = tmp_path_factory.mktemp("quantized")
        model.save_pretrained(folder)
        model = load(folder)
    message = refused(tmp_path, model, one_layer(), rows)
    assert "model.layers.0.self_attn.q_proj" in message
    assert "quantized already" in message
    assert "Start from the unquantized model" in message


# --- recipes of several modifiers, pipelines ------------------------------------------


def test_quantizer_first(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    message = refused(tmp_path, llama, [gptq(), one_layer()], rows)
    assert "GPTQModifier comes before NBLModifier" in message
    assert "Put NBLModifier first" in message


def test_two_nbl_modifiers(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    message = refused(tmp_path, llama, [one_layer(), one_layer()], rows)
    assert "two NBLModifiers" in message


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_shared_pass(llama: Path, rows: Dataset, tmp_path: Path, pipeline: str) -> None:
    model = load(llama)
    recipe = [one_layer(), gptq()]
    message = refused(tmp_path, model, recipe, rows, pipeline=pipeline)
    assert "NBLModifier shares its calibration pass with GPTQModifier" in message
    assert "pipeline='independent'" in message
    # GPTQ had not got hold of the model yet: it can be used as if nothing had happened.
    compress(model, [one_layer(), gptq()], rows)
    assert len(linearized(model)) == 1


def test_sequential_alone_is_fine(llama: Path, rows: Dataset) -> None:
    model = compress(load(llama), one_layer(), rows, pipeline="sequential")
    assert len(linearized(model)) == 1


def test_pipeline_without_data(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    message = refused(tmp_path, llama, one_layer(), rows, pipeline="datafree")
    assert "datafree" in message
    assert "calibration data" in message


# --- output directories ---------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "new", "new/er"])
def test_file_in_the_way(
    llama: Path, rows: Dataset, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("precious")
    message = refused(
        tmp_path,
        llama,
        one_layer(),
        rows,
        NotADirectoryError,
        output_dir=str(tmp_path / "file" / below),
    )
    assert str(tmp_path / "file") in message
    assert "Choose another directory" in message


@pytest.mark.parametrize("exists", [False, True])
def test_directory_that_is_not_writable(
    llama: Path,
    rows: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exists: bool,
) -> None:
    """Root may write anywhere, so os.access() has to say what it would to others."""
    out = tmp_path / "read-only" / "out"
    blocked = out if exists else out.parent
    blocked.mkdir(parents=True)
    allowed = os.access

    def access(path: Any, mode: int, **kwargs: Any) -> bool:
        writing = bool(mode & os.W_OK)
        return not (writing and Path(path) == blocked) and allowed(path, mode, **kwargs)

    monkeypatch.setattr(os, "access", access)
    message = refused(
        tmp_path, llama, one_layer(), rows, PermissionError, output_dir=str(out)
    )
    assert f"cannot write to {blocked}" in message
    assert "permissions" in message


@pytest.mark.parametrize("left", ["all", "weights", "config"])
def test_directory_of_another_model(
    llama: Path, rows: Dataset, tmp_path: Path, left: str
) -> None:
    out = tmp_path / "out"
    load(llama).save_pretrained(out)
    if left == "weights":
        (out / "config.json").unlink()
    elif left == "config":
        (out / "model.safetensors").unlink()
    message = refused(tmp_path, llama, one_layer(), rows, FileExistsError)
    found = None if left == "weights" else "llama"
    assert f"holds another model (model_type {found!r}" in message
    assert "Choose another directory" in message


def test_directory_with_other_files_is_fine(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    compress(load(llama), one_layer(), rows, output_dir=str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert (tmp_path / "config.json").exists()


# --- calibration data -----------------------------------------------------------------


def test_no_calibration_data(llama: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, llama, one_layer(), None)
    assert "NBLModifier needs calibration data" in message
    assert "dataset=" in message


@pytest.mark.parametrize("shuffle", [False, True])
def test_empty_calibration_set(llama: Path, tmp_path: Path, shuffle: bool) -> None:
    empty = Dataset.from_dict({"input_ids": [], "attention_mask": []})
    message = refused(
        tmp_path, llama, one_layer(), empty, shuffle_calibration_samples=shuffle
    )
    if shuffle:  # torch's sampler refuses it before any modifier is asked
        assert "num_samples should be a positive integer" in message
    else:
        assert "the calibration set is empty" in message
        assert "num_calibration_samples=" in message


def test_empty_loader(llama: Path, tmp_path: Path) -> None:
    nothing: Any = []
    message = refused(tmp_path, llama, one_layer(), DataLoader(nothing))
    assert "the calibration set is empty" in message


@pytest.mark.parametrize(
    ("lengths", "batch_size"),
    [([32], 1), ([8, 24], 1), ([20, 3, 3, 3], 4)],
)
def test_too_few_tokens(
    llama: Path, tmp_path: Path, lengths: list[int], batch_size: int
) -> None:
    """As many tokens as dimensions: everything would look exactly linear."""
    message = refused(
        tmp_path,
        llama,
        one_layer(),
        ragged_rows(lengths),
        batch_size=batch_size,
        data_collator="padding",
        max_seq_length=None,
    )
    assert f"{sum(lengths)} tokens" in message
    assert "hidden_size 32" in message
    assert "more or longer calibration samples" in message


def test_just_enough_tokens(llama: Path) -> None:
    model = load(llama)
    calls = count_calls(model)
    compress(model, one_layer(), token_rows(1, 33))
    assert len(linearized(model)) == 1
    assert calls  # what refused() watches does count


def test_too_few_tokens_in_the_loss(llama: Path, rows: Dataset, tmp_path: Path) -> None:
    """Known only once the pipeline has the masks, so the layer is named."""
    masks = [[1, 1] + [0] * 62] * 16
    with (
        nothing_written(tmp_path),
        pytest.raises(ValueError, match=r"layers\.0\.self_attn: 32 tokens"),
    ):
        compress(
            load(llama),
            one_layer(),
            rows.add_column("loss_mask", masks),
            use_loss_mask=True,
            output_dir=str(tmp_path / "out"),
        )


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("model.layers.2.self_attn.v_proj.weight", 2),
        ("model.layers.2.self_attn.o_proj.weight", 2),
        ("model.layers.1.mlp.down_proj.weight", 2),  # what layer 2 reads
        ("model.embed_tokens.weight", 0),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_activations(
    llama: Path,
    rows: Dataset,
    tmp_path: Path,
    parameter: str,
    named: int,
    value: float,
) -> None:
    model = load(llama)
    model.get_parameter(parameter).data[5, 3] = value
    with (
        nothing_written(tmp_path),
        pytest.raises(
            ValueError, match=rf"model\.layers\.{named}\.self_attn"
        ) as caught,
    ):
        compress(model, one_layer(), rows, output_dir=str(tmp_path / "out"))
    message = str(caught.value)
    assert "NaN or inf" in message
    assert "Check the model's dtype" in message
    assert linearized(model) == []


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16])
def test_tokens_are_counted_whatever_the_dtype_of_masks(dtype: torch.dtype) -> None:
    """A sum in 16 bits ends at 2,048, or 256, or overflows."""
    mask = torch.ones(1, 70_000, dtype=dtype)
    mask[0, :1] = 0
    batch = {"input_ids": torch.arange(70_000)[None], "attention_mask": mask}
    assert windows._count_tokens(batch) == 69_999


def rows_of_tokens(*samples: list[int]) -> Dataset:
    masks = [[1] * len(sample) for sample in samples]
    return Dataset.from_dict({"input_ids": samples, "attention_mask": masks})


@pytest.mark.parametrize("fields", [{}, {"criterion": "loss"}, {"method": "drop"}])
def test_one_repeated_token(llama: Path, tmp_path: Path, fields: Any) -> None:
    rows = rows_of_tokens(*[[7] * 64] * 16)
    modifier = NBLModifier(num_layers=1, **fields)
    message = refused(tmp_path, llama, [modifier], rows)
    assert "same embedding stands for all of its 1 different tokens" in message


def test_embeddings_that_are_all_zero(
    llama: Path, rows: Dataset, tmp_path: Path
) -> None:
    model = load(llama)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    settings: list[dict[str, Any]] = [{}, {"criterion": "loss"}, {"method": "drop"}]
    for fields in settings:
        modifier = NBLModifier(num_layers=1, **fields)
        message = refused(tmp_path, model, [modifier], rows)
        assert "the model's embeddings are not all zero" in message


@pytest.mark.parametrize("fields", [{}, {"criterion": "loss"}, {"method": "drop"}])
def test_samples_of_one_token(llama: Path, tmp_path: Path, fields: Any) -> None:
    rows = rows_of_tokens(*[[i] for i in range(2, 100)])
    modifier = NBLModifier(num_layers=1, **fields)
    message = refused(tmp_path, llama, [modifier], rows)
    assert "its samples have at most 1 token" in message


def test_held_out_samples_of_one_token(llama: Path, tmp_path: Path) -> None:
    held_out = held_out_batches([64] * 8)
    samples = [torch.arange(2, 3 if i in held_out else 66)[None] for i in range(8)]
    batches: Any = [
        {"input_ids": each, "attention_mask": each.sign()} for each in samples
    ]
    rows = DataLoader[Any](batches, batch_size=None)
    modifier = NBLModifier(num_layers=1, criterion="loss")
    message = refused(tmp_path, llama, [modifier], rows)
    assert "there is no token to predict in its 2 batches" in message
    compress(load(llama), [one_layer()], rows)  # which measures no losses


def test_few_different_tokens_are_told(llama: Path, logged: list[str]) -> None:
    rows = rows_of_tokens(*[[7, 8] * 32] * 16)
    compress(load(llama), [one_layer()], rows)
    assert any("2 different tokens for hidden_size 32" in line for line in logged)
    told = [line for line in logged if "directions" in line]
    assert len(told) == 1
    assert told[0].startswith("model.layers.0.self_attn: over the calibration set")


def test_enough_different_tokens_are_not(
    llama: Path, rows: Dataset, logged: list[str]
) -> None:
    compress(load(llama), [one_layer()], rows)
    assert not any("varied text" in line for line in logged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_model_makes_equal_is_refused_by_name(
    llama: Path, rows: Dataset, dtype: torch.dtype
) -> None:
    """Different tokens whose streams differ by rounding alone."""
    model = load(llama)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[:] = 1 + torch.finfo(dtype).eps * (torch.arange(128)[:, None] % 8 == 0)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn: its input is the same"
    ):
        compress(model.to(dtype), [one_layer()], rows)


# --- models that are not the family's causal language model ---------------------------


@pytest.mark.parametrize(
    "auto_class",
    [
        "AutoModel",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    ],
)
def test_another_model_of_the_family(
    llama: Path, rows: Dataset, tmp_path: Path, auto_class: str
) -> None:
    model = getattr(transformers, auto_class).from_pretrained(llama)
    name = type(model).__name__
    with pytest.raises(NotImplementedError, match=f"LlamaForCausalLM.*got a {name}"):
        compress(
            model, NBLModifier(num_layers=1), rows, output_dir=str(tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["wrapped", "inside", "loaded"])
def test_adapters_are_to_be_merged_first(
    llama: Path, rows: Dataset, tmp_path: Path, way: str
) -> None:
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(load(llama), settings)
    if way == "inside":
        model = model.base_model.model
    elif way == "loaded":
        model.save_pretrained(tmp_path / "adapter")
        model = load(llama)
        model.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"self_attn.q_proj: the model has PEFT"):
        compress(
            model, NBLModifier(num_layers=1), rows, output_dir=str(tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()
