"""The monitor in two and three processes: against one process, and when one of them fails or dies."""

import os
import signal
import time
from itertools import pairwise

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy, mse_loss

from samlib import SAM, EdgeMonitor

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")

EXAMPLES = 23


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def examples(share=slice(None)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (EXAMPLES,), generator=generator)
    labels[4:15] = -100  # ignored by the cross-entropy: shares are not those of the examples
    return x[share], y[share], labels[share]


def weighted(outputs, labels):
    return cross_entropy(outputs, labels, torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64))


def summed(outputs, targets):
    return (outputs - targets).square().sum()


def rows(share=slice(None), group=None, wrap=lambda model: model):
    """Each situation's row, and its eigenvectors."""
    x, y, labels = examples(share)
    found = {}
    situations = (("mean", "sam", mse_loss, y), ("mean", "adam", mse_loss, y))
    situations += (("weighted", "batches", weighted, labels), ("weighted", "sgd", weighted, labels))
    for name, kind, loss, targets in (*situations, ("sum", "sam", summed, y)):
        model = wrap(network())
        if kind == "sam":
            optimizer = SAM(model.parameters(), rho=0.2, lr=0.1)
        elif kind == "adam":
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = kind == "batches"
        data = [(x[:3], targets[:3]), (x[3:], targets[3:])] if batches else (x, targets)
        monitor = EdgeMonitor(model, loss, data, optimizer, tol=1e-8, group=group, max_basis=8 if batches else None)
        found[f"{name}, {kind}"] = {**monitor.measure()}, monitor.eigen.vectors
    return found


def shares(count):
    bounds = {2: [0, 5, EXAMPLES], 3: [0, 4, 19, EXAMPLES]}[count]
    return [slice(*pair) for pair in pairwise(bounds)]


def join(rank, count, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)


def measures(rank, count, folder):
    join(rank, count, folder)
    found = rows(shares(count)[rank], distributed.group.WORLD, nn.parallel.DistributedDataParallel)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_processes_with_unequal_shares_measure_what_one_does(count, tmp_path):
    multiprocessing.spawn(measures, (count, str(tmp_path)), count)
    whole = rows()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count)]
    for name, (expected, vectors) in whole.items():
        row, theirs = found[0][name]
        assert all(other[name][0] == row for other in found)
        assert all(torch.equal(other[name][1], theirs) for other in found)
        assert row.keys() == expected.keys()
        for column in expected.keys() - {"matvecs", "gap"}:
            if column.endswith("residual"):
                continue
            if column == "smallest_eigenvalue":  # known only roughly
                within = row["smallest_residual"] + expected["smallest_residual"]
                assert abs(row[column] - expected[column]) <= within, name
            else:
                assert row[column] == pytest.approx(expected[column], rel=1e-6, abs=1e-9), (name, column)
        assert torch.allclose(theirs[:, 0].abs(), vectors[:, 0].abs(), atol=1e-5)


class Breaks(nn.Module):
    """Fails, or kills its process, at its n-th evaluation."""

    def __init__(self, model, after, how):
        super().__init__()
        self.model, self.left, self.how = model, after, how

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a bad batch")
        return self.model(x)


def breaks(rank, count, folder, victim, how, after):
    join(rank, count, folder)
    x, y, _ = examples(shares(count)[rank])
    model = Breaks(network(), after if rank == victim else -1, how)
    said = "nothing"
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = EdgeMonitor(
            model, mse_loss, (x, y), optimizer, retain_graph=False, tol=1e-10, group=distributed.group.WORLD
        )
        for _ in range(3):
            monitor.measure()
    except RuntimeError as error:
        said = str(error)
    with open(f"{folder}/{rank}.txt", "w", encoding="utf-8") as file:
        file.write(said)
    os._exit(0)


def run(folder, count, victim, how, after):
    """What each process says in the end, and how long it took."""
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    arguments = (count, str(folder), victim, how, after)
    processes = [context.Process(target=breaks, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, started + 90 - time.monotonic()))
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "a process hangs"
    return {
        rank: path.read_text(encoding="utf-8") for rank in range(count) if (path := folder / f"{rank}.txt").exists()
    }


@pytest.mark.parametrize("after", [1, 9])
@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_in_one_process_is_an_error_in_all(victim, after, tmp_path):
    said = run(tmp_path, 2, victim, "fails", after)
    assert "a bad batch" in said[victim]
    assert f"process {victim} failed: RuntimeError: a bad batch" in said[1 - victim]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_dies_ends_the_others_with_an_error(victim, tmp_path):
    said = run(tmp_path, 3, victim, "dies", 9)
    assert victim not in said
    assert len(said) == 2
    assert all(text != "nothing" for text in said.values())


def differ(rank, count, folder):
    join(rank, count, folder)
    model = network()
    if rank:
        nn.init.ones_(model[0].weight)
    x, y, _ = examples(shares(count)[rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = EdgeMonitor(model, mse_loss, (x, y), optimizer, group=distributed.group.WORLD)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"process 1 (failed: ValueError: process 1 )?holds other weights"
    ):
        monitor.measure()
    distributed.barrier()
    distributed.destroy_process_group()


def test_processes_with_other_weights_are_told(tmp_path):
    multiprocessing.spawn(differ, (2, str(tmp_path)), 2)
