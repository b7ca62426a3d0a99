"""The loop is torch's own AdamW, clip and schedule, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from raymerge.apps.finetune.loop import Schedule, train
from raymerge.errors import RunError


def _regression() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    return model, 4 * torch.randn(8, 20, 5), torch.randn(8, 20, 3)


def _loss(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x), y)


def test_the_schedule_by_hand() -> None:
    schedule = Schedule(steps=10, warmup=4)
    assert [schedule.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4) == 1.0
    assert schedule.factor(7) == pytest.approx(0.5)
    assert schedule.factor(9) == pytest.approx(0.5 * (1 + math.cos(5 * math.pi / 6)))
    assert Schedule(10).factor(0) == 1.0
    assert Schedule(10).factor(10) == pytest.approx(0.0)


def test_the_default_recipe_reaches_its_rate_at_step_500() -> None:
    schedule = Schedule(steps=2000, warmup=500)
    assert schedule.factor(0) == pytest.approx(1 / 500)
    assert schedule.factor(499) == schedule.factor(500) == 1.0
    assert schedule.factor(1250) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_same_bits_as_a_plain_torch_loop(name: str) -> None:
    """Weight decay, clip and schedule are torch's, with a rate of its own for each group."""

    def optimizer(model: nn.Linear) -> torch.optim.Optimizer:
        groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias]}]
        groups[1]["lr"] = 0.05
        return getattr(torch.optim, name)(groups, lr=0.02)

    ours, xs, ys = _regression()
    optimizer_ours = optimizer(ours)

    def backward(step: int) -> None:
        _loss(ours, xs[step], ys[step]).backward()

    train(list(ours.parameters()), optimizer_ours, Schedule(8, 3), backward, clip_norm=0.5)

    plain, _, _ = _regression()
    optimizer_plain = optimizer(plain)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer_plain,
        lambda s: (s + 1) / 3 if s < 3 else 0.5 * (1 + math.cos(math.pi * (s - 3) / 5)),
    )
    clipped = 0
    for x, y in zip(xs, ys, strict=True):
        optimizer_plain.zero_grad()
        _loss(plain, x, y).backward()
        clipped += bool(nn.utils.clip_grad_norm_(plain.parameters(), 0.5) > 0.5)
        optimizer_plain.step()
        schedule.step()
    assert clipped
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rates_are_restored_and_observe_counts_from_zero() -> None:
    model, xs, ys = _regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    seen: list[tuple[int, float]] = []

    def backward(step: int) -> float:
        loss = _loss(model, xs[step], ys[step])
        loss.backward()
        return loss.item()

    def observe(step: int, loss: float) -> None:
        seen.append((step, optimizer.param_groups[0]["lr"]))

    train(list(model.parameters()), optimizer, Schedule(8, 2), backward, observe, start=3)
    assert [step for step, _ in seen] == [3, 4, 5, 6, 7]
    assert seen[0][1] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi / 6)))
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, xs, ys = _regression()
    xs[2, 0, 0] = float("inf")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    kept: list[torch.Tensor] = []

    def backward(step: int) -> None:
        _loss(model, xs[step], ys[step]).backward()

    def observe(step: int, result: None) -> None:
        kept.append(model.weight.detach().clone())

    with pytest.raises(RunError, match="step 3: the gradient is NaN or infinite"):
        train(list(model.parameters()), optimizer, Schedule(8), backward, observe)
    assert len(kept) == 2
    assert torch.equal(model.weight, kept[-1])
    assert optimizer.param_groups[0]["lr"] == 0.02
