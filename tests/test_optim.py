import copy

import pytest
import torch
from torch import nn

from samlib import SAM, frozen_batch_statistics, gd_step, sam_step
from samlib.optim import EPSILON

from .conftest import PROBLEMS, WithBatchNorm, problem


def training(model, optimizer, steps=5, seed=0, batches=1):
    """A few steps on random regression data; gradients accumulate over ``batches`` micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 2, generator=generator, dtype=torch.float64)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            losses = []
            for part, target in zip(x.chunk(batches), y.chunk(batches), strict=True):
                loss = (model(part) - target).square().mean() / batches
                loss.backward()
                losses.append(loss.detach())
            return sum(losses)

        optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def test_one_step_by_hand():
    # ℓ(w) = ½ Σ aᵢ wᵢ², so every gradient is a·w.
    a, w = torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    eta, rho = 0.1, 0.5
    g = a * w
    norm = (9.0 + 4.0) ** 0.5
    expected = w - eta * a * (w + rho * g / (norm + EPSILON))
    torch.testing.assert_close(sam_step(lambda w: a * w, w, eta, rho), expected, rtol=1e-15, atol=0)
    p = nn.Parameter(w.clone())
    optimizer = SAM([p], rho=rho, lr=eta)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (a * p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(0.5 * (3 + 4))
    torch.testing.assert_close(p.detach(), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_optimizer_and_the_pure_step_agree(name):
    objective, params = problem(name)
    torch.nn.utils.vector_to_parameters(params.clone(), objective.model.parameters())
    optimizer = SAM(objective.model.parameters(), rho=0.2, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = objective.loss(objective.model(objective.inputs), objective.targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        params = sam_step(objective.gradient, params, 0.1, 0.2)
    after = torch.cat([p.detach().reshape(-1) for p in objective.model.parameters()])
    torch.testing.assert_close(after, params)


@pytest.mark.parametrize(
    ("base", "settings"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.01}), (torch.optim.AdamW, {})],
)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(base, settings):
    first, second = network(), network()
    plain = training(first, base(first.parameters(), **settings))
    sam = training(second, SAM(second.parameters(), base, rho=0.0, **settings))
    assert torch.equal(plain, sam)


def test_pure_step_with_rho_zero_is_gradient_descent():
    objective, params = problem("mlp")
    assert torch.equal(sam_step(objective.gradient, params, 0.3, 0.0), gd_step(objective.gradient, params, 0.3))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_state_dict_round_trip_keeps_the_base_optimizers_state(base):
    settings = {"lr": 0.05} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    model = network()
    optimizer = SAM(model.parameters(), base, rho=0.1, **settings)
    training(model, optimizer, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    straight = training(model, optimizer, steps=2, seed=1)

    model = network(seed=9)
    model.load_state_dict(saved[0])
    optimizer = SAM(model.parameters(), base, rho=0.7, lr=9.0)
    optimizer.load_state_dict(saved[1])
    assert optimizer.param_groups[0]["rho"] == 0.1
    assert torch.equal(training(model, optimizer, steps=2, seed=1), straight)


def test_copies_and_plain_states():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
    training(model, optimizer, steps=2)
    both = copy.deepcopy((model, optimizer))
    assert torch.equal(training(*both), training(model, optimizer))
    plain = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.3
    training(model, optimizer, steps=1)
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": -1.0})
    assert len(optimizer.param_groups) == 1


def test_a_group_that_maximizes_is_perturbed_downhill():
    p = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = SAM([p], rho=0.5, lr=0.1, maximize=True)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(p.item())
        (0.5 * p * p).sum().backward()

    optimizer.step(closure)
    assert seen[1] == pytest.approx(3 - 0.5 * 3 / (3 + EPSILON))


def test_schedulers_drive_the_base_optimizer():
    model = network()
    optimizer = SAM(model.parameters(), rho=0.1, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    training(model, optimizer, steps=1)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.25


def test_accumulating_micro_batches_in_the_closure_equals_one_large_batch():
    first, second = network(), network()
    whole = training(first, SAM(first.parameters(), rho=0.1, lr=0.1))
    parts = training(second, SAM(second.parameters(), rho=0.1, lr=0.1), batches=4)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-14)


def test_weights_return_bit_for_bit_even_if_the_closure_fails():
    model = network()
    optimizer = SAM(model.parameters(), rho=1e6, lr=0.0)
    before = copy.deepcopy(model.state_dict())
    training(model, optimizer, steps=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def failing():
        if optimizer.perturbed:
            raise RuntimeError("out of memory")
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert not optimizer.perturbed
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_groups_have_their_own_rho_and_share_one_norm():
    p, q = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (3.0, 4.0))
    optimizer = SAM([{"params": [p]}, {"params": [q], "rho": 0.0}], rho=0.5, lr=0.1)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append((p.item(), q.item()))
        (0.5 * (p * p + q * q)).sum().backward()

    optimizer.step(closure)
    assert seen[1][0] == pytest.approx(3 + 0.5 * 3 / (5 + EPSILON), rel=1e-14)
    assert seen[1][1] == 4.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, dtype=torch.float64))]})
    assert optimizer.base_optimizer.param_groups[2]["rho"] == 0.5


def test_batch_statistics_move_twice_unless_frozen():
    def run(freeze):
        torch.manual_seed(0)
        model = WithBatchNorm().double()
        optimizer = SAM(model.parameters(), rho=0.5, lr=0.0)
        x = torch.randn(16, 3, dtype=torch.float64)

        def closure():
            optimizer.zero_grad()
            with frozen_batch_statistics(model, freeze and optimizer.perturbed):
                loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return model[1].num_batches_tracked.item(), model[1].running_mean.clone()

    torch.manual_seed(0)
    reference = WithBatchNorm().double()
    reference(torch.randn(16, 3, dtype=torch.float64))
    assert run(freeze=False)[0] == 2
    count, mean = run(freeze=True)
    assert count == 1
    assert torch.equal(mean, reference[1].running_mean)


def test_misuse_is_explained():
    model = network()
    with pytest.raises(TypeError, match=r"SAM\.step needs a closure that zeroes the gradients"):
        SAM(model.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match="rho must be a non-negative finite number, got -1"):
        SAM(model.parameters(), rho=-1, lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        SAM([{"params": model.parameters(), "rho": float("nan")}], lr=0.1)
