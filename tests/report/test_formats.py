"""Facts about how numbers are written."""

from __future__ import annotations

from raymerge.report.formats import count, decimal, percent, plural, seconds, short


def test_fractions_are_percentages_with_one_decimal():
    assert percent(0.83449) == "83.4"
    assert percent(None) == "–"


def test_decimals_and_counts():
    assert [decimal(v) for v in (0.12345, None, -1)] == ["0.123", "–", "-1.000"]
    assert [decimal(1e300), decimal(2.5, 2)] == ["1e+300", "2.50"]
    assert [count(12345), count(None)] == ["12,345", "–"]


def test_durations_are_written_for_people():
    written = [seconds(s) for s in (0.012, 3.21, 754, 7504)]
    assert written == ["12 ms", "3.2 s", "12 min 34 s", "2 h 5 min"]


def test_nouns_follow_their_number():
    assert [plural(1, "step"), plural(1200, "step")] == ["1 step", "1,200 steps"]


def test_numbers_have_no_more_digits_than_needed():
    assert [short(v) for v in (-0.5, 0.3, 100.0)] == ["−0.5", "0.3", "100"]
    assert short(83.41234, 4) == "83.41"
