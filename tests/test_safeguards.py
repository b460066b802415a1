"""What surrounds a SAM step: contexts, precisions, scalers, gradients from before, base optimizers, hooks."""

import copy
import functools
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samlib import SAM, frozen_batch_statistics
from samlib.optim import EPSILON

from .conftest import WithBatchNorm
from .test_optim import ALL, network, training

WITH_BASE = {**ALL, "rho 0": {"rho": 0.0}}


def single(seed=0, sizes=(8, 32, 1)):
    """A net in float32 with data: (model, x, y)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))
    return model, torch.randn(64, sizes[0]), torch.randn(64, sizes[-1])


def values(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# Contexts of the caller's


def in_double():
    class Default:
        def __enter__(self):
            torch.set_default_dtype(torch.float64)

        def __exit__(self, *_):
            torch.set_default_dtype(torch.float32)

    return Default()


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default float64": in_double,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16 without cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "float16": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("variant", WITH_BASE)
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_do_not_leak_in(context, variant):
    """Steps inside of a context are those whose forward passes alone are inside; outside of it training goes on."""
    cast = CONTEXTS[context] if "float16" in context else nullcontext

    def run(around, within):
        model, x, y = single()
        optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.05, **{"rho": 0.5, **WITH_BASE[variant]})
        losses = []

        def closure():
            optimizer.zero_grad()
            with within():
                loss = nn.functional.mse_loss(model(x).float(), y)
            loss.backward()
            losses.append(loss.item())
            return loss

        with around():
            for _ in range(4):
                optimizer.step(closure)
        within = nullcontext
        optimizer.step(closure)
        return values(model), losses

    inside, losses = run(CONTEXTS[context], nullcontext)
    outside, expected = run(nullcontext, cast)
    assert losses == expected
    assert torch.equal(inside, outside)
    assert abs(losses[1] - losses[0]) > 0.02


@pytest.mark.parametrize("variant", ALL)
def test_two_calls_inside_of_autocast(variant):
    def run(around, within):
        model, x, y = single()
        optimizer = SAM(model.parameters(), rho=0.5, lr=0.05, **ALL[variant])

        def backward():
            with within():
                loss = nn.functional.mse_loss(model(x).float(), y)
            loss.backward()

        with around():
            for _ in range(4):
                backward()
                optimizer.first_step(zero_grad=True)
                backward()
                optimizer.second_step(zero_grad=True)
        return values(model)

    cast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    assert torch.equal(run(cast, nullcontext), run(nullcontext, cast))


# Precision


def moved(p, slope, **settings):
    """Where the second gradient is taken, for a gradient given."""
    optimizer, seen = SAM([p], lr=0.0, **settings), []

    def closure():
        seen.append(p.detach().clone())
        p.grad = slope.clone()

    optimizer.step(closure)
    return seen[1]


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    exponent=st.integers(-40, 37),
    size=st.integers(1, 50),
    variant=st.sampled_from(["sam", "adaptive"]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=200)
@pytest.mark.filterwarnings("ignore:SAM's perturbation is lost")
def test_gradients_of_any_size_move_the_weights_by_rho(dtype, exponent, size, variant, seed):
    """Also where squares overflow or vanish in the gradient's own type: as float64 has it, up to one rounding."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.finfo(dtype).max
    p, slope = torch.randn(2, size, generator=generator, dtype=torch.float64)
    p, slope = p.to(dtype), (slope * 10.0**exponent).clamp(-limit, limit).to(dtype)
    w, g = p.double(), slope.double()
    t = w.abs() + 0.01 if variant == "adaptive" else torch.ones_like(w)
    expected = w + 0.5 * t * t * g / ((t * g).norm() + EPSILON)
    where = moved(nn.Parameter(p), slope, rho=0.5, **ALL[variant])
    assert where.dtype == dtype
    # float32 carries the sum of the half types; its own last places are those of the norm and of two products.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(where.double(), expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", ALL)
def test_a_zero_gradient_changes_nothing(dtype, variant):
    p = nn.Parameter(torch.linspace(-3, 3, 9).to(dtype))
    before = p.detach().clone()
    optimizer = SAM([p], rho=0.05, lr=0.1, momentum=0.9, **ALL[variant])

    def closure():
        p.grad = torch.zeros_like(p)

    for _ in range(5):
        optimizer.step(closure)
    assert torch.equal(p, before)


def test_weights_too_coarse_to_move_are_told_once():
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    fine = nn.Parameter(torch.ones(1000))
    optimizer = SAM([p, fine], rho=0.05, lr=0.0)

    def closure():
        optimizer.zero_grad()
        (p.sum(dtype=torch.float32) + fine.sum()).backward()

    with pytest.warns(
        UserWarning, match=r"lost to rounding: the bfloat16 parameters moved by 0 instead of 0\.035"
    ) as said:
        optimizer.step(closure)
    assert len(said) == 1
    for _ in range(3):
        optimizer.step(closure)
    _, other = pickle.loads(pickle.dumps((p, optimizer)))
    assert other._told


