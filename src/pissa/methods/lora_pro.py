"""LoRA-Pro: LoRA whose optimiser follows full fine-tuning (arXiv 2407.18242).

    left = 0,  right ~ U(-1/sqrt(in), 1/sqrt(in)),  frozen = W

The start is LoRA's. What differs is the step, see `pissa.linalg.tangent` and
`pissa.training.lora_pro`. Deviations are those of the step.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pissa.errors import InputError
from pissa.randomness import noise_beside_zero, tensor_seed
from pissa.registry import method
from pissa.splits import Split


@method(
    "lora_pro",
    title="LoRA-Pro",
    paper="2407.18242",
    trains="a new low-rank part, by steps nearest those of full fine-tuning",
    verdict="takes full fine-tuning's learning rate and optimiser memory; ties with LoRA where both rates are tuned",
    zero_start=True,
    optimizer="pissa.training.lora_pro:LoraPro",
)
def lora_pro(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    form: Literal["adamw", "sgd"] = "adamw",
    cap: float = 0.1,
    damping: float = 0.0,
) -> Split:
    """Noise on the right, zero on the left, as LoRA begins; the options are the optimiser's."""
    if not cap > 0 or not damping >= 0:
        raise InputError(
            f"lora_pro: cap is {cap} and damping {damping}, expected above 0, and 0 or more"
        )
    return noise_beside_zero(weight, rank, scale, tensor_seed(seed, name))
