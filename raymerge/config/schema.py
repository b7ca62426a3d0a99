"""The sections of the config: typed, frozen, validated once. Other rooms see no dicts."""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from raymerge.config.finetune import FinetuneConfig
from raymerge.config.methods import AdaMerging, Betas, Frozen, MethodConfig, Reference
from raymerge.files.urls import is_remote, redact

VectorDtype = Literal["float32", "bfloat16"]
VectorLocation = Literal["device", "host", "disk", "files"]

_TASK_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MODEL_SCHEMES = ("local-dir:", "hf-hub:")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class ModelConfig(Frozen):
    """The pretrained model θ₀: its architecture and its weights."""

    arch: str
    """An open_clip architecture, a config JSON, ``local-dir:DIR``, ``hf-hub:ORG/NAME``, or the
    URL of a folder."""
    pretrained: str | None = None
    """An open_clip pretrained tag or a checkpoint file; not with ``local-dir:`` or ``hf-hub:``."""

    _other_weights: str | None = PrivateAttr(default=None)

    @property
    def other_weights(self) -> str | None:
        """The file that takes the place of the model's own weights; see :meth:`with_weights`."""
        return self._other_weights

    def with_weights(self, reference: str) -> ModelConfig:
        """Return the same architecture and preprocessing with the weights of another file."""
        other = self.model_copy()
        other._other_weights = reference
        return other

    @property
    def is_folder(self) -> bool:
        return self.arch.startswith(_MODEL_SCHEMES) or is_remote(self.arch)

    @property
    def reference(self) -> str:
        """The place of the weights: a file, a folder, a hub id or an open_clip tag."""
        return self.arch if self.pretrained is None else self.pretrained

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> ModelConfig:
        if self.is_folder and self.pretrained is not None:
            raise ValueError(
                f"{self.arch} already holds the weights; remove model.pretrained={self.pretrained}"
            )
        if not self.is_folder and self.pretrained is None:
            raise ValueError(
                f"model.arch={self.arch} needs model.pretrained: an open_clip tag or a checkpoint"
                f"{self._other_forms()}"
            )
        return self

    def _other_forms(self) -> str:
        """Return how to write a model that brings its architecture, where ``arch`` may be one."""
        if self.arch.endswith(_WEIGHT_SUFFIXES):
            return f" (write model: {{arch: ViT-B-32, pretrained: {self.arch}}}, or its own arch)"
        forms = [f"for a folder write local-dir:{self.arch}"] * bool(re.search(r"[/.~]", self.arch))
        if _HUB_ID.fullmatch(self.arch):
            forms.insert(0, f"for a model of the Hugging Face hub write hf-hub:{self.arch}")
        return f" ({', '.join(forms)})" if forms else ""


class TaskConfig(Frozen):
    """One task: its expert, its classes, its images.

    A task without a checkpoint is only tested, or Frank-Wolfe learns for it. A task without
    images is only merged.
    """

    name: str
    checkpoint: Reference | None = None
    classnames: tuple[str, ...] = ()
    """In class order; in YAML a list, or a text file with one name per line. Images need them."""
    templates: tuple[str, ...] = Field(default=("a photo of a {}.",), min_length=1)
    head: Reference | None = None
    """A saved classifier of the task; default: the zero-shot head of the names and templates."""
    adapt: Reference | None = None
    """Unlabeled images: a folder, flat or with one folder per class; or a stored data set."""
    test: Reference | None = None
    """Labelled images: one folder per class, named as in ``classnames``; or a data set."""
    train: Reference | None = None
    """Labelled images to train its expert on, for ``raymerge finetune``; laid out as ``test``."""

    @model_validator(mode="after")
    def _has_what_it_is_for(self) -> TaskConfig:
        if not any((self.checkpoint, self.adapt, self.test, self.train)):
            raise ValueError(
                f"task {self.name!r} has neither a checkpoint to merge nor test images"
            )
        if not self.classnames and any((self.adapt, self.test, self.train)):
            raise ValueError(f"task {self.name!r} has images but no classnames; list its classes")
        if not self.classnames and self.head is not None:
            raise ValueError(
                f"task {self.name!r} has a head but no classnames; list its classes in the order "
                "of the head's rows"
            )
        return self

    @field_validator("classnames")
    @classmethod
    def _classes_differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) == 1:
            raise ValueError(f"{names[0]!r} is the only class; list at least 2")
        return names

    @field_validator("name")
    @classmethod
    def _name_is_a_plain_word(cls, name: str) -> str:
        if not _TASK_NAME.fullmatch(name) or set(name) == {"."}:
            raise ValueError(f"{name!r} is not a task name: use letters, digits, '.', '_' and '-'")
        return name

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place_for_the_class(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} needs exactly one {{}} for the class name")
            if _fields(template) != [("", "", None)]:  # checked before it is ever formatted
                raise ValueError(
                    f"template {template!r} has braces besides {{}}; write them as {{{{ and }}}}"
                )
        return templates


