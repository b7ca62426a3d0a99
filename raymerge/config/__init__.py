"""The config: typed, frozen, validated once.

``load_config`` reads YAML with the safe loader, applies ``-o key.path=value`` overrides and a
preset, checks every key, and makes every path absolute (paths are relative to the config's own
folder). A wrong key or value raises :class:`~raymerge.errors.ConfigError` in one line.
"""

from raymerge.config.loading import dump_config, load_config, parse_config
from raymerge.config.methods import (
    METHOD_NAMES,
    AdaMerging,
    Average,
    Clamp,
    Granularity,
    Individual,
    MethodConfig,
    TaskArithmetic,
    Ties,
    TrimScope,
    ZeroShot,
)
from raymerge.config.schema import (
    ClusterConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    StateConfig,
    TaskConfig,
    VectorDtype,
    VectorLocation,
    VectorsConfig,
)

__all__ = [
    "METHOD_NAMES",
    "AdaMerging",
    "Average",
    "Clamp",
    "ClusterConfig",
    "Config",
    "Granularity",
    "Individual",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "StateConfig",
    "TaskArithmetic",
    "TaskConfig",
    "Ties",
    "TrimScope",
    "VectorDtype",
    "VectorLocation",
    "VectorsConfig",
    "ZeroShot",
    "dump_config",
    "load_config",
    "parse_config",
]
