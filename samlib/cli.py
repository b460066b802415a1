"""The command line. Exit codes: 0 done (a diverged run is a result), 1 something failed, 2 the request is invalid, 130
interrupted."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .files import as_text
from .sweeps.command import app as sweep_app
from .terminal import Command, Group, fail, given_once, invalid, pairs, seconds, values

app = typer.Typer(
    cls=Group,
    help="SAM at the edge of stability: train runs, sweep parameters, check the claims, build the book.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sweep_app, name="sweep")

StoreOption = Annotated[Path, typer.Option(help="Folder in which runs are kept, resumed and found again.")]


@app.callback()
def main() -> None:
    # Warnings are messages to the user here, not to a programmer: no file name, no source line.
    warnings.formatwarning = lambda message, *_, **__: f"samlib: {message}\n"


@app.command(cls=Command)
def run(
    experiment: Annotated[str, typer.Argument(help="mnist, cifar10, shakespeare, … or a Python file of your own.")],
    learning_rate: Annotated[float | None, typer.Option(help="Step size η.")] = None,
    rho: Annotated[float | None, typer.Option(help="Radius ρ; 0 is gradient descent.")] = None,
    rule: Annotated[str | None, typer.Option(help="Where the gradient is taken: sam, usam, ….")] = None,
    base: Annotated[str | None, typer.Option(help="What steps with it: sgd or adam.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and mini-batches; 0 unless given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of updates.")] = None,
    profile: Annotated[str | None, typer.Option(help="quick (unless given), reduced or paper.")] = None,
    data: Annotated[str | None, typer.Option(help="auto (unless given), real or standin.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (unless given), cpu or cuda.")] = None,
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
    named = {"learning_rate": learning_rate, "rho": rho, "seed": seed, "steps": steps, "rule": rule, "base": base}
    named |= {"profile": profile, "data": data, "device": device}
    named = {name: value for name, value in named.items() if value is not None}
    further = pairs(setting, "--set")
    axes = {name: values(text) for name, text in pairs(grid, "--grid").items()}
    given_once(named, further, axes)
    if "experiment" in {*further, *axes}:
        invalid("the experiment is the first argument; it cannot be set or swept")
    settings = {"experiment": as_text(experiment), **named, **further}
    points = [settings | dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    budget = seconds(time_budget, "--time-budget") if time_budget else None

    from .datasets import DataError
    from .experiments import EXPERIMENTS
    from .runs import RunStore, StoreError, published_path, published_runs
    from .runs import publish as publish_runs
    from .training import train_grid

    if publish and experiment not in EXPERIMENTS:
        invalid(f"--publish is for the book's experiments, {', '.join(EXPERIMENTS)}; got {experiment}")
    try:
        configs = list(dict.fromkeys(_config(point) for point in points))
        reporter, kept = _Reporter(as_json), RunStore(store)
        if publish:
            for config in {config.data: config for config in configs}.values():
                if config.load_dataset().standin:
                    raise StoreError("stand-in data would be used, and only runs on real data can be published")
            kept.adopt(published_runs(experiment))
        runs = train_grid(configs, kept, jobs, budget, reporter.progress, reporter.done)
        if publish and runs:
            publish_runs(runs, published_path(experiment))
    except (ValueError, StoreError, DataError) as error:
        invalid(str(error))
    except OSError as error:
        fail(_of_files(error), 1)
    except KeyboardInterrupt:
        fail("interrupted; the same command continues from the last checkpoint", 130)
    if len(runs) < len(configs):
        left = len(configs) - len(runs)
        print(f"{left} run{'s are' if left > 1 else ' is'} left; the same command continues", file=sys.stderr)


@app.command(cls=Command)
def record(
    chapter: Annotated[str, typer.Argument(help="stochastic_edge, universal_sam, graphsam, ….")],
    store: StoreOption = Path("runs"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs to train side by side.")] = 1,
    time_budget: Annotated[
        str | None, typer.Option(help="Stop after this time (9m, 2h, 90s); the same command continues later.")
    ] = None,
) -> None:
    """Train all runs of a chapter on real data, solve its toy problems, and publish both; it continues if stopped."""
    from .claims import CHAPTERS, publish_toys
    from .datasets import DataError
    from .runs import RunStore, StoreError, published_path, published_runs
    from .runs import publish as publish_runs
    from .training import train_grid

    if chapter not in CHAPTERS:
        invalid(f"chapter must be one of {', '.join(CHAPTERS)}, got {chapter!r}")
    budget = seconds(time_budget, "--time-budget") if time_budget else None
    try:
        configs, kept, reporter = CHAPTERS[chapter].configs(), RunStore(store), _Reporter(False)
        kept.adopt(published_runs(chapter))
        runs = train_grid(configs, kept, jobs, budget, reporter.progress, reporter.done)
        publish_runs(runs, published_path(chapter))
        publish_toys(chapter)
    except (ValueError, StoreError, DataError) as error:
        invalid(str(error))
    except OSError as error:
        fail(_of_files(error), 1)
    except KeyboardInterrupt:
        fail("interrupted; the same command continues from the last checkpoint", 130)
    print(f"{len(runs)} of {len(configs)} runs are published in {published_path(chapter)}")


@app.command(cls=Command)
def data(policy: Annotated[str, typer.Option(help="auto or real.")] = "real") -> None:
    """Check the data sets, download what is missing, and say where each one is."""
    if policy not in ("auto", "real"):
        invalid(f"--policy must be auto or real, got {policy!r}")
    from .datasets import SOURCES, DataError

    failed = False
    for name, source in SOURCES.items():
        try:
            print(f"{name}: {source.locate()[0].parent}")
        except DataError as error:
            failed = policy == "real"
            print(error, file=sys.stderr)
    raise typer.Exit(int(failed))


@app.command(cls=Command)
def claims(
    published: Annotated[Path | None, typer.Option(help="Folder of published runs.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the verdicts down as the recorded ones.")] = False,
) -> None:
    """Judge the paper's claims by the published runs; fail if a recorded verdict no longer matches its data."""
    from .claims import agrees_with_record, record, table, verdicts
    from .runs import StoreError, published_path

    if published and not published.is_dir():
        invalid(f"--published {published} is not a folder")
    if not any(published_path("x", published).parent.glob("*.parquet")):
        invalid(
            f"there are no published runs in {published_path('x', published).parent.absolute()}; "
            "they come with the project's checkout: run this there, or give their folder with --published"
        )
    try:
        results = verdicts(published)
    except StoreError as error:
        fail(str(error), 1)
    for row in table(results).itertuples(index=False):
        claim, experiment, profile, statistic, threshold, supporting, verdict = row
        print(f"{verdict:15} {experiment:16} {profile:8} {claim}")
        print(f"{'':41} {statistic}, wanted {threshold}; {supporting} runs support it")
    if update:
        record(results, published)
    elif differences := agrees_with_record(results, published):
        fail("recorded verdicts do not match the data:\n" + "\n".join(differences), 1)


