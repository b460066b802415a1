"""The monitor: against the laboratory, against dense Hessians, and against a training without it."""

import copy
import csv
import json
import math
import random
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from samlib import SAM, EdgeMonitor, edge_law, sam_edge
from samlib.edges_cached import previous_gradient_edge
from samlib.eigen import extreme_eigenpairs
from samlib.experiments.task import Task
from samlib.lanczos import lanczos_ends
from samlib.observables import measure
from samlib.optim import EPSILON

from .conftest import ROOT, small_config, small_language_config, wraps_for_compiler

SGD, Adam = torch.optim.SGD, torch.optim.Adam


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def small_data(n=12):
    return numbers(n, 4), numbers(n, 3, seed=1)


def closing(model, optimizer, x, y):
    """The closure that an optimizer steps with."""

    def closure():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def dense_hessian(model, loss, inputs, targets, parameters):
    """∂²ℓ/∂w², and the gradient, of the module as it stands, one row at a time."""
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(model(inputs), targets)
        grads = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = []
        for i in range(len(flat)):
            row = torch.autograd.grad(flat[i], parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows).detach(), flat.detach()


EXPERIMENTS = {
    "mnist": small_config,
    "cifar10": lambda **more: small_config(experiment="cifar10", width=4, examples=40, **more),
    "shakespeare": small_language_config,
}