def test_weights_that_grow_too_coarse_are_told_later():
    p = nn.Parameter(torch.full((100,), 1e-3, dtype=torch.bfloat16))
    optimizer = SAM([p], rho=0.05, lr=0.0)

    def closure():
        optimizer.zero_grad()
        p.sum(dtype=torch.float32).backward()

    for _ in range(10):
        optimizer.step(closure)
    with torch.no_grad():
        p.fill_(100)

    def more():
        for _ in range(10):
            optimizer.step(closure)

    with pytest.warns(UserWarning, match="lost to rounding"):
        more()


@pytest.mark.parametrize(
    ("weights", "rho", "slope"),
    [
        (torch.ones(1000, dtype=torch.bfloat16), 5.0, 1.0),
        (torch.ones(1000, dtype=torch.bfloat16), 0.05, 0.0),
        (torch.full((1000,), 1e-3, dtype=torch.float16), 0.05, 1e-7),
        (torch.full((1000,), 100.0), 0.05, 1.0),
    ],
)
def test_weights_that_move_are_not_spoken_of(weights, rho, slope):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved(nn.Parameter(weights), torch.full_like(weights, slope), rho=rho)


def test_float32_weights_can_be_too_coarse_as_well():
    with pytest.warns(UserWarning, match="the float32 parameters moved by 0 instead of"):
        moved(nn.Parameter(torch.ones(1000)), torch.ones(1000), rho=1e-7)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_are_the_dense_ones(base, variant):
    """Indices that occur twice in a batch included: their gradient is a sum."""

    def run(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)).double()
        optimizer = SAM(model.parameters(), base, rho=0.3, lr=0.5, **ALL[variant])
        x, y = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 1, 0, 1])

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        return values(model)

    torch.testing.assert_close(run(True), run(False), rtol=1e-10, atol=1e-12)


# GradScaler


def scaled_run(how, steps=6, scale=2.0**10, overflow=(), **more):
    """Parameters, optimizer, model and scaler after steps with a scaled loss; the scale is a power of two, so exact."""
    torch.manual_seed(0)
    model = WithBatchNorm().double()
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.05, **{"rho": 0.3, **more})
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=how != "disabled")
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (3, 2))

        def backward(x=x, y=y, step=step):
            with frozen_batch_statistics(model, optimizer.repeated):
                loss = (model(x) - y).square().mean()
            at = 1 if optimizer.perturbed else 0
            factor = float("inf") if (step, at) in overflow else 1
            (loss * factor if how == "plain" else scaler.scale(loss) * factor).backward()
            return loss

        def closure(backward=backward):
            optimizer.zero_grad()
            loss = backward()
            if how == "divide":
                for p in model.parameters():
                    p.grad.div_(scaler.get_scale())
            return loss

        if how in ("plain", "divide"):
            optimizer.step(closure)
            continue
        if how == "two calls":
            if optimizer.needs_gradient:
                backward()
            optimizer.first_step(zero_grad=True, scaler=scaler)
            backward()
            optimizer.second_step(zero_grad=True, scaler=scaler)
        else:
            optimizer.step(closure, scaler=scaler)
        scaler.update()
    return values(model), optimizer, model, scaler


