"""How numbers are written, for the page and the terminal."""

from __future__ import annotations

NO_VALUE = "–"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal, without the sign: 0.8342 → "83.4"."""
    return NO_VALUE if value is None else f"{100 * value:.1f}"


def decimal(value: float | None, places: int = 3) -> str:
    """A number with as many decimals, a very large one with an exponent."""
    if value is None:
        return NO_VALUE
    return f"{value:.{places}f}" if abs(value) < 1e6 else f"{value:.{places}g}"


def count(value: int | None) -> str:
    return NO_VALUE if value is None else f"{value:,}"


def plural(number: int, noun: str) -> str:
    """1 and "step" → "1 step", 500 → "500 steps"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def seconds(value: float) -> str:
    """0.0123 → "12 ms", 3.21 → "3.2 s", 754 → "12 min 34 s", 7504 → "2 h 5 min"."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60} min"


def short(value: float, digits: int = 6) -> str:
    """A number with at most ``digits`` significant digits: 0.5 → "0.5", -1 → "−1"."""
    return f"{value:.{digits}g}".replace("-", "−")
