"""What goes into a model is looked at before anything is sent, by all ranks of a stage together."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.errors import RoutingError
from moe.parallel.agreement import Fact, together
from moe.parallel.groups import ProcessGroups
from moe.places import Places
from moe.vocabulary import UNLABELLED

__all__ = ["admit"]

DIGEST_BITS = 61


def admit(
    ids_BS: Tensor,
    places: Places,
    labels_BS: Tensor | None,
    vocabulary: int,
    groups: ProcessGroups,
) -> None:
    """Refuse tokens, places or labels that make no sense, or that differ within a TP group.

    Args:
        ids_BS: of this rank's (dp, cp) part.
        places: where they stand.
        labels_BS: what follows each, or `UNLABELLED`; None: there are none.
        vocabulary: how many tokens there are.
        groups: of the mapping.

    Raises:
        RoutingError: on every rank of the stage, if on any.
    """

    def look() -> None:
        _check_numbers("input_ids", ids_BS, vocabulary)
        places.check(*ids_BS.shape)
        if labels_BS is not None:
            _check_numbers("labels_BS", labels_BS, vocabulary, also=UNLABELLED)
            if labels_BS.shape != ids_BS.shape:
                raise RoutingError(
                    f"labels_BS has shape {tuple(labels_BS.shape)}, and input_ids "
                    f"{tuple(ids_BS.shape)}; give a label, or {UNLABELLED}, for each"
                )

    facts = []
    dims = groups.dims
    if dims.tp > 1:
        told = [ids_BS, places.positions_BS, places.documents_BS, places.valid_BS, labels_BS]
        own = dims.coordinates(groups.rank)
        fact = Fact(
            "the tokens of a TP group, their places or labels",
            _digest(told),
            "give every rank of a TP group the same",
            block=own["dp"] * dims.cp + own["cp"],
            blocks=dims.dp * dims.cp,
            words="digest {:x}".format,
        )
        facts.append(fact)
    together(look, groups["stage"], ids_BS.device, facts)


def _check_numbers(name: str, told_BS: Tensor, vocabulary: int, also: int | None = None) -> None:
    if told_BS.dim() != 2 or told_BS.dtype != torch.int64:
        raise RoutingError(
            f"{name} has shape {tuple(told_BS.shape)} and type {told_BS.dtype}; needed is "
            "(rows, tokens) of torch.int64"
        )
    wrong_BS = (told_BS < 0) | (told_BS >= vocabulary)
    if also is not None:
        wrong_BS &= told_BS != also
    if bool(wrong_BS.any()):
        row, token = (int(i) for i in wrong_BS.nonzero()[0])
        raise RoutingError(
            f"{name}[{row}, {token}] is {int(told_BS[row, token])}, and the vocabulary has entries "
            f"0 to {vocabulary - 1}"
        )


def _digest(tensors: list[Tensor | None]) -> int:
    """Return a number that differs for different tensors, but for accidents."""
    total = 0
    for number, tensor in enumerate(tensors, start=1):
        if tensor is None:
            continue
        flat = tensor.reshape(-1).to(torch.int64)
        order = torch.arange(1, len(flat) + 1, device=flat.device)
        # odd multipliers; int64 wraps around, the same way everywhere
        mixed = ((flat + number) * (order * 2654435761 + number)).sum()
        total = (total * 1000003 + int(mixed) + sum(tensor.shape)) % 2**DIGEST_BITS
    return total
