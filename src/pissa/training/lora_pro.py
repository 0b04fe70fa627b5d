"""LoRA-Pro's optimiser (arXiv 2407.18242): factors take the step whose change of the weight is
nearest the full one.

    SGD     B -= lr uB,  A -= lr uA                                      uB, uA: `pissa.linalg.tangent`
    AdamW   g~ from uB, uA;  d = Adam's direction for g~, with moments [out, in];  B -= lr dB,  A -= lr dA,
            where dB, dA are to d what uB, uA are to the gradient

Each weight so takes nearly the step of full fine-tuning, at full fine-tuning's learning rate rather
than LoRA's. The AdamW form holds as many moments as full fine-tuning does, in float32.

The second step from ``B = 0`` is where the closed form leaves its first-order ground: B is as small
as lr then, so uA is as large as 1 / lr. `cap` bounds each step of A relative to A.

Deviations from the authors' code: any alpha (theirs computes with alpha / rank = 2); the first step
is the paper's own, and Adam's count begins at 1; no damping by default; moments are in float32. As
there, weight decay is decoupled and acts on what trains, the factors or their drift. A trainer
clips the factors' raw gradients, before any of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from pissa.adapters import factors
from pissa.adapters.forms import Form, on_layer
from pissa.adapters.forms.pair import Pair as PlainPair
from pissa.adapters.runs import note_optimizer
from pissa.errors import ConfigError, InputError
from pissa.linalg.tangent import Tangent
from pissa.training.distributed import layout
from pissa.untyped import PeftLayer

Pair = tuple[PeftLayer, str]
"""A peft layer and the name of its adapter that trains."""
PLAIN = PlainPair(("left", "right"))


class LoraPro(Optimizer):
    """LoRA-Pro for what trains of a peft model: pairs of factors by its steps, all other parameters
    by AdamW.

    Works on plain LoRAs and on started adapters alike (a drift from LoRA-GA's start leaves nothing
    to jump). The state is a torch optimiser's: [out, in] moments belong to the left factor's
    parameter.

    Args:
        model: with one adapter that trains on each layer, in float32 or float64.
        lr: of full fine-tuning's size.
        betas: of Adam's moments.
        eps: added to the root of Adam's second moment.
        weight_decay: decoupled, on all that trains.
        form: "adamw", or "sgd" without moments and without any [out, in].
        cap: most that a step may change A, as a share of its norm; a large number for no bound.
        damping: see `pissa.linalg.tangent.Tangent`.

    Raises:
        InputError: no pair of factors, or one in 16 bits.
        ConfigError: the model is to be spread by FSDP or DeepSpeed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        form: Literal["adamw", "sgd"] = "adamw",
        cap: float = 0.1,
        damping: float = 0.0,
    ):
        if form not in ("adamw", "sgd"):
            raise InputError(f"form is {form!r}, expected adamw or sgd")
        if layout()["sharding"] in ("fsdp", "deepspeed"):
            raise ConfigError(
                "lora_pro needs each factor whole, which FSDP and DeepSpeed spread: use DDP, or one process"
            )
        self.pairs = _pairs(model)
        paired = [part for pair in self.pairs for part in factors.parameters(*pair)]
        ids = set(map(id, paired))
        others = [part for part in model.parameters() if part.requires_grad and id(part) not in ids]
        groups: list[dict[str, Any]] = [
            {"params": paired, "form": form, "cap": cap, "damping": damping},
            {"params": others},
        ]
        super().__init__(
            groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        note_optimizer(model, LoraPro)

    @staticmethod
    def numbers_kept(
        shapes: Iterable[tuple[int, int]], form: str = "adamw", **options: float
    ) -> int:
        """How many numbers in float32 it keeps for weights of these shapes [out, in]."""
        return 2 * sum(math.prod(shape) for shape in shapes) if form == "adamw" else 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        paired, others = self.param_groups
        parameters = iter(paired["params"])
        for pair, left, right in zip(self.pairs, parameters, parameters, strict=True):
            if left.grad is not None:
                for parameter, update in zip(
                    (left, right), self._updates(pair, left, right, paired), strict=True
                ):
                    _descend(parameter, update.view_as(parameter), paired)
        for parameter in others["params"]:
            if parameter.grad is not None:
                _descend(parameter, self._direction(parameter, parameter.grad, others), others)
        return loss

    def _updates(
        self, pair: Pair, left: Tensor, right: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """What lr times is to be subtracted from the pair, [out, r] and [r, in]."""
        layer, adapter = pair
        gB, gA = (part.grad.flatten(1) for part in (left, right))  # type: ignore[union-attr]
        B, A = _form(layer, adapter).current(layer, adapter)
        tangent = Tangent(B, A, layer.scaling[adapter], group["damping"])
        updates = tangent.updates(gB, gA)
        if group["form"] == "adamw":
            direction = self._direction(left, tangent.change(*updates), group)
            updates = tangent.updates(*tangent.gradients(direction))
        allowed = group["cap"] * A.norm() / (group["lr"] * updates[1].norm())
        return updates[0], updates[1] * allowed.clamp(max=1.0)

    def _direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's ``mean / (sqrt(mean of squares) + eps)`` of a parameter's gradients so far, both without bias."""
        state, (beta, beta_squares) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(gradient),
                torch.zeros_like(gradient),
            )
        state["step"] += 1
        count = float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - beta)
        squares = (
            state["exp_avg_sq"]
            .mul_(beta_squares)
            .addcmul_(gradient, gradient, value=1 - beta_squares)
        )
        root = (squares / (1 - beta_squares**count)).sqrt_().add_(group["eps"])
        direction: Tensor = mean / (1 - beta**count) / root
        return direction


def _pairs(model: nn.Module) -> list[Pair]:
    """Every layer with the adapter whose two factors, or their drift, train there."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    adapters = [
        (layer, name) for layer in layers for name in layer.active_adapters if name in layer.scaling
    ]
    pairs = [pair for pair in adapters if _trains_both(*pair)]
    if not pairs:
        raise InputError(
            "no layer trains a pair of factors: expected a model from pissa.attach(model, 'lora_pro')"
        )
    for layer, name in pairs:
        dtype = factors.parameters(layer, name)[0].dtype
        if dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"adapter {name!r} is in {dtype}, expected float32: resuming would round its moments"
            )
    return pairs


def _form(layer: PeftLayer, adapter: str) -> Form:
    """An adapter that was not attached here is a plain LoRA."""
    return on_layer(layer).get(adapter, PLAIN)


def _trains_both(layer: PeftLayer, adapter: str) -> bool:
    if _form(layer, adapter).parts != PLAIN.parts:
        return False
    return all(part.requires_grad for part in factors.parameters(layer, adapter))


def _descend(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    """One step along an update, after the decay."""
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
