"""The commands ``samlib sweep`` and ``samlib sweep report``."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ..terminal import Command, fail, invalid, pairs, seconds, values

__all__ = ["app"]


class _Group(typer.core.TyperGroup):
    """``samlib sweep NOTEBOOK …`` means ``samlib sweep run NOTEBOOK …``; the value of ``--ray`` may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        for at in [i for i, word in enumerate(args) if word == "--ray"]:
            following = args[at + 1 : at + 2]
            if not following or following[0].startswith("-") or following[0].endswith(".ipynb"):
                args[at] = "--ray=auto"
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group, no_args_is_help=True, help="Execute a notebook over a grid of parameters, and gather the results."
)


@app.command(name="run", cls=Command)
def run_sweep(
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
    kernel: Annotated[
        str | None, typer.Option(help="Jupyter kernel to execute it with; by default the one that the notebook names.")
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
    from .configuration import SweepError, read_config
    from .engines import Limits, Local, Ray, run
    from .planning import plan
    from .progress import duration, estimate

    limits = Limits(seconds(timeout, "--timeout") if timeout else None, retries)
    settings, axes = pairs(setting, "--set"), pairs(grid, "--grid")
    try:
        request = read_config(config) if config else {"settings": {}, "grid": {}, "points": None}
        for name in settings.keys() | axes.keys():
            request["settings"].pop(name, None)
            request["grid"].pop(name, None)
        request["settings"] |= settings
        request["grid"] |= {name: values(text) for name, text in axes.items()}
        planned = plan(notebook, out, **request, kernel=kernel)
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
        invalid(str(error))
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        fail(f"cannot write the sweep: {reason}. What was done is kept; the same command continues", 1)
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", 130)
    raise typer.Exit(_closing_table(planned))


@app.command(name="report", cls=Command)
def report_sweep(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Report also if some points have no result.")
    ] = False,
) -> None:
    """Gather a sweep: a table (CSV, Parquet) and a page of heatmaps."""
    from .configuration import SweepError
    from .report import ReportError, report

    try:
        table = report(folder, allow_partial)
    except ReportError as error:
        fail(str(error), 1)
    except SweepError as error:
        invalid(str(error))
    except OSError as error:
        fail(f"cannot write the report: {error}", 1)
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