@pytest.mark.parametrize("how", ["scaler", "two calls", "divide", "disabled"])
@pytest.mark.parametrize("variant", WITH_BASE)
def test_a_scaled_loss_gives_the_unscaled_step(variant, how):
    straight = scaled_run("plain", **WITH_BASE[variant])[0]
    torch.testing.assert_close(scaled_run(how, **WITH_BASE[variant])[0], straight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", ["scaler", "two calls"])
@pytest.mark.parametrize(
    ("variant", "step", "at"),
    [
        (variant, step, at)
        for variant, settings in ALL.items()
        for step in (0, 1, 3)
        for at in (0, 1)
        if at or step % settings.get("every", 1) == 0  # else there is no gradient at w
    ],
)
def test_a_step_that_overflows_is_skipped(variant, step, at, how):
    """Weights, base state, direction and running statistics are those of a run that never took it."""
    before = scaled_run(how, steps=step, **ALL[variant])
    after = scaled_run(how, steps=step + 1, overflow={(step, at)}, **ALL[variant])
    assert torch.equal(before[0], after[0])
    assert after[3].get_scale() == 2.0**9
    states = (run[1].state_dict()["state"] for run in (before, after))
    for a, b in zip(*(s.values() for s in states), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert after[1].param_groups[0]["age"] == before[1].param_groups[0]["age"]
    assert all(t.isfinite().all() for t in after[2].buffers())
    # Training goes on.
    more = scaled_run(how, steps=step + 4, overflow={(step, at)}, **ALL[variant])
    assert more[0].isfinite().all()
    assert not torch.equal(more[0], after[0])


def test_an_infinite_perturbation_is_not_tried():
    """Also without the recipe for BatchNorm its statistics stay finite."""
    model = WithBatchNorm()
    optimizer = SAM(model.parameters(), rho=0.3, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    x, overflows = torch.randn(8, 3), True

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        scaler.scale(loss * (math.inf if overflows else 1)).backward()
        return loss

    for overflows in (True, False):
        optimizer.step(closure, scaler=scaler)
        scaler.update()
        assert optimizer.evaluations == (1 if overflows else 2)
        assert all(b.isfinite().all() for b in model.buffers())


def test_the_recipe_for_float16_trains_and_clips():
    """The documented lines with a real float16 forward pass: near the float32 run, also with the step clipped."""

    def run(half):
        model, x, y = single()
        optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=half)

        def clip(*_):
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)

        optimizer.base_optimizer.register_step_pre_hook(clip)

        def closure():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            return loss

        losses = []
        for _ in range(60):
            losses.append(optimizer.step(closure, scaler=scaler).item())
            scaler.update()
            assert float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) <= 0.5001 or half
        return losses, scaler.get_scale()

    (half, scale), (full, _) = run(True), run(False)
    skipped = round(24 - math.log2(scale))
    assert skipped > 2
    assert half[0] == half[skipped]  # it overflowed at first, and changed nothing
    assert half[skipped : skipped + 20] == pytest.approx(full[:20], rel=0.01)
    assert half[-1] < 0.6 * half[0]


# Gradients from before


def micro(model, optimizer, x, y, zero):
    def closure():
        if zero:
            zero()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("variant", WITH_BASE)
def test_gradients_accumulated_before_the_step_are_refused(variant):
    model, x, y = single()
    optimizer = SAM(model.parameters(), lr=0.1, **{"rho": 0.5, **WITH_BASE[variant]})
    before = values(model)
    (model(x[:32]) - y[:32]).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"added to gradients from before\. Zero them first"):
        optimizer.step(micro(model, optimizer, x[32:], y[32:], None))
    assert torch.equal(values(model), before)
    assert not any(p._backward_hooks for p in model.parameters())
    # The step can be taken after all.
    optimizer.step(micro(model, optimizer, x, y, optimizer.zero_grad))
    assert not torch.equal(values(model), before)


def test_a_closure_that_never_zeroes_is_refused_at_the_second_step():
    model, x, y = single()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    closure = micro(model, optimizer, x, y, None)
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="added to gradients"):
        optimizer.step(closure)


@pytest.mark.parametrize("variant", WITH_BASE)
def test_every_way_of_zeroing_is_the_same(variant):
    def run(zero_inside, zero_after):
        model, x, y = single()
        optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.01, **{"rho": 0.5, **WITH_BASE[variant]})
        zero = {
            None: None,
            "none": optimizer.zero_grad,
            "zero": lambda: optimizer.zero_grad(set_to_none=False),
            "model": model.zero_grad,
        }
        for step in range(6):
            if step == 3:  # a gradient of something else, which a closure that zeroes drops
                model(x).sum().backward()
                if zero_after:
                    optimizer.zero_grad()
            optimizer.step(micro(model, optimizer, x, y, zero[zero_inside]))
            if zero_after:
                optimizer.zero_grad()
        return values(model)

    straight = run("none", False)
    for inside, after in (("zero", False), ("model", False), (None, True), ("none", True), ("zero", True)):
        assert torch.equal(run(inside, after), straight), (inside, after)


def test_two_calls_without_zeroing_in_between_are_refused():
    model, x, y = single()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    before = values(model)
    closure = micro(model, optimizer, x, y, None)
    closure()
    optimizer.first_step()
    closure()
    with pytest.raises(RuntimeError, match="added to gradients"):
        optimizer.second_step()
    assert torch.equal(values(model), before)
    assert not optimizer.perturbed
    # In any way of one's own it is fine.
    for zero in (model.zero_grad, lambda: optimizer.zero_grad(set_to_none=False)):
        zero()
        closure()
        optimizer.first_step()
        zero()
        closure()
        optimizer.second_step()


