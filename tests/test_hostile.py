# SPDX-License-Identifier: Apache-2.0
"""
Hostile recipes, fields and checkpoints: an error before calibration that names what is
wrong, or a right result. Options of the command line are in cli/test_options.py.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from llmcompressor.modifiers import Modifier

import nbl_modifier.hf
from nbl_modifier import NBLModifier
from nbl_modifier.architectures import ARCHITECTURES
from nbl_modifier.cli import main
from nbl_modifier.hf.configuration_nbl import config_class
from nbl_modifier.llmcompressor_plugin.old_names import OLD_NAMES
from nbl_modifier.llmcompressor_plugin.recipe_file import load_recipe
from tests.tiny_llama import compress, linearized, load

pytestmark = pytest.mark.usefixtures("one_thread")

FUZZ = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OWN = [name for name in NBLModifier.model_fields if name not in Modifier.model_fields]
# What goes with a field so that it has an effect.
OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("num_layers", "layers", "kv_cache_reduction"), {}),
    "method": {"num_layers": 1, "input": "normalized"},
}
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 2, -1, 0.5, 1.0, 10**400])
)
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "1", "nan", "yes", "re:(", "re:", "re:a{9}{9}{", "best"])
    | st.sampled_from(["linear", "drop", "block", "loss", "greedy", "normalized", "~"]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    WORDS,
    st.binary(max_size=3),
    st.dates(),
)
HOSTILE = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(SCALARS.filter(lambda key: key == key), inner, max_size=2)
    ),
    max_leaves=4,
)

# Written from the documentation of the fields, not from the class.
AT_LEAST_ONE = {"num_layers", "kv_cache_context"}
POSITIVE = {"kv_cache_reduction", "max_nmse"}
NOT_NEGATIVE = {"max_perplexity_increase", "dampening_frac"}
CHOICES: dict[str, set[str | bool | None]] = {
    "refit": {True, False},
    "criterion": {"cca_bound", "nmse", "residual_nmse", "cosine", "loss", "kl"},
    "selection": {"one_shot", "greedy"},
    "kind": {"attention", "block"},
    "method": {"linear", "wo_wv", "drop"},
    "input": {"residual", "normalized"},
    "preset": {"best", None},
}


def means_the_same(value: Any, kept: Any) -> bool:
    """Return whether a field holds what was written, as a number or as it was."""
    if isinstance(value, dict):
        given = {key: each for key, each in value.items() if each is not None}
        return all(means_the_same(given[key], getattr(kept, key)) for key in given)
    if isinstance(value, list | tuple):
        texts = [v.decode() if isinstance(v, bytes) else str(v) for v in value]
        return sorted(texts) == sorted(map(str, kept))
    if isinstance(kept, bool):
        yes = ("1", "1.0", "true", "yes", "on", "t", "y")
        return (str(value).lower() in yes) == kept
    if isinstance(kept, int | float):
        return not isinstance(value, bool) and math.isclose(
            float(value), float(kept), rel_tol=1e-9
        )
    return bool(value == kept) or str(value) == str(kept) or value == kept.encode()


def is_right(name: str, kept: Any) -> bool:
    """Return whether a value that a field took is one that its documentation allows."""
    if kept is None:
        return name not in CHOICES or None in CHOICES[name]
    if name in CHOICES:
        return kept in CHOICES[name]
    if name == "layers":
        return bool(kept) and min(kept) >= 0 and len(set(kept)) == len(kept)
    if name in ("targets", "ignore"):
        return all(isinstance(pattern, str) for pattern in kept)
    if name == "statistics":
        return bool(kept.strip())
    if name == "distill":
        right = kept.epochs >= 0 and (kept.rate is None or kept.rate > 0)
        return right and (kept.epochs > 0 or kept.rate is None)
    if name == "rank":
        return 0 < kept < 1 or (isinstance(kept, int) and kept >= 1)
    in_range = kept >= 1 if name in AT_LEAST_ONE else kept >= 0
    if name in POSITIVE:
        in_range = kept > 0
    if name == "kv_cache_reduction":
        in_range = 0 < kept <= 1
    assert name in AT_LEAST_ONE | POSITIVE | NOT_NEGATIVE
    return bool(in_range) and (isinstance(kept, int) or math.isfinite(kept))


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a call returns, or what it says against its input."""
    try:
        return call(), ""
    except ValueError as err:
        return None, str(err)


@pytest.mark.parametrize("name", OWN)
def test_fuzz_field(name: str, hostile_input: Callable[[], None]) -> None:
    @FUZZ
    @given(HOSTILE)
    @example(True)
    @example("")
    @example(math.nan)
    @example([True])
    def try_one(value: Any) -> None:
        hostile_input()
        others = OTHERS.get(name, {"num_layers": 1})
        fields: dict[str, Any] = {**others, name: value}
        modifier, said = outcome(lambda: NBLModifier(**fields))
        if modifier is None:
            assert name in said, (value, said)
            assert "got" in said or "input_value" in said
            return
        kept = getattr(modifier, name)
        assert is_right(name, kept), (value, kept)
        assert value is None or means_the_same(value, kept), (value, kept)

    try_one()


