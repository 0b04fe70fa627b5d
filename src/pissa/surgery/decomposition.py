"""One decomposition: what takes each tensor's place in the residual, and which start lies beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pissa.adapters import factors, plain
from pissa.adapters.adaptation import Adaptation
from pissa.adapters.plain import INIT
from pissa.adapters.storing import store
from pissa.checkpoint.fingerprint import Digests, canonical, combined, tensor_digests
from pissa.checkpoint.layout import Plan, Spec
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.targets import Target
from pissa.observe import Observations
from pissa.records import Base, Layer, Record, versions
from pissa.splits import Split
from pissa.surgery.packing import packed_names, quantisation_config
from pissa.surgery.small_files import init_config, residual_config, write_small_files
from pissa.surgery.streaming import SHARDS, Piece, StreamJob
from pissa.untyped import Json

FACTOR_DTYPE = torch.float32
PAIR, PARTS = f"{INIT}/{plain.WEIGHTS}", f"{INIT}/{plain.START}"
"""Of an output: the stock pair of each start, and the parts that some forms keep beside it."""


@dataclass
class Decomposition(StreamJob):
    """What is to be done to which checkpoint.

    Attributes:
        checkpoint: the base.
        skeleton: its model without weights.
        parameters: each tensor's parameter in the model.
        targets: by the name of their tensor.
        adaptation: how to split.
        dtypes: of each tensor in the output; of a packed one the dtype it is unpacked in.
        packed: modules whose weights are written in few bits.
        device: where the algebra runs.
        shard_bytes: most bytes of tensors in one file.
        observations: what was seen of the base on calibration rows, where the method needs it.
    """

    checkpoint: Checkpoint
    skeleton: nn.Module
    parameters: dict[str, str]
    targets: dict[str, Target]
    adaptation: Adaptation
    dtypes: dict[str, torch.dtype]
    packed: frozenset[str]
    device: str
    shard_bytes: int
    observations: Observations | None = None

    @cached_property
    def weights(self) -> set[str]:
        """The model's parameters: a stored buffer (BERT's position ids) does not make the base the base."""
        return {name for name, _ in self.skeleton.named_parameters(remove_duplicate=False)}

    def allot(self) -> None:
        """Where the method gives layers ranks of their own, look at all of them and settle the ranks."""
        weights = ((target, self.matrix(name)) for name, target in self.targets.items())
        settled = self.adaptation.allotted(weights, lambda target: self.seen(target.weight))
        kept = settled.recipe.targets
        self.targets = {name: t for name, t in self.targets.items() if t.module in kept}
        self.packed &= frozenset(kept)
        self.adaptation = settled

    def matrix(self, name: str) -> Tensor:
        """A target's weight [out, in]."""
        return self.targets[name].to_matrix(self.checkpoint.read(name).to(self.device))

    def seen(self, name: str) -> Any:  # what the method needs, see Adaptation.seen
        """What the method needs to have been seen of a parameter."""
        return self.adaptation.seen(self.observations, self.canonical(name))

    def canonical(self, name: str) -> str:
        """A parameter's name without the head's prefix."""
        return canonical(name, getattr(self.skeleton, "base_model_prefix", ""))

    def check(self) -> None:
        """Refuse now what a quantizer or names that no config can tell apart would refuse at the end."""
        if self.adaptation.quantizer and self.packed:
            packer = self.adaptation.quantizer
            quantisation_config(packer, self.skeleton, self.packed, torch.float32)

    def planned(self, name: str) -> dict[str, Plan]:
        """The residual's tensors, and of a target the start's."""
        target, packer = self.targets.get(name), self.adaptation.quantizer
        own = {name: (self.dtypes[name], self.checkpoint.tensors[name].shape)}
        if target is None:
            return {SHARDS: own}
        if packer is not None and target.module in self.packed:
            parts = packer.plan(target.matrix_shape, self.dtypes[name])
            names = packed_names(name, parts)
            own = {names[part]: spec for part, spec in parts.items()}
        shapes = factors.file_shapes(target, self.adaptation.recipe.rank_of(target.module))
        keys = factors.file_keys(target)
        pair = {key: (FACTOR_DTYPE, shape) for key, shape in zip(keys, shapes, strict=True)}
        beside = self._beside_plan(target)
        return {SHARDS: own, PAIR: pair, **({PARTS: beside} if beside else {})}

    def _beside_plan(self, target: Target) -> dict[str, Spec]:
        """The parts of a start that lie beside its pair."""
        method, recipe = self.adaptation.method, self.adaptation.recipe
        rank = recipe.rank_of(target.module)
        shapes = method.start_shapes(rank, target.matrix_shape, recipe.options)
        return {
            f"{target.module}.{part}": (
                torch.int64 if part == "pattern" else FACTOR_DTYPE,
                shapes[part],
            )
            for part in self.adaptation.form.beside_pair
            if part in shapes
        }

    def late(self) -> set[str]:
        """The state of each packed weight, whose JSON has a length of its own."""
        packer = self.adaptation.quantizer
        if packer is None:
            return set()
        packed = (weight for weight, t in self.targets.items() if t.module in self.packed)
        return {name for weight in packed for name in packed_names(weight, packer.late).values()}

    def facts(self) -> Json:
        """Recipe, observations, dtypes, device."""
        return {
            "recipe": asdict(self.adaptation.recipe),
            "observed": self.observations.digest() if self.observations else None,
            "dtypes": {name: str(dtype) for name, dtype in self.dtypes.items()},
            "packed": sorted(self.packed),
            "device": self.device,
        }

    def piece(self, name: str) -> Piece:
        """What takes the tensor's place in the residual, and the start where it is a target."""
        tensor, dtype = self.checkpoint.read(name), self.dtypes[name]
        parameter = self.parameters.get(name, name)
        key = self.canonical(parameter)
        is_weight = self.parameters.get(name) in self.weights
        base = {key: tensor_digests(tensor)} if is_weight else {}
        if self.observations:
            self.observations.check({key: tensor})
        target = self.targets.get(name)
        if target is None:
            written = tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
            return Piece(name, {name: written}, {"base": base})
        matrix = target.to_matrix(tensor.to(self.device))
        rank, observed = self.adaptation.recipe.rank_of(target.module), self.seen(parameter)
        split = self.adaptation.split(matrix, target.weight, dtype, rank=rank, observed=observed)
        stored = store(target.weight, split, FACTOR_DTYPE, dtype)
        if target.module in self.packed and stored.split.quantised:
            parts = {part: own.cpu() for part, own in stored.split.quantised.parts.items()}
        else:
            parts = {"weight": target.from_matrix(stored.frozen.to("cpu")).contiguous()}
        names, keys = packed_names(name, parts), packed_names(key, parts)
        residual = {keys[part]: tensor_digests(own) for part, own in parts.items()}
        facts = {"base": base, "residual": residual, "layer": asdict(stored.layer)}
        tensors = {names[part]: own for part, own in parts.items()}
        return Piece(name, tensors | self._start(target, stored.split), facts)

    def _start(self, target: Target, split: Split) -> dict[str, Tensor]:
        """What the files of the start hold of a target."""
        pair = factors.file_tensors(target, split.left_core, split.right)
        start = {key: factor.to("cpu", FACTOR_DTYPE).contiguous() for key, factor in pair.items()}
        for name, (dtype, shape) in self._beside_plan(target).items():
            part = getattr(split, name.rpartition(".")[2])
            start[name] = part.to("cpu", dtype).reshape(shape).contiguous()
        return start

    def finish(self, staging: Path, final: Path, pieces: list[Piece]) -> Record:
        """Configs, tokenizer and records."""
        base: dict[str, Digests] = {}
        residual: dict[str, Digests] = {}
        for piece in pieces:
            base |= piece.facts["base"]
            residual |= piece.facts.get("residual", {})
        source, recipe = self.checkpoint, self.adaptation.recipe
        name = str(source.folder.resolve()) if Path(source.name).is_dir() else source.name
        origin = Base(name, source.revision, combined(base), base)
        layers = [Layer(**piece.facts["layer"]) for piece in pieces if "layer" in piece.facts]
        notes = {"observed": self.observations.facts} if self.observations else {}
        record = Record("residual", recipe, origin, layers, residual, notes, versions())
        dtype = next(self.dtypes[name] for name in self.targets)
        packer = self.adaptation.quantizer
        packing = None
        if packer and self.packed:
            packing = quantisation_config(packer, self.skeleton, self.packed, dtype)
        targets = list(self.targets.values())
        write_small_files(
            staging,
            source.companions(),
            residual_config(source.config, recipe, origin, dtype, packing),
            init_config(recipe, targets, self.skeleton, final),
            record,
        )
        return record
