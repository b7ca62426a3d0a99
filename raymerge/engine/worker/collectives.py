"""The two collectives of a shard group: all-gather θ, reduce-scatter ∂ℒ/∂θ (as ZeRO and FSDP do).

NCCL serves GPUs, gloo CPUs. With one shard both are no-ops on views of the same buffer, so the
worker has one code path. Starting and ending generations is left to the group.

Legend: P padded parameters (S · N), N columns of this shard.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from raymerge.engine.messages import Rendezvous
from raymerge.errors import PeerLostError

_POLL_S = 0.005


class Collective:
    """One worker's membership in its shard group: a group of one before ``join``, after ``leave``.

    A call that a lost peer breaks raises :class:`~raymerge.errors.PeerLostError`; ``join`` again.

    gloo releases a rank that waits in a collective only when a peer closes its connections. So a
    rank that takes no further part, after ``abort`` or a failed collective, leaves the process
    group at once: the failure passes from one waiting rank to the next.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._store: TCPStore | None = None
        self._lock = threading.Lock()  # abort runs on a thread of its own
        self._busy = self._aborted = False

    def open_store(self, host: str, world: int) -> int:
        """Start the rendezvous store of the group on a free port; returns the port."""
        if self._store is None:
            self._store = TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def join(self, rendezvous: Rendezvous, rank: int, world: int, device: torch.device) -> None:
        """Build the process group with its ``world`` peers; blocks until all have joined."""
        self.leave()
        self._aborted = False
        if rendezvous.interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = rendezvous.interface
        with _peer_errors():
            # The prefix keeps the keys of earlier attempts apart from this one's.
            store = PrefixStore(rendezvous.prefix, self._connect(rendezvous, rank, world))
            self._await_all(store, rendezvous, rank, world)
            dist.init_process_group(
                backend="nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=rendezvous.timeout_s),
            )
        self.rank, self.world = rank, world
        # An abort during the forming found nothing to break; obey it now.
        with self._lock:
            if self._aborted:
                _disconnect()
                raise PeerLostError("the process group was aborted while it formed")

    def _await_all(self, store: PrefixStore, rendezvous: Rendezvous, rank: int, world: int) -> None:
        """Wait until every rank has joined.

        torch itself would wait as long as for a collective, and could not be interrupted. It also
        numbers its attempts to form a group, so ranks that failed unequally often never meet.
        """
        store.set(f"rank{rank}", "here")
        deadline = time.monotonic() + rendezvous.join_timeout_s
        while not store.check([f"rank{other}" for other in range(world)]):
            if self._aborted:
                raise PeerLostError("the process group was aborted before it formed")
            if time.monotonic() > deadline:
                raise PeerLostError(f"not all peers joined within {rendezvous.join_timeout_s:g} s")
            time.sleep(_POLL_S)

    def _connect(self, rendezvous: Rendezvous, rank: int, world: int) -> TCPStore:
        """Return the rendezvous store: rank 0's own, or a client of it."""
        if rank == 0 and self._store is not None:
            return self._store
        timeout = timedelta(seconds=rendezvous.join_timeout_s)
        return TCPStore(
            rendezvous.host,
            rendezvous.port,
            world,
            is_master=False,
            timeout=timeout,
            wait_for_workers=False,
        )

    def leave(self) -> None:
        """Leave the process group; this worker is then a group of one."""
        self.rank, self.world = 0, 1
        with self._lock:
            _disconnect()

    def all_gather(self, full_P: Tensor) -> None:
        """Fill ``full_P`` from every rank's own N columns of it."""
        if self.world > 1:
            with self._in_collective():
                dist.all_gather_into_tensor(full_P, self.own_columns(full_P).clone())

    def reduce_scatter(self, full_P: Tensor) -> Tensor:
        """Return this rank's N columns of the sum over ranks; overwrites ``full_P``."""
        own_N = self.own_columns(full_P)
        if self.world > 1:
            out_N = torch.empty_like(own_N)
            with self._in_collective():
                dist.reduce_scatter_tensor(out_N, full_P)
            return out_N
        return own_N

    def own_columns(self, full_P: Tensor) -> Tensor:
        """Return a view of this rank's N columns of ``full_P``."""
        width = full_P.numel() // self.world
        return full_P[self.rank * width : (self.rank + 1) * width]

    def abort(self) -> None:
        """Break the process group, so that this rank and its peers stop waiting for each other."""
        with self._lock:
            self._aborted = True
            if not dist.is_initialized():
                return
            if self._busy or dist.get_backend() == "nccl":
                abort = getattr(dist.group.WORLD, "abort", None)  # not in every torch
                if abort is not None:
                    abort()
            else:
                _disconnect()

    @contextmanager
    def _in_collective(self) -> Iterator[None]:
        """Run a collective; after an abort raise at once, since it would wait for ever."""
        with self._lock:
            if self._aborted:
                raise PeerLostError("the process group was aborted")
            self._busy = True
        try:
            with _peer_errors():
                yield
        except PeerLostError:
            self._aborted = True
            raise
        finally:
            with self._lock:
                self._busy = False
                if self._aborted:
                    _disconnect()


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Raise PeerLostError for the plain RuntimeErrors by which torch reports a lost peer."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError((str(error).strip().splitlines() or [repr(error)])[0]) from error
