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

import psutil

from raymerge.apps.experiments.bench import FAST, Bench, Changes, mean_top1, say
from raymerge.apps.experiments.findings import Cell, Curves, Findings, Table
from raymerge.apps.zoo.extras import Extra, build_extras, extras
from raymerge.apps.zoo.recipe import ZooRecipe
from raymerge.config import TaskConfig
from raymerge.config.experiments import FwScaling
from raymerge.config.loading import dump_config
from raymerge.data.sources import labelled_images
from raymerge.errors import DataError, RunError, UserError
from raymerge.files.atomic import write_json
from raymerge.merging.registry import needed_images
from raymerge.runs.merge import MergeResult

METHODS: Mapping[str, Changes] = {
    "task_arithmetic": {"method": {"name": "task_arithmetic", "scaling": 0.3}},
    "ties": {"method": {"name": "ties", "density": 0.2, "scaling": 0.3}},
    "adamerging": {"method": {"name": "adamerging"}, **FAST},
    "fw_hard": {"method": {"name": "fw_hard", "iterations": 20, "step_size": 0.1, "scaling": 1.0}},
    "fw_soft": {"method": {"name": "fw_soft", "iterations": 3}, **FAST},
}
START: Changes = {"method": {"name": "adamerging"}, **FAST}
"""What hard Frank-Wolfe starts from: a merge of the models that the pool starts with."""
MEMORY_MODELS = (10, 20, 40)
LOCATIONS = ("files", "device")
_MEMORY: Changes = {"name": "fw_hard", "iterations": 3, "step_size": 1.0, "images": 16}
_PASS = 16
"""Images in one pass: few, so that it is the vectors and not the activations that are seen."""
_SAMPLE_S = 0.02


@dataclass(frozen=True)
class Candidate:
    """A model that may be added to the pool. ``images``: what a method that needs a model's images
    gets for it; None where there are none."""

    config: TaskConfig
    images: TaskConfig | None = None

    @property
    def with_images(self) -> TaskConfig:
        assert self.images is not None
        given = {
            key: getattr(self.images, key) for key in ("adapt", "classnames", "templates", "head")
        }
        return self.config.model_copy(update=given)


@dataclass(frozen=True)
class Scan:
    """More and more ``candidates`` of one sort, beside the models that the pool starts with.

    ``tested``: the tasks that are tested and that Frank-Wolfe learns for, the same at every point.
    ``own``: those whose models the pool starts with. ``turns``: where else than at 4, 8, 16, …
    candidates it is measured.
    """

    sort: str
    tested: Sequence[TaskConfig]
    own: Sequence[TaskConfig]
    candidates: Sequence[Candidate]
    turns: Sequence[int] = ()

    @property
    def counts(self) -> list[int]:
        return sorted({0, *self.turns, *steps(len(self.candidates))})

    @property
    def title(self) -> str:
        return f"{self.sort} models"

    def tasks(self, count: int) -> tuple[TaskConfig, ...]:
        """With ``count`` candidates in the pool: the tested tasks, without a checkpoint where the
        model is not in it; then the candidates that are no tested task's."""
        pool = [*self.own, *(candidate.config for candidate in self.candidates[:count])]
        names = {task.name for task in pool}
        tested = {task.name for task in self.tested}
        mine = (t if t.name in names else _without_model(t) for t in self.tested)
        return (*mine, *(task for task in pool if task.name not in tested))

    def with_images(self, count: int) -> tuple[TaskConfig, ...] | None:
        """The same where every model has images to learn from; None if one has none."""
        given = {c.config.name: c.with_images for c in self.candidates[:count] if c.images}
        tasks = [given.get(task.name, task) for task in only_models_learn(self.tasks(count))]
        bare = any(task.checkpoint and task.adapt is None for task in tasks)
        return None if bare else tuple(tasks)


def only_models_learn(tasks: Sequence[TaskConfig]) -> tuple[TaskConfig, ...]:
    """A task without a checkpoint is only tested: methods but Frank-Wolfe cannot learn for it."""
    bare = {"adapt": None}
    return tuple(t if t.checkpoint else t.model_copy(update=bare) for t in tasks)


def _without_model(task: TaskConfig) -> TaskConfig:
    return task.model_copy(update={"checkpoint": None})


