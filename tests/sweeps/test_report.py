"""The report of a sweep: its files, heatmaps and page."""

import json
from dataclasses import asdict

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from samlib.files import atomic_write
from samlib.sweeps import planning as sweep
from samlib.sweeps import report as sweep_report
from samlib.sweeps.points import Status

from .conftest import notebook, samlib


def test_a_folder_that_is_no_sweep_has_no_report(tmp_path):
    result = samlib("report", tmp_path)
    assert (result.exit_code, "holds no sweep" in result.stderr) == (2, True)
    (tmp_path / "sweep.json").write_text('{"version": 0}', encoding="utf-8")
    assert "another version of samlib" in samlib("report", tmp_path).stderr
    (tmp_path / "sweep.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in samlib("report", tmp_path).stderr


def test_a_heatmap_shows_numbers_divergence_and_gaps():
    frame = pd.DataFrame(
        {
            "point": list("abcde"),
            "learning_rate": [0.1, 0.1, 1.0, 1.0, 10.0],
            "rho": [0.0, 0.1, 0.0, 0.1, 0.0],
            "seed": [0, 0, 0, 0, 0],
            "outcome": ["finished", "finished", "finished", "diverged", "finished"],
            "run_id": list("abcde"),
            "loss": [1.0, 0.001, 0.5, float("nan"), 0.2],
            "edge_ratio": [0.9, 1.05, 1.0, float("nan"), 1.1],
            "accuracy": [0.1, 0.2, 0.3, 0.4, 0.5],
            "seconds": [1.0] * 5,
            "notebook": [f"{p}/executed.ipynb" for p in "abcd"] + [""],
        }
    )
    over = ["learning_rate", "rho", "seed"]
    pictures = sweep_report.heatmaps(frame, over)
    assert [p.name for p in pictures] == ["edge_ratio", "loss", "accuracy"]
    svg = pictures[0].svg
    assert ">diverged<" in svg
    assert ">–<" in svg
    assert svg.index(">0.1<") < svg.index(">1<") < svg.index(">10<")  # numbers in the order of numbers
    assert 'href="a/executed.ipynb"' in svg
    assert "Medians over seed." in pictures[0].caption
    assert "learning_rate" in sweep_report.heatmap(frame, "loss", ["learning_rate"]).svg
    assert "a/executed.ipynb" in sweep_report.links(frame, over).to_html()


def test_a_sweep_of_several_runs_per_point_lists_them(trivial, tmp_path):
    planned = sweep.plan(trivial, tmp_path / "out", grid={"rate": [1]})
    planned.write()
    folder = planned.out / planned.points[0].id
    atomic_write(folder / "status.json", b'{"outcome": "diverged", "runs": ["a", "b"]}')
    frame = sweep_report.table(planned.out)
    assert frame.run_id[0] == "a b"
    assert "loss" not in frame


# Values that have no column of their own kind, that are markup, or mathematics, or more than fits.
ODD = [None, True, 2, 2.5, "auto", [1, 2], {"a": [1]}, 2**70, float("nan"), float("inf"), -1e308, 1e308, "10"]
ODD += ["$\\frac$", "<b>bold</b>", "<script>q()</script>", "&amp;", "\udcc3x", "x\ny" * 100, "日本", "a\x00b", "['/b']"]
NAMES = ["point", "outcome", "run_id", "seconds", "notebook", "loss", "across", "up", "value", "", "a b", "$\\foo$"]
NAMES += ["<b>\"'&", "\ud800", "recorded_point", "edge_ratio", "index", "__index_level_0__"]


def finished(out, path, points, values):
    """A sweep that was executed, in which each point recorded the values of its place."""
    planned = sweep.plan(path, out, points=points)
    planned.write()
    for i, point in enumerate(planned.points):
        atomic_write(out / point.id / "executed.ipynb", b"{}")
        status = Status("finished" if i % 5 else "diverged", [], values[i], 1.0)
        atomic_write(out / point.id / "status.json", json.dumps(asdict(status)).encode())
    return planned


@pytest.fixture
def odd(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "odd: object = None\nloss: object = 'mse'")
    points = [{"odd": v, "loss": ("$a$", "<b>b</b>")[i % 2]} for i, v in enumerate(ODD)]
    values = [dict.fromkeys(NAMES, i) | {"odd": v, "number": i / 7} for i, v in enumerate(ODD)]
    values = [row | {"huge": 1e308 * (-1) ** i} for i, row in enumerate(values)]
    finished(tmp_path / "out", path, points, values)
    return tmp_path / "out"


def test_a_table_takes_any_value_and_any_name(odd):
    frame = sweep_report.table(odd)
    assert frame.columns.is_unique
    assert list(frame)[:3] == ["point", "odd", "loss"]
    assert list(frame)[-2:] == ["seconds", "notebook"]
    for name in NAMES:
        written = name.encode("utf-8", "backslashreplace").decode()
        taken = name in ("point", "outcome", "run_id", "seconds", "notebook", "loss")
        # Every record is there, under its own name or, where that is taken, another.
        column = {"recorded_point": "recorded_recorded_point"}.get(name, f"recorded_{written}" if taken else written)
        assert list(frame[column]) == list(range(len(frame))), name
    assert list(frame.outcome.unique()) == ["diverged", "finished"]
    assert list(frame.recorded_odd[:4]) == [None, "True", "2", "2.5"]
    assert frame.number.dtype == "float64"
    frame.to_parquet(odd / "table.parquet", index=False)
    again = pd.read_parquet(odd / "table.parquet")
    assert list(again) == list(frame)
    assert again.recorded_odd.fillna("").tolist() == frame.recorded_odd.fillna("").tolist()
    frame.to_csv(odd / "table.csv", index=False)
    assert len(pd.read_csv(odd / "table.csv")) == len(frame)


@pytest.mark.filterwarnings("ignore:.*encountered in", "ignore:Glyph")
def test_pictures_and_page_take_them_too(odd):
    frame = sweep_report.table(odd)
    over = sweep_report.axes(frame, odd)
    assert over == ["odd", "loss"]
    pictures = [sweep_report.heatmap(frame, name, over) for name in ("huge", "$\\foo$", "<b>\"'&", "")]
    page = "".join(picture._repr_html_() for picture in pictures) + sweep_report.links(frame, over).to_html()
    found = BeautifulSoup(page, "html.parser")
    assert not found.select("td b, td script, th b, figcaption b, figure script, svg b, svg script")
    assert "<b>bold</b>" in [cell.get_text() for cell in found.select("td")]
    assert "<b>\"'& over odd and loss." in found.get_text()
    assert (
        "over odd and loss. Medians over $x."
        in sweep_report.heatmap(frame.assign(**{"$x": 1}), "huge", [*over, "$x"]).caption
    )
    assert [link["download"] for link in found.select("a[download]")] == [
        "huge.csv",
        "__foo_.csv",
        "_b____.csv",
        ".csv",
    ]


def test_a_report_of_anything_is_made(odd):
    result = samlib("report", odd)
    assert result.exit_code == 0, result.output
    page = BeautifulSoup((odd / "report.html").read_text(encoding="utf-8"), "html.parser")
    cells = [cell.get_text() for cell in page.select("td")]
    assert "<script>q()</script>" in cells
    assert not page.select("td script, td b")
    assert len(pd.read_csv(odd / "table.csv")) == len(ODD)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, 2], "int64", [1, 2]),
        ([1, None], "float64", [1.0, float("nan")]),
        ([1, 2.5], "float64", [1.0, 2.5]),
        ([True, False], "bool", [True, False]),
        ([True, None], "boolean", [True, pd.NA]),
        ([True, 1], "object", ["True", "1"]),
        ([2**60, 1], "object", [str(2**60), "1"]),
        ([2**60, 0.5], "object", [str(2**60), "0.5"]),
        ([1, "a", None], "object", ["1", "a", None]),
        ([[1], {"a": 2}], "object", ["[1]", "{'a': 2}"]),
        ([None, None], "object", [None, None]),
    ],
)
def test_a_column_is_of_one_kind(values, dtype, expected, tmp_path):
    path = notebook(tmp_path / "n.ipynb", "i = 0")
    finished(tmp_path / "out", path, [{"i": 0}, {"i": 1}, {"i": 2}][: len(values)], [{"x": v} for v in values])
    column = sweep_report.table(tmp_path / "out").x
    assert column.dtype == dtype
    pd.testing.assert_series_equal(column, pd.Series(expected, dtype=dtype), check_names=False)


