# SPDX-License-Identifier: Apache-2.0
"""Recipes are read strictly: nothing in them is passed over."""

import json
import re
from pathlib import Path

import pytest

from nbl_modifier.cli import main
from nbl_modifier.llmcompressor_plugin.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    """Write a recipe and return its path."""
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def in_group(modifiers: str) -> str:
    """Return a recipe with ``modifiers``, a flow mapping, in the usual place."""
    return f"default_stage:\n  default_modifiers: {modifiers}\n"


SHIPPED = sorted(path.name for path in (ROOT / "recipes").iterdir())
PAPER = [name for name in SHIPPED if name.startswith("paper_")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_parse_and_say_how_to_run_them(name: str) -> None:
    path = ROOT / "recipes" / name
    modifiers = load_recipe(str(path)).modifiers
    assert type(modifiers[0]).__name__ == "NBLModifier"
    text = path.read_text("utf-8")
    header = text[: text.index("default_stage")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "# Size: " in header
    assert re.search("[cC]hoose it", header)
    model = r"(MODEL|meta-llama/[\w.-]+)"
    assert re.search(rf"nbl compress {model} --recipe recipes/{name}", header)


def test_papers_settings() -> None:
    """arXiv:2505.21077: m of K layers in order of the bound, on the residual stream."""
    settings = []
    for name in PAPER:
        (modifier,) = load_recipe(str(ROOT / "recipes" / name)).modifiers
        fields = modifier.model_dump()
        layers, count = re.findall("[0-9]+", name)
        assert fields["num_layers"] == int(count)
        assert fields["criterion"] == "cca_bound"
        assert fields["input"] == "residual"
        settings.append((int(layers), int(count)))
    assert sorted(settings) == [
        *((32, count) for count in (4, 8, 12, 16)),
        *((80, count) for count in (32, 48, 54)),
    ]


@pytest.mark.usefixtures("one_thread", "pageable_cache")
@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in PAPER])
def test_shipped_recipes_run(name: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [
        *("compress", str(ROOT / "examples" / "models" / "pycode-4m")),
        *("--recipe", str(ROOT / "recipes" / name), "--output", str(output)),
        *("--num-samples", "16", "--max-seq-length", "128", "--heldout", "none"),
    ]
    assert main(arguments) == 0
    config = json.loads((output / "config.json").read_text())
    assert len(config["nbl_config"]["layers"]) == 4
    inputs = {layer["input"] for layer in config["nbl_config"]["layers"].values()}
    assert len(inputs) == 1
    saved = load_recipe(str(output / "recipe.yaml")).modifiers
    shipped = load_recipe(str(ROOT / "recipes" / name)).modifiers
    assert list(map(type, saved)) == list(map(type, shipped))
    assert ("quantization_config" in config) == (len(shipped) > 1)


def test_json_and_stage_names_and_order(tmp_path: Path) -> None:
    text = (
        '{"my_stage": {"a_modifiers": {"NBLModifier": {"num_layers": 1}},'
        ' "b_modifiers": {"GPTQModifier": {"scheme": "W4A16"}}}}'
    )
    recipe = load_recipe(write(tmp_path, text, "recipe.json"))
    names = [type(modifier).__name__ for modifier in recipe.modifiers]
    assert names == ["NBLModifier", "GPTQModifier"]
    assert recipe.stage == "my"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipe .*no\.yaml: no such file"):
        load_recipe(str(tmp_path / "no.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no modifiers. A recipe looks like this"),
        ("- NBLModifier\n", "holds no modifiers"),
        ("args: {a: 1}\n", "holds no modifiers"),
        (in_group("{}"), "holds no modifiers"),
        ("default_stage: [\n", "not valid YAML in line 2"),
        # llm-compressor reads each of these as an empty recipe
        ("NBLModifier: {num_layers: 1}\n", "'NBLModifier' must end in '_stage'"),
        (
            "default_stage_0: {a_modifiers: {}}",
            "'default_stage_0' must end in '_stage'",
        ),
        ("default_stage: {modifier: {}}", "'modifier' must end in '_modifiers'"),
        (
            "default_stage: NBL\n",
            "'default_stage' must hold keys and values, got 'NBL'",
        ),
        (in_group("[NBLModifier]"), "'default_modifiers' must hold keys and values"),
        # AttributeError in llm-compressor
        (in_group("{NBLModifier: }"), "NBLModifier has no fields.*'NBLModifier: {}'"),
        # TypeError in llm-compressor
        ("1: {a_modifiers: {}}", "key '1' must end in '_stage'"),
        ("a_stage: {2: {}}", "key '2' must end in '_modifiers'"),
        (in_group("{3: {}}"), "name 3, which is no text"),
        (in_group("{NBLModifier: {4: 1}}"), "NBLModifier has the name 4"),
        (in_group("{NBLModifier: {[4]: 1}}"), "not valid YAML"),
        (
            in_group("{NBLModifier: {num_layers: 1, group: mine}}"),
            "NBLModifier.group: llm-compressor sets it.*got 'mine'. Remove it",
        ),
        (in_group("{NBLModifier: {num_layers: 2020-99-99}}"), "not valid YAML: month"),
        ("[" * 5000, "nested too deeply|not valid YAML"),
        ("{? {a: 1} : 2}", "not valid YAML"),
        # llm-compressor does nothing with it
        (
            in_group("{NBLModifier: {num_layers: 1}}") + "args: {a: 1}\n",
            "nothing with 'args'.*Remove it",
        ),
        # llm-compressor keeps the last one only
        (
            in_group("{NBLModifier: {num_layers: 1}, NBLModifier: {num_layers: 2}}"),
            "NBLModifier appears twice under one key, line 2",
        ),
    ],
)
def test_wrong_layout_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"recipe {path}: ")


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        (
            "{NBLModifier: {num_layer: 4}}",
            r"NBLModifier has no field num_layer\. Its fields: num_layers, layers",
        ),
        ("{NBLModifier: {num_layers: four}}", r"NBLModifier\.num_layers: .*got 'four'"),
        ("{NBLModifier: {num_layers: 0}}", "num_layers"),
        ("{NBLModifier: {num_layers: -1}}", "num_layers"),
        ("{NBLModifier: {}}", "num_layers.*layers"),
        ("{NBLModifier: {num_layers: 1, layers: [0]}}", "num_layers.*layers"),
        ("{NBLModifier: {num_layers: 1, criterion: best}}", r"NBLModifier\.criterion"),
        ("{NBLModifier: {num_layers: 1, input: raw}}", r"NBLModifier\.input"),
        (
            "{GPTQModifier: {schem: W4A16}}",
            r"GPTQModifier\.schem: no such field.*scheme",
        ),
        (
            "{NBLModifer: {num_layers: 4}}",
            r"No modifier of type 'NBLModifer' found\. Did you mean NBLModifier\? "
            r"Known: .*GPTQModifier, .*NBLModifier",
        ),
    ],
)
def test_wrong_fields_are_one_line_with_the_remedy(
    tmp_path: Path, modifiers: str, message: str
) -> None:
    path = write(tmp_path, in_group(modifiers))
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"recipe {path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80" * 99, bytes(range(256))])
def test_binary_file_is_no_recipe(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^recipe .*is no text.*Pass a \.yaml"):
        load_recipe(str(path))


def test_modifier_that_takes_its_values_for_granted(tmp_path: Path) -> None:
    path = write(tmp_path, in_group("{SmoothQuantModifier: {mappings: [1]}}"))
    with pytest.raises(ValueError, match=r"^recipe .*mappings|cannot take its values"):
        load_recipe(path)
