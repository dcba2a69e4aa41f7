"""What a row is run on: models, prompts, checkpoints, adapters, draft models."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from integration_tests.rows import DEMO_MODEL, REAL_MODELS, ROOT
from nbl_modifier.architectures import architecture_of
from nbl_modifier.evaluation import perplexity
from nbl_modifier.evaluation.texts import load_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.hf import register

if TYPE_CHECKING:
    from datasets import Dataset

DEMO_DIRECTORY = ROOT / "examples" / "models" / DEMO_MODEL
SHORTEST_PROMPT, LONGEST_PROMPT = 5, 130
# How many prompts, and how many tokens follow each: a random model says less than a
# trained one.
NUM_PROMPTS = {True: 20, False: 8}
MAX_TOKENS = {True: 32, False: 16}
LORA_RANK, LORA_ALPHA = 8, 16
# Calibration windows of 512 tokens: 64 tokens per dimension of the bundled model's
# residual stream, 14 of SmolLM2's. The other real models are only to be served as they
# are, however good they are.
NUM_WINDOWS = {DEMO_MODEL: 16, "smollm2": 16}
FEW_WINDOWS = 6
# Held-out windows of 256 tokens.
NUM_HELDOUT = 12

register()


def is_trained(name: str) -> bool:
    """Return whether a row's model reads text; the others are random."""
    return name == DEMO_MODEL or name in REAL_MODELS


def save_model(name: str, directory: Path) -> Path:
    """
    Return where a row's model is.

    :param name: see :class:`Row`
    :param directory: where to write it, if it is a random one
    """
    from tests.tiny_models import save_for_vllm

    return trained_model(name) if is_trained(name) else save_for_vllm(directory, name)


def trained_model(name: str) -> Path:
    """Return where a trained model is; fetch it first if it is not there."""
    from real_model import fetch

    return DEMO_DIRECTORY if name == DEMO_MODEL else fetch(name)


def _tokenizer(name: str) -> Any:
    """Return that of a trained model; random tokens never meet the one they get."""
    source = trained_model(name) if is_trained(name) else DEMO_DIRECTORY
    return AutoTokenizer.from_pretrained(source)


def max_tokens(name: str) -> int:
    """Return how many tokens are generated after each prompt of a row's model."""
    return MAX_TOKENS[is_trained(name)]


def engine_defaults(name: str) -> dict[str, Any]:
    """
    Return the engine's arguments unless a row says otherwise.

    Longest prompt and answer fit. Lengths are multiples of a KV cache's block, since
    vLLM counts what fits in sequences of them.
    """
    if is_trained(name):
        return {"enforce_eager": True, "max_model_len": 512}
    tiny = {"enforce_eager": True, "max_model_len": 256}
    # Images are found in prompts by a tokenizer; the other models have none.
    return tiny if name == "llava" else tiny | {"skip_tokenizer_init": True}


@cache
def prompts(name: str = DEMO_MODEL) -> list[list[int]]:
    """
    Return the prompts for a row's model, 5 to 130 tokens each.

    For trained models beginnings of standard library modules, after BOS; for others
    random tokens.
    """
    number = NUM_PROMPTS[is_trained(name)]
    step = (LONGEST_PROMPT - SHORTEST_PROMPT) / (number - 1)
    lengths = [round(SHORTEST_PROMPT + step * index) for index in range(number)]
    if not is_trained(name):
        from tests.tiny_llama import ragged_rows

        return list(ragged_rows(lengths, seed=1)["input_ids"])
    tokenizer = _tokenizer(name)
    texts = load_texts("stdlib", "heldout")[:number]
    windows = [
        pack([text], tokenizer, length, 1)["input_ids"][0]
        for text, length in zip(texts, lengths, strict=True)
    ]
    assert all(window[0] == tokenizer.bos_token_id for window in windows)
    return windows


def compress(
    name: str, source: Path, recipe: str, directory: Path, seed: int = 0
) -> None:
    """
    Write a model compressed by ``recipe`` to ``directory``.

    :param name: see :class:`Row`
    :param source: where the model is
    :param recipe: llm-compressor recipe as YAML
    :param seed: of the choice of calibration text
    """
    from llmcompressor import oneshot

    import nbl_modifier.llmcompressor_plugin.modifier  # noqa: F401  # makes NBLModifier known to recipes

    has_own = (source / "processor_config.json").exists()
    config = AutoConfig.from_pretrained(source)
    sees = architecture_of(config.model_type).auto_class != "AutoModelForCausalLM"
    tokenizer = _tokenizer(name)
    dataset = _calibration_data(name, tokenizer, seed)
    # A path means a language model to oneshot().
    model: Any = load_model(source) if sees else str(source)
    torch.manual_seed(seed)  # the data loader draws the order of the samples
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        processor=None if has_own else tokenizer,
        num_calibration_samples=len(dataset),
        max_seq_length=512,
        output_dir=str(directory),
    )


