"""The model as training builds it, adapter included, on the meta device: nothing of it is guessed,
and nothing loaded.

What trains is counted on this model, and a step is tried on it (`step.py`).
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from pissa.adapters import plain
from pissa.adapters.adaptation import Adaptation, refuse_untrained
from pissa.adapters.attach import Attachment, wrap
from pissa.adapters.plain import INIT
from pissa.checkpoint.output import read_json
from pissa.checkpoint.skeleton import parameter_names
from pissa.checkpoint.targets import Target, find_targets, head_modules
from pissa.checks import check_rank
from pissa.config import TrainSettings, config_error
from pissa.planning.few_bits import FewBits
from pissa.planning.source import Source, skeleton
from pissa.presets import Choice
from pissa.quant import Quantiser
from pissa.records import Recipe, Record
from pissa.splits import Factors
from pissa.surgery.packing import packed_modules
from pissa.training import residual
from pissa.training.starting import set_dropout

NO_DEVICE = torch.device("meta")


@dataclass(frozen=True)
class Planned:
    """A model ready to train that has no values.

    Attributes:
        model: with its adapter, if it has one.
        source: what it is made of.
        sizes: how many numbers each weight of the base has, by name.
        adaptation: how its weights are split and how what trains lives on them; None for full.
        targets: the weights that are split.
        packed: modules whose weights are in few bits.
    """

    model: Any
    source: Source
    sizes: dict[str, int]
    adaptation: Adaptation | None = None
    targets: tuple[Target, ...] = ()
    packed: frozenset[str] = frozenset()

    @property
    def recipe(self) -> Recipe | None:
        """How its weights are split; None for full."""
        return self.adaptation.recipe if self.adaptation else None

    @property
    def trained(self) -> list[nn.Parameter]:
        """What training reports as trainable parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def base(self) -> Any:
        """The model without peft's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def makes_residual(self) -> bool:
        """Whether the run splits and quantises a 16-bit base first."""
        return bool(self.packed) and not self.source.decomposed


def build(source: Source, settings: TrainSettings, choice: Choice | None, classes: int) -> Planned:
    """The model of a run.

    Args:
        source: of the base.
        settings: of the run.
        choice: its method; None for full.
        classes: of a new classification head.

    Raises:
        InputError, CheckpointError, ConfigError: what training would refuse.
    """
    model = skeleton(source, settings, classes)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if choice is None:
        if source.dtype == torch.float16:
            mistake = "dtype: got float16, expected bfloat16 or float32 with full: AdamW's steps vanish in float16"
            raise config_error([mistake], "the settings")
        return Planned(model.train(), source, sizes)
    refuse_untrained(choice.method)
    adaptation, found = _adaptation(source, settings, choice, model)
    adaptation.refuse_unfit(found)
    adaptation = adaptation.at_full_rank(found)
    recipe = adaptation.recipe
    for target in found:
        check_rank(recipe.rank_of(target.module), target.matrix_shape, target.weight)
    heads = sorted({*head_modules(model), *(settings.modules_to_save or ())})
    packed: frozenset[str] = frozenset()
    if adaptation.quantizer:
        found, packed = _quantise(model, adaptation.quantizer, found, source.dtype)
    starts = {target.module: _start(adaptation, target) for target in found}
    attachment = Attachment(adaptation, Record("state", recipe), found)
    with NO_DEVICE:  # peft draws its own start otherwise
        # A form that takes its start out of the weight keeps the original on the CPU, to which what
        # has no values cannot be moved. So adapters only begin, and weights are left alone.
        attached = wrap(model, attachment, starts, heads, "default", put=adaptation.form.begin)
    if settings.dropout:
        set_dropout(attached, settings.dropout)
    return Planned(attached.train(), source, sizes, adaptation, tuple(found), packed)


def _start(adaptation: Adaptation, target: Target) -> Factors:
    """The start of a target without values; layers that get ranks of their own have the asked one here."""
    recipe = adaptation.recipe
    rank, shape = recipe.rank_of(target.module), target.matrix_shape
    shapes = adaptation.method.start_shapes(rank, shape, recipe.options)
    kinds = {"pattern": torch.int64}
    return Factors(
        **{
            part: torch.empty(shape, dtype=kinds.get(part), device=NO_DEVICE)
            for part, shape in shapes.items()
        }
    )


def _adaptation(
    source: Source, settings: TrainSettings, choice: Choice, model: nn.Module
) -> tuple[Adaptation, list[Target]]:
    """How the weights are split: as the settings say, or as a decomposed folder was."""
    record = source.folder / INIT / plain.RECORD
    if source.decomposed and record.is_file():
        recipe = Record.from_json(read_json(record), str(record)).split_by(source.folder)
        mistakes = [
            f"{key}: got {got!r}, expected {expected!r}, as {settings.model} was decomposed"
            for key, got, expected in residual.differences(recipe, settings, choice)
        ]
        if mistakes:
            raise config_error(mistakes, "the settings")
        weights = parameter_names(model, [f"{module}.weight" for module in recipe.targets])
        names = [name.removesuffix(".weight") for name in weights.values()]
        ranks = {
            weights[f"{module}.weight"].removesuffix(".weight"): rank
            for module, rank in recipe.ranks.items()
        }
        recipe = dataclasses.replace(recipe, base_form="residual", ranks=ranks)
        return Adaptation.of(recipe, choice.method), find_targets(model, names)
    recipe = Recipe(
        choice.method.name,
        settings.rank,
        settings.alpha,
        settings.svd,
        settings.seed,
        "residual" if source.decomposed else settings.base,
        quant=choice.quant,
        double_quant=settings.double_quant,
        iterations=choice.iterations,
        options=choice.method.checked(settings.options),
    )
    return Adaptation.of(recipe, choice.method), find_targets(model, settings.targets)


def _quantise(
    model: nn.Module, packer: Quantiser, found: list[Target], dtype: torch.dtype
) -> tuple[list[Target], frozenset[str]]:
    """Put layers in few bits into the model, and the rest in float32 as `prepare_model_for_kbit_training` does."""
    with warnings.catch_warnings():
        # That some weights are written unpacked is for training to say
        warnings.simplefilter("ignore")
        packed = frozenset(packed_modules(packer, found))
    model.float()
    targets = []
    for target in found:
        if target.module not in packed:
            targets.append(target)
            continue
        layer: Any = model.get_submodule(target.module)
        model.set_submodule(
            target.module,
            FewBits(target, packer.plan(target.matrix_shape, dtype), layer.bias, dtype),
        )
        targets.append(Target(target.module, "linear", target.matrix_shape))
    return targets, packed
