# SPDX-License-Identifier: Apache-2.0
"""``nbl compress`` on the bundled model, and everything it refuses beforehand."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from nbl_modifier.cli import main
from nbl_modifier.cli.compress import SAVED
from nbl_modifier.cli.results import weight_bytes
from nbl_modifier.records.compression import NBLReport

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "models" / "pycode-4m")
RECIPE = str(ROOT / "recipes" / "nbl.yaml")
GPTQ_RECIPE = str(ROOT / "recipes" / "nbl_gptq_w4a16.yaml")
# 32 x 128 tokens: more than the hidden size of 128, and a few seconds of work
SMALL = ["--num-samples", "32", "--max-seq-length", "128", "--batch-size", "8"]
HELDOUT = ["--heldout-samples", "8"]


@dataclass(frozen=True)
class Run:
    """
    One finished command.

    :param output: checkpoint directory
    :param printed: standard output
    """

    output: Path
    printed: str


def compress(
    folder: Path, recipe: str, capsys: pytest.CaptureFixture[str], *options: str
) -> Run:
    """Run the command on the bundled model."""
    output = folder / "checkpoint"
    arguments = ["compress", MODEL, "--recipe", recipe, "--output", str(output)]
    heldout = [] if "--dataset" in options else HELDOUT
    assert main([*arguments, *SMALL, *heldout, *options]) == 0
    return Run(output, capsys.readouterr().out)


@pytest.fixture(scope="module")
def gptq_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return one run of NBL and GPTQ that the tests below look at."""
    import contextlib
    import io

    output = tmp_path_factory.mktemp("compress") / "checkpoint"
    printed = io.StringIO()
    arguments = ["compress", MODEL, "--recipe", GPTQ_RECIPE, "--output", str(output)]
    with contextlib.redirect_stdout(printed):
        assert main([*arguments, *SMALL, *HELDOUT]) == 0
    return Run(output, printed.getvalue())


def test_checkpoint_is_complete(gptq_run: Run) -> None:
    names = {path.name for path in gptq_run.output.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "nbl_ranking.png",
        "nbl_report.json",
        "recipe.yaml",
        "tokenizer.json",
    }
    assert not {name for name in names if name.startswith(".")}


def test_new_layers_are_quantized(gptq_run: Run) -> None:
    report = NBLReport.load(gptq_run.output / "nbl_report.json")
    with safe_open(gptq_run.output / "model.safetensors", "pt") as tensors:
        keys = set(tensors.keys())
    for index in report.selected_layers:
        prefix = f"model.layers.{index}.self_attn."
        found = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        assert {"linear.weight_packed", "linear.weight_scale"} <= found
        assert not any("_proj" in key for key in found)


def test_recipe_is_the_users_without_the_probes(gptq_run: Run) -> None:
    saved = yaml.safe_load((gptq_run.output / "recipe.yaml").read_text("utf-8"))
    asked = yaml.safe_load(Path(GPTQ_RECIPE).read_text("utf-8"))
    modifiers = saved["default_stage"]["default_modifiers"]
    assert list(saved) == list(asked)
    assert list(saved["default_stage"]) == ["default_modifiers"]
    assert list(modifiers) == ["NBLModifier", "GPTQModifier"]
    for name, fields in asked["default_stage"]["default_modifiers"].items():
        assert fields.items() <= modifiers[name].items()
    report = NBLReport.load(gptq_run.output / "nbl_report.json")
    assert "Probe" not in str(report.recipe)


