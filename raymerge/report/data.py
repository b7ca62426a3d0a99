"""What a report draws, read from a folder and validated once.

Shapes: K tasks, L layers, N steps, M scalings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from raymerge.errors import UserError, one_line
from raymerge.report.reading import Node, read_json, read_json_lines, read_text

Measurements = tuple[float | None, ...]


@dataclass(frozen=True)
class Score:
    """A model on one task, or on average; None where the file has no value."""

    top1: float | None = None
    """Accuracy in [0, 1]."""
    loss: float | None = None
    entropy: float | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Results:
    method: str
    average: Score
    tasks: Mapping[str, Score]


@dataclass(frozen=True)
class Lambdas:
    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    """K rows of L."""

    @property
    def means(self) -> tuple[float, ...]:
        """K means over the layers."""
        return tuple(sum(row_L) / len(row_L) for row_L in self.values)

    @property
    def task_wise(self) -> bool:
        """One λ per task: there is no layer axis to draw."""
        return len(self.layers) == 1


@dataclass(frozen=True)
class Metrics:
    """The course of a learned run; every sequence has the length N of ``steps``."""

    steps: tuple[int, ...]
    loss: Measurements
    entropy: Mapping[str, Measurements]
    lambdas: Mapping[str, Measurements]
    """Each task's λ, averaged over its layers."""
    seconds: Measurements


@dataclass(frozen=True)
class MethodSettings:
    """The part of ``config.yaml`` that a headline needs; "" where it does not say."""

    name: str = ""
    granularity: str = ""
    task_vectors: str = ""
    objective: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from: its config, the software, the inputs and the time it took."""

    config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    incidents: Sequence[tuple[str, str]] = ()
    """What was under way, and the failure that the run survived then."""


@dataclass(frozen=True)
class Run:
    folder: Path
    results: Results | None
    lambdas: Lambdas | None
    metrics: Metrics | None
    settings: MethodSettings
    provenance: Provenance


@dataclass(frozen=True)
class Scan:
    """Mean accuracy of task arithmetic at each scaling (AdaMerging paper, Fig. 1)."""

    scalings: tuple[float, ...]
    """M values of the one λ, ascending."""
    top1: tuple[float, ...]
    """M accuracies in [0, 1]."""

    @property
    def best(self) -> tuple[float, float]:
        """(scaling, top1) of the best uniform λ, the smaller λ at a tie."""
        return max(zip(self.scalings, self.top1, strict=True), key=lambda p: (p[1], -p[0]))


@dataclass(frozen=True)
class Comparison:
    folder: Path
    methods: Mapping[str, Results]
    runs: Mapping[str, Run]
    """The learned methods that left a run folder."""
    scan: Scan | None
    notes: tuple[str, ...]
    provenance: Provenance


@dataclass(frozen=True)
class FoundTable:
    """A table of an experiment; numbers are fractions, to be read as percentages."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str | float | None, ...]]
    caption: str


@dataclass(frozen=True)
class FoundCurves:
    """Lines of an experiment over one axis."""

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    series: Mapping[str, Measurements]
    caption: str


@dataclass(frozen=True)
class Experiment:
    folder: Path
    title: str
    tables: tuple[FoundTable, ...]
    curves: tuple[FoundCurves, ...]
    notes: tuple[str, ...]
    methods: frozenset[str]
    """Names that its config gives to methods."""
    provenance: Provenance


def load(folder: Path) -> Run | Comparison | Experiment:
    """The experiment, comparison or run in ``folder``; ``UserError`` if there is none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give the output folder of a merge or a demo, or of an "
            "experiment"
        )
    experiment = read_json(folder / "experiment.json")
    if experiment is not None:
        return _experiment(folder, experiment)
    comparison = read_json(folder / "comparison.json")
    if comparison is not None:
        return _comparison(folder, comparison)
    run = load_run(folder)
    if run.results is None and run.lambdas is None and run.metrics is None:
        raise UserError(
            f"{folder}: nothing to draw, for there is no experiment.json, comparison.json, "
            "results.json, lambdas.json or metrics.jsonl; give the output folder of a merge or a "
            "demo, or of an experiment"
        )
    return run


def load_run(folder: Path) -> Run:
    """Whatever a merge left in ``folder``; absent files become None."""
    results = read_json(folder / "results.json")
    lambdas = read_json(folder / "lambdas.json")
    config = read_text(folder / "config.yaml") or ""
    return Run(
        folder=folder,
        results=None if results is None else parse_results(results),
        lambdas=None if lambdas is None else _lambdas(lambdas),
        metrics=_metrics(read_json_lines(folder / "metrics.jsonl")),
        settings=_settings(config, folder / "config.yaml"),
        provenance=_provenance(folder, config, results),
    )


def parse_results(node: Node, method: str = "") -> Results:
    """One method's results; what the average lacks is the mean of the tasks that have it."""
    tasks = {name: _score(task) for name, task in node["tasks"].members()}
    average = _or_mean(_score(node["average"]), list(tasks.values()))
    name = node["method"].text() if node["method"].present else method
    return Results(name, average, tasks)