def _fields(template: str) -> list[tuple[str, str | None, str | None]]:
    """Return name, format and conversion of each field; none if the braces do not match."""
    try:
        parts = Formatter().parse(template)
        return [(name, spec, how) for _, name, spec, how in parts if name is not None]
    except ValueError:
        return []


class OptimizerConfig(Frozen):
    """Adam on λ. One step uses ``batches`` × ``batch_size`` images of every task."""

    name: Literal["adam"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    betas: Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=16, ge=1)
    batches: int = Field(default=1, ge=1)
    schedule: Literal["constant", "cosine"] = "constant"
    """``cosine``: the rate falls from ``lr`` to 0 over ``steps``, along half a cosine."""
    sharpness: float = Field(default=0.0, ge=0)
    """Sharpness-aware steps: the gradient is taken this far up the slope. Twice the work."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """The reaction to a step with a NaN or infinite loss or gradient. ``skip``: keep λ and the
    moments and continue with the next step's images; ten in a row stop the run."""

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.batches


class ClusterConfig(Frozen):
    """The workers: ``workers: 0`` computes in this process, otherwise they are Ray actors."""

    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    shards: int = Field(default=1, ge=1)
    """Workers that split one copy of the task vectors; ``workers`` must be a multiple of it."""
    address: str | None = None
    """A running Ray cluster; default: RAY_ADDRESS if set, else a private local one."""
    cpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    micro_batch: Literal["auto", "all"] | Annotated[int, Field(ge=1)] = "auto"
    """Most images in one forward and backward pass. ``auto``: as many as keep the activations
    within half a gigabyte on a CPU, all of a worker's images on a GPU."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """Fewest workers to continue with when others cannot be restarted; default: ``shards``, one
    copy of the task vectors as planned. If set, a run also starts with fewer than ``workers``."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    load_timeout_s: float = Field(default=3600.0, gt=0)
    step_timeout_s: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Longest step of workers that answer heartbeats. ``auto``: five times the median of the last
    steps and at least ten seconds; ten minutes for the first."""
    hang_timeout_s: float = Field(default=60.0, gt=0)
    """A worker that answers no heartbeat for this long is killed and restarted."""
    replace_timeout_s: float = Field(default=60.0, ge=0)
    """Wait for the restart of a lost worker before the run continues with fewer."""
    max_worker_failures: Annotated[int, Field(ge=0)] | None = 10
    """Most failures of running workers (died, hung, lost their node) in one run; None: no limit."""
    max_start_failures: Annotated[int, Field(ge=0)] | None = 5
    """Most failures of workers before they were ready; None: no limit."""
    max_preemptions: Annotated[int, Field(ge=0)] | None = None
    """Most nodes that the cloud takes back with notice; None: no limit."""

    @model_validator(mode="after")
    def _min_workers_are_no_more(self) -> ClusterConfig:
        if isinstance(self.workers, int) and (self.min_workers or 0) > self.workers > 0:
            raise ValueError(
                f"min_workers={self.min_workers} is more than workers={self.workers}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _workers_fill_groups(self) -> ClusterConfig:
        if self.shards > 1 and isinstance(self.workers, int) and self.workers % self.shards:
            raise ValueError(
                f"workers={self.workers} is not a multiple of shards={self.shards}: "
                f"W workers = G groups x S shards; try workers={self.shards}"
            )
        if self.shards > 1 and self.workers == 0:
            raise ValueError(
                f"workers=0 runs in this process, which cannot hold {self.shards} shards"
            )
        return self


class VectorsConfig(Frozen):
    """The storage of a worker's task vectors: K times the model's size, read twice a step."""

    dtype: VectorDtype | Literal["auto"] = "auto"
    """``auto``: float32 where it fits into memory, else bfloat16 (half the bytes)."""
    location: VectorLocation | Literal["auto"] = "auto"
    """``device``: the memory of the model's device. ``host``: the machine's memory, copied to the
    GPU block by block. ``disk``: a memory-mapped file. ``auto``: the first of these that fits.
    ``files``: no storage; the checkpoints are read again in every step."""
    folder: Reference | None = None
    """The folder of ``disk``'s file, which is removed with the worker; default: the temporary."""

    @model_validator(mode="after")
    def _files_are_as_they_are(self) -> VectorsConfig:
        if self.location == "files" and self.dtype == "bfloat16":
            raise ValueError("location: files keeps no vectors, so dtype: bfloat16 saves nothing")
        return self


