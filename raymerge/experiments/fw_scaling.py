"""FW-Merging with more and more candidate models: accuracy, and the memory of a merge.

Legend: K candidate models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raymerge.config import TaskConfig
from raymerge.config.experiments import FwScaling
from raymerge.config.loading import dump_config
from raymerge.data.folder import labelled_images
from raymerge.errors import DataError, RunError, UserError
from raymerge.experiments.bench import FAST, Bench, Changes, mean_top1, say
from raymerge.experiments.findings import Cell, Curves, Findings, Table
from raymerge.files import write_json
from raymerge.merging.registry import needed_images
from raymerge.session import MergeResult
from raymerge.zoo.extras import Extra, build_extras, extras
from raymerge.zoo.recipe import ZooRecipe

METHODS: Mapping[str, Changes] = {
    "task_arithmetic": {"method": {"name": "task_arithmetic", "scaling": 0.3}},
    "ties": {"method": {"name": "ties", "density": 0.2, "scaling": 0.3}},
    "adamerging": {"method": {"name": "adamerging"}, **FAST},
    "fw_hard": {"method": {"name": "fw_hard", "iterations": 20, "step_size": 0.1, "scaling": 1.0}},
}
START: Changes = {"method": {"name": "adamerging"}, **FAST}
"""What Frank-Wolfe starts from: a merge of the base's own models."""
MEMORY_MODELS = (10, 20, 40)
LOCATIONS = ("files", "device")
_MEMORY: Changes = {"name": "fw_hard", "iterations": 3, "step_size": 1.0, "images": 16}
_PASS = 16
"""Images in one pass: few, so that it is the vectors and not the activations that are seen."""
_SAMPLE_S = 0.02


@dataclass(frozen=True)
class Candidate:
    """A model that is not the base's own. ``images``: what a method that needs a model's images
    gets for it; None where there are none."""

    config: TaskConfig
    images: TaskConfig | None = None

    @property
    def with_images(self) -> TaskConfig:
        assert self.images is not None
        given = {key: getattr(self.images, key) for key in ("adapt", "classnames", "templates")}
        return self.config.model_copy(update=given)


@dataclass(frozen=True)
class Point:
    """``count`` candidates of one sort beside the base's own models."""

    sort: str
    count: int
    candidates: Sequence[Candidate]

    def title(self, own: int) -> str:
        return f"{own} + {self.count} {self.sort}" if self.count else f"{own}"


def run(bench: Bench, options: FwScaling) -> Findings:
    own = [task for task in bench.base.tasks if task.adapt or task.test]
    sorts = candidates(bench, options)
    points = [Point(s, n, found[:n]) for s, found in sorts.items() for n in steps(len(found))]
    points = [Point("", 0, ()), *points]
    objective = objective_of(bench)
    start = _start(bench, own)
    top1 = _accuracies(bench, own, points, objective, start)
    memory = _memory(bench, own, [c for found in sorts.values() for c in found], objective)
    return Findings(
        "FW-Merging with more candidate models",
        tables=[_accuracy_table(top1, points, len(own)), *_memory_tables(memory)],
        curves=[
            *(_accuracy_curves(top1, sort, points, len(own)) for sort in sorts),
            *_memory_curves(memory),
        ],
        notes=_notes(bench, own, sorts, objective, start, memory),
        data={
            "top1": {
                point.title(len(own)): found for point, found in zip(points, top1, strict=True)
            },
            "peak_anonymous_bytes": {
                location: {str(models): value for models, value in peaks.items()}
                for location, peaks in memory.items()
            },
        },
    )


def steps(most: int) -> list[int]:
    """4, 8, 16, … candidates, and all of them: how many are added in turn."""
    doubled = [4 * 2**i for i in range(most.bit_length()) if 4 * 2**i < most]
    return [*doubled, most] if most else []


# --- candidates --------------------------------------------------------------------------------


