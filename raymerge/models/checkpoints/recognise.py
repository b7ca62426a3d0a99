"""Find where in a checkpoint a model stands: under which prefix of its keys.

Wrappers put names in front (``module.``, ``_orig_mod.``, ``net.``), and training code nests state
dicts beside others (``model``, ``model_ema``, ``optimizer``), which readers flatten to the same
thing: a prefix. So nothing here lists wrappers; the names that a model must have tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

_AVERAGE = re.compile(
    r"(?:^|[._])(?:ema|swa|averaged?|momentum|target|teacher|shadow)(?=[._\d]|$)", re.IGNORECASE
)

# Tensors beside a model that training code saves to go on.
_TRAINING = re.compile(
    r"optim|sched|scaler|exp_avg|momentum|shadow|rng|callbacks|loops|iteration|epoch|step|"
    r"num_batches|position_ids|n_averaged|logit_(?:scale|bias)|mean$|std$",
    re.IGNORECASE,
)


def is_training_state(key: str) -> bool:
    """Return whether a key outside of a model names a state of its training."""
    return _TRAINING.search(key) is not None


def prefixes_of(keys: Collection[str], names: Collection[str]) -> list[str]:
    """Return the prefixes under which most of ``names`` stand, the one to take first.

    Several are whole copies of a model, such as a model and its moving average: the model itself
    comes first, then what stands first in the file. Empty if no name is found.
    """
    wanted = frozenset(names)
    # A name has few dots, so of a long key only its end can be one.
    dots = max((name.count(".") for name in wanted), default=0)
    counts = Counter(prefix for prefix, name in _splits(keys, dots) if name in wanted)
    if not counts:
        return []
    most = max(counts.values())
    found = [prefix for prefix, count in counts.items() if count == most]
    return sorted(found, key=lambda prefix: (bool(_AVERAGE.search(prefix)), prefix != ""))


def _splits(keys: Collection[str], dots: int) -> Iterator[tuple[str, str]]:
    """Yield every way to part a key, before its first letter or after a dot, into a prefix and a
    name of at most ``dots`` dots."""
    for key in keys:
        parts = key.rsplit(".", dots + 1)
        if len(parts) <= dots + 1:
            yield "", key
        end = len(key)
        for part in reversed(parts[1:]):
            end -= len(part)
            yield key[:end], key[end:]
            end -= 1
