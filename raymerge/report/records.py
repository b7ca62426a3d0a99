"""The written files that a report is drawn from, as pydantic models.

Null and absent read the same, and unknown keys are ignored. A damaged or foreign file raises a
``UserError`` of one line that names the file and the key. What a folder's files mean together is
left to ``data``.

Shapes: K tasks, L layers, M scalings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence, Sized
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raymerge.errors import UserError, excerpt, one_line


def _finite_or_none(value: object) -> object:
    """Return None for NaN and infinity, which a diverged run writes."""
    is_diverged = isinstance(value, float) and not abs(value) <= sys.float_info.max
    return None if is_diverged else value


def _cell(value: object) -> str | float | None:
    """Return a table cell as text or a number; NaN and infinity become None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a cell must be text or a number, got {excerpt(value)}")
    return float(value) if abs(value) <= sys.float_info.max else None


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Whole = Annotated[int, Field(strict=True, ge=0, le=1 << 50)]
"""At most 2^50, so that neighbours stay distinct as floats."""
Measurement = Annotated[Number | None, BeforeValidator(_finite_or_none)]
"""A number that a run measured; None where it is absent, NaN or infinite."""
Measurements = tuple[Measurement, ...]
Cell = Annotated[str | float | None, PlainValidator(_cell)]


class Record(BaseModel):
    """An object in a file. Its null members are dropped, and a null object is an empty one."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if data is None:
            return {}
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class Score(Record):
    """A model's scores on one task, or on average; None where the file has no value."""

    top1: Fraction | None = None
    loss: Measurement = None
    entropy: Measurement = None
    examples: Whole | None = None


class Incident(Record):
    """A failure that the run survived, and what the run was doing then."""

    what: str
    reason: str


class Timings(Record):
    seconds: Mapping[str, Annotated[Number, Field(ge=0)]] = {}


class Results(Record):
    """``results.json``, or one method of ``comparison.json``."""

    method: str = ""
    tasks: Mapping[str, Score] = {}
    average: Score = Field(Score(), validate_default=True)
    """A score that the file leaves out is the mean over the tasks that have it."""
    timings: Timings = Timings()
    incidents: tuple[Incident, ...] = ()

    @field_validator("average")
    @classmethod
    def _complete(cls, average: Score, info: ValidationInfo) -> Score:
        tasks = info.data.get("tasks", {}).values()
        absent = [key for key in ("top1", "loss", "entropy") if getattr(average, key) is None]
        means = {key: mean([getattr(task, key) for task in tasks]) for key in absent}
        return average.model_copy(update=means)


class Lambdas(Record):
    """``lambdas.json``: a row of L values for each of K tasks."""

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    values: tuple[tuple[Number, ...], ...]

    @model_validator(mode="after")
    def _check_shape(self) -> Lambdas:
        lengths = [len(row) for row in self.values]
        if not self.tasks or not self.layers or lengths != [len(self.layers)] * len(self.tasks):
            raise ValueError(
                f"values must be {len(self.tasks)} rows (tasks) of {len(self.layers)} numbers "
                f"(layers), with at least one of each, got {len(lengths)} rows of length "
                f"{sorted(set(lengths))}"
            )
        return self

    @property
    def means(self) -> tuple[float, ...]:
        """K means over the layers."""
        return tuple(sum(row_L) / len(row_L) for row_L in self.values)

    @property
    def is_task_wise(self) -> bool:
        """True with one λ per task: there is no layer axis to draw."""
        return len(self.layers) == 1

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest λ."""
        values = [value for row_L in self.values for value in row_L]
        return min(values), max(values)


class Step(Record):
    """A line of ``metrics.jsonl``."""

    step: Whole
    loss: Measurement = None
    entropy: Mapping[str, Measurement] = {}
    lambdas: Mapping[str, Measurement] = {}
    """Each task's λ, averaged over its layers."""
    seconds: Measurement = None


class Scan(Record):
    """Mean accuracy of task arithmetic at each scaling (AdaMerging paper, Fig. 1)."""

    scalings: tuple[Number, ...]
    """M values of the one λ."""
    top1: tuple[Fraction, ...]
    """M accuracies."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Scan:
        if len(self.scalings) != len(self.top1) or not self.scalings:
            raise ValueError(
                "scalings and top1 must be of the same length, and at least 1, got "
                f"{len(self.scalings)} and {len(self.top1)}"
            )
        return self

    @property
    def points(self) -> list[tuple[float, float]]:
        """M pairs (scaling, top1), by ascending scaling."""
        return sorted(zip(self.scalings, self.top1, strict=True))

    @property
    def best(self) -> tuple[float, float]:
        """The pair (scaling, top1) of the best uniform λ, the smaller λ at a tie."""
        return max(self.points, key=lambda point: (point[1], -point[0]))


class ComparisonRecord(Record):
    """``comparison.json``."""

    methods: Mapping[str, Results]
    uniform_scan: Scan | None = None
    notes: tuple[str, ...] = ()
    timings: Timings = Timings()

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, methods: Mapping[str, Results]) -> Mapping[str, Results]:
        if not methods:
            raise ValueError("there is nothing to draw, for methods is empty")
        return methods


class FindingsTable(Record):
    """A table of an experiment; its numbers are fractions, to be shown as percentages."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]
    caption: str = ""

    @model_validator(mode="after")
    def _check_rows(self) -> FindingsTable:
        _check_lengths(self.rows, "rows", len(self.columns), "columns")
        return self