@app.command(cls=Command)
def book(
    profile: Annotated[str, typer.Option(help="Profile of the live runs: quick, reduced or paper.")] = "quick",
    data: Annotated[str, typer.Option(help="auto, real or standin.")] = "auto",
    root: Annotated[Path, typer.Option(help="The project's folder.")] = Path("."),
    as_pdf: Annotated[bool, typer.Option("--pdf", help="Also print it into _build/book.pdf; needs Chromium.")] = False,
) -> None:
    """Execute the notebooks and build the website into _build/html."""
    from .experiments import PROFILES
    from .site.build import BookError, InvalidBook, build, pdf

    if profile not in PROFILES or data not in ("auto", "real", "standin"):
        invalid(f"profile must be one of {', '.join(PROFILES)} and data auto, real or standin; got {profile}, {data}")
    if not (root / "_toc.yml").exists():
        invalid(f"{root.absolute()} holds no _toc.yml; run this in the project's folder or give --root")
    try:
        index = build(root.absolute(), profile, data, printed=as_pdf)
        printed = pdf(root.absolute()) if as_pdf else None
    except InvalidBook as error:
        invalid(str(error))
    except BookError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"cannot write the book: {error}", 1)
    print(f"The book is built. Open {index}" + (f" or {printed}" if printed else ""))


def _of_files(error: OSError) -> str:
    """What went wrong with a file, and what to do."""
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}; what is finished is kept, and the same command continues"


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
        names = {"loss": "loss", "eigenvalue_1": "sharpness", "edge": "edge"}
        bar.set_postfix_str(", ".join(f"{word} {row[name]:.4g}" for name, word in names.items() if name in row))

    def done(self, run: Any) -> None:
        name = f"η={run.config.learning_rate:g} ρ={run.config.rho:g} seed {run.config.seed}"
        if bar := self.bars.pop(name, None):
            bar.close()
        if self.as_json:
            last = {k: (v if math.isfinite(v) else None) for k, v in run.last.items()}
            about = {"id": run.id, "status": run.outcome, "config": run.config.model_dump()}
            print(json.dumps({**about, "last": last, "provenance": run.provenance}, allow_nan=False), flush=True)
        else:
            print(run, flush=True)


def _config(settings: dict[str, Any]) -> Any:
    """A RunConfig, or a ValueError with one line per bad setting."""
    from pydantic import ValidationError

    from .config import RunConfig, explain

    try:
        return RunConfig(**settings)
    except ValidationError as error:
        raise ValueError("\n".join(explain(error))) from None


if __name__ == "__main__":
    app()