def _or_mean(average: Score, tasks: Sequence[Score]) -> Score:
    return Score(
        top1=_first(average.top1, _mean([task.top1 for task in tasks])),
        loss=_first(average.loss, _mean([task.loss for task in tasks])),
        entropy=_first(average.entropy, _mean([task.entropy for task in tasks])),
        examples=average.examples,
    )


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _score(node: Node) -> Score:
    top1, examples = node["top1"], node["examples"]
    return Score(
        top1=top1.number(0, 1) if top1.present else None,
        loss=node["loss"].measurement(),
        entropy=node["entropy"].measurement(),
        examples=examples.whole() if examples.present else None,
    )


def _lambdas(node: Node) -> Lambdas:
    tasks = tuple(name.text() for name in node["tasks"].elements())
    layers = tuple(name.text() for name in node["layers"].elements())
    rows = [row.elements() for row in node["values"].elements()]
    if not tasks or not layers:
        raise UserError(f"{node.file}: has {len(tasks)} tasks and {len(layers)} layers, not one")
    if len(rows) != len(tasks) or any(len(row) != len(layers) for row in rows):
        lengths = sorted({len(row) for row in rows})
        raise UserError(
            f"{node.file}: values must be {len(tasks)} rows (tasks) of {len(layers)} numbers "
            f"(layers), not {len(rows)} rows of length {lengths}"
        )
    values_KL = tuple(tuple(cell.number() for cell in row) for row in rows)
    return Lambdas(tasks, layers, values_KL)


def _metrics(lines: list[Node]) -> Metrics | None:
    """Lines in step order; a resumed run repeats steps, and the later line of a step holds."""
    by_step = {line["step"].whole(): line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]
    if not ordered:
        return None
    return Metrics(
        steps=tuple(sorted(by_step)),
        loss=tuple(line["loss"].measurement() for line in ordered),
        entropy=_by_task([line["entropy"] for line in ordered]),
        lambdas=_by_task([line["lambdas"] for line in ordered]),
        seconds=tuple(line["seconds"].measurement() for line in ordered),
    )


def _by_task(nodes: list[Node]) -> dict[str, Measurements]:
    """task → N measurements, tasks in order of their first appearance."""
    tasks = dict.fromkeys(task for node in nodes for task in node.names())
    return {task: tuple(node[task].measurement() for node in nodes) for task in tasks}


def _settings(config: str, file: Path) -> MethodSettings:
    import yaml

    from raymerge.config.loading import YAML_ERRORS

    try:
        root = yaml.safe_load(config)
    except YAML_ERRORS as error:
        raise UserError(f"{file}: not valid YAML ({one_line(error, 300)})") from error
    method = root.get("method") if isinstance(root, dict) else None
    if isinstance(method, str):
        return MethodSettings(name=method)
    if not isinstance(method, dict):
        return MethodSettings()
    keys = ("name", "granularity", "task_vectors", "objective")
    return MethodSettings(**{key: str(method.get(key) or "") for key in keys})


def _comparison(folder: Path, node: Node) -> Comparison:
    methods = {name: parse_results(each, name) for name, each in node["methods"].members()}
    if not methods:
        raise UserError(f"{node.file}: nothing to draw, for methods is empty")
    notes = node["notes"].elements() if node["notes"].present else []
    return Comparison(
        folder=folder,
        methods=methods,
        runs=_method_runs(folder / "runs", methods),
        scan=parse_scan(node["uniform_scan"]),
        notes=tuple(note.text() for note in notes),
        provenance=_provenance(folder, read_text(folder / "config.yaml") or "", node),
    )


def _method_runs(parent: Path, methods: Iterable[str]) -> dict[str, Run]:
    """The run folders of ``methods``. Names match existing folders, so none leads elsewhere."""
    folders = {p.name: p for p in parent.iterdir() if p.is_dir()} if parent.is_dir() else {}
    runs = {name: load_run(folders[name]) for name in methods if name in folders}
    return {name: run for name, run in runs.items() if run.lambdas or run.metrics}


