"""What a run says on its way, and what a notebook records."""

import decimal
import fractions
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from samlib import train
from samlib.journal import PROGRESS, Journal, append, note, record

from .conftest import small_config

CIRCLE: list = []
CIRCLE.append(CIRCLE)


def test_a_run_keeps_a_journal_where_it_is_asked_to(store, tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS, str(tmp_path / "journal"))
    run = train(small_config(), store)
    train(small_config(), store)
    events = [e for e in Journal(tmp_path / "journal").read() if e["event"] != "checkpoint"]
    assert [e["event"] for e in events] == ["start", "step", "step", "step", "step", "done", "done"]
    assert all(e["run"] == run.id for e in events)
    assert events[4] == {
        **{"event": "step", "run": run.id, "step": 30, "steps": 30},
        **{"loss": run.last.loss, "edge_ratio": run.last.edge_ratio},
    }


def test_a_journal_survives_half_written_lines(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    append(path, "old")
    journal, late = Journal(path), Journal(path, skip=True)
    with path.open("ab") as file:
        file.write(b'\n{"event": "cut sho')
    monkeypatch.setenv(PROGRESS, str(path))
    note("new", value=1)
    record(answer=42)
    events = [{"event": "new", "value": 1}, {"event": "record", "values": {"answer": 42}}]
    assert journal.read() == [{"event": "old"}, *events]
    assert late.read() == events
    assert journal.read() == []
    monkeypatch.delenv(PROGRESS)
    note("nowhere")
    assert journal.read() == []
    assert Journal(tmp_path / "none").read() == []


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Record values, and read what arrives."""
    monkeypatch.setenv(PROGRESS, str(tmp_path / "journal"))
    journal = Journal(tmp_path / "journal")

    def read(**values):
        record(**values)
        [event] = journal.read()
        return event["values"]

    return read


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((3, 3), (0.5, 0.5), ("text", "text"), (True, True), (None, None), (2**70, 2**70)),
        *((np.int64(3), 3), (np.float32(0.5), 0.5), (np.bool_(True), True), (np.str_("a"), "a")),
        *((np.array(2.5), 2.5), (torch.tensor(3), 3), (torch.tensor(0.5, requires_grad=True), 0.5)),
        *(
            (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
            (fractions.Fraction(1, 2), 0.5),
            (decimal.Decimal("0.5"), 0.5),
        ),
        *((np.arange(3.0), [0.0, 1.0, 2.0]), (torch.ones(2, 2), [[1.0, 1.0], [1.0, 1.0]]), (np.array([True]), [True])),
        *(([np.int8(1), None], [1, None]), ((1, 2), [1, 2]), ({"a": np.float64(1), 2: "b"}, {"a": 1.0, "2": "b"})),
    ],
)
def test_a_value_and_an_array_are_recorded_as_the_numbers_that_they_hold(value, expected, recorded):
    found = recorded(x=value)["x"]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("value", [1j, np.array([1j]), object(), torch.nn.Linear(1, 1), float, [object()], {"a": len}])
@pytest.mark.parametrize("sweeping", [True, False])
def test_what_cannot_be_recorded_is_named_at_once_in_a_sweep_and_outside(value, sweeping, tmp_path, monkeypatch):
    if sweeping:
        monkeypatch.setenv(PROGRESS, str(tmp_path / "journal"))
    with pytest.raises(TypeError, match=r"record takes numbers, text, truth values and None.* curve.* is of type "):
        record(score=1.0, curve=value)
    assert not (tmp_path / "journal").exists()


def test_text_of_any_kind_arrives(recorded):
    values = {"text": "η 日本 \n \x00", "half": "\udcc3", "nan": float("nan")}
    found = recorded(**values)
    assert json.dumps(found) == json.dumps(values)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.datetime64("2020-01-01", "ns"), "x"),
        (np.array([1, Path("y")], dtype=object), r"x\[1\]"),
        (torch.eye(2).to_sparse(), "x"),
        (torch.empty(2, device="meta"), "x"),
        (10**5000, "x"),
        (decimal.Decimal("sNaN"), "x"),
        ({1: "a", "1": "b"}, "x"),
        ({"y": CIRCLE}, r"x\['y'\]\[0\]"),
    ],
    ids=["times", "objects", "sparse", "meta", "huge", "signalling", "keys", "circle"],
)
def test_what_cannot_be_written_is_named(value, name):
    with pytest.raises(TypeError, match=f"record takes .*; {name} is of type"):
        record(x=value)


def test_numbers_of_all_kinds_are_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIB_PROGRESS", str(tmp_path / "journal"))
    values = {"a": np.longdouble(1.5), "b": np.int64(2**53 + 1), "c": np.uint64(2**64 - 1), "d": torch.tensor(True)}
    record(**values)
    assert Journal(tmp_path / "journal").read()[-1]["values"] == {"a": 1.5, "b": 2**53 + 1, "c": 2**64 - 1, "d": True}
