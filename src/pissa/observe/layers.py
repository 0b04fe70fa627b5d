"""The rows that enter a model's layers, each once: layers that read one and the same tensor share what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pissa.errors import InputError
from pissa.observe.accumulators import Accumulator
from pissa.observe.processes import gathered
from pissa.splits import is_finite


class Layers:
    """What was gathered of the layers' inputs so far.

    Attributes:
        same: each layer's first one with the very same input (its own name where it is that), by
            weight name.
        kept: what is kept of those first ones, by weight name and need.
        keep: which tokens of the batch count, [samples, tokens] of bool; None where the batch has
            no tokens.

    Args:
        make: from a weight's name and its columns to what is to be kept of it.
    """

    def __init__(self, make: Callable[[str, int], Mapping[str, Accumulator]]) -> None:
        self._make = make
        self.same: dict[str, str] = {}
        self.kept: dict[str, Mapping[str, Accumulator]] = {}
        self.keep: Tensor | None = None
        self._last: tuple[Tensor, int, str] | None = None

    def watch(self, name: str, module: nn.Module) -> Callable[[], None]:
        """See what enters the layer with that weight from now on; call what is returned to end it."""

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, next(iter((*args, *kwargs.values()))))

        return module.register_forward_pre_hook(see, with_kwargs=True).remove

    def next_batch(self, keep: Tensor | None) -> None:
        """Begin a batch."""
        self.keep, self._last = keep, None

    def turning(self) -> list[str]:
        """The layers that have to see more."""
        return [
            name
            for name, kept in self.kept.items()
            if any(not one.settled for one in kept.values())
        ]

    def combine(self, counts: dict[str, int]) -> dict[str, int]:
        """Become what one process would have that had read every process's batches.

        Args:
            counts: of this process.

        Returns:
            Those of all.

        Raises:
            InputError: on every process, where two of them did not see the same layers.
        """
        parts = gathered((list(self.kept), self.same, counts))
        for at, (kept_names, same, count) in enumerate(parts):
            if (kept_names, same) != parts[0][:2] or not count["batches"]:
                raise InputError(
                    f"process {at} of {len(parts)} read {count['batches']} batches and saw {len(kept_names)} inputs, "
                    f"process 0 read {parts[0][2]['batches']} and saw {len(parts[0][0])}: give each at least one "
                    "batch, and batches that reach the same layers"
                )
        for kept in self.kept.values():
            for accumulator in kept.values():
                accumulator.combine()
        return {key: sum(count[key] for *_, count in parts) for key in counts}

    def results(self, needs: list[str]) -> dict[str, dict[str, Any]]:
        """By need and weight name, of the first layer of each input."""
        return {
            need: {name: kept[need].result() for name, kept in self.kept.items()} for need in needs
        }

    @torch.no_grad()
    def _see(self, name: str, entering: Tensor) -> None:
        last = self._last
        # Held on to until the next one, so that no other tensor can be taken for it; and not
        # written to since.
        known = last is not None and last[0] is entering and last[1] == entering._version
        first = last[2] if last is not None and known else name
        if self.same.setdefault(name, first) != first:
            raise InputError(
                f"`{name}` does not have the same input as `{self.same[name]}` in every batch: observe it by itself"
            )
        if known:
            return
        self._last = entering, entering._version, first
        rows, sample = rows_of(entering, self.keep, name)
        if not is_finite(rows):
            raise InputError(
                f"what enters `{name}` has NaN or Inf: load the model in bfloat16 or float32, and look at the batch"
            )
        if not len(rows):
            return
        if first not in self.kept:
            self.kept[first] = self._make(first, rows.shape[1])
        for accumulator in self.kept[first].values():
            accumulator.add(rows, sample)


def rows_of(entering: Tensor, keep: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """The rows that count among those which enter a layer.

    Args:
        entering: [samples, tokens, in]; or [samples, in] or [samples * tokens, in].
        keep: [samples, tokens] of bool; None for all.
        name: of the weight, for the message.

    Returns:
        Rows [n, in] in float32, and which sample each is from, [n].

    Raises:
        InputError: rows that are not those of the tokens.
    """
    columns = entering.shape[-1]
    # A pooler gets one row of each sample
    if keep is None or entering.shape[:-1] == keep.shape[:1]:
        entering = entering.reshape(len(entering), -1, columns)
        keep = torch.ones(entering.shape[:2], dtype=torch.bool)
    elif entering.shape[:-1] == keep.shape or entering.shape[:-1] == (keep.numel(),):
        entering = entering.reshape(*keep.shape, columns)
    else:
        raise InputError(
            f"`{name}` gets rows {list(entering.shape)} and the batch's tokens are {list(keep.shape)}, so its padding "
            "cannot be told from its text: leave it out of the targets"
        )
    keep = keep.to(entering.device)
    return entering[keep].float(), keep.nonzero()[:, 0]
