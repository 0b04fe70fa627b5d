"""LoRA-Pro: its closed form is the least-squares step, and its optimiser follows full fine-tuning with it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pissa
from conftest import TOKENS, build_pico
from pissa.errors import ConfigError, InputError
from pissa.linalg.tangent import Tangent
from pissa.training.lora_pro import LoraPro

OUT, IN, SCALE = 14, 11, 1.7


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def problem(rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(B, A, G), of full rank."""
    return noise(OUT, rank, seed=1), noise(rank, IN, seed=2), noise(OUT, IN, seed=3)


def updates(B: Tensor, A: Tensor, G: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    tangent = Tangent(B, A, SCALE, damping)
    return tangent.updates(*tangent.gradients(G))


def change(B: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """g~ for the gradient G."""
    return Tangent(B, A, SCALE).change(*updates(B, A, G))


def operator(B: Tensor, A: Tensor) -> Tensor:
    """The matrix of (uB, uA) -> s (B uA + uB A), built from its columns."""
    rank = B.shape[1]
    units = torch.eye(rank * (OUT + IN), dtype=B.dtype)
    parts = [
        (unit[: OUT * rank].view(OUT, rank), unit[OUT * rank :].view(rank, IN)) for unit in units
    ]
    return torch.stack([SCALE * (B @ uA + uB @ A).flatten() for uB, uA in parts], dim=1)


def assert_near(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    assert (one - other).detach().norm() <= tolerance * other.detach().norm()


def projectors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


@pytest.mark.parametrize("rank_of_left", [4, 2, 0])
def test_updates_are_the_least_squares_solution_of_least_norm(rank_of_left):
    B, A, G = problem()
    B = B[:, :rank_of_left] @ noise(rank_of_left, 4, seed=4)
    solution = torch.linalg.lstsq(
        operator(B, A), G.flatten()[:, None], driver="gelsd"
    ).solution.flatten()
    assert_near(torch.cat([part.flatten() for part in updates(B, A, G)]), solution)
    assert rank_of_left or not updates(B, A, G)[1].any()


def test_damping_is_a_ridge_on_both_updates():
    B, A, G = problem()
    M = operator(B, A)
    ridge = 0.1 * SCALE**2 * (B.square().sum() + A.square().sum()) / 4
    solution = torch.linalg.solve(
        M.T @ M + ridge * torch.eye(M.shape[1], dtype=M.dtype), M.T @ G.flatten()
    )
    assert_near(torch.cat([part.flatten() for part in updates(B, A, G, damping=0.1)]), solution)


def test_the_change_is_the_gradient_but_for_what_neither_factor_can_write():
    B, A, G = problem()
    P_B, P_A = projectors(B, A)
    assert_near(change(B, A, G), P_B @ G + (G - P_B @ G) @ P_A)


def test_the_free_matrix_solves_the_papers_sylvester_equation_and_cancels():
    B, A, G = problem()
    gB, gA = Tangent(B, A, SCALE).gradients(G)
    uB, uA = updates(B, A, G)
    inner = torch.linalg.inv(B.T @ B)
    X = (uA - inner @ gA / SCALE**2) @ torch.linalg.pinv(A)
    assert_near(B.T @ B @ X + X @ (A @ A.T), -inner @ gA @ A.T / SCALE**2)
    plain = (
        (gB - B @ inner @ B.T @ gB) @ torch.linalg.inv(A @ A.T) / SCALE**2,
        inner @ gA / SCALE**2,
    )
    assert_near(uB, plain[0] - B @ X)
    assert_near(change(B, A, G), Tangent(B, A, SCALE).change(*plain))
    assert X.norm() > 0.01


def test_no_multiple_of_loras_own_change_is_nearer_to_the_gradient():
    B, A, G = problem()
    own = Tangent(B, A, SCALE).change(*Tangent(B, A, SCALE).gradients(G))
    best = (own * G).sum() / own.square().sum()
    assert (change(B, A, G) - G).norm() < 0.95 * (best * own - G).norm()


def test_the_loss_falls_by_the_square_of_the_change():
    B, A, G = problem()
    fall = sum(
        (one * other).sum()
        for one, other in zip(updates(B, A, G), Tangent(B, A, SCALE).gradients(G), strict=True)
    )
    assert_near(fall, change(B, A, G).square().sum())


def test_at_full_rank_the_change_is_the_gradient():
    assert_near(change(*problem(rank=IN)), problem(rank=IN)[2])


@pytest.mark.parametrize(
    "turn", [torch.linalg.qr(noise(4, 4, seed=5))[0], noise(4, 4, seed=6)], ids=["turned", "mixed"]
)
def test_the_change_does_not_depend_on_the_factors_of_a_product(turn):
    B, A, G = problem()
    assert_near(change(B @ turn, torch.linalg.inv(turn) @ A, G), change(B, A, G))


class Target(nn.Module):
    """One linear layer without bias; the loss is its distance to `goal`, so G = W - goal."""

    def __init__(self, goal: Tensor):
        super().__init__()
        self.linear, self.goal = nn.Linear(IN, OUT, bias=False, dtype=goal.dtype), goal
        with torch.no_grad():
            self.linear.weight.copy_(noise(OUT, IN, seed=8))

    def weight(self) -> Tensor:
        return self.linear(torch.eye(IN, dtype=self.goal.dtype)).T

    def forward(self) -> Tensor:
        return 0.5 * (self.weight() - self.goal).square().sum()


def attached(rank: int, method: str = "lora", **options: Any) -> Any:
    return pissa.attach(Target(noise(OUT, IN, seed=9)), method, rank, alpha=SCALE * rank, **options)


def pair_of(model: Any) -> tuple[Tensor, Tensor]:
    layer = model.base_model.model.linear
    return layer.lora_B["default"].weight, layer.lora_A["default"].weight


def walk(model: Any, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("lr", [1e-4, 1e-3])
def test_sgd_at_full_rank_follows_full_fine_tuning(lr):
    model, full = attached(IN), Target(noise(OUT, IN, seed=9))
    with torch.no_grad():
        # A start where both factors span everything
        pair_of(model)[0].copy_(noise(OUT, IN, seed=10))
        full.linear.weight.copy_(model.base_model.model.weight())
    before = full.weight().detach()
    walk(model, LoraPro(model, lr=lr, form="sgd", cap=float("inf")), 20)
    walk(full, torch.optim.SGD(full.parameters(), lr=lr), 20)
    apart, moved = model.base_model.model.weight() - full.weight(), full.weight() - before
    assert apart.norm() < 20 * lr * moved.norm()


def test_the_first_step_of_adamw_is_the_hand_computation():
    lr, decay = 0.01, 0.1
    model = attached(4)
    B, A = (part.detach().clone() for part in pair_of(model))
    G = noise(OUT, IN, seed=8) - noise(OUT, IN, seed=9)
    walk(model, LoraPro(model, lr=lr, weight_decay=decay, eps=1e-3), 1)
    seen = G @ torch.linalg.pinv(A) @ A  # B is zero
    direction = seen / (seen.abs() + 1e-3)
    assert_near(pair_of(model)[0], -lr * direction @ torch.linalg.pinv(A) / SCALE)
    assert torch.equal(pair_of(model)[1], A * (1 - lr * decay))
    assert not B.any()


def test_moments_are_those_of_adam_on_the_changes_of_the_weight():
    model = attached(4)
    optimiser = LoraPro(model, lr=0.01)
    other = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.float64))
    adam = torch.optim.AdamW([other], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        tangent = Tangent(*(part.detach().clone() for part in pair_of(model)), SCALE)
        walk(model, optimiser, 1)
        other.grad = tangent.change(*tangent.updates(*(part.grad for part in pair_of(model))))
        adam.step()
    state = optimiser.state[pair_of(model)[0]]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert_near(state[moment], adam.state[other][moment])
    assert float(state["step"]) == 3.0


def second_step(lr: float = 0.05, **options: Any) -> float:
    """Of A, relative to A."""
    model = attached(4)
    optimiser = LoraPro(model, lr=lr, form="sgd", **options)
    walk(model, optimiser, 1)
    before = pair_of(model)[1].detach().clone()
    walk(model, optimiser, 1)
    return float((pair_of(model)[1].detach() - before).norm() / before.norm())


def test_the_second_step_from_zero_jumps_and_the_cap_bounds_it():
    assert second_step(cap=float("inf")) > 0.9
    # A hundredth of the rate makes it no smaller
    assert second_step(lr=5e-4, cap=float("inf")) > 0.9
    assert second_step(cap=0.2) == pytest.approx(0.2)
    assert second_step() == pytest.approx(0.1)


def test_a_started_adapter_takes_the_step_of_its_whole_factors():
    drifting, whole = attached(4, "pissa"), attached(4)
    start = pissa.split(noise(OUT, IN, seed=8), "pissa", 4, alpha=4 * SCALE, svd="exact")
    with torch.no_grad():
        whole.base_model.model.linear.base_layer.weight.copy_(start.frozen)
        for parameter, factor in zip(pair_of(whole), (start.left, start.right), strict=True):
            parameter.copy_(factor)
    for model in (drifting, whole):
        walk(model, LoraPro(model, lr=0.01), 3)
    assert_near(drifting.base_model.model.weight(), whole.base_model.model.weight(), 1e-6)
    assert (drifting.base_model.model.weight() - noise(OUT, IN, seed=8)).norm() > 0.1


def test_what_is_no_pair_of_factors_trains_as_adamw_does():
    models = [pissa.attach(build_pico(), "lora_pro", 4, modules_to_save=["norm"]) for _ in range(2)]
    ours = LoraPro(models[0], lr=0.01, weight_decay=0.1)
    norm = [
        dict(model.named_parameters())["base_model.model.model.norm.modules_to_save.default.weight"]
        for model in models
    ]
    theirs = torch.optim.AdamW([norm[1]], lr=0.01, weight_decay=0.1)
    for step in range(3):
        for parameter, optimiser in zip(norm, (ours, theirs), strict=True):
            parameter.grad = noise(*parameter.shape, seed=step, dtype=torch.float32)
            optimiser.step()
    assert (norm[0] - 1).abs().max() > 0.01
    assert torch.allclose(*norm, rtol=1e-6)


def train(model: Any, optimiser: LoraPro, schedule: Any, steps: int) -> None:
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
        schedule.step()


def ready(form: str) -> tuple[Any, LoraPro, Any]:
    model = pissa.attach(build_pico(), "lora_pro", 4, modules_to_save=["norm"])
    optimiser = LoraPro(model, lr=0.01, weight_decay=0.1, form=form)
    return model, optimiser, torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=6)


def on_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("form", ["adamw", "sgd"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(form):
    unbroken, broken, resumed = ready(form), ready(form), ready(form)
    train(*unbroken, 6)
    train(*broken, 3)
    for new, old in zip(resumed, broken, strict=True):
        new.load_state_dict(on_disk(old.state_dict()))
    train(*resumed, 3)
    parts = [
        [part for part in each[0].parameters() if part.requires_grad]
        for each in (resumed, unbroken, ready(form))
    ]
    for part, same, before in zip(*parts, strict=True):
        assert torch.equal(part, same) and not torch.equal(part, before)


def test_the_sgd_form_keeps_no_moments_of_factors():
    model, optimiser, schedule = ready("sgd")
    train(model, optimiser, schedule, 1)
    assert {tuple(parameter.shape) for parameter in optimiser.state} == {(32,)}  # the norms'


def test_the_start_is_loras():
    W = noise(OUT, IN)
    one, other = (pissa.split(W, name, 4, seed=3) for name in ("lora", "lora_pro"))
    assert (
        torch.equal(one.right, other.right)
        and not other.left.any()
        and torch.equal(other.frozen, W)
    )


def test_what_it_cannot_train_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        InputError, match=r"expected a model from pissa.attach\(model, 'lora_pro'\)"
    ):
        LoraPro(build_pico())
    with pytest.raises(InputError, match="no layer trains a pair of factors"):
        LoraPro(attached(4, "lora_xs"))
    with pytest.raises(InputError, match="form is 'adam', expected adamw or sgd"):
        LoraPro(attached(4), form="adam")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"is in torch.bfloat16, expected float32"):
        LoraPro(attached(4).bfloat16())
    for name, value in {
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="use DDP, or one process"):
        LoraPro(attached(4))
