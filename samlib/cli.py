"""The command line. Exit codes: 0 done (a diverged run is a result), 1 something failed, 2 the request is invalid."""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

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
    experiment: Annotated[str, typer.Argument(help="mnist, cifar10, shakespeare, … or a Python file of your own.")],
    learning_rate: Annotated[float | None, typer.Option(help="Step size η.")] = None,
    rho: Annotated[float | None, typer.Option(help="Radius ρ; 0 is gradient descent.")] = None,
    rule: Annotated[str | None, typer.Option(help="Where the gradient is taken: sam, usam, ….")] = None,
    base: Annotated[str | None, typer.Option(help="What steps with it: sgd or adam.")] = None,
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
    settings |= {"rule": rule, "base": base, "profile": profile, "data": data, "device": device}
    settings |= _pairs(setting or [], "--set")
    axes = {name: _values(text) for name, text in _pairs(grid or [], "--grid").items()}
    if "experiment" in {*_pairs(setting or [], "--set"), *axes}:
        _invalid("the experiment is the first argument; it cannot be set or swept")
    points = [settings | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    budget = _seconds(time_budget, "--time-budget") if time_budget else None

    from .datasets import DataError
    from .runs import RunStore, StoreError, published_path, published_runs
    from .runs import publish as publish_runs
    from .training import train_grid

    try:
        configs = list(dict.fromkeys(_config(point) for point in points))
        reporter, kept = _Reporter(as_json), RunStore(store)
        if publish:
            kept.adopt(published_runs(experiment))
        runs = train_grid(configs, kept, jobs, budget, reporter.progress, reporter.done)
        if publish and runs:
            publish_runs(runs, published_path(experiment))
    except (ValueError, StoreError, DataError) as error:
        _invalid(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}", 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint", 130)
    if len(runs) < len(configs):
        left = len(configs) - len(runs)
        print(f"{left} run{'s are' if left > 1 else ' is'} left; the same command continues", file=sys.stderr)