def candidates(bench: Bench, options: FwScaling) -> dict[str, list[Candidate]]:
    """By sort. Of the demo world, more models are trained; of another base, they are its models
    without images. Raises :class:`UserError` where there are none."""
    reference = bench.base.model.arch.removeprefix("local-dir:")
    root = Path(reference).parent
    if (root / "zoo.fingerprint").exists():
        wanted = {"irrelevant": options.irrelevant, "relevant": options.relevant}
        found = {
            sort: _trained(bench, root, extras(sort, count))  # type: ignore[arg-type]
            for sort, count in wanted.items()
            if count
        }
    else:
        bare = [task for task in bench.base.models if task.adapt is None and task.test is None]
        found = {"without images": [Candidate(task) for task in bare]} if bare else {}
    if not found:
        raise UserError(
            "experiment: fw_scaling has no candidates to add; list models without images in the "
            "base config's tasks (a name and a checkpoint each), or take `base: demo`"
        )
    return found


def _trained(bench: Bench, root: Path, wanted: Sequence[Extra]) -> list[Candidate]:
    seed = bench.base.seed
    if (root / "zoo.fingerprint").read_text().strip() != ZooRecipe().fingerprint(seed):
        raise UserError(f"experiment: {root} is not the demo world of seed {seed}; set its seed")
    began = time.perf_counter()
    paths = build_extras(root, wanted, seed=seed, workers=min(len(wanted), os.cpu_count() or 1))
    say(f"{len(paths)} more models ({time.perf_counter() - began:.0f} s)")
    images = {task.name: task for task in bench.base.tasks}
    return [
        Candidate(
            TaskConfig(name=extra.name, checkpoint=str(paths[extra.name])), images[extra.task]
        )
        for extra in wanted
    ]


def objective_of(bench: Bench) -> str:
    """``cross_entropy`` where all images to adapt on lie in folders of their class."""
    for task in bench.base.tasks:
        if task.adapt is not None:
            try:
                labelled_images(task.adapt, task.classnames, "adapt")
            except DataError:
                return "entropy"
    return "cross_entropy"


# --- accuracy ----------------------------------------------------------------------------------


def _accuracies(
    bench: Bench,
    own: Sequence[TaskConfig],
    points: Sequence[Point],
    objective: str,
    start: MergeResult | None,
) -> list[dict[str, float | None]]:
    """Mean top-1 over the tested tasks of every method, at every point."""
    methods = bench.methods or METHODS
    found: list[dict[str, float | None]] = []
    for point in points:
        tasks = (*own, *(candidate.config for candidate in point.candidates))
        row: dict[str, float | None] = {}
        with bench.workers(tasks) as group:
            for name, changes in methods.items():
                run_name = f"{name}_{point.sort or 'own'}_{point.count}".replace(" ", "_")
                if _needs_all_images(bench, changes, own):
                    row[name] = _with_images(bench, run_name, changes, own, point)
                    continue
                given = _completed(changes, objective, start, tasks, bench.output / run_name)
                row[name] = mean_top1(bench.merge(run_name, given, group, tasks).scores)
        found.append(row)
    return found


def _needs_all_images(bench: Bench, changes: Changes, own: Sequence[TaskConfig]) -> bool:
    config = bench.config(changes, "check", own)
    return needed_images(config) != "none" and not _frank_wolfe(changes)


def _with_images(
    bench: Bench, name: str, changes: Changes, own: Sequence[TaskConfig], point: Point
) -> float | None:
    """A method that needs images for every model: a candidate gets those of a tested task, and all
    together as many a step as the base's own models; None where candidates have no images."""
    if any(candidate.images is None for candidate in point.candidates):
        return None
    tasks = (*own, *(candidate.with_images for candidate in point.candidates))
    batch = bench.config(changes, name, own).optimizer.batch_size * len(own) // len(tasks)
    optimizer = {**changes.get("optimizer", {}), "batch_size": max(1, batch)}
    with bench.workers(tasks) as group:
        result = bench.merge(name, {**changes, "optimizer": optimizer}, group, tasks)
    return mean_top1(result.scores)


