"""Where a first step goes, and what a start leaves of the outputs: on gradients and inputs that models really have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from conftest import build_pico
from pissa import Split
from pissa.linalg import Components, relative_error
from pissa.registry import get

SCALE = 2.0
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "pissa": ("pissa", {}),
    "milora": ("milora", {}),
    "olora": ("olora", {}),
    "corda": ("corda", {"mode": "ipm"}),
    "corda-kpm": ("corda", {"mode": "kpm"}),
    "corda-root": ("corda", {"weighting": "root"}),
    "eva": ("eva", {}),
    "lora_ga": ("lora_ga", {}),
}
every_start = pytest.mark.parametrize("start", STARTS)
STORY = (
    "Once upon a time there was a small fox who wanted to see the sea. She walked for two days and met a blue bird.",
    "Tom had a red ball. He threw it over the wall and it did not come back, so he went to look for it in the garden.",
    "The old man made a soup of stones. Everybody in the village brought something, and in the end it tasted good.",
)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a calibration sees of one layer, float64."""

    weight: Tensor
    gradient: Tensor
    samples: list[Tensor]

    @cached_property
    def rows(self) -> Tensor:
        return torch.cat(self.samples)

    @cached_property
    def covariance(self) -> Tensor:
        scaled = [X / X.abs().max() for X in self.samples]
        return torch.stack([X.T @ X for X in scaled]).mean(0)

    @cached_property
    def components(self) -> Components:
        return Components.of(self.rows, 16)


@dataclass(frozen=True, eq=False)
class Setting:
    model: Any
    samples: list[Tensor]
    rank: int
    layers: dict[str, Seen]

    def split(self, start: str, name: str) -> Split:
        method, options = STARTS[start]
        seen, needs = self.layers[name], get(method).needs
        observed = None if needs == "weight" else getattr(seen, needs)
        return get(method).split(
            seen.weight, self.rank, scale=SCALE, name=name, observed=observed, options=options
        )


def loss_of(model: Any, samples: list[Tensor], weights: dict[str, Tensor] | None = None) -> Tensor:
    """Mean over samples, with other weights in place of the model's own where given."""
    losses = [
        torch.func.functional_call(
            model, weights or {}, kwargs={"input_ids": ids[None], "labels": ids[None]}
        ).loss
        for ids in samples
    ]
    return torch.stack(losses).mean()


def watch(model: Any, samples: list[Tensor], rank: int) -> Setting:
    model = model.double().eval()
    inputs: dict[str, list[Tensor]] = {}
    modules = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    hooks = [
        module.register_forward_hook(
            lambda _, given, __, name=name: inputs.setdefault(name, []).append(given[0].detach()[0])
        )
        for name, module in modules.items()
    ]
    loss_of(model, samples).backward()
    for hook in hooks:
        hook.remove()
    layers = {
        f"{name}.weight": Seen(
            module.weight.detach().clone(), module.weight.grad.clone(), inputs[name]
        )
        for name, module in modules.items()
    }
    model.zero_grad()
    return Setting(model, samples, rank, layers)


@pytest.fixture(scope="module", params=["pico", "stories260K"])
def setting(request: pytest.FixtureRequest) -> Setting:
    if request.param == "pico":
        tokens = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(0))
        return watch(build_pico(), list(tokens), rank=4)
    folder = request.getfixturevalue("shared") / "models" / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return watch(model, [torch.tensor(tokenizer(text)["input_ids"]) for text in STORY], rank=8)


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def first_change(split: Split, G: Tensor, rate: float = 1.0) -> Tensor:
    return (
        -rate * split.scale**2 * (split.left @ (split.left.T @ G) + G @ split.right.T @ split.right)
    )


@every_start
def test_one_step_of_sgd_on_the_factors_moves_the_weight_by_the_formula(setting, start):
    splits = {name: setting.split(start, name) for name in setting.layers}
    leaves = {
        name: (s.left.clone().requires_grad_(), s.right.clone().requires_grad_())
        for name, s in splits.items()
    }
    effective = {
        name: s.frozen + s.scale * leaves[name][0] @ leaves[name][1] for name, s in splits.items()
    }
    loss = loss_of(setting.model, setting.samples, effective)
    assert float(loss.detach()) == pytest.approx(
        float(loss_of(setting.model, setting.samples).detach()), rel=1e-9
    )
    loss.backward()
    rate = 1e-6
    for name, split in splits.items():
        left, right = (leaf.detach() - rate * leaf.grad for leaf in leaves[name])
        moved = split.frozen + split.scale * left @ right - setting.layers[name].weight
        assert (
            relative_error(moved, first_change(split, setting.layers[name].gradient, rate)) < 1e-4
        )


