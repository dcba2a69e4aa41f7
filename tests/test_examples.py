# SPDX-License-Identifier: Apache-2.0
"""Every script that users copy runs as it is, and leaves the checkpoint it promises."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import nbl_modifier.hf
from tests.tiny_llama import linearized, load

pytestmark = pytest.mark.usefixtures("one_thread", "pageable_cache")

EXAMPLES = Path(__file__).parents[1] / "examples"
# demo.py is `make demo`, in two environments; the others have a test file each.
OTHERS = (
    *("demo.py", "train_demo_model.py", "demo_training.py", "lora_recovery.py"),
    *("real_model.py", "gguf_tokenizer.py"),
)
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name not in OTHERS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()
    (name,) = re.findall(r'^OUTPUT = "(.*)"$', text, re.MULTILINE)
    output = Path(name)
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "nbl_llama"
    assert ("quantization_config" in config) == (script.stem != "nbl_kv_cache_budget")
    nbl_modifier.hf.register()
    assert len(linearized(load(output))) == 4


def test_there_is_one_for_each_recipe() -> None:
    recipes = {path.stem for path in (EXAMPLES.parent / "recipes").glob("nbl_*.yaml")}
    assert recipes <= {path.stem for path in SCRIPTS}