@pytest.mark.parametrize(("rho", "momentum"), [(0.1, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_row_is_that_of_the_laboratory(name, rho, momentum):
    settings = {"learning_rate": 0.05, "rho": rho, "momentum": momentum, "eigenvalues": 2}
    task = Task(EXPERIMENTS[name](**settings))
    objective, w = task.measured(1), task.initial_parameters()
    expected = measure(task, w, step=1, objective=objective)
    model = copy.deepcopy(task.model)
    nn.utils.vector_to_parameters(w, model.parameters())
    optimizer = SAM(model.parameters(), SGD, rho=rho, lr=0.05, momentum=momentum)
    row = EdgeMonitor(
        model, task.loss, (objective.inputs, objective.targets), optimizer, eigenvalues=2, tol=task.config.tolerance
    ).measure()
    assert row.keys() - {"sharpness", "sharpness_residual"} == expected.keys()
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=1e-5), column
    assert row["sharpness"] == row["eigenvalue_1"]
    assert row["edge_ratio"] == pytest.approx(row["operator_norm"] / row["edge"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.there, self.back = nn.Linear(4, 4), nn.Linear(4, 4)
        self.back.weight = self.there.weight

    def forward(self, x):
        return self.back(self.there(x).tanh())


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return {"hidden": hidden, "out": self.head(hidden)}


class Reader(nn.Module):
    """Tokens, embedded, read by a layer, then the mean over positions."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)
        if kind == "rnn":
            self.rnn = nn.RNN(4, 4, batch_first=True)
        elif kind == "attention":
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.kind == "rnn":
            x = self.rnn(x)[0]
        elif self.kind == "attention":
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1).tanh())


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def tokens():
    return torch.randint(0, 6, (12, 5), generator=torch.Generator().manual_seed(2)), torch.arange(12) % 3


SITUATIONS = {
    "plain": (mlp, mse_loss, small_data),
    "frozen": (frozen, mse_loss, small_data),
    "tied": (lambda: seeded(Tied), mse_loss, lambda: (numbers(12, 4), numbers(12, 4, seed=1))),
    "dict": (lambda: seeded(Dictionary), lambda out, y: mse_loss(out["out"], y), small_data),
    "embedding": (lambda: seeded(lambda: Reader("none")), cross_entropy, tokens),
    "rnn": (lambda: seeded(lambda: Reader("rnn")), cross_entropy, tokens),
    "attention": (lambda: seeded(lambda: Reader("attention")), cross_entropy, tokens),
}


@pytest.mark.parametrize("basis", [None, 6])
@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_row_is_that_of_the_dense_hessian(situation, batches, basis):
    make, loss, examples = SITUATIONS[situation]
    model, (x, y) = make(), examples()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(trained, lr=0.1, momentum=0.5)
    data = [(x[:7], y[:7]), (x[7:], y[7:])] if batches else (x, y)
    monitor = EdgeMonitor(model, loss, data, optimizer, tol=1e-7, eigenvalues=2, max_basis=basis)
    row = monitor.measure()
    hessian, gradient = dense_hessian(model, loss, x, y, trained)
    values, vectors = torch.linalg.eigh(hessian)
    norm = float(values.abs().max())
    assert row["loss"] == pytest.approx(float(loss(model(x), y).detach()))
    assert row["grad_norm"] == pytest.approx(float(gradient.norm()))
    assert row["sharpness"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert abs(row["eigenvalue_2"] - float(values[-2])) < 1e-6 * norm
    assert float((values - row["smallest_eigenvalue"]).abs().min()) <= row["smallest_residual"] + 1e-12
    assert row["smallest_eigenvalue"] >= float(values[0]) - 1e-12
    assert row["operator_norm"] == pytest.approx(norm, rel=1e-6)
    assert row["sharpness_residual"] <= 1.1e-7 * norm
    assert row["edge"] == pytest.approx(30.0)
    assert row["edge_ratio"] == pytest.approx(norm / 30)
    principal = vectors[:, values.abs().argmax()]
    assert row["grad_alignment"] == pytest.approx(float((gradient @ principal).abs() / gradient.norm()), rel=1e-4)
    assert torch.allclose(monitor.eigen.vectors[:, 0].abs(), vectors[:, -1].abs(), atol=1e-4)


def test_groups_with_rates_of_their_own_and_adam_have_a_geometry():
    model, (x, y) = mlp(), small_data()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    hessian, gradient = dense_hessian(model, mse_loss, x, y, [*first, *last])
    optimizer = SGD([{"params": last, "lr": 0.3}, {"params": first, "lr": 0.1}])  # in another order than the model's
    row = EdgeMonitor(model, mse_loss, (x, y), optimizer, tol=1e-8).measure()
    rates = torch.cat([torch.full((25,), 0.1), torch.full((18,), 0.3)]).double()
    scaled = rates.sqrt()[:, None] * hessian * rates.sqrt()
    assert row["preconditioned_norm"] == pytest.approx(float(torch.linalg.eigvalsh(scaled).abs().max()))
    assert row["edge"] == pytest.approx(2.0)
    assert row["edge_ratio"] == pytest.approx(row["preconditioned_norm"] / 2)
    assert row["gd_edge"] is None
    assert "gd_edge" not in row

    adam = Adam(model.parameters(), lr=0.01)
    monitor = EdgeMonitor(model, mse_loss, (x, y), adam, tol=1e-8)
    assert monitor.measure()["edge"] is None
    for p, g in zip(model.parameters(), gradient.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = g.view_as(p)
    adam.step()
    hessian, gradient = dense_hessian(model, mse_loss, x, y, list(model.parameters()))
    corrected = [s["exp_avg_sq"].reshape(-1) / (1 - 0.999) for s in adam.state.values()]
    root = (torch.cat(corrected).sqrt() + 1e-8).rsqrt()
    row = monitor.measure()
    expected = float(torch.linalg.eigvalsh(root[:, None] * hessian * root).abs().max())
    assert row["preconditioned_norm"] == pytest.approx(expected)
    assert row["edge"] == pytest.approx(38 / 0.01)
    assert row["edge_ratio"] == pytest.approx(expected / 3800)


@pytest.mark.parametrize("names", [["2"], "0.weight", ["0.bias", "2.weight"]])
def test_a_block_has_its_own_spectrum_and_the_edge_of_the_whole_step(names):
    model, (x, y) = mlp(), small_data()
    hessian, gradient = dense_hessian(model, mse_loss, x, y, list(model.parameters()))
    listed = [names] if isinstance(names, str) else names
    inside = torch.cat(
        [
            torch.full((p.numel(),), any(n == m or n.startswith(m + ".") for m in listed))
            for n, p in model.named_parameters()
        ]
    )
    optimizer = SAM(model.parameters(), rho=0.2, lr=0.1)
    row = EdgeMonitor(model, mse_loss, (x, y), optimizer, parameters=names, tol=1e-8).measure()
    values = torch.linalg.eigvalsh(hessian[inside][:, inside])
    assert row["operator_norm"] == pytest.approx(float(values.abs().max()))
    assert row["grad_norm"] == pytest.approx(float(gradient[inside].norm()))
    assert row["edge"] == pytest.approx(sam_edge(float(gradient.norm()) + EPSILON, 0.1, 0.2))
    moved = copy.deepcopy(model)
    step = gradient * 0.2 / (gradient.norm() + EPSILON)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) + step, moved.parameters())
    _, descent = dense_hessian(moved, mse_loss, x, y, list(moved.parameters()))
    assert row["sam_grad_norm"] == pytest.approx(float(descent[inside].norm()))


@pytest.mark.parametrize("settings", [{"normalize": False}, {"adaptive": True}, {"every": 3, "beta": 0.5}])
def test_the_gradient_of_sams_kin_is_the_one_that_they_step_with(settings):
    model, (x, y) = mlp(), small_data()
    optimizer = SAM(model.parameters(), rho=0.3, lr=0.1, **settings)
    row = EdgeMonitor(model, mse_loss, (x, y), optimizer).measure()
    closure = closing(model, optimizer, x, y)
    optimizer.step(closure)
    taken = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    assert row["sam_grad_norm"] == pytest.approx(float(taken.norm()), rel=1e-9)
    assert ("edge" in row) == (not row.reason) == (settings == {"normalize": False})


def test_where_no_law_is_known_the_row_says_why():
    model, data = mlp(), small_data()
    row = EdgeMonitor(model, mse_loss, data, torch.optim.RMSprop(model.parameters())).measure()
    assert row["edge"] is row["edge_ratio"] is None
    assert "no law is known for RMSprop" in row.reason
    assert row["sharpness"] > 0
    with pytest.raises(KeyError):
        row["sharpnes"]
    groups = [{"params": model[0].parameters(), "momentum": 0.5}, {"params": model[2].parameters()}]
    row = EdgeMonitor(model, mse_loss, data, SGD(groups, lr=0.1)).measure()
    assert row["edge"] is None
    assert "differ in momentum" in row.reason
    warming = SGD(model.parameters(), lr=0.0)
    row = EdgeMonitor(model, mse_loss, data, warming).measure()
    assert row["edge"] is None
    assert row.reason


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3)]
    return nn.Sequential(*layers)


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sam": lambda p: SAM(p, SGD, rho=0.05, lr=0.1, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.01),
}


def everything(model, optimizer, loader):
    """All that a training leaves behind, as bytes."""
    own = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    tensors = [*model.state_dict().values(), *own, *(p.grad for p in model.parameters()), torch.get_rng_state()]
    found = [t.numpy().tobytes() for t in tensors]
    modes = [m.training for m in model.modules()]
    return found, modes, random.getstate(), np.random.get_state()[1].tobytes(), loader.generator.get_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_to_the_bit_with_and_without(name, autocast):
    x, y = numbers(24, 1, 6, 6).float(), torch.arange(24) % 3
    ends = []
    for watched in (False, True):
        model = network()
        model[1].eval()  # modes of one's own
        random.seed(0)
        optimizer = OPTIMIZERS[name](model.parameters())
        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True, generator=generator)
        monitor = EdgeMonitor(model, cross_entropy, loader, optimizer) if watched else None
        for epoch in range(2):
            for inputs, targets in loader:

                def closure(model=model, optimizer=optimizer, inputs=inputs, targets=targets):
                    optimizer.zero_grad()
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = cross_entropy(model(inputs), targets)
                    loss.backward()
                    return loss

                optimizer.step(closure)
                if monitor:
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
                        assert monitor.measure()["sharpness"] > 0
            model[1].train(epoch == 0)
        ends.append(everything(model, optimizer, loader))
    assert ends[0] == ends[1]


def test_it_is_measured_in_single_precision_whatever_surrounds_it():
    model, (x, y) = network().eval(), (numbers(9, 1, 6, 6).float(), torch.arange(9) % 3)
    monitor = EdgeMonitor(model, cross_entropy, (x, y), SGD(model.parameters(), lr=0.1), tol=1e-5)
    plain = monitor.measure()["loss"]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert monitor.measure()["loss"] == plain


def test_it_is_warm_from_call_to_call_and_follows_changes_of_the_model():
    model, (x, y) = mlp(), small_data()
    monitor = EdgeMonitor(model, mse_loss, (x, y), SGD(model.parameters(), lr=0.1), tol=1e-6)
    cold = monitor.measure()["matvecs"]
    assert monitor.measure()["matvecs"] < cold
    model[0].requires_grad_(False)
    hessian, _ = dense_hessian(model, mse_loss, x, y, list(model[2].parameters()))
    assert monitor.measure()["sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]))
    model[0].requires_grad_(True)
    with torch.no_grad():
        model[2].weight.mul_(2)
    hessian, _ = dense_hessian(model, mse_loss, x, y, list(model.parameters()))
    assert monitor.measure()["sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]))


@pytest.mark.parametrize("wrap", [pytest.param(torch.compile, marks=wraps_for_compiler), nn.DataParallel])
def test_wrapped_models_are_seen_through(wrap):
    model, (x, y) = mlp(), small_data()
    optimizer = SGD(model.parameters(), lr=0.1)
    plain = EdgeMonitor(model, mse_loss, (x, y), optimizer).measure()
    assert EdgeMonitor(wrap(model), mse_loss, [x, y], optimizer).measure() == plain


def test_parameters_that_the_optimizer_does_not_move_have_no_part_in_the_edge():
    model, (x, y) = mlp(), small_data()
    optimizer = SGD(model[2].parameters(), lr=0.1)
    hessian, _ = dense_hessian(model, mse_loss, x, y, list(model[2].parameters()))
    row = EdgeMonitor(model, mse_loss, (x, y), optimizer, tol=1e-8).measure()
    assert row["preconditioned_norm"] == pytest.approx(float(torch.linalg.eigvalsh(hessian).abs().max()))
    assert row["edge"] == pytest.approx(edge_law(optimizer)())
    sam = SAM(model[2].parameters(), rho=0.1, lr=0.1)
    _, gradient = dense_hessian(model, mse_loss, x, y, list(model[2].parameters()))
    row = EdgeMonitor(model, mse_loss, (x, y), sam).measure()
    assert row["edge"] == pytest.approx(sam_edge(float(gradient.norm()) + EPSILON, 0.1, 0.1))


class Other:
    """Batches that are others on each pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield numbers(4, 4, seed=self.passes), numbers(4, 3)


def unknown(model, x, y):
    return EdgeMonitor(model, mse_loss, (x, y), SGD([nn.Parameter(torch.zeros(2))], lr=0.1))


BAD = {
    "dropout": (lambda m, x, y: as_it_is(nn.Sequential(m, nn.Dropout(0.5)), x, y), ValueError, "Dropout.*model.eval"),
    "batchnorm": (lambda m, x, y: as_it_is(nn.Sequential(m, nn.BatchNorm1d(3).double()), x, y), ValueError, "BatchNor"),
    "not scalar": (lambda m, x, y: watch(m, lambda o, t: (o - t).square(), (x, y)), ValueError, "one real number"),
    "not finite": (lambda m, x, y: watch(m, lambda o, t: (o - t).mean() / 0, (x, y)), ValueError, "finite"),
    "empty": (lambda m, x, y: watch(m, mse_loss, []), ValueError, "no examples"),
    "no examples": (lambda m, x, y: watch(m, mse_loss, (x[:0], y[:0])), ValueError, "at least one"),
    "other data": (lambda m, x, y: watch(m, mse_loss, Other()), ValueError, "other examples on each pass"),
    "read once": (lambda m, x, y: watch(m, mse_loss, iter([(x, y)])), TypeError, "only once"),
    "three": (lambda m, x, y: watch(m, mse_loss, (x, y, y)), TypeError, "a tuple of 3"),
    "frozen": (lambda m, x, y: watch(m.requires_grad_(False), mse_loss, (x, y)), ValueError, "none is trainable"),
    "complex": (lambda m, x, y: watch(m.to(torch.complex64), mse_loss, (x, y)), ValueError, "complex64"),
    "half": (lambda m, x, y: watch(m.bfloat16(), mse_loss, (x, y)), ValueError, "bfloat16.*float"),
    "no optimizer": (lambda m, x, y: EdgeMonitor(m, mse_loss, (x, y), None), TypeError, "torch.optim.Optimizer"),
    "other parameters": (unknown, ValueError, "moves none of the model's parameters"),
    "unknown name": (lambda m, x, y: watch(m, mse_loss, (x, y), parameters=["head"]), ValueError, "'head'"),
    "tol": (lambda m, x, y: watch(m, mse_loss, (x, y), tol=0), ValueError, "tol"),
    "eigenvalues": (lambda m, x, y: watch(m, mse_loss, (x, y), eigenvalues=0), ValueError, "eigenvalues"),
    "basis": (lambda m, x, y: watch(m, mse_loss, (x, y), max_basis=3), ValueError, "max_basis"),
}


def watch(model, loss, data, **options):
    return EdgeMonitor(model, loss, data, SGD(model.parameters(), lr=0.1), **options)


def as_it_is(model, x, y):
    return watch(model, mse_loss, (x, y), evaluation=False)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_named(fault):
    call, kind, message = BAD[fault]
    model, data = mlp().train(), small_data()  # both seed the generator
    state = torch.get_rng_state()
    with pytest.raises(kind, match=f"(?s){message}"):
        call(model, *data)
    assert torch.equal(state, torch.get_rng_state())


def test_what_becomes_random_or_diverges_is_refused_at_the_measurement():
    x, y = small_data()
    model = nn.Sequential(mlp(), nn.Dropout(0.5)).eval()
    monitor = as_it_is(model, x, y)
    assert monitor.measure()["sharpness"] > 0
    model.train()
    with pytest.raises(ValueError, match="Dropout"):
        monitor.measure()
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        model[0][2].weight[0, 0] = math.nan
    model.eval()
    with pytest.raises(FloatingPointError, match="not finite"):
        monitor.measure()


def test_it_is_not_measured_at_sams_perturbed_point():
    model, (x, y) = mlp(), small_data()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    monitor = EdgeMonitor(model, mse_loss, (x, y), optimizer)
    mse_loss(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="perturbed point"):
        monitor.measure()
    mse_loss(model(x), y).backward()
    optimizer.second_step()
    assert monitor.measure()["edge"] > 0


def test_a_row_goes_into_a_table(tmp_path):
    model, data = mlp(), small_data()
    monitor = EdgeMonitor(model, mse_loss, data, SGD(model.parameters(), lr=0.1))
    row = monitor.measure()
    assert all(isinstance(value, int | float) for value in row.values())
    with open(tmp_path / "edge.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, row)
        table.writeheader()
        table.writerow(row)
    with open(tmp_path / "edge.csv", encoding="utf-8") as file:
        assert float(next(csv.DictReader(file))["sharpness"]) == row["sharpness"]


def snippets():
    """The Python blocks in the text of the page on one's own model."""
    page = json.loads((ROOT / "book/own_model.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "markdown")
    return re.findall(r"```python\n(.*?)```", text, re.S)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(conv1=nn.Conv2d(3, 4, 3), act=nn.Tanh(), flat=nn.Flatten(), fc=nn.Linear(4 * 36, 10))
    )


def test_the_pages_snippets_run():
    *plain, lightning = snippets()
    assert len(plain) == 2
    assert "lightning" in lightning
    model, inputs, targets = small_network(), numbers(32, 3, 8, 8).float(), torch.arange(32) % 10
    names = {"model": model, "inputs": inputs, "targets": targets, "EdgeMonitor": EdgeMonitor}
    names |= {"cross_entropy": cross_entropy, "optimizer": SGD(model.parameters(), lr=0.1)}
    for snippet in plain:
        exec(snippet, names)
    with open("edge.csv", encoding="utf-8") as file:
        [line] = csv.DictReader(file)
    assert float(line["edge"]) == pytest.approx(20)
    assert set(names["layers"]) == {"conv1", "fc"}


def test_the_pages_callback_runs_in_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    names = {"EdgeMonitor": EdgeMonitor}
    exec(snippets()[-1], names)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = small_network()

        def forward(self, x):
            return self.network(x)

        def training_step(self, batch, _):
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1)

    data = numbers(32, 3, 8, 8).float(), torch.arange(32) % 10
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_steps=4,
        logger=logger,
        callbacks=[names["AtTheEdge"](cross_entropy, data, every=2)],
        enable_progress_bar=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(Module(), DataLoader(TensorDataset(*data), batch_size=8))
    with open(next(tmp_path.rglob("metrics.csv")), encoding="utf-8") as file:
        assert [float(line["edge"]) for line in csv.DictReader(file)] == pytest.approx([20, 20])


@pytest.mark.parametrize("basis", [4, 6, 9])
@pytest.mark.parametrize("high", [1, 2, 5])
def test_lanczos_finds_both_ends_within_its_bounds(high, basis):
    matrix = numbers(60, 60, seed=high)
    matrix = (matrix + matrix.T) / 2 + torch.diag(torch.linspace(0, 1, 60).double() ** 9 * 40)
    basis = max(basis, high + 3)
    found = lanczos_ends(matrix, high, tol=1e-8, low_tol=1e-8, basis=basis, max_matvecs=2000)
    exact = torch.linalg.eigvalsh(matrix)
    assert found.converged
    assert torch.allclose(found.values, torch.cat([exact[-high:].flip(0), exact[:1]]), rtol=0, atol=1e-8)
    true = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert (true <= found.residuals + 1e-12).all()
    assert (found.residuals <= 1e-8 * exact.abs().max()).all()
    near = matrix + 1e-3 * torch.diag(numbers(60))
    warm = lanczos_ends(near, high, found.model, 1e-3, basis=basis)
    assert warm.matvecs < lanczos_ends(near, high, None, 1e-3, basis=basis).matvecs
    assert float(warm.values[0]) == pytest.approx(float(torch.linalg.eigvalsh(near)[-1]), rel=1e-5)


def test_lanczos_where_the_lower_end_is_the_norm_and_in_invariant_spaces():
    values = torch.tensor([-9.0, -1.0, 0.0, 0.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    turn = torch.linalg.qr(numbers(7, 7)).Q
    found = lanczos_ends(turn * values @ turn.T, tol=1e-10, basis=4)
    assert found.values.tolist() == pytest.approx([3.0, -9.0])
    assert found.residuals[1] <= 1e-9
    assert lanczos_ends(torch.eye(9, dtype=torch.float64)).values.tolist() == pytest.approx([1.0, 1.0])
    assert lanczos_ends(torch.zeros(9, 9, dtype=torch.float64)).values.tolist() == [0.0, 0.0]
    agree = extreme_eigenpairs(turn * values @ turn.T, tol=1e-10)
    assert found.values.tolist() == pytest.approx(agree.values.tolist())


def test_lanczos_says_what_it_cannot_do():
    matrix = numbers(30, 30)
    matrix = matrix + matrix.T
    with pytest.warns(RuntimeWarning, match="not converged after 5 products"):
        assert not lanczos_ends(matrix, tol=1e-9, max_matvecs=5).converged
    with pytest.raises(ValueError, match="basis must be at least"):
        lanczos_ends(matrix, 3, basis=5)
    with pytest.raises(ValueError, match="high must lie between"):
        lanczos_ends(matrix, 31)
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos_ends(matrix * math.nan)


class Tempered(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, outputs, targets):
        return mse_loss(outputs * self.scale.exp(), targets)


def test_what_the_optimizer_steps_by_and_measuring_does_not_see_is_said():
    data = small_data()
    model, loss = mlp(), Tempered()
    row = EdgeMonitor(model, loss, data, SAM([*model.parameters(), *loss.parameters()], lr=0.1)).measure()
    assert row["edge"] is None
    assert "moves 1 parameters that are not the model's" in row.reason
    model = mlp()
    monitor = EdgeMonitor(model, mse_loss, data, SAM(model.parameters(), lr=0.1))
    assert monitor.measure()["edge"] is not None
    handle = model[0].weight.register_hook(lambda g: 0 * g)
    assert "hooks that change their gradients" in monitor.measure().reason
    handle.remove()
    assert monitor.measure().reason == ""


@pytest.mark.parametrize(("every", "beta"), [(1000, 0.0), (3, 1.0), (3, 0.5)])
def test_between_true_gradients_the_row_is_of_the_direction_that_is_held(every, beta):
    x, y = small_data()
    model = mlp()
    optimizer = SAM(model.parameters(), SGD, rho=0.5, lr=0.1, every=every, beta=beta)
    closure = closing(model, optimizer, x, y)
    optimizer.step(closure)
    row = EdgeMonitor(model, mse_loss, (x, y), optimizer).measure()
    optimizer.step(closure)
    descent = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert row["sam_grad_norm"] == pytest.approx(float(descent.norm()), rel=1e-10)
    if beta == 0:
        assert row["edge"] == pytest.approx(previous_gradient_edge(float(descent.norm()), 0.1, 0.5), rel=1e-10)


@pytest.mark.parametrize("basis", [None, 5])
def test_as_few_parameters_as_there_are(basis):
    """ℓ = mean (2a + b − 2)² at x = 2: the Hessian is 2 (2, 1)ᵀ(2, 1)."""
    x = torch.full((3, 1), 2.0, dtype=torch.float64)
    for bias, parameters, count, values in (
        (False, None, 1, [8.0]),
        (True, ["bias"], 1, [2.0]),
        (True, None, 2, [10.0, 0.0]),
    ):
        model = nn.Linear(1, 1, bias=bias).double()
        options = {"parameters": parameters, "eigenvalues": count, "max_basis": basis}
        row = EdgeMonitor(model, mse_loss, (x, x), SGD(model.parameters(), lr=0.1), **options).measure()
        assert [row[f"eigenvalue_{i + 1}"] for i in range(count)] == pytest.approx(values, abs=1e-9)
        with pytest.raises(ValueError, match=f"eigenvalues must be at most the {count} parameters"):
            EdgeMonitor(
                *(model, mse_loss, (x, x), SGD(model.parameters(), lr=0.1)),
                **{**options, "eigenvalues": count + 1, "max_basis": None},
            )


def test_lanczos_says_that_an_operator_is_not_symmetric():
    skewed = numbers(40, 40)
    symmetric = skewed + skewed.T
    assert lanczos_ends(symmetric, tol=1e-3).converged
    with pytest.warns(RuntimeWarning, match="not symmetric: its products differ"):
        assert not lanczos_ends(symmetric + 0.1 * (skewed - skewed.T), tol=1e-3).converged