def cosines(setting: Setting, start: str, on: Setting | None = None) -> dict[str, float]:
    """Of the first change with full fine-tuning's, by layer; on the rows of another setting if one is given."""
    return {
        name: cosine(-first_change(setting.split(start, name), seen.gradient), seen.gradient)
        for name, seen in (on or setting).layers.items()
    }


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def test_lora_gas_first_step_is_the_nearest_to_full_fine_tunings_in_every_layer(setting):
    ours = cosines(setting, "lora_ga")
    for name, seen in setting.layers.items():
        energy = torch.linalg.svdvals(seen.gradient).square()
        assert ours[name] == pytest.approx(
            float((energy[: 2 * setting.rank].sum() / energy.sum()).sqrt()), abs=1e-9
        )
    for start in STARTS:
        others = cosines(setting, start)
        assert start == "lora_ga" or all(ours[name] > others[name] for name in ours)
    # Measured: 0.98 and 0.95 against 0.32 and 0.32 (LoRA), 0.43 and 0.45 (PiSSA).
    assert mean(ours) > mean(cosines(setting, "pissa")) + 0.3
    assert mean(ours) > mean(cosines(setting, "lora")) + 0.3


def test_evas_rows_capture_the_most_that_orthonormal_rows_can(setting):
    generator = torch.Generator().manual_seed(0)
    for name, seen in setting.layers.items():
        split = setting.split("eva", name)
        centred = seen.rows - seen.rows.mean(0)
        captured = float((centred @ split.right.T).square().sum())
        assert relative_error(split.right @ split.right.T, torch.eye(setting.rank).double()) < 1e-6
        assert captured == pytest.approx(
            float(torch.linalg.svdvals(centred)[: setting.rank].square().sum()), rel=1e-6
        )
        for _ in range(100):
            noise = torch.randn(
                centred.shape[1], setting.rank, generator=generator, dtype=torch.float64
            )
            assert float((centred @ torch.linalg.qr(noise)[0]).square().sum()) < captured


def output_changes(
    setting: Setting, start: str, of: str, on: Setting | None = None
) -> dict[str, float]:
    """By layer, how far the outputs are from the weight's when the model keeps `of`: "product" or "frozen"."""
    changes = {}
    for name, seen in (on or setting).layers.items():
        split = setting.split(start, name)
        kept = split.product() if of == "product" else split.frozen
        changes[name] = relative_error(seen.rows @ kept.T, seen.rows @ seen.weight.T)
    return changes


def test_cordas_leading_part_is_closer_on_the_outputs_than_pissas(setting):
    plain, corda, root = (
        output_changes(setting, start, "product") for start in ("pissa", "corda", "corda-root")
    )
    assert all(corda[name] < plain[name] for name in plain)
    assert mean(root) < mean(corda)


def test_what_kpm_leaves_frozen_keeps_the_outputs_better_than_what_milora_leaves(setting):
    milora, kpm = (output_changes(setting, start, "frozen") for start in ("milora", "corda-kpm"))
    assert all(kpm[name] < milora[name] for name in milora)


@pytest.fixture(scope="module")
def stories(shared: Path) -> Callable[[slice], Setting]:
    """stories260K on some rows of 128 tokens of stories."""
    folder = shared / "models" / "stories260K"
    lines = (
        (shared / "data" / "tinystories_sample" / "stories.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    text = "\n".join(json.loads(line)["text"] for line in lines)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]
    rows = torch.tensor(tokens[: len(tokens) // 128 * 128]).reshape(-1, 128)

    def make(which: slice) -> Setting:
        return watch(
            transformers.AutoModelForCausalLM.from_pretrained(folder), list(rows[which]), rank=8
        )

    return make


def test_on_other_rows_the_order_stays_and_kpm_needs_more_than_a_few(stories):
    one, twelve, other = (stories(which) for which in (slice(1), slice(12), slice(-12, None)))
    near = {
        start: mean(cosines(twelve, start, other)) for start in ("lora", "pissa", "eva", "lora_ga")
    }
    assert near["lora_ga"] > near["eva"] > near["pissa"] > near["lora"]
    # What the rows themselves promise is not what others give: 0.70 here, nearly 1 there.
    assert near["lora_ga"] < mean(cosines(twelve, "lora_ga")) - 0.1
    milora = mean(output_changes(one, "milora", "frozen", other))
    assert mean(output_changes(twelve, "corda-kpm", "frozen", other)) < milora
    assert mean(output_changes(one, "corda-kpm", "frozen", other)) > milora