class CardConfig(Frozen):
    """Facts for the model card that raymerge cannot know."""

    license: str | None = None
    """As the hub names it: apache-2.0, mit, cc-by-4.0 …"""
    authors: tuple[str, ...] = ()

    @field_validator("license", "authors")
    @classmethod
    def _holds_no_credential(
        cls, value: str | tuple[str, ...] | None
    ) -> str | tuple[str, ...] | None:
        """Redact the URLs: the model card is published."""
        if isinstance(value, tuple):
            return tuple(map(redact, value))
        return value and redact(value)


class WandbConfig(Frozen):
    """Weights & Biases. The key comes from ``wandb login`` or WANDB_API_KEY, never from here."""

    project: str = Field(default="raymerge", min_length=1)
    entity: str | None = None
    """The user or team; default: the key's own."""
    name: str | None = None
    """The run's name on W&B; default: the output folder's name."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes below the output folder, for ``wandb sync``."""


class TrackingConfig(Frozen):
    """Trackers that the metrics of each step are logged to, besides the output folder."""

    tensorboard: bool = False
    """Event files in ``tensorboard/`` of the output folder."""
    wandb: WandbConfig | None = None


class StateConfig(Frozen):
    """Saves of λ and the optimiser's moments, for ``--resume``."""

    every_steps: int = Field(default=10, ge=1)
    keep: int = Field(default=3, ge=1)


class Config(Frozen):
    """Everything one merge needs. See ``docs/config.md`` for the same in prose."""

    model: ModelConfig
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    method: MethodConfig = AdaMerging(name="adamerging")
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["float32", "bfloat16"] = "float32"
    vectors: VectorsConfig = VectorsConfig()
    seed: int = Field(default=0, ge=0)
    cluster: ClusterConfig = ClusterConfig()
    state: StateConfig = StateConfig()
    tracking: TrackingConfig = TrackingConfig()
    finetune: FinetuneConfig | None = None
    """For ``raymerge finetune``; default: the task-vectors recipe."""
    card: CardConfig = CardConfig()
    output: Reference | None = None

    @model_validator(mode="after")
    def _has_a_model(self) -> Config:
        if not self.models and all(task.train is None for task in self.tasks):
            raise ValueError("no task has a checkpoint; merging needs at least one")
        return self

    @model_validator(mode="after")
    def _tasks_are_distinct(self) -> Config:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"task {name!r} is listed {names.count(name)} times; names are unique"
                )
        return self

    @model_validator(mode="after")
    def _images_are_for_a_model(self) -> Config:
        if not self.method.adapts_models_only:
            return self
        for k, task in enumerate(self.tasks):
            if task.checkpoint is None and task.adapt is not None:
                raise ValueError(
                    f"tasks[{k}]: task {task.name!r} has images to adapt on but no checkpoint; "
                    "name its checkpoint or remove adapt"
                )
        return self

    @model_validator(mode="after")
    def _steps_may_be_skipped(self) -> Config:
        if problem := self.method.problem_with(self.optimizer.nonfinite):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _finetuning_knows_its_tasks(self) -> Config:
        keys = {} if self.finetune is None else self.finetune.named_tasks
        for task, key in keys.items():
            if task not in self.task_names:
                names = ", ".join(self.task_names)
                raise ValueError(f"{key}: no task has this name (tasks: {names}, or default)")
        return self

    @property
    def models(self) -> tuple[TaskConfig, ...]:
        """The tasks whose checkpoints are merged: one row of λ each."""
        return tuple(task for task in self.tasks if task.checkpoint is not None)

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.models)

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)