def test_perplexity_is_measured_after_each_modifier_and_of_what_was_saved(
    gptq_run: Run,
) -> None:
    evaluation = NBLReport.load(gptq_run.output / "nbl_report.json").evaluation
    assert evaluation is not None
    names = [name for name in evaluation if name.startswith("perplexity")]
    names, ratio = names[:4], names[4:]
    labels = ["base", "after NBLModifier", "after GPTQModifier", SAVED]
    assert names == [f"perplexity {label}" for label in labels]
    base, nbl, gptq, saved = (evaluation[name] for name in names)
    # each step costs something, none of them breaks the model
    assert base < nbl < gptq < 2 * base
    # the same bf16 weights, decompressed once rather than in every forward pass
    assert saved == pytest.approx(gptq, rel=1e-3)
    assert evaluation["held-out tokens"] == 8 * 127
    assert ratio == ["perplexity times base", "perplexity times base, standard error"]
    assert evaluation[ratio[0]] == pytest.approx(saved / base, rel=1e-9)
    assert 0 < evaluation[ratio[1]] < evaluation[ratio[0]] / 10


def test_step_after_nbl_is_what_nbl_alone_gives(
    gptq_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantizers attach early; they must be without effect until their own epoch."""
    alone = compress(tmp_path, RECIPE, capsys)
    expected = NBLReport.load(alone.output / "nbl_report.json").evaluation
    evaluation = NBLReport.load(gptq_run.output / "nbl_report.json").evaluation
    assert expected is not None
    assert evaluation is not None
    name = "perplexity after NBLModifier"
    assert evaluation[name] == pytest.approx(expected[name], rel=1e-6)


def test_printed_results(gptq_run: Run) -> None:
    for words in (
        "calibration: 32 x 128 tokens of the standard library of Python",
        "4 of 16 attention layers replaced",
        "perplexity on 1,016 held-out tokens",
        "after NBLModifier",
        "weights on disk: 7.36 MB -> ",
        "KV cache per token: 75.0% of the base model's",
        f"vllm serve {gptq_run.output}",
    ):
        assert words in gptq_run.printed, words


def test_model_card_has_the_perplexities(gptq_run: Run) -> None:
    card = (gptq_run.output / "README.md").read_text("utf-8")
    assert re.search(rf"^\| perplexity {SAVED} +\|", card, re.MULTILINE)
    assert "compressed-tensors pack-quantized" in card
    assert str(ROOT) not in card


def test_sizes_on_disk(gptq_run: Run) -> None:
    size = (gptq_run.output / "model.safetensors").stat().st_size
    assert weight_bytes(str(gptq_run.output)) == size
    assert size < weight_bytes(MODEL) / 2


def test_overwrite_replaces_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "def f(x):\n    return [x, x + 1]\n" * 2000
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    dataset = ["--dataset", str(tmp_path / "text.txt")]
    first = compress(tmp_path, RECIPE, capsys, *dataset)
    # text of one's own has no held-out half
    assert "no perplexities" in first.printed
    before = NBLReport.load(first.output / "nbl_report.json")
    arguments = ["compress", MODEL, "--recipe", RECIPE, *SMALL, *dataset]
    assert main([*arguments, "--output", str(first.output)]) == 2
    assert main([*arguments, "--output", str(first.output), "--overwrite"]) == 0
    after = NBLReport.load(first.output / "nbl_report.json")
    assert after.selected_layers == before.selected_layers
    assert after.created >= before.created


def make_recipe(folder: Path, fields: str) -> list[str]:
    """Return ``--recipe`` with NBLModifier fields, a flow mapping."""
    path = folder / "recipe.yaml"
    path.write_text(f"default_stage: {{default_modifiers: {{NBLModifier: {fields}}}}}")
    return ["--recipe", str(path)]


def refuse(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail before calibration; return the message."""
    output = folder / "output"
    defaults = ["--recipe", RECIPE, "--output", str(output), *SMALL]
    assert main(["compress", MODEL, *defaults, *arguments]) == 2
    message = capsys.readouterr().err.split("nbl: error: ")[1]
    assert "Traceback" not in message
    assert not output.exists()
    return message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("{num_layers: 0}", ["num_layers"]),
        ("{num_layers: -2}", ["num_layers"]),
        ("{num_layers: 17}", ["num_layers", "17", "16"]),
        ("{num_layers: 1, layers: [2]}", ["num_layers", "layers"]),
        ("{}", ["num_layers", "layers"]),
        ("{layers: [16]}", ["layers", "16"]),
        ("{num_layer: 1}", ["num_layer", "num_layers"]),
        ("{num_layers: 1, targets: ['re:.*attention$']}", ["targets", "self_attn"]),
    ],
)
def test_bad_recipe_fields_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: str,
    words: list[str],
) -> None:
    message = refuse(tmp_path, capsys, *make_recipe(tmp_path, fields))
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "no.yaml"], ["recipe no.yaml", "no such file"]),
        (["--dataset", "no.txt"], ["no.txt", "no such file", "stdlib"]),
        (["--dataset", "no-such-name"], ["--dataset no-such-name", "c4"]),
        (["--heldout", "no.txt"], ["no.txt", "no such file"]),
        (["--heldout", "c4"], ["--heldout c4", "stdlib"]),
        (["--max-seq-length", "4096"], ["--max-seq-length 4096", "2048 or less"]),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    message = refuse(tmp_path, capsys, *arguments)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ["holds no text"]), ("def f", ["not one window of 128", "more text"])],
)
def test_empty_calibration_set_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    words: list[str],
) -> None:
    (tmp_path / "text.txt").write_text(text)
    message = refuse(tmp_path, capsys, "--dataset", str(tmp_path / "text.txt"))
    for word in words:
        assert word in message, message