def load_model(directory: Path, dtype: Any = "auto") -> Any:
    """
    Return a checkpoint, linearized or not, as a transformers model.

    With attention as it is written down: torch's own leaves out Gemma 2's soft-capping.
    """
    config = AutoConfig.from_pretrained(directory)
    auto_class = getattr(transformers, architecture_of(config.model_type).auto_class)
    return auto_class.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )


def _calibration_data(name: str, tokenizer: Any, seed: int) -> "Dataset":
    if is_trained(name):
        texts = load_texts("stdlib", "calibration", seed=seed)
        return pack(texts, tokenizer, 512, NUM_WINDOWS.get(name, FEW_WINDOWS))
    from tests.tiny_llama import token_rows

    return token_rows(num_rows=48, length=128)  # 24 tokens per dimension


def heldout_nll(name: str, directory: Path) -> float:
    """
    Return what a trained model, compressed or not, makes of held-out text, in float32.

    :param name: see :class:`Row`
    :param directory: the checkpoint
    :return: negative log-likelihood, nat per token
    """
    texts = load_texts("stdlib", "heldout")
    windows = pack(texts, _tokenizer(name), 256, NUM_HELDOUT)
    return perplexity(load_model(directory, torch.float32), windows).nll_mean


def save_adapter(checkpoint: Path, directory: Path) -> None:
    """
    Write a random LoRA adapter for every linear layer of attention, kept or replaced.

    In PEFT's format. Strong enough to change every prediction.

    :param checkpoint: what it is for
    """
    weights = _attention_weights(checkpoint)
    generator = torch.Generator().manual_seed(0)
    adapter = {}
    for name, weight in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        d_out, d_in = weight.shape
        for part, shape in (("A", (LORA_RANK, d_in)), ("B", (d_out, LORA_RANK))):
            values = torch.randn(shape, generator=generator) * 0.3 * shape[1] ** -0.5
            adapter[f"{module}.lora_{part}.weight"] = values
    directory.mkdir()
    save_file(adapter, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "target_modules": sorted({name.split(".")[-2] for name in weights}),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_merged(checkpoint: Path, adapter: Path, directory: Path) -> None:
    """
    Write a checkpoint with an adapter merged into its weights: the reference for LoRA.

    In float32, since vLLM does not round their sum either.

    :param checkpoint: what the adapter is for
    :param adapter: see :func:`save_adapter`
    """
    shutil.copytree(checkpoint, directory)
    parts = load_file(adapter / "adapter_model.safetensors")
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name in _attention_weights(checkpoint).keys() & tensors.keys():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (parts[f"{module}.lora_{part}.weight"] for part in "AB")
            tensors[name] = tensors[name].float() + LORA_ALPHA / LORA_RANK * (b @ a)
        save_file(tensors, path, metadata={"format": "pt"})


def _attention_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if ".self_attn." in name and name.endswith(".weight") and tensor.dim() == 2
    }


def save_draft(checkpoint: Path, directory: Path) -> None:
    """
    Write a random EAGLE-3 head, a draft model of one decoder layer.

    It drafts by what it sees of the hidden states of three layers of the model whose
    tokens it guesses. Untrained, so hardly a guess is right: what is proven is that the
    model's own tokens come out.

    :param checkpoint: the model that it drafts for
    """
    verifier = AutoConfig.from_pretrained(checkpoint)
    verifier = getattr(verifier, "text_config", verifier)
    hidden, vocab = verifier.hidden_size, verifier.vocab_size
    fields: dict[str, Any] = {"draft_vocab_size": vocab}  # beyond those of a Llama
    config = LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=verifier.max_position_embeddings,
        tie_word_embeddings=False,
        dtype=torch.float32,
        **fields,
    )
    config.save_pretrained(directory)
    shapes = {
        "embed_tokens.weight": (vocab, hidden),
        "fc.weight": (hidden, 3 * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (hidden // 2, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (hidden // 2, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, hidden),
        "midlayer.mlp.gate_proj.weight": (2 * hidden, hidden),
        "midlayer.mlp.up_proj.weight": (2 * hidden, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, 2 * hidden),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (
            torch.ones(shape)
            if len(shape) == 1
            else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        )
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
