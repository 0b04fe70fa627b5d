"""A form whose forward pass is not peft's own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from pissa.adapters import starts
from pissa.adapters.forms.form import Form, remember
from pissa.adapters.plain import whole
from pissa.checkpoint.targets import target_of
from pissa.errors import InputError
from pissa.splits import Factors
from pissa.untyped import PeftLayer


class Variant(Form, LoraVariant):
    """A form whose forward pass is not peft's: peft calls it in the place of its own.

    What trains is the drift from the start. Whatever stock tools save from such a layer is a plain
    LoRA of `state_dict_ranks` ranks, right on the original base.
    """

    trained_prefix: ClassVar[str] = "drift_"

    def supports_lora_conversion(self) -> bool:
        """peft's own conversion reads lora_A and lora_B as a plain pair, which they are not here."""
        return False

    @abstractmethod
    def merged_change(self, layer: PeftLayer, adapter: str) -> Tensor:
        """What merging adds to the layer's weight as a matrix [out, in], in float32 at least."""

    def tell_stock_tools(self, model: Any, adapter: str) -> None:
        """The pair's own rank, at the same scale; and no sums of pairs, which these are not."""
        config, times = model.peft_config[adapter], self.state_dict_ranks
        config.r, config.lora_alpha = times * config.r, whole(times * config.lora_alpha)
        config.rank_pattern = {name: times * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: times * own for name, own in config.alpha_pattern.items()}

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise InputError(
                "add_weighted_adapter reads lora_A and lora_B as a plain pair, which a started "
                "adapter is not: save the runs, load their adapter/ folders on the base model and "
                "combine those"
            )

        model.base_model.add_weighted_adapter = refuse

    def _delta(self, layer: PeftLayer, adapter: str) -> Tensor:
        change = self.merged_change(layer, adapter)
        return target_of("", layer.get_base_layer()).from_matrix(change)

    # peft calls these on the object that it finds on the layer, so they need not be static.

    def merge_safe(self, module: PeftLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """The weight with the adapter in it, summed in float32 and rounded once."""
        change = self._delta(module, active_adapter)
        return (orig_weight.to(change.dtype) + change).to(orig_weight.dtype)

    def merge_unsafe(self, module: PeftLayer, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """The same, in place."""
        orig_weight.data.copy_(self.merge_safe(module, active_adapter, orig_weight.data))

    def unmerge(self, module: PeftLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """The weight without the adapter, exact up to one rounding of its dtype."""
        change = self._delta(module, active_adapter)
        return (orig_weight.to(change.dtype) - change).to(orig_weight.dtype)

    def put(self, layer: PeftLayer, adapter: str, start: Factors, like: Tensor) -> None:
        """Keep the start on the layer, and let peft ask this form for the forward pass."""
        starts.put(layer, adapter, start, like)
        layer.lora_variant[adapter] = self
        remember(layer, adapter, self)