@pytest.mark.parametrize("name", OLD_NAMES)
def test_fuzz_old_name(name: str, hostile_input: Callable[[], None]) -> None:
    @FUZZ
    @given(HOSTILE)
    def try_one(value: Any) -> None:
        hostile_input()
        fields: dict[str, Any] = {"num_layers": 1, "input": "normalized", name: value}
        modifier, said = outcome(lambda: NBLModifier(**fields))
        assert (modifier is None) == bool(said)

    try_one()


RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "num_layers": st.integers(1, 99),
    "layers": st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    "kv_cache_reduction": st.floats(0.01, 1),
    "max_nmse": st.floats(0.01, 9),
    "max_perplexity_increase": st.floats(0, 9),
    "distill": st.fixed_dictionaries(
        {"epochs": st.integers(1, 99)}, optional={"rate": st.floats(0.01, 9)}
    ),
    "dampening_frac": st.floats(0, 9),
    "rank": st.integers(1, 99) | st.floats(0.01, 0.99),
}


@pytest.mark.parametrize("name", RIGHT)
def test_fuzz_right_values_are_taken(
    name: str, hostile_input: Callable[[], None]
) -> None:
    @FUZZ
    @given(RIGHT[name])
    def try_one(value: Any) -> None:
        hostile_input()
        fields: dict[str, Any] = {**OTHERS.get(name, {"num_layers": 1}), name: value}
        modifier = NBLModifier(**fields)
        kept = modifier.model_dump()[name]
        assert kept == (sorted(value) if isinstance(value, list) else value)

    try_one()


# --- recipe files ---------------------------------------------------------------------


def read_or_refuse(path: Path) -> None:
    """Assert that a recipe is read as what it says, or refused by name."""
    recipe, said = outcome(lambda: load_recipe(str(path)))
    if recipe is None:
        assert said.startswith(f"recipe {path}: ")
        return
    assert recipe.modifiers
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = [
        name
        for stage, groups in content.items()
        if stage != "args"
        for group in groups.values()
        for name in group
    ]
    assert [type(each).__name__ for each in recipe.modifiers] == names


GOOD = "default_stage:\n  default_modifiers:\n    NBLModifier: {num_layers: 4}\n"
LEVELS = st.recursive(
    HOSTILE,
    lambda inner: st.dictionaries(
        st.sampled_from(["a_stage", "b_modifiers", "args", "NBLModifier", "num_layers"])
        | st.sampled_from(["GPTQModifier", "scheme", "group", "targets", "start"])
        | SCALARS.filter(lambda key: key == key),
        inner,
        max_size=3,
    ),
    max_leaves=6,
)


def test_fuzz_recipe_of_any_shape(
    tmp_path: Path, hostile_input: Callable[[], None]
) -> None:
    path = tmp_path / "recipe.yaml"

    @settings(FUZZ, max_examples=150)
    @given(LEVELS)
    def try_one(content: Any) -> None:
        hostile_input()
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        read_or_refuse(path)

    try_one()


def test_fuzz_recipe_with_damage(
    tmp_path: Path, hostile_input: Callable[[], None]
) -> None:
    path = tmp_path / "recipe.yaml"

    @settings(FUZZ, max_examples=150)
    @given(
        st.integers(0, len(GOOD)),
        st.integers(0, 9),
        st.binary(max_size=4) | st.text("{}[]:,&*!|>'\"%@`? \n\t-#0", max_size=4),
    )
    def try_one(start: int, removed: int, added: bytes | str) -> None:
        hostile_input()
        middle = added if isinstance(added, bytes) else added.encode()
        good = GOOD.encode()
        path.write_bytes(good[:start] + middle + good[start + removed :])
        read_or_refuse(path)

    try_one()


def test_fuzz_fields_of_other_modifiers(
    tmp_path: Path, hostile_input: Callable[[], None]
) -> None:
    path = tmp_path / "recipe.yaml"
    names = ["GPTQModifier", "QuantizationModifier", "SmoothQuantModifier"]

    @settings(FUZZ, max_examples=60)
    @given(
        st.sampled_from(names),
        st.sampled_from(["targets", "ignore", "scheme", "mappings", "group", "index"]),
        HOSTILE,
    )
    def try_one(modifier: str, field: str, value: Any) -> None:
        hostile_input()
        content = {"a_stage": {"b_modifiers": {modifier: {field: value}}}}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        read_or_refuse(path)

    try_one()


# --- config.json ----------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["version", "layers", "0", "3", "12", "-1", "x", "01"])
            | st.sampled_from(["input", "kind", "method", "rank", "residual"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "input": st.sampled_from(["residual", "normalized", 1, None]),
        "kind": st.sampled_from(["attention", "block", []]),
        "method": st.sampled_from(["linear", "drop", {}]),
        "rank": st.sampled_from([None, 1, 32, 33, 0, True, 1.5, "8"]),
        "experts": st.just(1),
    },
)
BLOCK = st.fixed_dictionaries(
    {},
    optional={
        "version": st.sampled_from([1, 1, 1, 2, 0, "1", None, True]),
        "layers": st.dictionaries(
            st.sampled_from(["0", "3", "4", "-1", "00", "a"]), ENTRY | JSON, max_size=2
        ),
    },
)


