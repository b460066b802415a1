"""The command line. Exit codes: 0 done (a diverged run is a result), 1 something failed, 2 the request is invalid."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="SAM at the edge of stability: train runs, sweep parameters, check the claims, build the book.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StoreOption = Annotated[Path, typer.Option(help="Folder in which runs are kept, resumed and found again.")]


@app.callback()
def main() -> None:
    # Warnings are messages to the user here, not to a programmer: no file name, no source line.
    warnings.formatwarning = lambda message, *_, **__: f"samlib: {message}\n"


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="mnist, cifar10 or shakespeare.")],
    learning_rate: Annotated[float | None, typer.Option(help="Step size η.")] = None,
    rho: Annotated[float | None, typer.Option(help="Radius ρ; 0 is gradient descent.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and mini-batches.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Number of updates.")] = None,
    profile: Annotated[str, typer.Option(help="quick, reduced or paper.")] = "quick",
    data: Annotated[str, typer.Option(help="auto, real or standin.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    store: StoreOption = Path("runs"),
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of a run; repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V1,V2,…", help="Train every combination of these values; repeatable."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs of a grid to train side by side.")] = 1,
    time_budget: Annotated[
        str | None, typer.Option(help="Stop after this time (9m, 2h, 90s); the same command continues later.")
    ] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Merge the runs into data/published/.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run.")] = False,
) -> None:
    """Train a run, or load it if it is finished, or continue it where it stopped.

    samlib run mnist --learning-rate 0.3 --rho 0.1 --profile quick --store runs
    """
    settings = {"experiment": experiment, "learning_rate": learning_rate, "rho": rho, "seed": seed, "steps": steps}
    settings |= {"profile": profile, "data": data, "device": device, **_pairs(setting or [], "--set")}
    axes = {name: text.split(",") for name, text in _pairs(grid or [], "--grid").items()}
    points = [settings | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    budget = _seconds(time_budget) if time_budget else None

    from .datasets import DataError
    from .runs import RunStore, StoreError, published_path
    from .runs import publish as publish_runs
    from .training import train_grid

    try:
        configs = [_config(point) for point in points]
        reporter = _Reporter(as_json)
        runs = train_grid(configs, RunStore(store), jobs, budget, reporter.progress, reporter.done)
        if publish and runs:
            publish_runs(runs, published_path(experiment))
    except (ValueError, StoreError, DataError) as error:
        _invalid(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint", 130)
    if len(runs) < len(configs):
        print(f"{len(configs) - len(runs)} runs are left; the same command continues", file=sys.stderr)


@app.command()
def data(policy: Annotated[str, typer.Option(help="auto or real.")] = "real") -> None:
    """Check the data sets, download what is missing, and say where each one is."""
    from .datasets import FILES, DataError, locate

    failed = False
    for name in FILES:
        try:
            print(f"{name}: {locate(name)[0].parent}")
        except DataError as error:
            failed = policy == "real"
            print(error, file=sys.stderr)
    raise typer.Exit(int(failed))


@app.command()
def book(
    profile: Annotated[str, typer.Option(help="Profile of the live runs: quick, reduced or paper.")] = "quick",
    data: Annotated[str, typer.Option(help="auto, real or standin.")] = "auto",
    root: Annotated[Path, typer.Option(help="The project's folder.")] = Path("."),
) -> None:
    """Execute the notebooks and build the website into _build/html."""
    from .book import BookError, build
    from .experiments import PROFILES

    if profile not in PROFILES or data not in ("auto", "real", "standin"):
        _invalid(f"profile must be one of {', '.join(PROFILES)} and data auto, real or standin; got {profile}, {data}")
    if not (root / "_toc.yml").exists():
        _invalid(f"{root.absolute()} holds no _toc.yml; run this in the project's folder or give --root")
    try:
        index = build(root.absolute(), profile, data)
    except BookError as error:
        _fail(str(error), 1)
    print(f"The book is built. Open {index}")


class _Reporter:
    """Progress on the terminal: one bar per run being trained, one line per completed run."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.bars: dict[str, Any] = {}

    def progress(self, config: Any, row: dict[str, float]) -> None:
        from tqdm import tqdm

        name = f"η={config.learning_rate:g} ρ={config.rho:g} seed {config.seed}"
        if name not in self.bars:
            self.bars[name] = tqdm(total=config.steps, desc=name, unit="step", disable=None, leave=False)
        bar = self.bars[name]
        bar.n = int(row["step"])
        edge = row["sam_edge"]
        bar.set_postfix_str(f"loss {row['loss']:.4g}, sharpness {row['eigenvalue_1']:.4g}, edge {edge:.4g}")

    def done(self, run: Any) -> None:
        name = f"η={run.config.learning_rate:g} ρ={run.config.rho:g} seed {run.config.seed}"
        if bar := self.bars.pop(name, None):
            bar.close()
        if self.as_json:
            last = {k: (None if v != v else v) for k, v in run.last.items()}
            about = {"id": run.id, "status": run.outcome, "config": run.config.model_dump()}
            print(json.dumps({**about, "last": last, "provenance": run.provenance}), flush=True)
        else:
            print(run, flush=True)


def _config(settings: dict[str, Any]) -> Any:
    """A RunConfig, or a ValueError with one line per bad setting."""
    from pydantic import ValidationError

    from .experiments import RunConfig, explain

    try:
        return RunConfig(**settings)
    except ValidationError as error:
        raise ValueError("\n".join(explain(error))) from None


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            _invalid(f"{option} takes NAME=VALUE, got {text!r}")
        if name in pairs:
            _invalid(f"{option} names {name} twice")
        pairs[name.strip().replace("-", "_")] = value.strip()
    return pairs


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        value = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
        if value > 0:
            return value
    except ValueError:
        pass
    _invalid(f"--time-budget takes a positive time such as 90s, 9m or 2h, got {text!r}")


def _invalid(message: str) -> NoReturn:
    _fail(message, 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"samlib: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    app()