def test_a_measurement_yields_to_a_parameter_and_a_record_to_a_measurement(tmp_path, monkeypatch):
    path = notebook(tmp_path / "n.ipynb", "loss = 'mse'\ni = 0")
    points = [{"loss": "mse", "i": 0}, {"loss": "mae", "i": 1}]
    finished(tmp_path / "out", path, points, [{"edge_ratio": 5.0, "loss": 1}, {"edge_ratio": 6.0}])
    measured = iter([{"loss": 0.1, "edge_ratio": 1.0}, {}])
    monkeypatch.setattr("samlib.sweeps.table._measured", lambda *_: next(measured))
    frame = sweep_report.table(tmp_path / "out")
    assert frame.loss.tolist() == ["mse", "mae"]
    assert frame.run_loss[0] == 0.1
    assert frame.edge_ratio.fillna(0).tolist() == [1.0, 0.0]  # nothing but measurements
    assert frame.recorded_edge_ratio.tolist() == [5.0, 6.0]
    assert frame.recorded_loss[0] == 1
    assert [p.name for p in sweep_report.heatmaps(frame, ["i"])] == ["edge_ratio", "recorded_edge_ratio"]


def test_runs_that_are_elsewhere_leave_gaps(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "store = 'x'")
    planned = finished(tmp_path / "out", path, [{"store": "/proc/nowhere"}, {"store": str(tmp_path)}], [{}, {}])
    for point in planned.points:
        atomic_write(planned.out / point.id / "status.json", b'{"outcome": "finished", "runs": ["abc"]}')
    assert sweep_report.table(planned.out).run_id.tolist() == ["abc", "abc"]