def test_fuzz_nbl_config(hostile_input: Callable[[], None]) -> None:
    @settings(FUZZ, max_examples=300)
    @given(BLOCK | JSON)
    def try_one(block: Any) -> None:
        hostile_input()
        kind: Any = config_class(ARCHITECTURES["llama"])
        config = kind(hidden_size=32, num_hidden_layers=4, nbl_config=block)
        layers, said = outcome(config.linearized_layers)
        if layers is None:
            assert "nbl_config" in said
            assert "pip install -U" in said or "write it again" in said
            return
        assert block["version"] == 1
        assert list(layers) == sorted(int(index) for index in block["layers"])
        for index, layer in layers.items():
            assert 0 <= index < 4
            assert layer.rank is None or 1 <= layer.rank <= 32
            assert (layer.kind, layer.method) != ("block", "drop")

    try_one()


@pytest.mark.parametrize("block", ["a text", [], {}, {"version": 1}, {"layers": {}}])
def test_hostile_checkpoint_is_refused(
    llama: Path, tmp_path: Path, block: Any, hostile_input: Callable[[], None]
) -> None:
    """By transformers with our classes, in words."""
    hostile_input()
    nbl_modifier.hf.register()
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "nbl_llama", "architectures": ["NBLLlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"nbl_config": block}))
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    with pytest.raises(ValueError, match="nbl_config"):
        load(tmp_path)


# --- what only a model can tell -------------------------------------------------------


def test_fuzz_budget_of_a_model(
    llama: Path, rows: Dataset, hostile_input: Callable[[], None]
) -> None:
    """Four layers of hidden size 32, through oneshot(): refused by name, or so many."""
    ways = st.one_of(
        st.tuples(st.just("num_layers"), st.integers(1, 6)),
        st.tuples(st.just("layers"), RIGHT["layers"].map(lambda found: found[:2])),
        st.tuples(st.just("kv_cache_reduction"), st.sampled_from([0.01, 0.5, 1.0])),
    )

    @settings(FUZZ, max_examples=12)
    @given(ways, st.sampled_from([None, 1, 32, 33, 10**9, 0.5]))
    def try_one(way: tuple[str, Any], rank: Any) -> None:
        hostile_input()
        name, value = way
        wanted = {
            "num_layers": lambda: value,
            "layers": lambda: len(value),
            "kv_cache_reduction": lambda: math.ceil(4 * value),
        }[name]()
        fits = wanted <= 4 and (name != "layers" or max(value) < 4)
        rank_fits = rank is None or rank <= 32
        model = load(llama)
        fields: dict[str, Any] = {name: value, "rank": rank}
        modifier = NBLModifier(**fields)
        _, said = outcome(lambda: compress(model, modifier, rows))
        assert len(linearized(model)) == (0 if said else wanted)
        assert bool(said) == (not (fits and rank_fits)), said
        if said:
            assert ("rank" if fits else name) in said
            assert "Use " in said or "among the layers" in said

    try_one()


ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "examples" / "models" / "pycode-4m")
RECIPE = str(ROOT / "recipes" / "nbl.yaml")
FILES: dict[str, bytes] = {
    "empty.json": b"",
    "blank.json": b"  \n",
    "list.json": b"[]",
    "number.json": b"7",
    "torn.jsonl": b'{"text": "a"}\n{"te',
    "other.json": b'{"words": "a"}',
    "bad.parquet": b"PAR1 and no more",
    "empty.csv": b"",
    "bad.csv": b'a,b\n"',
    "binary.txt": bytes(256),
    "short.txt": b"def f",
    "packed.txt.gz": b"\x1f\x8b",
}


@pytest.mark.parametrize("option", ["--dataset", "--heldout"])
@pytest.mark.parametrize("name", FILES)
def test_hostile_file_is_named_with_its_option(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hostile_input: Callable[[], None],
    option: str,
    name: str,
) -> None:
    hostile_input()
    path = tmp_path / name
    path.write_bytes(FILES[name])
    arguments = ["compress", MODEL, "--recipe", RECIPE, "--max-seq-length", "128"]
    arguments += ["--output", str(tmp_path / "out"), "--num-samples", "2"]
    assert main([*arguments, option, str(path)]) == 2
    said = capsys.readouterr().err
    assert f"nbl: error: {option} {path}: " in said
    assert not (tmp_path / "out").exists()


def test_hostile_recipe_in_binary(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hostile_input: Callable[[], None],
) -> None:
    hostile_input()
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    arguments = ["compress", MODEL, "--recipe", str(path), "--output", str(path) + "x"]
    assert main(arguments) == 2
    assert f"nbl: error: recipe {path}: is no text" in capsys.readouterr().err


def test_dates_are_no_layers() -> None:
    date: Any = datetime.date(2026, 1, 1)
    with pytest.raises(ValueError, match="num_layers"):
        NBLModifier(num_layers=date)
