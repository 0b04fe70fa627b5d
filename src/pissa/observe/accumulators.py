"""What is kept of a layer from batch to batch, in float32 on the CPU: sums, components, a sample; never the rows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pissa.checkpoint.targets import Target
from pissa.errors import InputError, OutputError
from pissa.linalg import Components
from pissa.observe.processes import add_up, gathered
from pissa.splits import is_finite

SPARE = 2
"""Components kept in between for each one asked for, so that cutting off loses none of these."""


class Accumulator(Protocol):
    """Takes the rows that enter a layer.

    Attributes:
        settled: whether more rows would change nothing.
    """

    settled: bool

    def add(self, rows: Tensor, sample: Tensor) -> None:
        """Take the rows of a batch.

        Args:
            rows: [n, in], float32, n >= 1, without padding.
            sample: [n], which of the batch's samples each row is from.
        """

    def combine(self) -> None:
        """Become what one process would have that had read every process's rows."""

    def result(self) -> Any:
        """What a method gets; the last call."""


class Covariance:
    """``(1/N) sum over samples of Xs^T Xs, Xs = X / max|X|`` (CorDA, arXiv 2406.05223); [in, in].

    The authors' code divides by ``|max X|``, which is not the largest magnitude where most entries
    are negative.
    """

    settled = False

    def __init__(self, columns: int, scratch: Path | None = None) -> None:
        self.total = zeros((columns, columns), scratch)
        self.samples = 0

    def add(self, rows: Tensor, sample: Tensor) -> None:
        """See `Accumulator`."""
        peaks = rows.new_zeros(int(sample.max()) + 1).scatter_reduce_(
            0, sample, rows.abs().amax(1), "amax"
        )
        scaled = rows / peaks.clamp_min(torch.finfo(rows.dtype).tiny)[sample, None]
        if scaled.is_cpu:
            self.total.addmm_(scaled.T, scaled)
        else:
            self.total.add_((scaled.T @ scaled).cpu())
        self.samples += len(torch.unique(sample))

    def combine(self) -> None:
        """See `Accumulator`."""
        add_up(self.total)
        self.samples = sum(gathered(self.samples))

    def result(self) -> Tensor:
        """[in, in]."""
        return self.total.div_(self.samples)


class Stream:
    """The leading principal components (EVA, arXiv 2410.07170).

    With `tau` no more rows are taken once all components are within that cosine of those before a
    batch.
    """

    def __init__(self, most: int, tau: float | None = None) -> None:
        self.most, self.tau, self.settled = most, tau, False
        self.seen: Components | None = None

    def add(self, rows: Tensor, sample: Tensor) -> None:
        """See `Accumulator`."""
        if self.settled:
            return
        before, new = self.seen, _on_cpu(Components.of(rows, SPARE * self.most))
        self.seen = before.joined(new, SPARE * self.most) if before else new
        if before and self.tau:
            self.settled = bool(self.seen.leading(self.most).converged(before, self.tau).all())

    def combine(self) -> None:
        """See `Accumulator`."""
        parts = [part for part in gathered(self.seen) if part is not None]
        self.seen = reduce(lambda one, other: one.joined(other, SPARE * self.most), parts)

    def result(self) -> Components:
        """At most `most`.

        Raises:
            InputError: no rows came.
        """
        if self.seen is None:
            raise InputError("no rows came to take components of: give a batch with tokens")
        return self.seen.leading(self.most)


class Sample:
    """Rows drawn with equal chances from all that were seen: those that got the largest random keys."""

    settled = False

    def __init__(self, most: int, columns: int, seed: int) -> None:
        self.most, self.random = most, torch.Generator().manual_seed(seed)
        self.keys, self.rows = torch.empty(0, dtype=torch.float64), torch.empty(0, columns)

    def add(self, rows: Tensor, sample: Tensor) -> None:
        """See `Accumulator`."""
        self._keep(torch.rand(len(rows), generator=self.random, dtype=torch.float64), rows)

    def combine(self) -> None:
        """See `Accumulator`."""
        parts = gathered((self.keys, self.rows))
        self.keys, self.rows = self.keys[:0], self.rows[:0]
        for keys, rows in parts:
            self._keep(keys, rows)

    def result(self) -> Tensor:
        """[at most `most`, in]."""
        return self.rows

    def _keep(self, keys: Tensor, rows: Tensor) -> None:
        held = len(self.keys)
        keys = torch.cat([self.keys, keys])
        chosen = keys.topk(min(self.most, len(keys))).indices
        new = rows[(chosen[chosen >= held] - held).to(rows.device)].cpu()
        old = self.rows[chosen[chosen < held]]
        self.keys = torch.cat([keys[chosen[chosen < held]], keys[chosen[chosen >= held]]])
        self.rows = torch.cat([old, new])


class MeanGradient:
    """The mean over batches of the loss's gradient of one weight (LoRA-GA, arXiv 2407.05000); [out, in]."""

    def __init__(self, target: Target, scratch: Path | None = None) -> None:
        self.target, self.reached = target, False
        self.total = zeros(target.matrix_shape, scratch)

    def watch(self, weight: Tensor) -> Callable[[], None]:
        """Take the gradients of that parameter from now on; call what is returned to end it."""
        weight.requires_grad_(True)
        register: Callable[..., RemovableHandle] = weight.register_post_accumulate_grad_hook
        return register(self._take).remove

    def combine(self) -> None:
        """See `Accumulator`."""
        add_up(self.total)
        self.reached = any(gathered(self.reached))

    def result(self, batches: int) -> Tensor:
        """[out, in]."""
        return self.total.div_(batches)

    def _take(self, weight: Tensor) -> None:
        """Add a gradient as soon as it is made, and let go of it."""
        gradient, weight.grad = weight.grad, None
        if gradient is None:  # none was made
            return
        if not is_finite(gradient):
            raise InputError(
                f"the gradient of `{self.target.weight}` has NaN or Inf: load the model in float32"
            )
        self.total.add_(self.target.to_matrix(gradient).cpu())
        self.reached = True


def zeros(shape: tuple[int, int], scratch: Path | None) -> Tensor:
    """Zeros in float32: in memory, or in a file that has no name any more and goes with the tensor,
    or the process.

    Raises:
        OutputError: no room in `scratch`.
    """
    if scratch is None:
        return torch.zeros(shape)
    try:
        handle, path = tempfile.mkstemp(dir=scratch, prefix="pissa-")
        try:
            # A hole in the file would end the process once the disk is full
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, 4 * shape[0] * shape[1])
            return torch.from_file(
                path, shared=True, size=shape[0] * shape[1], dtype=torch.float32
            ).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        raise OutputError(
            f"{scratch} has no room for {4 * shape[0] * shape[1] / 1e6:.0f} MB more ({error}): choose another scratch"
        ) from error


def _on_cpu(seen: Components) -> Components:
    return Components(
        seen.mean.cpu(), seen.values.cpu(), seen.vectors.cpu(), seen.rows, seen.energy
    )
