"""CorDA, OLoRA, LoRA-GA and EVA against peft's own starts, driven as its users do."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from conftest import build_pico
from pissa.linalg import Components, relative_error
from pissa.registry import get
from test_laws import matrix
from test_oriented_starts import (
    by_the_equations,
    cosine,
    covariance_of,
    every_mode,
    first_step,
    rows_of,
    same_up_to_signs,
    start,
)


class Layer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows)


def factors_of(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(frozen, left, right) of peft's layer."""
    layer = model.base_model.model.linear
    parts = layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return tuple(part.detach() for part in parts)


def corda_by_peft(
    W: Tensor, samples: list[Tensor], mode: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    pytest.importorskip("attr", reason="peft's CorDA needs attrs, which peft does not ask for")
    from peft.tuners.lora.corda import preprocess_corda

    model = Layer(W)
    settings = CordaConfig(corda_method=mode)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=["linear"],
        init_lora_weights="corda",
        corda_config=settings,
    )
    preprocess_corda(model, config, run_model=lambda: [model(X[None]) for X in samples])
    return factors_of(peft.get_peft_model(model, config))


@every_mode
@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_corda_in_the_authors_share_is_pefts(shape, mode):
    W = matrix(*shape, torch.float32)
    samples = [rows_of(60, shape[1], seed=seed, dtype=torch.float32) for seed in (3, 5, 8)]
    frozen, left, right = corda_by_peft(W, samples, mode, alpha=8)
    split = start("corda", W, 4, covariance_of(*samples), 2.0, mode=mode, normalised=False)
    # peft decomposes in float32, which rounds the small end of the spectrum more.
    exact = torch.from_numpy(
        by_the_equations(W.double(), covariance_of(*samples), 4, mode, "covariance")
    )
    assert relative_error(split.product().double(), exact) < 1e-6
    tolerance = 1e-5 if mode == "ipm" else 1e-4
    assert relative_error(split.product(), 2 * left @ right) < tolerance
    assert relative_error(split.frozen, frozen) < 1e-5
    assert same_up_to_signs(left.T, split.left.T, tolerance)
    assert same_up_to_signs(right, split.right, tolerance)


def test_peft_lets_a_sample_of_negative_entries_outweigh_all_others():
    # It divides by |max X|, not by max |X|, as the authors' code does.
    W, ordinary = matrix(24, 32, torch.float32), rows_of(60, 32, dtype=torch.float32)
    negative = rows_of(60, 32, seed=5, dtype=torch.float32).abs().neg()
    negative = negative + 0.02 * negative.abs().max()
    _, left, right = corda_by_peft(W, [ordinary, negative], "ipm", alpha=4)
    both, alone = (
        start("corda", W, 4, covariance_of(*given)) for given in ((ordinary, negative), (negative,))
    )
    assert relative_error(alone.product(), both.product()) > 0.2
    assert relative_error(left @ right, both.product()) > 0.2
    assert relative_error(left @ right, alone.product()) < 0.02


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
@pytest.mark.parametrize("alpha", [4, 8])
def test_olora_is_pefts(shape, alpha):
    W = matrix(*shape, torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=["linear"], init_lora_weights="olora"
    )
    frozen, left, right = factors_of(peft.get_peft_model(Layer(W), config))
    split = start("olora", W, 4, scale=alpha / 4)
    assert relative_error(split.frozen, frozen) < 1e-5
    assert same_up_to_signs(left.T, split.left.T, 1e-5)
    assert same_up_to_signs(right, split.right, 1e-5)


def lora_ga_by_peft(W: Tensor, loss: Any, rank: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    model = Layer(W)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["linear"], init_lora_weights="lora_ga", use_rslora=True,
        lora_ga_config=peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )  # fmt: skip
    peft.preprocess_loraga(model, config, lambda: loss(model).backward())
    return factors_of(peft.get_peft_model(model, config))


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_lora_ga_has_pefts_directions_and_the_authors_norms(shape):
    W, rank, scale = matrix(*shape, torch.float32), 8, 16 / 8**0.5
    X, Y = (
        rows_of(60, width, seed=width, dtype=torch.float32).requires_grad_()
        for width in reversed(shape)
    )

    def loss(model: Any) -> Tensor:
        return (model(X) - Y).square().mean()

    G = torch.autograd.grad(loss(layer := Layer(W)), layer.linear.weight)[0]
    frozen, left, right = lora_ga_by_peft(W, loss, rank, alpha=16)
    split = start("lora_ga", W, rank, G, scale)
    U, S, Vh = np.linalg.svd(G.double().numpy())
    kappa = shape[0] ** 0.25 / 4
    ours = torch.from_numpy(kappa * U[:, rank : 2 * rank]), torch.from_numpy(kappa * Vh[:rank])
    assert same_up_to_signs(split.left.T.double(), ours[0].T, 1e-5)
    assert same_up_to_signs(split.right.double(), ours[1], 1e-5)
    # peft's right is not scaled, its left carries the singular values of the gradient as well.
    assert same_up_to_signs(kappa * right, split.right, 1e-5)
    values = torch.from_numpy(S[rank : 2 * rank]).float()
    assert same_up_to_signs((left / values).T, split.left.T, 1e-5)
    assert relative_error(frozen + scale * left @ right, W) < 1e-5
    # So its first step is that of the right factor alone: the best of rank r where ours is the best
    # of rank 2r.
    energy = np.cumsum(S**2) / (S**2).sum()
    assert cosine(-first_step(split.left, split.right, G), G) == pytest.approx(
        energy[2 * rank - 1] ** 0.5, abs=1e-5
    )
    assert cosine(-first_step(left, right, G), G) < energy[2 * rank - 1] ** 0.5 - 0.001
    assert cosine(-first_step(left, right, G), G) == pytest.approx(
        energy[rank - 1] ** 0.5, abs=1e-3
    )


@pytest.mark.parametrize(("rank", "rho"), [(24, 1.0), (12, 2.0)])
def test_eva_is_pefts_in_vectors_ranks_and_scales(rank, rho):
    # peft's sketch of 2 rho rank columns spans all 48 here, so it is exact.
    tokens = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    settings = peft.EvaConfig(rho=rho)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank / 2, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"],
        init_lora_weights="eva", eva_config=settings,
    )  # fmt: skip
    model = peft.get_peft_model(build_pico(), config, low_cpu_mem_usage=True)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    plain, seen = build_pico(), {}
    targets = {
        name: module
        for name, module in plain.named_modules()
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj"))
    }
    for name, module in targets.items():
        module.register_forward_hook(
            lambda _, given, __, name=name: seen.update(
                {name: Components.of(given[0].flatten(0, 1), 24)}
            )
        )
    with torch.no_grad():
        plain(**batch)
    eva = get("eva")
    assert eva.allotment is not None
    shares = {
        name: eva.allotment.score(targets[name].weight, seen[name], rank, rho=rho) for name in seen
    }
    ranks = eva.allotment.allot(shares, rank, rho=rho)
    assert {name: count for name, count in ranks.items() if count} == {
        name: m.r["default"] for name, m in theirs.items()
    }
    assert (len(set(ranks.values())) == 1) == (rho == 1)
    for name, module in theirs.items():
        split = start("eva", targets[name].weight.detach(), ranks[name], seen[name], 0.5)
        assert module.scaling["default"] == pytest.approx(split.scale)
        assert same_up_to_signs(module.lora_A["default"].weight.detach(), split.right, 3e-5)
        assert not module.lora_B["default"].weight.any()