def _experiment(folder: Path, node: Node) -> Experiment:
    import yaml

    config = node["config"].value
    return Experiment(
        folder=folder,
        title=node["title"].text(),
        tables=tuple(_found_table(each) for each in _elements(node["tables"])),
        curves=tuple(_found_curves(each) for each in _elements(node["curves"])),
        notes=tuple(each.text() for each in _elements(node["notes"])),
        methods=frozenset(node["config"]["methods"].names()),
        provenance=replace(
            _provenance(
                folder, yaml.safe_dump(config, sort_keys=False) if config is not None else "", node
            ),
            versions=_experiment_versions(folder),
        ),
    )


def _experiment_versions(folder: Path) -> dict[str, str]:
    """Of the software: the experiment's own record, or else that of the first of its runs."""
    files = [folder / "environment.json", *sorted(folder.glob("runs/**/environment.json"))]
    first = next((file for file in files if file.exists()), None)
    return {} if first is None else dict(_provenance(first.parent, "", None).versions)


def _elements(node: Node) -> list[Node]:
    return node.elements() if node.present else []


def _found_table(node: Node) -> FoundTable:
    columns = tuple(each.text() for each in node["columns"].elements())
    rows = {name: tuple(map(_cell, row.elements())) for name, row in node["rows"].members()}
    for name, row in rows.items():
        if len(row) != len(columns):
            raise UserError(
                f"{node.file}: {node.key}.rows.{name} has {len(row)} cells, but there are "
                f"{len(columns)} columns"
            )
    return FoundTable(node["title"].text(), columns, rows, _caption(node))


def _cell(node: Node) -> str | float | None:
    return node.value if isinstance(node.value, str) else node.measurement()


def _found_curves(node: Node) -> FoundCurves:
    x = tuple(each.number() for each in node["x"].elements())
    series = {
        name: tuple(each.measurement() for each in line.elements())
        for name, line in node["series"].members()
    }
    for name, line in series.items():
        if len(line) != len(x):
            raise UserError(
                f"{node.file}: {node.key}.series.{name} has {len(line)} points, but x has {len(x)}"
            )
    labels = (node["title"].text(), node["x_label"].text(), node["y_label"].text())
    return FoundCurves(*labels, x, series, _caption(node))


def _caption(node: Node) -> str:
    return node["caption"].text() if node["caption"].present else ""


def parse_scan(node: Node) -> Scan | None:
    if not node.present:
        return None
    scalings = tuple(each.number() for each in node["scalings"].elements())
    top1 = tuple(each.number(0, 1) for each in node["top1"].elements())
    if len(scalings) != len(top1) or not scalings:
        raise UserError(
            f"{node.file}: {node.key} must have as many scalings as top1 values, and at least "
            f"one, not {len(scalings)} and {len(top1)}"
        )
    pairs = sorted(zip(scalings, top1, strict=True))
    return Scan(tuple(s for s, _ in pairs), tuple(t for _, t in pairs))


def _provenance(folder: Path, config: str, results: Node | None) -> Provenance:
    environment = read_json(folder / "environment.json") or Node({}, folder / "environment.json")
    timings = results["timings"] if results else Node({}, folder)
    hashes = {**_flat(environment["hashes"]), **_flat(environment["sources"]["hashes"])}
    versions = [(key, node) for key, node in environment.members() if key not in _HASHES]
    return Provenance(
        config=config,
        versions={key: text for name, node in versions for key, text in _flat(node, name).items()},
        hashes=hashes,
        seconds=_seconds(timings["seconds"] if timings["seconds"].present else timings),
        incidents=_incidents(results["incidents"]) if results else (),
    )


def _incidents(node: Node) -> list[tuple[str, str]]:
    """In their order; a run from before there were any has none."""
    found = node.elements() if node.present else []
    return [(one["what"].text(), f"a worker {one['reason'].text()}") for one in found]


_HASHES = ("hashes", "sources")


def _flat(node: Node, name: str = "") -> dict[str, str]:
    """Leaves as text, keyed by their path: {"a": {"b": 1}} → {"a · b": "1"}."""
    if not isinstance(node.value, dict):
        return {name: str(node.value)} if node.present and name else {}
    inner = [(f"{name} · {key}" if name else key, child) for key, child in node.members()]
    return {path: text for key, child in inner for path, text in _flat(child, key).items()}


def _seconds(node: Node, name: str = "") -> dict[str, float]:
    """Leaves as seconds, keyed by their path; a nested "seconds" adds nothing to the path."""
    if not isinstance(node.value, dict):
        return {name: node.number(0)} if node.present else {}
    flat: dict[str, float] = {}
    for key, child in node.members():
        part = "" if key == "seconds" else key
        flat |= _seconds(child, " · ".join(filter(None, (name, part))))
    return flat