@app.command()
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
        _invalid(f"chapter must be one of {', '.join(CHAPTERS)}, got {chapter!r}")
    budget = _seconds(time_budget, "--time-budget") if time_budget else None
    try:
        configs, kept, reporter = CHAPTERS[chapter].configs(), RunStore(store), _Reporter(False)
        kept.adopt(published_runs(chapter))
        runs = train_grid(configs, kept, jobs, budget, reporter.progress, reporter.done)
        publish_runs(runs, published_path(chapter))
        publish_toys(chapter)
    except (ValueError, StoreError, DataError) as error:
        _invalid(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint", 130)
    print(f"{len(runs)} of {len(configs)} runs are published in {published_path(chapter)}")


@app.command()
def data(policy: Annotated[str, typer.Option(help="auto or real.")] = "real") -> None:
    """Check the data sets, download what is missing, and say where each one is."""
    if policy not in ("auto", "real"):
        _invalid(f"--policy must be auto or real, got {policy!r}")
    from .datasets import SOURCES, DataError

    failed = False
    for name, source in SOURCES.items():
        try:
            print(f"{name}: {source.locate()[0].parent}")
        except DataError as error:
            failed = policy == "real"
            print(error, file=sys.stderr)
    raise typer.Exit(int(failed))


@app.command()
def claims(
    published: Annotated[Path | None, typer.Option(help="Folder of published runs.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the verdicts down as the recorded ones.")] = False,
) -> None:
    """Judge the paper's claims by the published runs; fail if a recorded verdict no longer matches its data."""
    from .claims import agrees_with_record, record, table, verdicts
    from .runs import StoreError, published_path

    if published and not published.is_dir():
        _invalid(f"--published {published} is not a folder")
    if not any(published_path("x", published).parent.glob("*.parquet")):
        _invalid(
            f"there are no published runs in {published_path('x', published).parent.absolute()}; "
            "they come with the project's checkout: run this there, or give their folder with --published"
        )
    try:
        results = verdicts(published)
    except StoreError as error:
        _fail(str(error), 1)
    for row in table(results).itertuples(index=False):
        claim, experiment, profile, statistic, threshold, supporting, verdict = row
        print(f"{verdict:15} {experiment:16} {profile:8} {claim}")
        print(f"{'':41} {statistic}, wanted {threshold}; {supporting} runs support it")
    if update:
        record(results, published)
    elif differences := agrees_with_record(results, published):
        _fail("recorded verdicts do not match the data:\n" + "\n".join(differences), 1)


@app.command()
def book(
    profile: Annotated[str, typer.Option(help="Profile of the live runs: quick, reduced or paper.")] = "quick",
    data: Annotated[str, typer.Option(help="auto, real or standin.")] = "auto",
    root: Annotated[Path, typer.Option(help="The project's folder.")] = Path("."),
    as_pdf: Annotated[bool, typer.Option("--pdf", help="Also print it into _build/book.pdf; needs Chromium.")] = False,
) -> None:
    """Execute the notebooks and build the website into _build/html."""
    from .experiments import PROFILES
    from .site.build import BookError, build, pdf

    if profile not in PROFILES or data not in ("auto", "real", "standin"):
        _invalid(f"profile must be one of {', '.join(PROFILES)} and data auto, real or standin; got {profile}, {data}")
    if not (root / "_toc.yml").exists():
        _invalid(f"{root.absolute()} holds no _toc.yml; run this in the project's folder or give --root")
    try:
        index = build(root.absolute(), profile, data)
        printed = pdf(root.absolute()) if as_pdf else None
    except BookError as error:
        _fail(str(error), 1)
    print(f"The book is built. Open {index}" + (f" or {printed}" if printed else ""))


class _SweepGroup(typer.core.TyperGroup):
    """``samlib sweep NOTEBOOK …`` means ``samlib sweep run NOTEBOOK …``; the value of ``--ray`` may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        for at in [i for i, word in enumerate(args) if word == "--ray"]:
            following = args[at + 1 : at + 2]
            if not following or following[0].startswith("-") or following[0].endswith(".ipynb"):
                args[at] = "--ray=auto"
        return super().parse_args(ctx, args)


sweep_app = typer.Typer(
    cls=_SweepGroup, no_args_is_help=True, help="Execute a notebook over a grid of parameters, and gather the results."
)
app.add_typer(sweep_app, name="sweep")


@sweep_app.command(name="run")
def sweep_run(
    notebook: Annotated[Path, typer.Argument(help="A notebook with a cell tagged 'parameters'.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; the same command with the same folder continues.")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of all points; repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="NAME=V1,V2,…", help="A parameter to sweep; repeatable.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with set, grid, ranges and points; --set and --grid override it.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Notebooks side by side; by default one per GPU, else one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the points and an estimate, and stop.")] = False,
    timeout: Annotated[str | None, typer.Option(help="Give up on a point after this time (90s, 9m, 2h).")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts when a kernel died.")] = 2,
    ray: Annotated[
        str | None, typer.Option(metavar="[ADDRESS]", help="Execute on a Ray cluster: auto, HOST:PORT or ray://….")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="With --ray: cores per point.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs per point; fractions share one.")] = 0,
) -> None:
    """Execute a notebook at every point of a grid.

    samlib sweep notebooks/run.ipynb --grid learning_rate=0.1,0.3 --grid rho=0,0.1 --out sweeps/first --jobs 2
    """
    from .sweeps.engines import Limits, Local, Ray, run
    from .sweeps.planning import SweepError, plan, read_config
    from .sweeps.progress import duration, estimate

    limits = Limits(_seconds(timeout, "--timeout") if timeout else None, retries)
    settings, axes = _pairs(setting or [], "--set"), _pairs(grid or [], "--grid")
    try:
        request = read_config(config) if config else {"settings": {}, "grid": {}, "points": None}
        for name in settings.keys() | axes.keys():
            request["settings"].pop(name, None)
            request["grid"].pop(name, None)
        request["settings"] |= settings
        request["grid"] |= {name: _values(text) for name, text in axes.items()}
        planned = plan(notebook, out, **request)
        if dry_run:
            for point in planned.points:
                print(point.id, " ".join(f"{name}={value}" for name, value in point.params.items()))
            guess = estimate(planned, jobs or 1)
            print(f"{len(planned.points)} points, {len(planned.left())} of them without a result; ", end="")
            print(f"about {duration(guess[0])}, {guess[1]}" if guess else "no estimate before a point was executed")
            return
        engine = Ray(ray, cpus, gpus) if ray else Local(jobs)
        run(planned, engine, limits)
    except SweepError as error:
        _invalid(str(error))
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        _fail(f"cannot write the sweep: {reason}. What was done is kept; the same command continues", 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues", 130)
    raise typer.Exit(_closing_table(planned))


@sweep_app.command(name="report")
def sweep_report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Report also if some points have no result.")
    ] = False,
) -> None:
    """Gather a sweep: a table (CSV, Parquet) and a page of heatmaps."""
    from .sweeps.planning import SweepError
    from .sweeps.report import ReportError, report

    try:
        table = report(folder, allow_partial)
    except ReportError as error:
        _fail(str(error), 1)
    except SweepError as error:
        _invalid(str(error))
    except OSError as error:
        _fail(f"cannot write the report: {error}", 1)
    print(f"{len(table)} points: {folder}/table.csv, table.parquet, report.ipynb and report.html")


def _closing_table(sweep: Any) -> int:
    """What became of each point that is not a result, and the exit code."""
    statuses = {point: sweep.status(point) for point in sweep.points}
    counts = collections.Counter(status.outcome if status else "not executed" for status in statuses.values())
    print(f"{len(statuses)} points: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    left = sweep.left()
    for point in left:
        status = statuses[point]
        reason = (status.error.strip().splitlines() or [""])[-1] if status else ""
        print(f"  {point.id} {sweep.label(point)}: {status.outcome if status else 'not executed'} {reason}")
        print(f"    log: {sweep.out / point.id / 'log.txt'}")
    if left:
        print(f"the same command executes these {len(left)} again and leaves the others as they are")
    else:
        print(f"next: samlib sweep report {sweep.out}")
    return int(bool(left))


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


def _values(text: str) -> list[str]:
    """The values of a grid: not cut at the commas inside of brackets, since a value may be a list."""
    return re.split(r",(?![^\[{]*[\]}])", text)


def _seconds(text: str, option: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        value = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
        if value > 0:
            return value
    except ValueError:
        pass
    _invalid(f"{option} takes a positive time such as 90s, 9m or 2h, got {text!r}")


def _invalid(message: str) -> NoReturn:
    _fail(message, 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"samlib: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    app()
