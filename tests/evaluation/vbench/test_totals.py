"""The totals of VBench-I2V are those that were published, and a dimension that is missing is no zero."""

import pytest

from pusa.evaluation.vbench.published import ROWS, Row
from pusa.evaluation.vbench.totals import DIMENSIONS, total_of

EXCEPTIONS = {
    ("4c", "Pusa", 750, "2.0", "i2v"): (92.87, "printed as 93.87, while the printed total, 85.98, is that of 92.87"),
}
"""Printed values that the formula does not give, with what it gives and why that is right."""

GROUPS = {"quality": ("quality",), "i2v": ("i2v",), "total": ("quality", "i2v")}


def rounding(group: str) -> float:
    """Return the error that two decimals leave: half a digit of each score, by its slope, and of the result."""
    members = [dimension for dimension in DIMENSIONS.values() if dimension.group in GROUPS[group]]
    shares = sum(100 * dimension.share / (dimension.maximum - dimension.minimum) for dimension in members)
    return 0.005 * (1 + shares * (1 if group == "total" else 2)) + 1e-9


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.table} {row.model} {row.iterations} {row.alpha}")
def test_formula_gives_every_published_total(row: Row) -> None:
    computed = total_of(row.scores)
    checked = 0
    for name in GROUPS:
        printed, interval = getattr(row, name), getattr(computed, name)
        key = (row.table, row.model, row.iterations, row.alpha, name)
        if key in EXCEPTIONS:
            right, _ = EXCEPTIONS[key]
            assert abs(interval.low - printed) > 0.5  # else it is no exception
            printed = right
        if printed is None:  # SVD has no camera motion
            continue
        checked += 1
        assert interval.is_known
        assert interval.low == pytest.approx(printed, abs=rounding(name))
    assert checked == 3 or (row.model.startswith("SVD-XT") and checked == 1)


def test_tables_are_complete() -> None:
    counts = {table: sum(row.table == table for row in ROWS) for table in ("1", "3", "4a", "4b", "4c", "5a", "5b")}

    assert counts == {"1": 16, "3": 2, "4a": 4, "4b": 4, "4c": 20, "5a": 16, "5b": 24}
    assert len(ROWS) == 86
    assert all(rounding(name) < 0.015 for name in GROUPS)  # two decimals: tighter than any difference that matters


def test_headline_to_two_decimals() -> None:
    pusa, wan = (
        next(row for row in ROWS if row.is_full_set and row.model == name) for name in ("Pusa", "Wan-I2V (14B)")
    )

    assert str(total_of(pusa.scores).total) == "87.32"
    assert str(total_of(wan.scores).total) == "86.86"


def test_camera_missing_gives_narrow_bounds_and_no_zero() -> None:
    pusa = next(row for row in ROWS if row.is_full_set and row.model == "Pusa")
    totals = total_of({name: score for name, score in pusa.scores.items() if name != "camera_motion"})

    assert totals.missing == ("camera_motion",)
    assert totals.quality.is_known
    assert totals.total.low <= 87.32 <= totals.total.high
    assert totals.total.half == pytest.approx(100 * 0.1 / 2.1 / 4)  # 1.19 points
    assert 1 - DIMENSIONS["camera_motion"].share == pytest.approx(0.976, abs=5e-4)  # of the total's weight is there


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "no scores: give at least one of " + ", ".join(DIMENSIONS)),
        ({"i2v_subject": 101.0}, "i2v_subject=101 is outside 0..100: scores are percents"),
        ({"i2v_subject": float("nan")}, "i2v_subject=nan is outside 0..100: scores are percents"),
        (
            {"temporal_flickering": 98.0},
            "'temporal_flickering' is no dimension of VBench-I2V that counts: it has " + ", ".join(DIMENSIONS),
        ),
    ],
)
def test_wrong_scores_are_refused(scores: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as error:
        total_of(scores)

    assert str(error.value) == message