def test_quantized_model_is_refused(
    gptq_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", RECIPE, "--output", str(tmp_path / "output"), *SMALL]
    assert main(["compress", str(gptq_run.output), *arguments]) == 2
    assert "quantized already" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_are_checked_by_the_parser(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", MODEL, "--recipe", RECIPE, "--output", "x"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--num-samples", value])
    assert stop.value.code == 2
    assert "--num-samples" in capsys.readouterr().err


def test_report_numbers_are_finite(gptq_run: Run) -> None:
    fields = json.loads((gptq_run.output / "nbl_report.json").read_text("utf-8"))
    for layer in fields["layers"]:
        for name in ("nmse", "residual_nmse", "cca_bound", "seconds"):
            assert math.isfinite(layer[name])
            assert layer[name] >= 0


def test_shorter_model_needs_no_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = "{num_layers: 2, kind: block, method: drop, criterion: cosine}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"default_stage: {{default_modifiers: {{NBLModifier: {fields}}}}}\n"
    )
    made = compress(tmp_path, str(recipe), capsys)
    assert "2 of 16 blocks dropped" in made.printed
    assert "serve it, where vLLM is installed" in made.printed
    assert (
        "nbl-modifier"
        not in (made.output / "README.md")
        .read_text()
        .partition("## Made with")[0]
        .partition("## Load")[2]
    )
    again = ["compress", MODEL, "--recipe", str(recipe), *SMALL]
    assert main([*again, "--output", str(made.output), "--overwrite"]) == 0


def test_overwrite_without_nbl_leaves_nothing_of_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llm-compressor saves this one, file by file over what is there."""
    first = compress(tmp_path, RECIPE, capsys)
    (first.output / "nbl_evaluation.json").write_text("{}")
    (first.output / "notes.txt").write_text("precious")
    recipe = tmp_path / "recipe.yaml"
    fields = "{targets: [Linear], scheme: W8A8, ignore: [lm_head]}"
    recipe.write_text(
        f"default_stage: {{default_modifiers: {{QuantizationModifier: {fields}}}}}\n"
    )
    arguments = ["compress", MODEL, "--recipe", str(recipe), *HELDOUT]
    assert main([*arguments, "--output", str(first.output), "--overwrite"]) == 0
    names = {path.name for path in first.output.iterdir()}
    assert not {name for name in names if name.startswith("nbl_")}
    assert not list(first.output.glob("*.py"))
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "notes.txt"}
