# SPDX-License-Identifier: Apache-2.0
"""One model and calibration set of benchmarks/selection_study.py."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.paper_texts import load_windows
from benchmarks.selection_results import Row
from benchmarks.selection_settings import Setting
from nbl_modifier.architectures import architecture_of
from nbl_modifier.calibration.calibration import Calibration
from nbl_modifier.calibration.forward import PartialForward
from nbl_modifier.calibration.layers import MeasuredLayers
from nbl_modifier.calibration.leaderboard import Leaderboard
from nbl_modifier.calibration.passes import Passes
from nbl_modifier.calibration.solver import LayerSolver
from nbl_modifier.criteria import TRIED
from nbl_modifier.evaluation import PerplexityResult
from nbl_modifier.evaluation.texts import stdlib_texts
from nbl_modifier.evaluation.token_windows import pack
from nbl_modifier.layer_statistics.windows import Windows, held_out_batches
from nbl_modifier.replacement.surgery import Replacement
from nbl_modifier.search.budget import Budget
from nbl_modifier.search.choose import choose
from nbl_modifier.search.distillation import Distillation
from nbl_modifier.search.trials import Trial, Trials


class _TrialsOnce(Trials):
    """Tries each candidate alone once, however many criteria ask for that."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._alone: dict[Replacement, Trial] = {}

    def single(
        self,
        candidates: Mapping[int, Replacement],
        given: Mapping[int, Replacement] | None = None,
    ) -> dict[int, Trial]:
        """Return the trials, as in the class above."""
        if given:
            return super().single(candidates, given)
        new = {i: c for i, c in candidates.items() if c not in self._alone}
        if new:
            found = super().single(new)
            self._alone |= {new[index]: trial for index, trial in found.items()}
        return {index: self._alone[c] for index, c in candidates.items()}


class Case:
    """
    A model with one calibration set, and everything that settings share.

    :param path: the model's folder
    :param seed: of the calibration text
    :param num_windows: calibration windows
    :param args: sizes, from the command line
    :param rows: what was measured on the same before
    """

    def __init__(
        self,
        path: str,
        seed: int,
        num_windows: int,
        args: argparse.Namespace,
        rows: Iterable[Row] = (),
    ) -> None:
        self._known = {
            (row.setting.ranking, row.num_layers): row.layers for row in rows
        }
        self.name, self.seed, self.num_windows = Path(path).name, seed, num_windows
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=args.dtype
        ).eval()
        self._architecture = architecture_of(self._model.config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(path)

        def windows(rows: Dataset) -> Windows:
            # whole batches are held out: of few windows, make small ones
            size = max(1, min(args.batch_size, len(rows) // 4))
            tokens = torch.tensor(rows["input_ids"][:])
            return Windows([{"input_ids": batch} for batch in tokens.split(size)])

        calibration, tests = texts(seed, num_windows, tokenizer, args)
        self._windows = windows(calibration)
        self._held_out = held_out_batches(
            [batch["input_ids"].numel() for batch in self._windows.batches]
        )
        self._forward = PartialForward(self._model, self._architecture)
        self._trials = _TrialsOnce(
            self._forward, self._architecture, self._windows.select(self._held_out)
        )
        self._tests = {
            text: Trials(self._forward, self._architecture, windows(rows))
            for text, rows in tests.items()
        }
        self.candidates = range(len(self._forward.layers))
        self.base = {text: test.loss() for text, test in self._tests.items()}
        self._calibrations: dict[object, Calibration] = {}
        self._orders: dict[Setting, list[int]] = {}
        self._greedy: dict[Setting, dict[int, Replacement]] = {}
        self._refits: dict[object, Mapping[int, Replacement]] = {}
        self._results: dict[object, dict[str, PerplexityResult]] = {}

    def measure(self, setting: Setting, num_layers: int) -> list[Row]:
        """Return the perplexity of each text with ``num_layers`` layers replaced."""
        known = self._known.get((setting.ranking, num_layers))
        if known is None or not setting.refit:
            known = tuple(self._path(setting.ranking, num_layers)[:num_layers])
        layers = frozenset(known)
        key = (setting.fit, layers)
        if key not in self._results:
            replacements = self._replacements(setting, layers)
            self._results[key] = {
                text: test.loss(replacements) for text, test in self._tests.items()
            }
        return [
            Row(
                self.name,
                self.seed,
                self.num_windows,
                setting,
                num_layers,
                tuple(sorted(layers)),
                result.perplexity,
                self.base[text].perplexity,
                result.relative_to(self.base[text])[1],
                text,
            )
            for text, result in self._results[key].items()
        ]

    def _replacements(
        self, setting: Setting, layers: frozenset[int]
    ) -> Mapping[int, Replacement]:
        if setting.epochs:
            start = self._replacements(replace(setting, epochs=0), layers)
            fitted_on = set(range(len(self._windows.batches))) - self._held_out
            distillation = Distillation(
                self._forward,
                self._architecture,
                self._windows.select(fitted_on),
                self._trials,
            )
            return distillation.run(start, setting.epochs, None)[0]
        if setting.refit:
            key = (setting.spec, setting.dampening_frac, layers)
            if key not in self._refits:
                passes = self._passes(setting)
                self._refits[key] = passes.refit(layers).replacements
            return self._refits[key]
        if setting.selection == "greedy":
            found = self._greedy[setting.ranking]
        else:
            found = self._calibration(setting).replacements
        return {index: found[index] for index in layers}

    def _path(self, setting: Setting, num_layers: int) -> list[int]:
        """Return layers in the order in which they are replaced."""
        if setting not in self._orders or len(self._orders[setting]) < num_layers:
            calibration = self._calibration(setting)
            trials = self._trials if setting.criterion in TRIED else None
            greedy = setting.selection == "greedy"
            passes = self._passes(setting) if greedy else None
            budget = Budget(num_layers, "")
            outcome = choose(calibration, setting.criterion, budget, trials, passes)
            self._orders[setting] = outcome.order
            if greedy:
                self._greedy[setting] = outcome.replacements
                self._orders[setting] = outcome.order[:num_layers]
        return self._orders[setting]

    def _calibration(self, setting: Setting) -> Calibration:
        key = (setting.spec, setting.dampening_frac)
        if key not in self._calibrations:
            passes = self._passes(setting)
            self._calibrations[key] = passes.estimate(self.candidates)
        return self._calibrations[key]

    def _passes(self, setting: Setting) -> Passes:
        def calibration(streams: Mapping[int, Tensor] | None) -> Calibration:
            layers = MeasuredLayers(
                dict(enumerate(self._forward.layers)),
                {i: self._architecture.attention_name(i) for i in self.candidates},
                self._architecture,
                setting.spec,
            )
            return Calibration(
                LayerSolver(layers=layers, dampening_frac=setting.dampening_frac),
                Leaderboard("cca_bound", len(self.candidates)),
                held_out=self._held_out,
                streams=streams,
            )

        return Passes(self._forward, self._architecture, self._windows, calibration)


def texts(
    seed: int,
    num_windows: int,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
) -> tuple[Dataset, dict[str, Dataset]]:
    """Return the windows to calibrate on, and those to measure on by text."""
    length, count = args.seq_length, args.test_windows
    if args.calibration is None:
        calibration = stdlib_texts("calibration", seed)
        return (
            pack(calibration, tokenizer, length, num_windows),
            {"": pack(stdlib_texts("heldout"), tokenizer, length, count)},
        )
    found = load_windows(
        args.calibration,
        args.text,
        tokenizer,
        samples=num_windows,
        heldout_windows=count,
        seq_len=length,
        seed=seed,
    )
    return found.calibration, found.heldout
