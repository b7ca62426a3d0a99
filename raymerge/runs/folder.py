"""The output folder of a run: permission to write it, its files, and the record of each step.

The saved state is kept by :mod:`raymerge.runs.state`; the merged weights are written by the merge.

Legend: K tasks, L layers.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from raymerge.config import Config, dump_config, load_config
from raymerge.engine.driver.loop import StepRecord
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import Incident
from raymerge.engine.scores import TaskScore, results_json
from raymerge.errors import RunError, UserError
from raymerge.files.atomic import write_json, write_text
from raymerge.files.output_folder import OutputFolder
from raymerge.files.urls import is_remote, redact, redact_url
from raymerge.merging.registry import describe, merged_checkpoints, method_of
from raymerge.models.checkpoints.digests import remember, sha256
from raymerge.models.checkpoints.locate import files_of, locate
from raymerge.models.convert import HF_FILES, HF_FOLDER, STATE_DICT_FILE
from raymerge.models.resolve import CONFIG_FILE, WEIGHTS_FILE, ResolvedModel
from raymerge.report import write_plots, write_report
from raymerge.runs.model_card import model_card
from raymerge.runs.plan.plan import Plan
from raymerge.runs.state import StateStore, fingerprint
from raymerge.runs.tracking import tracking_files

_CONFIG = "config.yaml"
_JOB_COPY = "working_dir_files"  # the folder of files that `ray job submit` uploads

_OWN_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "lambdas.json",
    "results.json",
    "metrics.jsonl",
    "environment.json",
    "README.md",
    "report.html",
    STATE_DICT_FILE,
    "lambda_heatmap.png",
    "lambda_curves.png",
)


class RunFolder:
    """The output folder of one run and the paths in it."""

    def __init__(self, path: Path) -> None:
        writer = "`raymerge merge`"
        self._output = OutputFolder(path, [_CONFIG], "results.json", writer=writer)
        self.path = self._output.path
        self._prepared = False

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Raise :class:`UserError` unless this run may write here. Writes nothing.

        A folder in use needs ``overwrite``, or ``resume`` and a config that decides the same λ.
        """
        if _JOB_COPY in self.path.parts:
            raise UserError(
                f"output {self.path}: lies in the job's uploaded copy, which Ray deletes; give an "
                "absolute path that every node can reach"
            )
        in_use = self._output.check({"resume": resume, "overwrite": overwrite})
        if in_use and resume:
            self._require_same_run(config)

    def _require_same_run(self, config: Config) -> None:
        if fingerprint(load_config(self.path / _CONFIG)) != fingerprint(config):
            raise UserError(
                f"output {self.path}: --resume continues the run of its config.yaml, and this "
                "config differs from it; resume with that config, or choose another folder"
            )

    def prepare(self, config: Config, *, resume: bool) -> None:
        """Create and claim the folder, set an earlier run's files aside, write the config."""
        if not self._prepared:
            self._output.claim([] if resume else self._own_files())
            write_text(self.path / _CONFIG, dump_config(config))
            self._prepared = True

    def require_own(self) -> None:
        """Raise :class:`RunError` if another driver has taken the folder over since."""
        self._output.require_own()

    def _own_files(self) -> list[Path]:
        """Return what a run has written, but the config and the attempts, which fence drivers."""
        names = {*_OWN_FILES, *(f"{HF_FOLDER}/{name}" for name in HF_FILES)}
        files = [self.path / name for name in sorted(names) if (self.path / name).exists()]
        return [*files, *tracking_files(self.path), *self.state.glob("step-*")]

    def write_model_config(self, resolved: ResolvedModel) -> None:
        """Write open_clip's config, with which the folder loads as ``local-dir:``."""
        self.require_own()
        write_text(self.path / CONFIG_FILE, resolved.config_json)

    def write_lambdas(
        self, tasks: Sequence[str], layers: Sequence[str], lambdas_KL: Tensor
    ) -> None:
        self.require_own()
        values = {"tasks": list(tasks), "layers": list(layers), "values": lambdas_KL.tolist()}
        write_json(self.path / "lambdas.json", values)

    def _lambdas(self, config: Config) -> dict[str, list[float]]:
        """Return the written coefficients by model; empty if the method has none."""
        if not method_of(config.method).rows:
            return {}
        content = json.loads((self.path / "lambdas.json").read_text(encoding="utf-8"))
        return dict(zip(content["tasks"], content["values"], strict=True))

    def write_results(
        self,
        config: Config,
        plan: Plan,
        scores: Mapping[str, TaskScore],
        seconds: Mapping[str, float],
        incidents: Sequence[Incident],
    ) -> None:
        """Write provenance, the model card, results and the report."""
        environment = _environment(config, plan)
        self.require_own()
        write_json(self.path / "environment.json", environment)
        if plan.output_bytes:
            card = model_card(config, plan, scores, environment["hashes"], self._lambdas(config))
            write_text(self.path / "README.md", card)
        results = results_json(config.method.name, scores)
        results["description"] = describe(config.method)
        results["timings"] = {"seconds": dict(seconds)}
        results["incidents"] = [
            {**asdict(incident), "reason": redact(incident.reason)} for incident in incidents
        ]
        write_json(self.path / "results.json", results)
        write_plots(self.path)
        write_report(self.path)
        self._output.finish()


