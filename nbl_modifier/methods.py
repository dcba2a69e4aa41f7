"""
Which replacements exist, and which options go together. Standard library only, so that
a recipe's mistakes show before anything is loaded.
"""

from __future__ import annotations

__all__ = ["applies", "check_options", "choose_rank"]


def applies(name: str, kind: str, method: str, estimator: str) -> bool:
    """
    Return whether a field of NBLModifier has a meaning beside the others.

    :param name: of the field
    :param kind: ``attention`` or ``block``
    :param method: ``linear`` or ``drop``
    :param estimator: ``lmmse`` or ``wo_wv``
    """
    fitted = method == "linear" and estimator == "lmmse"
    if name == "input":
        return kind == "attention" and fitted
    if name == "distill_epochs":
        return method == "linear"
    return fitted if name == "refit" else True


def check_options(
    *,
    kind: str,
    method: str,
    estimator: str,
    input: str,
    low_rank: list[str],
    refit: bool,
    distilled: bool,
) -> None:
    """
    Refuse options of NBLModifier that do not go together.

    :param kind: ``attention`` or ``block``
    :param method: ``linear`` or ``drop``
    :param estimator: ``lmmse`` or ``wo_wv``
    :param input: ``residual`` or ``normalized``
    :param low_rank: names of the given fields that limit the rank
    :param refit: whether the chosen layers are fitted again
    :param distilled: whether they are trained
    :raises ValueError: naming the fields
    """
    if len(low_rank) > 1:
        raise ValueError(
            f"NBLModifier.{low_rank[0]} and {low_rank[1]} both say which rank the "
            "linear layers have. Give one of the two."
        )
    fitted = {
        **dict.fromkeys(low_rank, True),
        "refit": refit,
        "distill_epochs": distilled,
        "estimator: wo_wv": estimator == "wo_wv",
    }
    given = [name for name, is_given in fitted.items() if is_given]
    if method == "drop" and given:
        raise ValueError(
            f"NBLModifier.method: drop puts nothing in place of a layer, so {given[0]} "
            f"has nothing to work on. Remove it, or use method: linear."
        )
    if kind == "block" and input != "residual":
        raise ValueError(
            "NBLModifier.kind: block replaces the input norm, too, so its input is the "
            f"residual stream, got input: {input}. Remove it, or use kind: attention."
        )
    if estimator != "wo_wv":
        return
    if kind == "block" or input != "normalized" or refit:
        raise ValueError(
            "NBLModifier.estimator: wo_wv is a map of the input norm's output, from "
            "attention's own weights. It needs kind: attention, input: normalized and "
            f"refit: false, got kind: {kind}, input: {input}, "
            f"refit: {str(refit).lower()}."
        )


def choose_rank(
    hidden_size: int,
    num_layers: int,
    rank: float | None,
    max_parameters: int | None,
) -> int | None:
    """
    Return the rank of each linear layer; None for full rank.

    A layer of rank r has ``2 r d + d`` weights, one of full rank ``d^2 + d``: where
    the budget allows a rank of d / 2, full rank costs no more and is better.

    :param hidden_size: d
    :param num_layers: layers to be replaced, at most
    :param rank: an integer, or a fraction of ``hidden_size``; or None
    :param max_parameters: weights of all linear layers together; or None
    :raises ValueError: naming the recipe's field, if there is no such rank
    """
    d = hidden_size
    if max_parameters is not None:
        each = max_parameters // num_layers - d
        if each >= d * d:
            return None
        if each < 2 * d:
            raise ValueError(
                f"NBLModifier.max_parameters: {num_layers} linear layers of hidden "
                f"size {d} have at least {num_layers * 3 * d} weights, got "
                f"{max_parameters}. Allow more, replace fewer, or use method: drop."
            )
        return each // (2 * d)
    if rank is None:
        return None
    if isinstance(rank, int):
        if rank > d:
            raise ValueError(
                f"NBLModifier.rank: the model's hidden size is {d}, got {rank}. Use a "
                "lower rank, or none for full rank."
            )
        return rank
    return max(1, round(rank * d))
