"""The settings of the commands that read a checkpoint and write one: each field said once.

They are plain data, as the command line and a caller of `pissa.decompose` give them; nothing here
needs torch. What bears `NO_FLAG` is for callers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from pissa.keywords import NO_FLAG

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, the bytes done and the bytes in all."""


@dataclass(frozen=True, kw_only=True)
class WriteSettings:
    """How a model is written."""

    max_shard_bytes: Annotated[int | str, Doc("Size of an output file: bytes, 500MB, 5GB.")] = "5GB"
    trust_remote_code: Annotated[bool, Doc("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Doc("Replace the output folder if it is there.")] = False
    progress: Annotated[
        Progress | None,
        Doc("Called after every tensor with its name, the bytes done and the bytes in all."),
        NO_FLAG,
    ] = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class StreamSettings(WriteSettings):
    """How a model is read and another one written, tensor by tensor."""

    workers: Annotated[
        int | None,
        Doc("Tensors worked on side by side, 1 or more. Default: one a core, up to 4."),
    ] = None
    revision: Annotated[str | None, Doc("Commit, tag or branch of a Hub model.")] = None


@dataclass(frozen=True, kw_only=True)
class SplitSettings(StreamSettings):
    """Which weights are split, and how exactly."""

    targets: Annotated[
        str | Iterable[str],
        Doc(
            "all-linear, a regular expression, or names: a list, separated by commas on the command line."
        ),
    ] = "all-linear"
    svd: Annotated[
        str | float,
        Doc("fast (seeded sketch), exact (certified to 1e-5) or the tolerance to certify."),
    ] = "fast"
    seed: Annotated[int, Doc("Fixes every random number, together with the tensors' names.")] = 0
    options: Annotated[
        Mapping[str, Any] | None,  # each method's own settings, checked by the method
        Doc("The method's own settings by name; NAME=VALUE for each on the command line."),
    ] = None


@dataclass(frozen=True)
class DecomposeSettings(SplitSettings):
    """What `pissa decompose` is told."""

    method: Annotated[
        str, Doc("How to split; see `pissa methods`. Presets: qlora, loftq, qpissa.")
    ] = "pissa"
    rank: Annotated[
        int, Doc("Rank of the trainable part, 1 to the smaller side of the narrowest target.")
    ] = 16
    _: KW_ONLY
    alpha: Annotated[
        float | None,
        Doc("Strength: the product is scaled by alpha / rank. Default: the rank (1)."),
    ] = None
    dtype: Annotated[
        str | None,
        Doc("float32, bfloat16 or float16 for what is written. Default: as stored."),
    ] = None
    quant: Annotated[
        str | None,
        Doc("nf4, fp4 or int8 for the frozen part. Default: as it is, or as a preset says."),
    ] = None
    iterations: Annotated[
        int | None,
        Doc("Rounds of low-rank part and quantized rest (pissa, loftq). Default: 5."),
    ] = None
    double_quant: Annotated[bool, Doc("Quantize the scales of the blocks too (nf4, fp4).")] = False
    store: Annotated[
        str,
        Doc("packed (few bits, for bitsandbytes) or 16bit (what they stand for, for any tool)."),
    ] = "packed"
    device: Annotated[str, Doc("Where the algebra runs: cpu, cuda, cuda:1.")] = "cpu"
    observations: Annotated[
        Any,  # pissa.Observations, which needs torch, its file, or None
        Doc("What was seen of this model, for the methods that need it; or the file of it."),
        NO_FLAG,
    ] = None


@dataclass(frozen=True, kw_only=True)
class MergeSettings(StreamSettings):
    """What `pissa merge` is told."""

    dtype: Annotated[
        str | None,
        Doc("float32, bfloat16 or float16 for what is written. Default: as stored."),
    ] = None
    quant: Annotated[
        str | None, Doc("nf4, fp4 or int8 for the merged weights. Default: 16 bits.")
    ] = None


@dataclass(frozen=True)
class ConvertSettings:
    """What `pissa convert` is told."""

    rank: Annotated[
        int | None, Doc("Best approximation of this rank. Default: exact (rank 2r).")
    ] = None
    _: KW_ONLY
    start: Annotated[
        str | Path | None, Doc("The pissa_init/ folder that the adapter was trained from.")
    ] = None
    base: Annotated[
        str | Path | None, Doc("The original base, to check against and to write down.")
    ] = None
    force: Annotated[bool, Doc("Replace the output folder if it is there.")] = False


@dataclass(frozen=True)
class FourBitSettings(SplitSettings):
    """What `pissa.w4a4.svdquant` is told."""

    observations: Annotated[
        Any,  # pissa.Observations, which needs torch
        Doc("What entered the targets while this model read calibration rows."),
        NO_FLAG,
    ]
    rank: Annotated[
        int, Doc("Rank of the branches, 1 to the smaller side of the narrowest target.")
    ] = 32


@dataclass(frozen=True, kw_only=True)
class DenseSettings(WriteSettings):
    """What `pissa.w4a4.export_dense` is told."""

    dtype: Annotated[
        str | None,
        Doc("float32, bfloat16 or float16 for what is written. Default: of the base."),
    ] = None