class Recorder:
    """Records each step: a line of metrics, a state every ``every`` steps, the progress bar.

    ``urgent``: returns True to save a state after this step whatever its number. ``log``: called
    with every record. On leaving, also by an error, the newest state is saved, so an interrupted
    run loses no step.
    """

    def __init__(
        self,
        folder: RunFolder,
        store: StateStore[LearningState],
        every: int,
        start: LearningState,
        steps: int,
        urgent: Callable[[], bool] = lambda: False,
        log: Callable[[StepRecord], None] = lambda record: None,
    ) -> None:
        self._folder = folder
        self._store, self._every, self._urgent, self._log = store, every, urgent, log
        self._state, self._saved = start, start.step
        keep_lines(folder.metrics, start.step)
        self._metrics = folder.metrics.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=steps,
            initial=start.step,
            desc="merging",
            unit="step",
            file=sys.stderr,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def __enter__(self) -> Recorder:
        return self

    def observe(self, record: StepRecord, state: LearningState) -> None:
        try:
            self._metrics.write(json.dumps(asdict(record)) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise RunError(
                f"metrics.jsonl: cannot be written: {error.strerror}; "
                "free space, or choose another folder"
            ) from error
        self._state = state  # after its line: an interrupt in between repeats a step
        if state.step % self._every == 0 or self._urgent():
            self._save()
        self._log(record)
        if record.entropy:  # empty once every task has been restored
            mean = sum(record.entropy.values()) / len(record.entropy)
            self._bar.set_postfix(entropy=f"{mean:.4f}", refresh=False)
        self._bar.update()

    def _save(self) -> None:
        if self._state.step > self._saved:
            self._folder.require_own()
            self._store.save(self._state)
            self._saved = self._state.step

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        with suppress(OSError):  # the run has failed already if a line could not be written
            self._metrics.close()
        try:
            self._save()
        except RunError:
            if error is None:
                raise


def keep_lines(metrics: Path, step: int) -> None:
    """Remove the lines of steps after ``step``, which run again, and a torn last line."""
    if not metrics.exists():
        return
    lines = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    write_text(metrics, "".join(lines))


def _environment(config: Config, plan: Plan) -> dict[str, Any]:
    """Return versions, platform and the hash of every file that the merge read."""
    heads = [task.head for task in config.tasks if task.head is not None]
    references = [config.model.reference, *merged_checkpoints(config), *heads]
    located = [plan.resolved.weights, *map(locate, references[1:])]
    files = {
        _file_name(reference, file): file
        for reference, path in zip(references, located, strict=True)
        for file in files_of(path)
    }
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        hashes = list(pool.map(sha256, files.values()))
    remember()
    return {
        "raymerge": _version("raymerge"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": _version("open_clip_torch"),
        "ray": _version("ray"),
        "platform": platform.platform(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "hashes": dict(zip(files, hashes, strict=True)),
    }


def _file_name(reference: str, file: Path) -> str:
    """Return a local file's path, or the URL that it was fetched from."""
    if not is_remote(reference):
        return str(file)
    url = redact_url(reference)
    return url if url.endswith(file.name) else f"{url.rstrip('/')}/{file.name}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
