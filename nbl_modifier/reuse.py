"""Where the statistics of a run come from: calibration data, a folder, or both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loguru import logger
from transformers import PreTrainedModel

from .distributed import Ranks
from .fingerprint import data_digest, model_digest
from .preflight import CalibrationData, check_calibration_data
from .store import Origin, StatisticsStore

__all__ = ["Needs", "Sources", "open_sources"]


@dataclass(frozen=True)
class Sources:
    """
    What a run measures on.

    :param data: the calibration set; with statistics to reuse its held-out windows
    :param store: where statistics are read from and written to, or None
    :param complete: whether the store has all that is needed of every layer
    """

    data: CalibrationData
    store: StatisticsStore | None
    complete: bool


@dataclass(frozen=True)
class Needs:
    """
    What a run is going to ask for.

    :param kind: part of the layers, ``attention`` or ``block``
    :param input: ``residual`` or ``normalized``
    :param heldout_nmse: errors on tokens that are not fitted on
    :param losses: losses on windows that are not fitted on
    :param windows: the model run again over all windows
    """

    kind: str
    input: str
    heldout_nmse: bool
    losses: bool
    windows: bool


def open_sources(
    model: PreTrainedModel,
    batches: Iterable[Any] | None,
    candidates: Mapping[int, str],
    needs: Needs,
    *,
    statistics: str | None,
    save_statistics: str | None,
) -> Sources:
    """
    Return what the run measures on, checked.

    :param model: the causal language model
    :param batches: the calibration dataloader; may be None with ``statistics``
    :param candidates: names of the modules to measure, by decoder layer index
    :param needs: what the run is going to ask for
    :param statistics: folder to read from
    :param save_statistics: folder to write to
    :raises ValueError: if data or statistics are missing, do not fit each other or the
        model, or do not hold what is needed
    """
    ranks = Ranks()
    _check_ranks(needs, ranks)
    # Recipes are read by no shell that would know what ~ is.
    statistics, save_statistics = map(_expanded, (statistics, save_statistics))
    if statistics is not None:
        return _reused(model, batches, candidates, needs, statistics)
    hold_out = needs.heldout_nmse or needs.losses
    # Saved statistics are to serve whatever is asked for later, here also losses.
    hold_out_to_save = save_statistics is not None and ranks.alone
    data = check_calibration_data(
        batches, _hidden_size(model), hold_out or hold_out_to_save, ranks
    )
    digest = _pooled_digest(data, ranks)
    if save_statistics is None:
        return Sources(data, None, complete=False)
    held_out = sum(len(data.batches[i]["input_ids"]) for i in data.held_out)
    origin = _origin(model, data.num_samples, digest, needs)
    origin = replace(origin, held_out=sum(ranks.gather(held_out)))
    store = _created(save_statistics, origin, ranks)
    if ranks.alone:
        store.save_windows([data.batches[number] for number in sorted(data.held_out)])
    found = [index for index in candidates if index in store]
    if found:
        logger.info(
            "{}: statistics of {} of {} layers are read, not measured again",
            save_statistics,
            len(found),
            len(candidates),
        )
    return Sources(data, store, complete=len(found) == len(candidates))


def _expanded(folder: str | None) -> str | None:
    return folder and os.path.expanduser(folder)  # noqa: PTH111  keeps ~nobody as it is


def _reused(
    model: PreTrainedModel,
    batches: Iterable[Any] | None,
    candidates: Mapping[int, str],
    needs: Needs,
    folder: str,
) -> Sources:
    store = StatisticsStore.open(folder)
    data, digest = None, ""
    if batches is not None:
        data = check_calibration_data(batches, _hidden_size(model), hold_out=True)
        digest = _pooled_digest(data, Ranks())
    elif needs.windows:
        raise ValueError(
            f"statistics {folder}: selection: greedy, refit and distill_epochs run the "
            "model over the calibration windows again. Pass the dataset, too, or leave "
            "them out."
        )
    store.check(_origin(model, store.origin.num_samples, digest, needs))
    if needs.heldout_nmse and not store.origin.held_out:
        raise ValueError(
            f"statistics {folder}: taken in several processes, without held-out tokens "
            "to measure max_nmse on. Calibrate with max_nmse, or leave it out."
        )
    missing = [name for index, name in candidates.items() if index not in store]
    if missing:
        raise ValueError(
            f"statistics {folder}: there are none of {missing[0]} ({len(missing)} such "
            "layers). Calibrate with save_statistics set to this folder, which goes on "
            "where it was interrupted."
        )
    if data is None:
        windows = store.windows() if needs.losses else []
        held_out = frozenset(range(len(windows)))
        data = CalibrationData(list(windows), store.origin.num_samples, held_out)
    return Sources(replace(data, num_samples=store.origin.num_samples), store, True)


def _hidden_size(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().hidden_size
    return size


def _check_ranks(needs: Needs, ranks: Ranks) -> None:
    """Refuse what each process would answer for its own windows only."""
    if ranks.alone or not (needs.losses or needs.windows):
        return
    asked = "selection: greedy, refit and distill_epochs" if needs.windows else "losses"
    raise NotImplementedError(
        f"NBLModifier: {asked} run the model over windows of one process, got "
        f"{ranks.size} processes. Use a criterion and a budget that statistics answer, "
        "or calibrate with save_statistics and search in one process."
    )


def _pooled_digest(data: CalibrationData, ranks: Ranks) -> str:
    """
    Return a digest of the data of all processes.

    :raises ValueError: if two processes have the same
    """
    digests = ranks.gather(data_digest(data.batches))
    if ranks.alone:
        return digests[0]
    twins = [rank for rank, each in enumerate(digests) if digests.index(each) < rank]
    if twins:
        raise ValueError(
            f"processes {digests.index(digests[twins[0]])} and {twins[0]} calibrate on "
            "the same samples: llm-compressor 0.14 hands every process the first part "
            "of a dataset that all have in full. Pass each process its own part: "
            "dataset.shard(world_size, rank)."
        )
    return hashlib.sha256("".join(digests).encode()).hexdigest()[: len(digests[0])]


def _created(folder: str, origin: Origin, ranks: Ranks) -> StatisticsStore:
    """Let the first process make the store, and open it in all of them."""
    failure = None
    if ranks.rank == 0:
        try:
            StatisticsStore.create(folder, origin)
        except (ValueError, OSError) as err:
            failure = err
    ranks.check(failure)
    return StatisticsStore.open(folder)


def _origin(
    model: PreTrainedModel, num_samples: int, digest: str, needs: Needs
) -> Origin:
    return Origin(
        model=model.config._name_or_path,
        model_digest=model_digest(model),
        data_digest=digest,
        num_samples=num_samples,
        held_out=0,
        kind=needs.kind,
        input=needs.input,
    )
