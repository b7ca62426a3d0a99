"""How numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable

NO_VALUE = "–"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal, without the sign: 0.8342 → "83.4"."""
    return NO_VALUE if value is None else f"{100 * value:.1f}"


def decimal(value: float | None, places: int = 3) -> str:
    return NO_VALUE if value is None else f"{value:.{places}f}"


def count(value: int | None) -> str:
    return NO_VALUE if value is None else f"{value:,}"


def seconds(value: float) -> str:
    """0.0123 → "12 ms", 3.21 → "3.2 s", 754 → "12 min 34 s", 7504 → "2 h 5 min"."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60} min"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about ``about``."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_text(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def same_places(texts: Iterable[str]) -> list[str]:
    """Numbers with as many decimals as the longest: "0.5", "1" → "0.5", "1.0"."""
    parts = [text.partition(".") for text in texts]
    places = max((len(decimals) for _, _, decimals in parts), default=0)
    return [f"{whole}.{part:0<{places}}" if places else whole for whole, _, part in parts]
