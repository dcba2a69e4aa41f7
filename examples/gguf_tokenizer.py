# SPDX-License-Identifier: Apache-2.0
"""
The tokenizer that a GGUF file describes, as transformers wants it.

transformers 5.17 reads some itself, but not these: it drops SmolLM's rule that every
digit stands alone, and takes Gemma's pieces for a unigram model, which splits text into
characters.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer", "merges_from_scores"]

# Kinds of tokens in a GGUF, as its specification numbers them.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# How Qwen 2 splits text before its merges apply.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merges_from_scores(pieces: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """
    Rebuild the merges of a SentencePiece BPE model from the scores of its pieces.

    SentencePiece joins the neighbours whose union has the highest score; the merges of
    a piece are hence all its splits into two pieces, and come in the order of scores.

    :param pieces: the pieces that merging can make or begin with, and their scores
    :return: merges, the first to apply first
    """
    ranked = sorted(pieces, key=lambda item: -item[1])
    known = {piece for piece, _ in ranked}
    return [
        (piece[:place], piece[place:])
        for piece, _ in ranked
        for place in range(1, len(piece))
        if piece[:place] in known and piece[place:] in known
    ]


def byte_level(vocab: dict[str, int], merges: list[str], split: Sequence[Any]) -> Any:
    """Return a tokenizer on bytes, as of GPT-2, that first splits text by ``split``."""
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges])
    )
    tokenizer.pre_tokenizer = pre.Sequence(list(split))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def smollm(vocab: dict[str, int], fields: dict[str, Any]) -> Any:
    """Return SmolLM's tokenizer: every digit alone, then GPT-2's rules."""
    split = [
        pre.Digits(individual_digits=True),
        pre.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
    return byte_level(vocab, fields["merges"], split)


def qwen2(vocab: dict[str, int], fields: dict[str, Any]) -> Any:
    """Return Qwen 2's tokenizer."""
    split = [
        pre.Split(Regex(QWEN2), behavior="isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = byte_level(vocab, fields["merges"], split)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece(vocab: dict[str, int], fields: dict[str, Any]) -> Any:
    """Return a SentencePiece BPE tokenizer with byte fallback, such as Gemma's."""
    merges = merges_from_scores(
        (token, score)
        for token, score, kind in zip(
            fields["tokens"], fields["scores"], fields["token_type"], strict=True
        )
        if kind == NORMAL
    )
    unknown = fields["tokens"][fields["unknown_token_id"]]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


TOKENIZERS: dict[tuple[str, str], Callable[[dict[str, int], dict[str, Any]], Any]] = {
    ("gpt2", "smollm"): smollm,
    ("gpt2", "qwen2"): qwen2,
    ("llama", "default"): sentencepiece,
}


def build_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """
    Build the tokenizer that a GGUF describes.

    :param metadata: all its fields by name
    """
    prefix = "tokenizer.ggml."
    fields = {
        name.removeprefix(prefix): value
        for name, value in metadata.items()
        if name.startswith(prefix)
    }
    tokens, kinds = fields["tokens"], fields["token_type"]
    # Names such as [PAD151665] fill up the embedding; no text may become one.
    vocab = {
        token: place
        for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != UNUSED
    }
    tokenizer = TOKENIZERS[fields["model"], fields["pre"]](vocab, fields)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    named = {
        name: tokens[fields[field]]
        for name, field in {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "pad_token": "padding_token_id",
            "unk_token": "unknown_token_id",
        }.items()
        if field in fields
    }
    if fields.get("add_bos_token"):
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, fields["bos_token_id"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata[f"{metadata['general.architecture']}.context_length"],
        **named,
    )
