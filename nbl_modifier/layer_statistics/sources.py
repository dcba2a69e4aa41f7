"""Where the statistics of a run come from: calibration data, a folder, or both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from loguru import logger
from transformers import PreTrainedModel

from .fingerprint import data_digest, model_digest, sampled_model_digest
from .origin import REMEDY, Origin
from .processes import Ranks
from .store import FORMAT_VERSION, StatisticsStore, windows_digest
from .windows import (
    CalibrationData,
    Windows,
    check_calibration_data,
    check_predictable,
    check_variety,
)

__all__ = ["Needs", "Sources", "open_sources"]


@dataclass(frozen=True)
class Sources:
    """
    What a run measures on.

    :param data: the calibration set; without one the held-out windows of the store
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
    :param loss_masks: only tokens count that the data's ``loss_mask``, if any, lets
    """

    kind: str
    input: str
    heldout_nmse: bool
    losses: bool
    windows: bool
    loss_masks: bool


def open_sources(
    model: PreTrainedModel,
    batches: Iterable[Any] | None,
    candidates: Mapping[int, str],
    needs: Needs,
    *,
    folder: str | None,
) -> Sources:
    """
    Return what the run measures on, checked.

    With calibration data what the folder lacks is measured, and what it has must be of
    these data; without, it must have everything.

    :param model: the causal language model
    :param batches: the calibration dataloader; may be None with a folder
    :param candidates: names of the modules to measure, by decoder layer index
    :param needs: what the run is going to ask for
    :param folder: of statistics, to read from and to add to; None: nothing is kept
    :raises ValueError: if data or statistics are missing, do not fit each other or the
        model, or do not hold what is needed
    """
    ranks = Ranks()
    if folder is not None:
        # Recipes are read by no shell that would know what ~ is.
        folder = os.path.expanduser(folder)  # noqa: PTH111  keeps ~nobody as it is
        if batches is None:
            return _reused(model, candidates, needs, folder)
    # Saved statistics are to serve whatever is asked for later, here also losses.
    hold_out = needs.heldout_nmse or needs.losses or folder is not None
    data = check_calibration_data(batches, _hidden_size(model), hold_out, ranks)
    data = replace(data, masks_count=needs.loss_masks)
    with ranks.failing_together():
        check_variety(model, data.batches)
    if needs.losses:
        check_predictable(_held_out(data))
    digest = _pooled_digest(data, ranks)
    if folder is None:
        return Sources(data, None, complete=False)
    store = _prepared(model, data, digest, needs, folder, ranks)
    found = [index for index in candidates if index in store]
    complete = len(found) == len(candidates)
    if not complete:
        _check_input(store, needs, len(candidates) - len(found))
        _check_found(store, {index: candidates[index] for index in found}, ranks)
    if found:
        logger.info(
            "{}: statistics of {} of {} layers are read, not measured again",
            folder,
            len(found),
            len(candidates),
        )
    return Sources(data, store, complete)


def _prepared(
    model: PreTrainedModel,
    data: CalibrationData,
    digest: str,
    needs: Needs,
    folder: str,
    ranks: Ranks,
) -> StatisticsStore:
    """
    Return the store to write to, new or as an interrupted calibration left it.

    :param digest: of the data of all processes
    """
    mine = [data.batches[number] for number in sorted(data.held_out)]
    windows = list(chain.from_iterable(ranks.gather(mine)))
    version = StatisticsStore.version_in(folder)
    origin = _origin(model, data.num_samples, digest, needs, version)
    masked = any("loss_mask" in batch for batch in data.batches)
    origin = replace(
        origin,
        held_out=sum(len(each["input_ids"]) for each in windows),
        windows_digest=windows_digest(windows) if version == FORMAT_VERSION else None,
        loss_masks=data.masks_count if masked else None,
    )
    store = _created(folder, origin, ranks)
    with ranks.failing_together():
        if ranks.rank == 0:
            store.save_windows(windows)
    return store


def _reused(
    model: PreTrainedModel, candidates: Mapping[int, str], needs: Needs, folder: str
) -> Sources:
    """Return a store that stands for the calibration data."""
    if not StatisticsStore.is_in(folder):
        raise ValueError(
            f"statistics {folder}: there are none, and no calibration data to take "
            "them of. Pass dataset=… and num_calibration_samples=… to oneshot(), or "
            "name the folder of a calibration."
        )
    store = StatisticsStore.open(folder)
    _warn_of_old(store)
    if needs.windows:
        raise ValueError(
            f"statistics {folder}: selection: greedy, refit and distill run the model "
            "over the calibration windows again. Pass the dataset, too, or leave them "
            "out."
        )
    num_samples = store.origin.num_samples
    wanted = _origin(model, num_samples, "", needs, store.version)
    # False is the default of oneshot(), and says nothing where there are no data.
    wanted = replace(wanted, loss_masks=needs.loss_masks or None)
    store.origin.check(wanted, folder)
    if (needs.heldout_nmse or needs.losses) and not store.origin.held_out:
        raise ValueError(
            f"statistics {folder}: taken in several processes by an earlier version, "
            f"without held-out tokens to measure errors and losses on. {REMEDY}."
        )
    missing = [name for index, name in candidates.items() if index not in store]
    if missing:
        raise ValueError(
            f"statistics {folder}: there are none of {missing[0]} ({len(missing)} such "
            "layers). Pass the dataset, too: what is missing is then measured and "
            "added."
        )
    ranks = Ranks()
    windows = store.windows()[ranks.rank :: ranks.size] if needs.losses else []
    held_out = frozenset(range(len(windows)))
    masks_count = store.origin.loss_masks is not False
    data = CalibrationData(list(windows), num_samples, held_out, masks_count)
    if needs.losses:
        check_predictable(_held_out(data))
    return Sources(data, store, complete=True)


def _held_out(data: CalibrationData) -> Windows:
    return Windows(data.batches, data.loss_masks).select(data.held_out)


def _hidden_size(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().hidden_size
    return size


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
    with ranks.failing_together():
        if ranks.rank == 0:
            StatisticsStore.create(folder, origin)
    store = StatisticsStore.open(folder)
    _warn_of_old(store)
    return store


def _check_input(store: StatisticsStore, needs: Needs, missing: int) -> None:
    """Refuse to add less to a store than its other layers have."""
    if store.origin.input != needs.input:
        raise ValueError(
            f"statistics {store.folder}: taken with input {store.origin.input}, and "
            f"{missing} layers are missing, of which this run would measure less, got "
            f"input: {needs.input}. Measure them with input: {store.origin.input}, "
            "which serves both, or calibrate into another folder."
        )


def _check_found(
    store: StatisticsStore, found: Mapping[int, str], ranks: Ranks
) -> None:
    """Read what an interrupted calibration left, each process a part of it, to see
    now rather than hours later whether it can be used."""
    with ranks.failing_together():
        for index in list(found)[ranks.rank :: ranks.size]:
            store.load(index, found[index])


def _warn_of_old(store: StatisticsStore) -> None:
    if store.version < FORMAT_VERSION:
        logger.warning(
            "statistics {}: of format version {}, which has no digests, so a file that "
            "was changed since, or a model that was edited in a few rows, goes unseen. "
            "{} to be sure.",
            store.folder,
            store.version,
            REMEDY,
        )


def _origin(
    model: PreTrainedModel, num_samples: int, digest: str, needs: Needs, version: int
) -> Origin:
    recognize = model_digest if version == FORMAT_VERSION else sampled_model_digest
    return Origin(
        model=model.config._name_or_path,
        model_digest=recognize(model),
        data_digest=digest,
        num_samples=num_samples,
        held_out=0,
        kind=needs.kind,
        input=needs.input,
    )
