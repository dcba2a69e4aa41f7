# SPDX-License-Identifier: Apache-2.0
"""Read a recipe strictly: llm-compressor skips what it does not recognize."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier
    from llmcompressor.recipe import Recipe
    from pydantic import ValidationError

_LAYOUT = """\
A recipe looks like this:
  default_stage:
    default_modifiers:
      NBLModifier: {num_layers: 4}"""


def load_recipe(path: str) -> Recipe:
    """
    Return the recipe in a file, with every key of it understood.

    :param path: a .yaml, .yml or .json file
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: on wrong syntax, wrong layout, an unknown modifier, or an
        unknown or wrong field; the message names it
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"recipe {path}: no such file. Check the path.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(
            f"recipe {path}: is no text ({err.reason} at byte {err.start}). Pass a "
            ".yaml or .json file."
        ) from err
    _check_layout(path, _parse(path, text))

    from llmcompressor.recipe import Recipe
    from pydantic import ValidationError

    import nbl_modifier.llmcompressor_plugin.modifier  # noqa: F401  makes NBLModifier known to recipes

    try:
        return Recipe.create_instance(path)
    except ValidationError as err:
        raise ValueError(f"recipe {path}: {_explain_fields(err)}") from err
    except ValueError as err:
        raise ValueError(f"recipe {path}: {err}{_suggest_modifier(str(err))}") from err
    except (TypeError, AttributeError, KeyError) as err:
        # a modifier that takes its own values for granted
        raise ValueError(
            f"recipe {path}: a modifier cannot take its values ({type(err).__name__}: "
            f"{err}). Compare them with its documentation."
        ) from err


def _parse(path: str, text: str) -> dict[str, Any]:
    """Return the YAML (or JSON, which is YAML) as a dictionary, duplicates refused."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice: plain YAML would drop the first."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                raise ValueError(
                    f"recipe {path}: {', '.join(twice)} appears twice under one key, "
                    f"line {node.start_mark.line + 1}; only the last would be used. "
                    "Put the second one under another group, such as more_modifiers."
                )
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(text, Loader)
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(err, "problem", None) or err
        raise ValueError(f"recipe {path}: not valid YAML{where}: {reason}.") from err
    except RecursionError as err:
        raise ValueError(f"recipe {path}: is nested too deeply. {_LAYOUT}") from err
    except (ValueError, TypeError, OverflowError) as err:
        # of a scalar that looks like a date or a number and is none
        if str(err).startswith("recipe "):
            raise
        raise ValueError(f"recipe {path}: not valid YAML: {err}. Quote it.") from err
    if not isinstance(content, dict) or not content:
        raise ValueError(f"recipe {path}: holds no modifiers. {_LAYOUT}")
    return content


def _check_layout(path: str, content: dict[str, Any]) -> None:
    """Refuse every key that llm-compressor would pass over without a word."""
    stages = {key: value for key, value in content.items() if key != "args"}
    groups = {}
    for name, stage in stages.items():
        _check_key(path, name, stage, "_stage")
        for group_name, group in stage.items():
            _check_key(path, group_name, group, "_modifiers")
            groups[f"{name}.{group_name}"] = group
    for name, group in groups.items():
        for modifier, fields in group.items():
            if not isinstance(fields, dict):
                raise ValueError(
                    f"recipe {path}: {name}.{modifier} has no fields, got {fields!r}. "
                    f"Write '{modifier}: {{}}' to use its defaults."
                )
            _check_names(path, f"{name}.{modifier}", modifier, fields)
    if not any(groups.values()):
        raise ValueError(f"recipe {path}: holds no modifiers. {_LAYOUT}")
    if content.get("args"):
        raise ValueError(
            f"recipe {path}: llm-compressor does nothing with 'args', got "
            f"{content['args']!r}. Remove it."
        )


def _check_names(path: str, where: str, modifier: Any, fields: dict[Any, Any]) -> None:
    """Refuse names that llm-compressor cannot pass on."""
    for name in (modifier, *fields):
        if not isinstance(name, str):
            raise ValueError(
                f"recipe {path}: {where} has the name {name!r}, which is no text. "
                "Write the name of a modifier, or of one of its fields."
            )
    for name in {"group", "type_", "allow_registered", "allow_experimental"} & {
        *fields
    }:
        raise ValueError(
            f"recipe {path}: {where}.{name}: llm-compressor sets it itself, got "
            f"{fields[name]!r}. Remove it; a group is named by the key that ends in "
            "'_modifiers'."
        )


def _check_key(path: str, key: Any, value: Any, ending: str) -> None:
    if not (isinstance(key, str) and key.endswith(ending)):
        raise ValueError(
            f"recipe {path}: key '{key}' must end in '{ending}', llm-compressor "
            f"ignores it otherwise. {_LAYOUT}"
        )
    if not isinstance(value, dict):
        raise ValueError(
            f"recipe {path}: '{key}' must hold keys and values, got {value!r}. "
            f"{_LAYOUT}"
        )


def _explain_fields(err: ValidationError) -> str:
    """Return pydantic's complaints as one line that starts with the field's name."""
    from llmcompressor.modifiers import ModifierFactory

    registries = (ModifierFactory._registered_registry, ModifierFactory._main_registry)
    kind = next((found[err.title] for found in registries if err.title in found), None)
    complaints = []
    for error in err.errors():
        field = ".".join(str(part) for part in error["loc"])
        name = f"{err.title}.{field}" if field else err.title
        if error["type"] == "extra_forbidden":
            complaint = f"{name}: no such field. {_suggest_field(field, kind)}"
        else:
            reason = error["msg"].removeprefix("Value error, ")
            complaint = f"{name}: {reason}"
            if not field.startswith("_") and error["type"] != "value_error":
                complaint += f", got {error['input']!r}"
        complaints.append(complaint.strip())
    return "; ".join(complaints)


def _suggest_field(field: str, kind: type[Modifier] | None) -> str:
    if kind is None:
        return ""
    # what every modifier has for training is no help here
    shared = {"index", "group", "start", "end", "update", "requires_calibration_data"}
    known = sorted(
        name
        for name in kind.model_fields
        if name not in shared and not name.endswith("_")
    )
    close = difflib.get_close_matches(field, known, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}Fields: {', '.join(known)}"


def _suggest_modifier(message: str) -> str:
    """Return close names if the message is about an unknown modifier."""
    from llmcompressor.modifiers import ModifierFactory

    if not message.startswith("No modifier of type"):
        return ""
    known = sorted(
        {*ModifierFactory._registered_registry, *ModifierFactory._main_registry}
        - {"Modifier"}
    )
    asked = message.split("'")[1]  # No modifier of type 'NBLModifer' found.
    close = difflib.get_close_matches(asked, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Known: {', '.join(known)}"