def _frank_wolfe(changes: Changes) -> bool:
    method = changes.get("method")
    return isinstance(method, Mapping) and str(method.get("name")).startswith("fw_")


def _start(bench: Bench, own: Sequence[TaskConfig]) -> MergeResult | None:
    """Of the Frank-Wolfe methods that do not name their own."""
    methods = bench.methods or METHODS
    wanted = [m for m in methods.values() if _frank_wolfe(m) and "start" not in m["method"]]
    if not wanted or any(task.adapt is None for task in own if task.checkpoint):
        return None
    with bench.workers(own) as group:
        return bench.merge("start", START, group, own)


def _completed(
    changes: Changes,
    objective: str,
    start: MergeResult | None,
    tasks: Sequence[TaskConfig],
    folder: Path,
) -> Changes:
    """A Frank-Wolfe method with the base's objective, and its start: no candidate is in it yet."""
    if not _frank_wolfe(changes):
        return changes
    given = {"objective": objective, **changes["method"]}
    if "start" not in given and start is not None:
        given["start"] = _padded(start, tasks, folder)
    return {**changes, "method": given}


def _padded(start: MergeResult, tasks: Sequence[TaskConfig], folder: Path) -> str:
    """The start's ``lambdas.json`` with rows of 0 for the models that it has not seen."""
    assert start.output is not None
    known = json.loads((start.output / "lambdas.json").read_text(encoding="utf-8"))
    rows = dict(zip(known["tasks"], known["values"], strict=True))
    names = [task.name for task in tasks if task.checkpoint is not None]
    zeros = [0.0] * len(known["layers"])
    path = folder.parent / "runs" / "starts" / folder.name / "lambdas.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [rows.get(name, zeros) for name in names]
    write_json(path, {"tasks": names, "layers": known["layers"], "values": values})
    return str(path)


def _accuracy_table(
    found: Sequence[Mapping[str, float | None]], points: Sequence[Point], own: int
) -> Table:
    columns = [point.title(own) for point in points]
    rows: dict[str, list[Cell]] = {name: [each[name] for each in found] for name in found[0]}
    caption = "Mean top-1 in % over the tested tasks, which are the same in every column."
    return Table("Accuracy against the candidate models", columns, rows, caption)


def _accuracy_curves(
    found: Sequence[Mapping[str, float | None]], sort: str, points: Sequence[Point], own: int
) -> Curves:
    here = [i for i, point in enumerate(points) if point.sort in ("", sort)]
    return Curves(
        f"More candidates: {sort}",
        x_label="candidate models",
        y_label="mean top-1",
        x=[own + points[i].count for i in here],
        series={name: [found[i][name] for i in here] for name in found[0]},
    )


# --- memory ------------------------------------------------------------------------------------

Peaks = dict[str, dict[int, int]]


def _memory(
    bench: Bench, own: Sequence[TaskConfig], more: Sequence[Candidate], objective: str
) -> Peaks:
    """Location of the vectors → K → peak anonymous bytes of a whole merge; {} without /proc."""
    if not Path("/proc/self/status").exists():
        return {}
    peaks: Peaks = {}
    for location in LOCATIONS:
        peaks[location] = {}
        for models in MEMORY_MODELS:
            changes = {
                "method": {**_MEMORY, "objective": objective},
                "vectors": {"location": location},
                "cluster": {"workers": 0, "micro_batch": _PASS},
            }
            tasks = listed([*own, *(candidate.config for candidate in more)], models)
            peaks[location][models] = _peak(bench, f"memory_{location}_{models}", changes, tasks)
    return peaks


