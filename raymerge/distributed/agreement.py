"""One code and one data on all nodes: compare what each worker reports with the driver's own.

A difference would change λ without a word, and a missing file would be found only after minutes.
So both are one line before the first step, which names the node, the file or package, and the
remedy. Workers on the driver's own node share its files and are not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raymerge.engine.worker.identity import Identity, own_identity
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import RunError, excerpt


def require_agreement(address: str, theirs: Identity, own: Identity) -> None:
    """Raise :class:`RunError` unless a worker's node has the driver's code and inputs.

    ``address``: of the worker's node.
    """
    for name, version in own.code.items():
        if theirs.code.get(name) != version:
            raise RunError(
                f"node {address}: has {name} {theirs.code.get(name, 'not installed')}, and the "
                f"driver {version}; install the same on every node"
            )
    for name, finding in own.inputs.items():
        found = theirs.inputs.get(name)
        if found is None or found.problem:
            reason = "is not reported" if found is None else found.problem
            raise RunError(
                f"node {address}: {name}: {reason}; put the same files on every node, or on a "
                "folder that all of them share"
            )
        if not finding.problem and found.digest != finding.digest:
            raise RunError(
                f"node {address}: {name}: is another one than the driver's; put the same files on "
                "every node"
            )


def agreement_check(inputs: Callable[[], Any]) -> Callable[[str, Identity], None]:
    """Return a check of workers, which computes the driver's own identity when first needed."""
    own: list[Identity] = []

    def check(address: str, theirs: Identity) -> None:
        if not own:
            own.append(own_identity(inputs()))
        require_agreement(address, theirs, own[0])

    return check


def sees(worker: MergeWorker, path: str) -> bool:
    """Return whether a worker's node has a file."""
    return Path(path).is_file()


def unseen(path: Path, addresses: list[str]) -> RunError:
    """Return the error for nodes that do not see what the driver has written."""
    return RunError(
        f"output {excerpt(str(path.parent), 200)}: node {', '.join(addresses)} does not see what "
        "the driver writes there, so it could not load the merged model; name a folder that all "
        "nodes share, or leave tasks[].test out and run `raymerge eval` later"
    )
