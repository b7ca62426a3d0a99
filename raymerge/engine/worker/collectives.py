"""The two collectives of a shard group: all-gather θ, reduce-scatter ∂ℒ/∂θ (as ZeRO and FSDP do).

NCCL on GPUs, gloo on CPUs. With one shard both are no-ops on views of the same buffer, so the
worker has one code path.

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

_LOOK_S = 0.005


class Collective:
    """One worker's membership in its shard group; alone until ``join``, and after ``leave``.

    Whatever a lost peer breaks raises :class:`~raymerge.errors.PeerLostError`; then ``join`` again.

    gloo frees a rank that waits in a collective only when a peer closes its connections. So whoever
    will take no further part, by ``abort`` or because a collective failed, leaves the process group
    at once: a failure runs through the group, from one waiting rank to the next.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._store: TCPStore | None = None
        self._lock = threading.Lock()  # abort comes on a thread of its own
        self._busy = self._aborted = False

    def open_store(self, host: str, world: int) -> int:
        """Start the rendezvous store of the group on a free port; returns the port."""
        if self._store is None:
            self._store = TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def join(self, where: Rendezvous, rank: int, world: int, device: torch.device) -> None:
        """Build the process group with its ``world`` peers; blocks until all have joined."""
        self.leave()
        self._aborted = False
        if where.interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = where.interface
        with _peers():
            store = PrefixStore(where.prefix, self._meeting_place(where, rank, world))
            self._await_all(store, where, rank, world)
            dist.init_process_group(
                backend="nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=where.timeout_s),
            )
        self.rank, self.world = rank, world
        with self._lock:
            if self._aborted:
                _disconnect()
                raise PeerLostError("the process group was aborted while it formed")

    def _await_all(self, store: PrefixStore, where: Rendezvous, rank: int, world: int) -> None:
        """Until every rank is there. torch would wait as long as for a collective, and could not
        be freed; and a group that it fails to form has a number of its own, under which those that
        come later look for it in vain."""
        store.set(f"rank{rank}", "here")
        deadline = time.monotonic() + where.join_timeout_s
        while not store.check([f"rank{other}" for other in range(world)]):
            if self._aborted:
                raise PeerLostError("the process group was aborted before it formed")
            if time.monotonic() > deadline:
                raise PeerLostError(f"not all peers came within {where.join_timeout_s:g} s")
            time.sleep(_LOOK_S)

    def _meeting_place(self, where: Rendezvous, rank: int, world: int) -> TCPStore:
        if rank == 0 and self._store is not None:
            return self._store
        timeout = timedelta(seconds=where.join_timeout_s)
        return TCPStore(
            where.host, where.port, world, is_master=False, timeout=timeout, wait_for_workers=False
        )

    def leave(self) -> None:
        """Be alone again."""
        self.rank, self.world = 0, 1
        with self._lock:
            _disconnect()

    def all_gather(self, full_P: Tensor) -> None:
        """Fill ``full_P`` from every rank's own N columns of it."""
        if self.world > 1:
            with self._together():
                dist.all_gather_into_tensor(full_P, self.mine(full_P).clone())

    def reduce_scatter(self, full_P: Tensor) -> Tensor:
        """This rank's N columns of the sum of ``full_P`` over ranks; spoils ``full_P``."""
        mine_N = self.mine(full_P)
        if self.world > 1:
            out_N = torch.empty_like(mine_N)
            with self._together():
                dist.reduce_scatter_tensor(out_N, full_P)
            return out_N
        return mine_N

    def mine(self, full_P: Tensor) -> Tensor:
        width = full_P.numel() // self.world
        return full_P[self.rank * width : (self.rank + 1) * width]

    def abort(self) -> None:
        """Spoil the process group: the peers that wait for this rank are freed, and it for them."""
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
    def _together(self) -> Iterator[None]:
        """Around a collective; one that begins after an abort would wait for ever."""
        with self._lock:
            if self._aborted:
                raise PeerLostError("the process group was aborted")
            self._busy = True
        try:
            with _peers():
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
def _peers() -> Iterator[None]:
    """torch raises plain RuntimeErrors for a peer that is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError((str(error).strip().splitlines() or [repr(error)])[0]) from error