def listed(tasks: Sequence[TaskConfig], models: int) -> list[TaskConfig]:
    """``models`` models, without tests: the tasks' own, then the same files under other names."""
    untested = [task.model_copy(update={"test": None}) for task in tasks if task.checkpoint]
    again = [
        TaskConfig(name=f"{task.name}-{i}", checkpoint=task.checkpoint)
        for i in range(1, -(-models // len(untested)))
        for task in untested
    ]
    return [*untested, *again][:models]


def _peak(bench: Bench, name: str, changes: Changes, tasks: Sequence[TaskConfig]) -> int:
    config = bench.config(changes, name, tasks)
    path = bench.output / "runs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(config), encoding="utf-8")
    began = time.perf_counter()
    command = [sys.executable, "-m", "raymerge", "merge", str(path), "--overwrite"]
    peak = peak_anonymous_bytes(command)
    bench.seconds[name] = time.perf_counter() - began
    say(f"{name}: {peak / 1e6:.0f} MB ({bench.seconds[name]:.0f} s)")
    return peak


def peak_anonymous_bytes(command: Sequence[str]) -> int:
    """Of a process and its children, sampled from /proc; :class:`RunError` where it fails."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(_SAMPLE_S)
    errors = process.communicate()[1]
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"experiment: {' '.join(command[1:])}: {last}")
    return peak


def _anonymous_bytes(pid: int) -> int:
    total = 0
    try:
        tree = psutil.Process(pid)
        for member in [tree, *tree.children(recursive=True)]:
            lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    except (psutil.Error, OSError):
        pass  # it has just ended
    return total * 1024


def _memory_tables(memory: Peaks) -> list[Table]:
    if not memory:
        return []
    first, last = MEMORY_MODELS[0], MEMORY_MODELS[-1]
    rows: dict[str, list[Cell]] = {
        f"vectors.location: {location}": [
            *(f"{peaks[models] / 1e6:.0f} MB" for models in MEMORY_MODELS),
            f"{peaks[last] / peaks[first] - 1:+.1%}",
        ]
        for location, peaks in memory.items()
    }
    columns = [*(f"K = {models}" for models in MEMORY_MODELS), f"{last} against {first}"]
    caption = "Peak anonymous memory of a whole `raymerge merge` with fw_hard, Python included."
    return [Table("Memory against the candidate models", columns, rows, caption)]


def _memory_curves(memory: Peaks) -> list[Curves]:
    if not memory:
        return []
    series: dict[str, list[float | None]] = {
        location: [peaks[models] / 1e6 for models in MEMORY_MODELS]
        for location, peaks in memory.items()
    }
    title = "Memory of a merge"
    return [Curves(title, "candidate models", "peak, MB", list(MEMORY_MODELS), series)]


def _notes(
    bench: Bench,
    own: Sequence[TaskConfig],
    sorts: Mapping[str, Any],
    objective: str,
    start: MergeResult | None,
    memory: Peaks,
) -> list[str]:
    steered = {"entropy": "entropy of unlabeled images", "cross_entropy": "labelled cross-entropy"}
    notes = [
        f"base: {len(own)} models of {bench.base.model.reference}; more candidates: "
        + ", ".join(f"{len(found)} {sort}" for sort, found in sorts.items()),
        f"FW-Merging minimises the {steered[objective]} of the tested tasks.",
        "AdaMerging needs images for every model: a further one gets those of a tested task, and a "
        "step has as many images in all as with the base's own models. Every λ starts at 0.3 "
        "however many models there are, as in the paper: so many more start from a worse merge.",
    ]
    if start is not None and start.lambdas is not None:
        total, top1 = float(start.lambdas.sum(0).mean()), start.top1
        scored = "" if top1 is None else f" and scores {top1:.1%}"
        notes.append(
            "FW-Merging starts from an AdaMerging of the base's own models, in which the further "
            f"candidates have λ = 0{scored}: compare its row with that. The start's λ add up to "
            f"{total:.1f} in the mean over the layers, a single model's to 1, so steps toward "
            "models also shrink what was learned."
        )
    if "relevant" in sorts:
        notes.append(
            "relevant: fine-tuned on the tested tasks from other images, in a shorter training "
            "than the base's experts; irrelevant: to tell turned and tinted images apart."
        )
    if not memory:
        notes.append("Memory was not measured: this system has no /proc.")
    return notes
