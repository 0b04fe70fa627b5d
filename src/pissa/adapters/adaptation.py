"""A recipe with what its names stand for, looked up once where the recipe is made or read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pissa.adapters.forms import Form, form_of
from pissa.adapters.splitting import quantizer_of, split_by
from pissa.checkpoint.targets import Target
from pissa.errors import InputError
from pissa.method import Method
from pissa.observe import Observations
from pissa.presets import find
from pissa.quant import Quantiser
from pissa.records import Recipe
from pissa.splits import Split
from pissa.untyped import Observed


@dataclass(frozen=True)
class Adaptation:
    """How weights are split and how what trains lives on their layers.

    Attributes:
        recipe: as files hold it.
        method: which low-rank part.
        form: how it lives on a layer.
    """

    recipe: Recipe
    method: Method
    form: Form

    @classmethod
    def of(cls, recipe: Recipe, method: Method | None = None) -> Adaptation:
        """Look up what a recipe names.

        Args:
            recipe: new, or from a file.
            method: one that is looked up already; taken if it is the one that the recipe names.

        Raises:
            InputError: a method that this version does not know.
        """
        named = method if method and method.name == recipe.method else find(recipe.method)
        return cls(recipe, named, form_of(named, recipe.base_form, recipe.quant is not None))

    def changed(self, **facts: Any) -> Adaptation:  # fields of a Recipe, each of its own type
        """With other facts in the recipe, of the same method and quantizer."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **facts))

    @cached_property
    def quantizer(self) -> Quantiser | None:
        """Of what does not train; None where that stays as it is.

        Raises:
            MissingExtraError: bitsandbytes is absent.
        """
        return quantizer_of(self.recipe)

    def split(
        self,
        weight: Tensor,
        name: str,
        dtype: torch.dtype,
        *,
        rank: int | None = None,
        observed: Observed = None,  # what `Observations.get` gives, a type for each need
    ) -> Split:
        """Split a weight [out, in], see `split_by`."""
        how = self.recipe, self.method, self.quantizer
        return split_by(*how, weight, name, dtype, rank=rank, observed=observed)

    def allotted(
        self, weights: Iterable[tuple[Target, Tensor]], seen: Callable[[Target], Any]
    ) -> Adaptation:
        """With a rank for each target where the method gives layers ranks of their own.

        Args:
            weights: each target with its weight [out, in]; read once, and only where the method
                looks at all layers.
            seen: what the method needs to have been seen of a target.

        Returns:
            The adaptation; targets that got no rank are left out of its recipe.

        Raises:
            InputError: no target got a rank.
        """
        allotment, recipe = self.method.allotment, self.recipe
        if allotment is None:
            return self
        modules, scores = {}, {}
        for target, weight in weights:
            modules[target.weight] = target.module
            scores[target.weight] = allotment.score(
                weight, seen(target), recipe.rank, **recipe.options
            )
        given = allotment.allot(scores, recipe.rank, **recipe.options)
        ranks = {modules[name]: rank for name, rank in given.items() if rank}
        if not ranks:
            raise InputError(f"{recipe.method} gives no layer a rank: use a larger --rank")
        kept = {module: kind for module, kind in recipe.targets.items() if module in ranks}
        return self.changed(ranks=ranks, targets=kept)

    def at_full_rank(self, targets: Iterable[Target]) -> Adaptation:
        """With the rank of each target where the method works at full rank, whatever is asked."""
        if not self.method.full_rank:
            return self
        return self.changed(ranks={t.module: min(t.matrix_shape) for t in targets})

    def refuse_unfit(self, targets: Iterable[Target]) -> None:
        """Refuse kinds of layers that the form cannot live on.

        Raises:
            InputError: naming the first such layer.
        """
        odd = next((target for target in targets if target.kind not in self.form.kinds), None)
        if odd:
            raise InputError(
                f"what {self.method.name} trains lives on layers of kind "
                f"{' or '.join(self.form.kinds)}, and `{odd.module}` is of kind {odd.kind}: "
                "leave it out of targets"
            )

    def seen(self, observations: Observations | None, name: str) -> Any:
        """What the method needs to have been seen of a weight; None where it needs nothing.

        Args:
            observations: of the model.
            name: of the weight, canonical.

        Raises:
            InputError: nothing was observed.
        """
        need = self.method.observes
        return self.method.required(observations, name).get(need, name) if need else None


def refuse_untrained(method: Method) -> None:
    """Refuse a method that trains nothing, which no form holds.

    Raises:
        InputError: with where to go.
    """
    if not method.parts:
        raise InputError(
            f"{method.name} trains nothing, it makes a model smaller: use pissa decompose "
            f"--method {method.name}, or pissa.w4a4.svdquant"
        )