def run(bench: Bench, options: FwScaling) -> Findings:
    found = scans(bench, options)
    objective = objective_of(bench)
    starts = [_start(bench, scan) for scan in found]
    top1 = [
        _accuracies(bench, scan, objective, start)
        for scan, start in zip(found, starts, strict=True)
    ]
    memory = _memory(bench, _all_models(found), objective)
    return Findings(
        "FW-Merging with more candidate models",
        tables=[
            *(_accuracy_table(scan, rows) for scan, rows in zip(found, top1, strict=True)),
            *_memory_tables(memory),
        ],
        curves=[
            *(_accuracy_curves(scan, rows) for scan, rows in zip(found, top1, strict=True)),
            *_memory_curves(memory),
        ],
        notes=_notes(bench, found, objective, starts, memory),
        data={
            "top1": {
                scan.sort: {str(n): row for n, row in zip(scan.counts, rows, strict=True)}
                for scan, rows in zip(found, top1, strict=True)
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


def scans(bench: Bench, options: FwScaling) -> list[Scan]:
    """Relevant models, first those of the tested tasks that the pool starts without; then
    irrelevant ones. Of the demo world more models are trained; another base's irrelevant ones are
    its models without images. Raises :class:`UserError` where there are none of either."""
    tested = [task for task in bench.base.tasks if task.adapt or task.test]
    merged = [task for task in tested if task.checkpoint]
    own = _own(bench, merged, options)
    others = [Candidate(task, task if task.adapt else None) for task in merged if task not in own]
    others = others[: options.relevant]
    root = _demo_root(bench)
    if root is not None:
        more = _trained(bench, root, extras("relevant", options.relevant - len(others)))
        less = _trained(bench, root, extras("irrelevant", options.irrelevant))
        sort = "irrelevant"
    else:
        bare = [task for task in bench.base.models if task not in merged]
        more, less, sort = [], [Candidate(task) for task in bare], "untested"
    found = [
        Scan("relevant", tested, own, [*others, *more], [len(others)]),
        Scan(sort, tested, merged, less),
    ]
    found = [scan for scan in found if scan.candidates]
    if not found:
        raise UserError(
            "experiment: fw_scaling has no candidates to add; list more tested tasks than "
            "experiment.own in the base config, or models without images (a name and a checkpoint "
            "each), or take `base: demo`"
        )
    return found


def _own(bench: Bench, merged: Sequence[TaskConfig], options: FwScaling) -> list[TaskConfig]:
    """The tested tasks whose models the pool starts with, in the base's order."""
    if isinstance(options.own, int):
        return list(merged[: options.own])
    named = bench.tasks(options.own)
    for task in named:
        if task not in merged:
            raise UserError(
                f"experiment: own: task {task.name!r} has no checkpoint or no images to test; "
                "name tested tasks with a model"
            )
    return [task for task in merged if task in named]


def _demo_root(bench: Bench) -> Path | None:
    root = Path(bench.base.model.arch.removeprefix("local-dir:")).parent
    return root if (root / "zoo.fingerprint").exists() else None


def _all_models(found: Sequence[Scan]) -> list[TaskConfig]:
    """Every model of any pool, once."""
    configs = [c for scan in found for c in scan.own]
    configs += [c.config for scan in found for c in scan.candidates]
    return list({config.name: config for config in configs}.values())


def _trained(bench: Bench, root: Path, wanted: Sequence[Extra]) -> list[Candidate]:
    if not wanted:
        return []
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
    bench: Bench, scan: Scan, objective: str, start: MergeResult | None
) -> list[dict[str, float | None]]:
    """Mean top-1 over the tested tasks of every method, at every count of candidates."""
    methods = bench.methods or METHODS
    found: list[dict[str, float | None]] = []
    for count in scan.counts:
        row: dict[str, float | None] = dict.fromkeys(methods)
        for sort, tasks in _given(scan, count).items():
            wanted = {n: c for n, c in methods.items() if _sort(bench, c, scan.own) == sort}
            if not wanted or tasks is None:
                continue
            with bench.workers(tasks) as group:
                for name, changes in wanted.items():
                    run_name = f"{name}_{scan.sort}_{count}"
                    given = _completed(changes, objective, start, tasks, bench.output / run_name)
                    if sort == "images":
                        given = _shared(bench, changes, scan, tasks)
                    row[name] = mean_top1(bench.merge(run_name, given, group, tasks).scores)
        found.append(row)
    return found


def _given(scan: Scan, count: int) -> dict[str, tuple[TaskConfig, ...] | None]:
    """The tasks by what a method needs: nothing, images for every model, or Frank-Wolfe."""
    tasks = scan.tasks(count)
    return {
        "none": only_models_learn(tasks),
        "images": scan.with_images(count),
        "frank_wolfe": tasks,
    }


def _sort(bench: Bench, changes: Changes, own: Sequence[TaskConfig]) -> str:
    if _frank_wolfe(changes):
        return "frank_wolfe"
    return "none" if needed_images(bench.config(changes, "check", own)) == "none" else "images"


def _shared(bench: Bench, changes: Changes, scan: Scan, tasks: Sequence[TaskConfig]) -> Changes:
    """Where several models learn from one task's images: together as many a step as that task's
    own, so that a step costs no more than Frank-Wolfe's."""
    models = sum(task.checkpoint is not None for task in tasks)
    most = len(scan.tested)
    if models <= most:
        return changes
    batch = bench.config(changes, "check", scan.own).optimizer.batch_size * most // models
    return {**changes, "optimizer": {**changes.get("optimizer", {}), "batch_size": max(1, batch)}}


def _frank_wolfe(changes: Changes) -> bool:
    method = changes.get("method")
    return isinstance(method, Mapping) and str(method.get("name")).startswith("fw_")


def _wants_start(changes: Changes) -> bool:
    """Hard Frank-Wolfe that names no start of its own; soft starts from the pretrained model."""
    method = changes["method"] if _frank_wolfe(changes) else {}
    return method.get("name") == "fw_hard" and "start" not in method


def _start(bench: Bench, scan: Scan) -> MergeResult | None:
    """A merge of the models that the pool starts with, from their own images alone."""
    methods = bench.methods or METHODS
    wanted = any(_wants_start(changes) for changes in methods.values())
    if not wanted or any(task.adapt is None for task in scan.own):
        return None
    tasks = only_models_learn(scan.tasks(0))
    with bench.workers(tasks) as group:
        return bench.merge(f"start_{scan.sort}", START, group, tasks)


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
    if _wants_start(changes) and start is not None:
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


def _accuracy_table(scan: Scan, found: Sequence[Mapping[str, float | None]]) -> Table:
    columns = [f"{len(scan.own)} models", *(f"+{count}" for count in scan.counts[1:])]
    rows: dict[str, list[Cell]] = {name: [each[name] for each in found] for name in found[0]}
    caption = (
        f"Mean top-1 in % over the {len(scan.tested)} tested tasks, the same in every column; the "
        f"pool starts with the models of {', '.join(task.name for task in scan.own)}."
    )
    return Table(f"Accuracy with more {scan.title}", columns, rows, caption)


def _accuracy_curves(scan: Scan, found: Sequence[Mapping[str, float | None]]) -> Curves:
    return Curves(
        f"More {scan.title}",
        x_label="candidate models",
        y_label="mean top-1",
        x=[len(scan.own) + count for count in scan.counts],
        series={name: [each[name] for each in found] for name in found[0]},
    )


# --- memory ------------------------------------------------------------------------------------

Peaks = dict[str, dict[int, int]]


def _memory(bench: Bench, pool: Sequence[TaskConfig], objective: str) -> Peaks:
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
            tasks = listed(pool, models)
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
    found: Sequence[Scan],
    objective: str,
    starts: Sequence[MergeResult | None],
    memory: Peaks,
) -> list[str]:
    steered = {"entropy": "entropy of unlabeled images", "cross_entropy": "labelled cross-entropy"}
    added = (f"{len(s.candidates)} {s.sort} beside {len(s.own)}" for s in found)
    notes = [
        f"base: {bench.base.model.reference}; candidates added: {', '.join(added)}.",
        f"FW-Merging minimises the {steered[objective]} of all tested tasks, whether a model of "
        "the pool was trained for them or not.",
        "AdaMerging can learn only from images of its models' tasks: it gets those of the tested "
        "tasks whose model is in the pool, and for every further model a tested task's again. A "
        "step has at most as many images in all as with one model for each tested task. "
        "Every λ starts at 0.3 however many models there are, as in the paper.",
    ]
    for scan, start in zip(found, starts, strict=True):
        if start is not None and start.top1 is not None:
            notes.append(
                f"{scan.title}: hard FW-Merging starts from an AdaMerging of the first "
                f"{len(scan.own)} models, which scores {start.top1:.1%}; soft from the pretrained "
                "model, with every point's whole pool."
            )
    notes += [_what_they_are(scan, demo=_demo_root(bench) is not None) for scan in found]
    if not memory:
        notes.append("Memory was not measured: this system has no /proc.")
    return notes


def _what_they_are(scan: Scan, *, demo: bool) -> str:
    if scan.sort == "irrelevant":
        return "irrelevant: fine-tuned to tell turned and tinted images apart."
    if scan.sort != "relevant":
        return f"{scan.sort}: the base's models without images."
    others = len(scan.tested) - len(scan.own)
    text = f"relevant: first the models of the {others} tested tasks that the pool starts without"
    more = ", then more of all tested tasks, fine-tuned from other images in a shorter training"
    return f"{text}{more if demo else ''}."