def test_gradients_that_nothing_adds_to_may_stay():
    """Those of frozen parameters, or of ones that the closure's loss does not use."""
    model, x, y = single()
    unused = nn.Parameter(torch.ones(3))
    optimizer = SAM([*model.parameters(), unused], rho=0.5, lr=0.1)
    unused.sum().backward()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].weight.requires_grad_(False)

    def closure():
        for p in (model[0].bias, *model[2].parameters()):
            p.grad = None
        (model(x) - y).square().mean().backward()

    optimizer.step(closure)
    optimizer.step(closure)


# Base optimizers


class Crowded(torch.optim.Optimizer):
    """A base whose settings have most of SAM's names, and that changes one."""

    def __init__(self, params, lr=0.1, rho=0.9, beta=0.5, every="minute", age=3):
        super().__init__(params, {"lr": lr, "rho": rho, "beta": beta, "every": every, "age": age})

    @torch.no_grad()
    def step(self, closure=None):
        if closure:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            assert group["every"] == "minute"
            assert len(list(group)) == len(group) >= 6
            group["age"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                    buffer.mul_(group["beta"]).add_(p.grad)
                    p.sub_(group["lr"] * group["rho"] * buffer / group["age"])


@pytest.mark.parametrize(
    ("base", "own"),
    [(torch.optim.Adadelta, {"rho": 0.8, "lr": 1.0}), (Crowded, {"rho": 0.7, "beta": 0.4, "age": 2})],
)
def test_settings_of_the_same_name_are_kept_apart(base, own):
    """At ρ = 0 the base bit for bit; at ρ > 0 both values act; a state goes on bit for bit, also after a copy."""
    kind = functools.partial(base, **own)

    def fresh(model, rho):
        return SAM(model.parameters(), kind, rho=rho, every=2, beta=0.9)

    first, second = network(), network()
    plain, sam = kind(first.parameters()), fresh(second, 0.0)
    assert torch.equal(training(first, plain), training(second, sam))
    assert sam.base_optimizer.param_groups[0]["rho"] == own["rho"]
    assert sam.param_groups[0]["rho"] == 0.0

    model = network()
    optimizer = fresh(model, 0.3)
    training(model, optimizer, steps=3)
    assert optimizer.evaluations == 2
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    loaded = network()
    loaded.load_state_dict(model.state_dict())
    other = SAM(loaded.parameters(), base, rho=9.0)
    other.load_state_dict(optimizer.state_dict())
    straight = training(model, optimizer, steps=3, seed=1)
    for one in (*copies, (loaded, other)):
        assert torch.equal(training(*one, steps=3, seed=1), straight)
        assert one[1].param_groups[0]["rho"] == 0.3
        assert one[1].base_optimizer.param_groups[0]["rho"] == own["rho"]
        assert one[1].param_groups[0]["age"] == 0

    # What is not contested is shared, both ways; schedulers and new groups reach the base.
    torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.param_groups[0]["lr"] = 0.125
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.125
    optimizer.base_optimizer.param_groups[0]["lr"] = 0.25
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.01})
    assert optimizer.param_groups[1]["rho"] == 0.01
    assert optimizer.base_optimizer.param_groups[1]["rho"] == own["rho"]

    # A plain optimizer's state has the base's value under the name.
    optimizer = fresh(model, 0.3)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.3
    assert optimizer.base_optimizer.param_groups[0]["rho"] == own["rho"]


def test_a_base_optimizer_with_a_closure_of_its_own_is_refused():
    with pytest.raises(ValueError, match="LBFGS evaluates a closure itself"):
        SAM([nn.Parameter(torch.zeros(2))], torch.optim.LBFGS, lr=0.1)


def test_groups_of_named_parameters():
    model = network()
    optimizer = SAM(model.named_parameters(), rho=0.1, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    training(model, optimizer)


# Hooks


def test_hooks_run_as_for_every_optimizer():
    p = nn.Parameter(torch.ones(2))
    optimizer, log = SAM([p], rho=0.05, lr=0.1, momentum=0.9), []

    def says(what):
        def hook(*_):
            log.append(what)

        return hook

    def halves(_, state):
        log.append("load")
        return {**state, "param_groups": [{**g, "lr": g["lr"] / 2} for g in state["param_groups"]]}

    optimizer.register_step_pre_hook(says("before"))
    optimizer.register_step_post_hook(says("after"))
    optimizer.base_optimizer.register_step_pre_hook(says("base"))
    optimizer.register_state_dict_pre_hook(says("state"))
    optimizer.register_load_state_dict_pre_hook(halves)
    optimizer.register_load_state_dict_post_hook(says("loaded"))
    optimizer.base_optimizer.register_load_state_dict_post_hook(says("base loaded"))

    def closure():
        log.append("closure")
        p.grad = torch.ones_like(p)

    optimizer.step(closure)
    assert log == ["before", "closure", "closure", "base", "after"]
    log.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert log == ["state", "load", "base loaded", "loaded"]
    assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == 0.05