class FindingsCurves(Record):
    """The lines of an experiment over one axis."""

    title: str
    x_label: str
    y_label: str
    x: tuple[Number, ...]
    series: Mapping[str, Measurements]
    caption: str = ""

    @model_validator(mode="after")
    def _check_series(self) -> FindingsCurves:
        _check_lengths(self.series, "series", len(self.x), "values of x")
        return self


def _check_lengths(lines: Mapping[str, Sized], what: str, length: int, of: str) -> None:
    for name, line in lines.items():
        if len(line) != length:
            raise ValueError(f"{what}.{name} has length {len(line)}, but there are {length} {of}")


class ExperimentRecord(Record):
    """``experiment.json``."""

    title: str
    tables: tuple[FindingsTable, ...] = ()
    curves: tuple[FindingsCurves, ...] = ()
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = {}
    timings: Timings = Timings()


class Environment(Record):
    """``environment.json``: hashes of the input files; every other key is a version."""

    model_config = ConfigDict(frozen=True, extra="allow")

    hashes: Mapping[str, str] = {}

    @property
    def versions(self) -> dict[str, str]:
        return {name: str(value) for name, value in (self.model_extra or {}).items()}


class MethodSettings(Record):
    """The part of ``config.yaml`` that a headline needs; "" where the file does not say."""

    name: str = ""
    granularity: str = ""
    task_vectors: str = ""
    objective: str = ""
    init: Number | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class RunConfig(Record):
    method: MethodSettings = MethodSettings()


AnyRecord = TypeVar("AnyRecord", bound=Record)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, None if there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def validate(kind: type[AnyRecord], data: object, source: str | Path) -> AnyRecord:
    """Return ``data`` as a record; a mismatch is a ``UserError`` that begins with ``source``."""
    if not isinstance(data, dict):
        raise UserError(
            f"{source}: the content must be an object, got {excerpt(data)}; "
            "restore it, or merge again"
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_mismatch(error)}") from error


def _first_mismatch(error: ValidationError) -> str:
    """Return such as "tasks.mnist.top1 must be a valid number, got 'low'"."""
    first = error.errors()[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    place = "".join(parts).removeprefix(".")
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "value_error":
        return f"{place}: {first['ctx']['error']}" if place else str(first["ctx"]["error"])
    rule = first["msg"].removeprefix("Input should be ")
    return f"{place} must be {rule}, got {excerpt(first['input'])}"


def read(kind: type[AnyRecord], file: Path) -> AnyRecord | None:
    """Read a JSON file, None if there is no such file."""
    text = read_text(file)
    return None if text is None else validate(kind, _parse(text, file), file)


def read_steps(file: Path) -> list[Step]:
    """Read ``metrics.jsonl``, [] if there is no such file.

    A run that was killed leaves half a last line, without its newline: that line is dropped.
    """
    *lines, tail = (read_text(file) or "").split("\n")
    steps = [
        (number, _parse(line, file, number)) for number, line in enumerate(lines, 1) if line.strip()
    ]
    with suppress(UserError):
        steps.append((len(lines) + 1, _parse(tail, file)))
    return [validate(Step, data, f"{file}: line {number}") for number, data in steps]


def read_config(file: Path) -> tuple[str, MethodSettings]:
    """Return a run's ``config.yaml`` as text ("" if there is none) and its method's settings."""
    import yaml

    from raymerge.config.loading import YAML_ERRORS

    text = read_text(file) or ""
    try:
        data = yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise UserError(
            f"{file}: not valid YAML ({one_line(error, 300)}); restore it, or merge again"
        ) from error
    return text, validate(RunConfig, {} if data is None else data, file).method


def read_text(file: Path) -> str | None:
    """Return the file's text, None if there is no such file."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text (byte {error.start}); restore it, or merge again"
        ) from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); make it readable") from error


def _parse(text: str, file: Path, line: int | None = None) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = line or error.lineno
        raise UserError(
            f"{file}: line {where} is not valid JSON ({error.msg}); restore it, or merge again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not readable as JSON ({error}); restore it, or merge again"
        ) from error
