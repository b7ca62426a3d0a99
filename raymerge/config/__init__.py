"""The config as frozen types, validated once.

``load_config`` reads YAML, applies a preset and ``-o key.path=value`` overrides, checks every key
and makes every path absolute: paths start from the config's own folder. A wrong key or value
raises :class:`~raymerge.errors.ConfigError` in one line.
"""

from raymerge.config.finetune import FinetuneConfig
from raymerge.config.loading import dump_config, load_config, parse_config
from raymerge.config.methods import METHOD_NAMES, MethodConfig
from raymerge.config.schema import (
    ClusterConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    StateConfig,
    TaskConfig,
    TrackingConfig,
    VectorDtype,
    VectorLocation,
    VectorsConfig,
    WandbConfig,
)

__all__ = [
    "METHOD_NAMES",
    "ClusterConfig",
    "Config",
    "FinetuneConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "StateConfig",
    "TaskConfig",
    "TrackingConfig",
    "VectorDtype",
    "VectorLocation",
    "VectorsConfig",
    "WandbConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
