# SPDX-License-Identifier: Apache-2.0
"""README.md of a checkpoint: what it is, what was measured, how to load it."""

import json
import re
from pathlib import Path
from typing import Any

from nbl_modifier.records.compression import REPORT_FILE_NAME, NBLReport
from nbl_modifier.records.files import write_atomically

from .markdown import escape_markdown, fenced
from .tables import markdown_table

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_TEMPLATE = """\
---
{front_matter}
---

# {title}

{base_link} with {m} of {k} {subject} {outcome}{quantized}. Made with
[Neural Block Linearization](https://arxiv.org/abs/2505.21077) (NBL), a modifier for
[llm-compressor](https://github.com/vllm-project/llm-compressor).

- layers {action}: {layers} (of the base model, numbers from 0)
- class: `{architecture}`, `model_type` `{model_type}`
- KV cache: {kept} of {k} layers keep one; {kv_subject}: {kv_percent:.1f} % of the base
  model's, so {kv_ratio} the tokens fit in the same memory
{quantization_line}{training_line}\
- calibrated on {samples:,} sequences, {tokens:,} tokens, in {seconds:.1f} s

## Figures

{figures}\
Layers in the order of the ranking by `{criterion}`, those {action} in bold. `bound` is
sum(1 - rho_i^2) between the residual stream before and after {part}; `NMSE` is the
error of what takes its place over the variance of what {part} adds to the stream;
`residual NMSE` is the same error over the variance of the residual stream after it;
`loss` is the increase of the loss on held-out windows with that layer alone {action},
`KL` the divergence from the original model's predictions, both in nats per token. What
was not measured is left out.

{table}

`nbl_report.json` holds these numbers in full.

## Load

{load}## Made with

{recipe}{versions}, {created}.

## Citation

```bibtex
@article{{erdogan2025nbl,
  title = {{Efficient Large Language Model Inference with Neural Block Linearization}},
  author = {{Erdogan, Mete and Tonin, Francesco and Cevher, Volkan}},
  journal = {{arXiv preprint arXiv:2505.21077}},
  year = {{2025}}
}}
```
"""

# Where the package is needed.
_LOAD = """\
In transformers:

```bash
pip install nbl-modifier
```

```python
import nbl_modifier.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

nbl_modifier.hf.register()
model = AutoModelForCausalLM.from_pretrained("{directory}")
tokenizer = AutoTokenizer.from_pretrained("{directory}")
```

In vLLM, install the package into the environment vLLM runs in, nothing else; vLLM finds
it by itself:

```bash
pip install nbl-modifier
vllm serve {directory}
```

Without the package both refuse the checkpoint:

```
The repository {directory} contains custom code which must be executed to correctly \
load the model.
```

transformers then also loads it with `trust_remote_code=True`, from the modelling files
in this directory. vLLM needs the package in any case; with `--trust-remote-code` in its
place it says

```
Layer ... does not dispatch through the Transformers attention interface and vLLM has \
no other way to handle it.
```

"""

# A model of the base class: blocks were dropped, and nothing else.
_LOAD_PLAIN = """\
The checkpoint is one of the base model's class with fewer layers. Whatever loads the
base model loads it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{directory}")
tokenizer = AutoTokenizer.from_pretrained("{directory}")
```

```bash
vllm serve {directory}
```

"""


def model_card(
    report: NBLReport, architecture_name: str, quantization: str | None
) -> str:
    """
    Return the text of README.md for the checkpoint that ``report`` describes.

    :param report: a finished run
    :param architecture_name: class in ``config.json``, such as ``NBLLlamaForCausalLM``
    :param quantization: what quantized the weights, such as
        ``compressed-tensors pack-quantized``, or None for a dense checkpoint
    :return: markdown with Hugging Face's YAML front matter
    """
    name = Path(report.model).name or "model"
    kept = report.num_hidden_layers - report.num_replaced
    needs_package = architecture_name.startswith("NBL")
    load = _LOAD if needs_package else _LOAD_PLAIN
    return _TEMPLATE.format(
        front_matter=_front_matter(report, quantization),
        title=(
            f"{escape_markdown(name)}, {report.num_replaced} {report.subject} "
            f"{'dropped' if report.method == 'drop' else 'linear'}"
        ),
        base_link=_link(report.model),
        m=report.num_replaced,
        k=report.num_hidden_layers,
        quantized=", then quantized" if quantization else "",
        layers=", ".join(map(str, report.selected_layers)) or "none",
        architecture=architecture_name,
        model_type=("nbl_" if needs_package else "") + report.model_type,
        subject=report.subject,
        outcome=report.outcome,
        action=report.outcome.split()[0],
        part="attention" if report.kind == "attention" else "the block",
        load=load.format(directory="THIS_DIRECTORY"),
        kept=kept,
        kv_subject=report.kv_cache_subject,
        kv_percent=100 * report.kv_cache_fraction,
        kv_ratio=f"{1 / report.kv_cache_fraction:.3g} times" if kept else "all",
        quantization_line=(
            f"- quantization: {escape_markdown(quantization)}\n" if quantization else ""
        ),
        training_line=f"- trained: {escape_markdown(report.training)}\n"
        if report.training
        else "",
        samples=report.num_calibration_samples,
        tokens=report.num_tokens,
        seconds=report.calibration_seconds,
        figures=_evaluation_table(report.evaluation),
        criterion=report.criterion,
        table=markdown_table(report),
        recipe=f"{fenced(report.recipe.strip(), 'yaml')}\n\n" if report.recipe else "",
        versions=", ".join(f"{name} {v}" for name, v in report.versions.items()),
        created=report.created,
    )


def write_report(report: NBLReport, directory: Path) -> None:
    """
    Write ``nbl_report.json`` and the model card into a checkpoint.

    :param report: a finished run
    :param directory: the checkpoint, with its ``config.json``
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    report.save(directory / REPORT_FILE_NAME)
    card = model_card(report, config["architectures"][0], quantization_of(config))
    write_atomically(directory / "README.md", card)


def quantization_of(config: dict[str, Any]) -> str | None:
    """
    Return what quantized a checkpoint, in words, or None for a dense one.

    :param config: content of ``config.json``
    """
    entry = config.get("quantization_config")
    if not entry:
        return None
    words = [entry.get("quant_method"), entry.get("format")]
    return " ".join(word for word in words if word) or "unknown"


def _front_matter(report: NBLReport, quantization: str | None) -> str:
    lines = ["library_name: transformers"]
    if _is_hub_model(report.model):
        lines += [f"base_model: {report.model}"]
    tags = ["nbl", "nbl-modifier", "llm-compressor", "vllm", "linear-attention"]
    if quantization:
        tags.append(quantization.split()[0])
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags)])


def _is_hub_model(model: str) -> bool:
    return bool(_REPOSITORY_ID.fullmatch(model)) and not Path(model).exists()


def _link(model: str) -> str:
    """Return how to name the base model; of a local path only its last part."""
    if _is_hub_model(model):
        return f"[{model}](https://huggingface.co/{model})"
    return escape_markdown(Path(model).name) or "A local model"


def _evaluation_table(evaluation: dict[str, float] | None) -> str:
    if not evaluation:
        return ""
    rows = [
        f"| {escape_markdown(name)} | {_number(value)} |"
        for name, value in evaluation.items()
    ]
    return "\n".join(["| figure | value |", "|:---|---:|", *rows]) + "\n\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"
