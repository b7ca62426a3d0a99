"""A finished folder as a report sees it: a run, a comparison or an experiment.

``load`` tells which it is and reads the files that belong together. What each file may hold is
checked in ``records``; nothing here draws.

Shapes: K tasks, N steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from raymerge.errors import UserError
from raymerge.report.records import (
    ComparisonRecord,
    Environment,
    ExperimentRecord,
    FindingsCurves,
    FindingsTable,
    Incident,
    Lambdas,
    Measurements,
    MethodSettings,
    Results,
    Scan,
    Step,
    Timings,
    read,
    read_config,
    read_steps,
    read_text,
)


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
class Provenance:
    """The origin of a result: its config, the software, the inputs and the time it took."""

    config: str
    versions: Mapping[str, str]
    hashes: Mapping[str, str]
    seconds: Mapping[str, float]
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True)
class Run:
    folder: Path
    results: Results | None
    lambdas: Lambdas | None
    metrics: Metrics | None
    settings: MethodSettings
    provenance: Provenance


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
class Experiment:
    folder: Path
    title: str
    tables: tuple[FindingsTable, ...]
    curves: tuple[FindingsCurves, ...]
    notes: tuple[str, ...]
    methods: frozenset[str]
    """The names that its config gives to methods."""
    provenance: Provenance


def load(folder: Path) -> Run | Comparison | Experiment:
    """Return the experiment, comparison or run in ``folder``; ``UserError`` if there is none."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give the output folder of a merge or a demo, or of an "
            "experiment"
        )
    if experiment := read(ExperimentRecord, folder / "experiment.json"):
        return _experiment(folder, experiment)
    if comparison := read(ComparisonRecord, folder / "comparison.json"):
        return _comparison(folder, comparison)
    run = load_run(folder)
    if run.results is None and run.lambdas is None and run.metrics is None:
        raise UserError(
            f"{folder}: nothing to draw: there is no experiment.json, comparison.json, "
            "results.json, lambdas.json or metrics.jsonl; give the output folder of a merge or a "
            "demo, or of an experiment"
        )
    return run


def load_run(folder: Path) -> Run:
    """Return what a merge left in ``folder``; absent files become None."""
    results = read(Results, folder / "results.json")
    lambdas = read(Lambdas, folder / "lambdas.json")
    config, settings = read_config(folder / "config.yaml")
    incidents = results.incidents if results else ()
    provenance = _provenance(folder, config, results.timings if results else Timings(), incidents)
    metrics = _metrics(read_steps(folder / "metrics.jsonl"))
    return Run(folder, results, lambdas, metrics, settings, provenance)


def _provenance(
    folder: Path, config: str, timings: Timings, incidents: tuple[Incident, ...] = ()
) -> Provenance:
    environment = _environment(folder)
    return Provenance(config, environment.versions, environment.hashes, timings.seconds, incidents)


def _environment(folder: Path) -> Environment:
    return read(Environment, folder / "environment.json") or Environment()


def _metrics(lines: Iterable[Step]) -> Metrics | None:
    """Return the lines in step order; a resumed run repeats steps, and the later line holds."""
    by_step = {line.step: line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]
    if not ordered:
        return None
    return Metrics(
        steps=tuple(line.step for line in ordered),
        loss=tuple(line.loss for line in ordered),
        entropy=_by_task([line.entropy for line in ordered]),
        lambdas=_by_task([line.lambdas for line in ordered]),
        seconds=tuple(line.seconds for line in ordered),
    )


def _by_task(lines: list[Mapping[str, float | None]]) -> dict[str, Measurements]:
    """Return each task's N measurements, tasks in order of their first appearance."""
    tasks = dict.fromkeys(task for line in lines for task in line)
    return {task: tuple(line.get(task) for line in lines) for task in tasks}


def _comparison(folder: Path, record: ComparisonRecord) -> Comparison:
    return Comparison(
        folder=folder,
        methods=record.methods,
        runs=_method_runs(folder / "runs", record.methods),
        scan=record.uniform_scan,
        notes=record.notes,
        provenance=_provenance(folder, read_text(folder / "config.yaml") or "", record.timings),
    )


def _method_runs(parent: Path, methods: Iterable[str]) -> dict[str, Run]:
    """Return the runs of ``methods``. Names match existing folders, so none leads elsewhere."""
    folders = {p.name: p for p in parent.iterdir() if p.is_dir()} if parent.is_dir() else {}
    runs = {name: load_run(folders[name]) for name in methods if name in folders}
    return {name: run for name, run in runs.items() if run.lambdas or run.metrics}


def _experiment(folder: Path, record: ExperimentRecord) -> Experiment:
    import yaml

    methods = record.config.get("methods")
    config = yaml.safe_dump(record.config, sort_keys=False) if record.config else ""
    provenance = _provenance(folder, config, record.timings)
    return Experiment(
        folder=folder,
        title=record.title,
        tables=record.tables,
        curves=record.curves,
        notes=record.notes,
        methods=frozenset(methods if isinstance(methods, dict) else ()),
        provenance=replace(provenance, versions=_experiment_versions(folder)),
    )


def _experiment_versions(folder: Path) -> dict[str, str]:
    """Return the versions that the experiment recorded, or else those of the first of its runs."""
    files = [folder / "environment.json", *sorted(folder.glob("runs/**/environment.json"))]
    first = next((file for file in files if file.exists()), None)
    return {} if first is None else _environment(first.parent).versions
