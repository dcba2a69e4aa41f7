# SPDX-License-Identifier: Apache-2.0
"""Recipes are read strictly: nothing in them is passed over."""

from pathlib import Path

import pytest

from nbl_modifier.cli.recipes import load_recipe

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    """Write a recipe and return its path."""
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def in_group(modifiers: str) -> str:
    """Return a recipe with ``modifiers``, a flow mapping, in the usual place."""
    return f"default_stage:\n  default_modifiers: {modifiers}\n"


@pytest.mark.parametrize("name", ["nbl.yaml", "nbl_gptq_w4a16.yaml"])
def test_shipped_recipes_parse_and_say_how_to_run_them(name: str) -> None:
    path = ROOT / "recipes" / name
    modifiers = load_recipe(str(path)).modifiers
    assert type(modifiers[0]).__name__ == "NBLModifier"
    assert modifiers[0].model_dump()["num_layers"] == 4
    assert f"nbl compress MODEL --recipe recipes/{name}" in path.read_text("utf-8")


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
