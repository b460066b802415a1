"""SAM in two processes, by the recipe in its docstring: against one process, and against the arithmetic by hand."""

from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn

from samlib import SAM
from samlib.optim import EPSILON

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")

RHO, RATE, STEPS = 0.5, 0.3, 5
VARIANTS = {"sam": {}, "adaptive": {"adaptive": True}, "cached": {"every": 2, "beta": 0.9}}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 2))


def train(model, optimizer, x, y, context=nullcontext):
    for _ in range(STEPS):

        def closure():
            optimizer.zero_grad()
            with nullcontext() if optimizer.perturbed else context():
                loss = (model(x) - y).square().mean()
                loss.backward()
            return loss

        optimizer.step(closure)


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y = (t.chunk(2)[rank] for t in data())
    weights = {}
    for name, settings in VARIANTS.items():
        model = nn.parallel.DistributedDataParallel(network())
        train(model, SAM(model.parameters(), rho=RHO, lr=RATE, **settings), x, y)
        weights[name] = [p.detach() for p in model.parameters()]

        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        sharded = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
        train(sharded, SAM(sharded.parameters(), rho=RHO, lr=RATE, **settings), x, y)
        weights[f"{name}, sharded"] = [p.detach().full_tensor() for p in sharded.parameters()]
    model = nn.parallel.DistributedDataParallel(network())
    train(model, SAM(model.parameters(), rho=RHO, lr=RATE), x, y, model.no_sync)
    weights["own"] = [p.detach() for p in model.parameters()]
    torch.save(weights, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def perturbed_by_ones_own():
    """Each half of the data perturbs by its own gradient; the step takes the mean of the two that follow."""
    model = network()
    weights = list(model.parameters())
    halves = list(zip(*(t.chunk(2) for t in data()), strict=True))

    def gradient(at, x, y):
        with torch.no_grad():
            for p, value in zip(weights, at, strict=True):
                p.copy_(value)
        return torch.autograd.grad((model(x) - y).square().mean(), weights)

    w = [p.detach().clone() for p in weights]
    for _ in range(STEPS):
        steps = []
        for half in halves:
            grads = gradient(w, *half)
            length = sum(float(g.square().sum()) for g in grads) ** 0.5 + EPSILON
            steps.append(gradient([p + RHO / length * g for p, g in zip(w, grads, strict=True)], *half))
        w = [p - RATE * (g + h) / 2 for p, g, h in zip(w, *steps, strict=True)]
    return w


def test_two_processes_take_the_path_of_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = {"own": perturbed_by_ones_own()}
    for name, settings in VARIANTS.items():
        model = network()
        train(model, SAM(model.parameters(), rho=RHO, lr=RATE, **settings), *data())
        expected[name] = expected[f"{name}, sharded"] = [p.detach() for p in model.parameters()]
    for name, weights in expected.items():
        for a, b, p in zip(first[name], second[name], weights, strict=True):
            assert torch.equal(a, b), name
            torch.testing.assert_close(a, p, rtol=1e-10, atol=1e-12, msg=name)
    assert not torch.allclose(expected["own"][0], expected["sam"][0], rtol=1e-3)
