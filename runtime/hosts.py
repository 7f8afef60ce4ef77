"""The hosts of a run: what the user wrote, checked before anything is started, and which rank goes where.

A host's slots are places for executors' ranks. The orchestrator, rank 0, needs no device and takes none of them: it is
added to the first host, which is this machine if it is among them, so that the launcher sees how the run ended.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from .launcher import LaunchError

MAX_SLOTS: Final = 1 << 16
_MOST_HOSTFILE_BYTES: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_LOOK_UP_S: Final = 10.0


class HostError(ValueError):
    """Hosts that are written wrongly, or that nobody knows; the text names the option or the file and line."""

    exit_code: Final = 2


class Host(Struct, frozen=True):
    """`slots`: ranks of executors that may run there."""

    name: str
    slots: int = 1


class Placing(Struct, frozen=True):
    """Hosts in the order of ranks. `agent`: what starts a process on a host, called as `agent HOST COMMAND…`."""

    hosts: tuple[Host, ...]
    agent: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether all of it is this machine, and nothing is asked to start it."""
        return self.agent is None and all(is_local(host.name) for host in self.hosts)

    @property
    def arguments(self) -> list[str]:
        """For `launch(hosts=…)`: the orchestrator's place comes on top of the first host's slots."""
        return [f"{host.name}:{host.slots + (number == 0)}" for number, host in enumerate(self.hosts)]

    def rank_hosts(self, num_ranks: int) -> list[tuple[str, int | None]]:
        """(host, place among its executors' ranks) of each rank; the orchestrator's place is None.

        Raises LaunchError if there are fewer slots than executors' ranks.
        """
        slots = sum(host.slots for host in self.hosts)
        if num_ranks - 1 > slots:
            raise LaunchError(
                f"the executors need {num_ranks - 1} ranks, and the hosts have {slots} slots"
                f" ({', '.join(f'{host.name}:{host.slots}' for host in self.hosts)}); allowed: more hosts, more slots each"
            )
        places: list[tuple[str, int | None]] = [(self.hosts[0].name, None)]
        places += [(host.name, place) for host in self.hosts for place in range(host.slots)]
        return places[:num_ranks]


def parse_hosts(text: str, flag: str = "--host") -> tuple[Host, ...]:
    """`a:4,b:4` or `a,b` (a slot each time a name is given). Raises HostError."""
    return _joined([_host(part.strip(), f"{flag} {text}") for part in text.split(",")])


def read_hostfile(path: Path, flag: str = "--hostfile") -> tuple[Host, ...]:
    """Lines `NAME [slots=N]`, as Open MPI reads them; `#` begins a comment. Raises HostError naming file and line."""
    try:
        if path.stat().st_size > _MOST_HOSTFILE_BYTES:
            raise HostError(f"{flag} {path}: larger than {_MOST_HOSTFILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise HostError(f"{flag} {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise HostError(f"{flag} {path}: is not UTF-8 text") from None
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        slots = "1"
        for word in words[1:]:
            key, _, value = word.partition("=")
            if key not in ("slots", "max_slots", "max-slots"):
                raise HostError(f"{where}: unknown word {word!r}; allowed: NAME slots=N")
            slots = value if key == "slots" else slots
        found.append(_host(f"{words[0]}:{slots}", where))
    if not found:
        raise HostError(f"{flag} {path}: names no host; allowed: lines NAME slots=N")
    return _joined(found)


def slurm_hosts(env: Mapping[str, str] | None = None) -> tuple[Host, ...] | None:
    """The hosts of the Slurm allocation around this process, with its tasks as slots; None outside one, or on one host.

    Raises HostError if Slurm's own `scontrol` cannot name them.
    """
    env = os.environ if env is None else env
    nodes = env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", ""))
    listed = env.get("SLURM_JOB_NODELIST", env.get("SLURM_NODELIST", ""))
    if not nodes.isdecimal() or int(nodes) < 2 or not listed:
        return None
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", listed],
            capture_output=True,
            text=True,
            timeout=_LOOK_UP_S,
            check=True,
            env=dict(env),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(
            f"SLURM_JOB_NODELIST={listed}: scontrol cannot name its hosts ({error}); allowed: --host"
        ) from None
    names = told.stdout.split()
    tasks = _slurm_tasks(env.get("SLURM_TASKS_PER_NODE", ""), len(names))
    return _joined([_host(f"{name}:{slots}", "SLURM_JOB_NODELIST") for name, slots in zip(names, tasks)])


def check_hosts(placing: Placing) -> None:
    """Raise HostError for a host that nobody knows, LaunchError where hosts cannot be reached at all.

    With an agent of the user's, names are the agent's business.
    """
    remote = [host for host in placing.hosts if not is_local(host.name)]
    if not remote or placing.agent is not None or "SLURM_JOB_ID" in os.environ:
        if placing.agent is not None and shutil.which(placing.agent.split()[0]) is None:
            raise HostError(f"--launch-agent {placing.agent}: is no program that can be run")
        return
    if shutil.which("ssh") is None:
        raise LaunchError(
            f"host {remote[0].name} is another machine, and there is no ssh here to reach it; allowed: install ssh,"
            " --launch-agent, or an allocation of Slurm"
        )
    for host in remote:
        if not (_resolves(host.name) or _resolves(_ssh_name(host.name))):
            raise HostError(f"host {host.name} is unknown: its name resolves to no address")


def is_local(name: str) -> bool:
    """Whether `name` is this machine."""
    own = socket.gethostname()
    if name in ("localhost", own, own.partition(".")[0]):
        return True
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
        except OSError:
            continue
        return True
    return False


def local_first(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The same hosts, this machine first if it is among them."""
    return tuple(sorted(hosts, key=lambda host: not is_local(host.name)))


def _host(text: str, where: str) -> Host:
    name, colon, slots = text.partition(":")
    if not _NAME.fullmatch(name):
        raise HostError(f"{where}: {name!r} is no host name")
    if colon and not (slots.isdecimal() and 1 <= int(slots) <= MAX_SLOTS):
        raise HostError(f"{where}: slots of host {name} must be a whole number from 1 to {MAX_SLOTS}, not {slots!r}")
    return Host(name, int(slots) if colon else 1)


def _joined(hosts: Sequence[Host]) -> tuple[Host, ...]:
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return tuple(Host(name, number) for name, number in slots.items())


def _slurm_tasks(text: str, num_hosts: int) -> list[int]:
    """SLURM_TASKS_PER_NODE, such as `4(x2),3`, as one number a host; 1 each where it does not say."""
    tasks: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise HostError(f"SLURM_TASKS_PER_NODE={text}: cannot be read; allowed: --host")
        tasks += [int(match[1])] * min(int(match[2] or 1), num_hosts)
    return (tasks + [1] * num_hosts)[:num_hosts]


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _ssh_name(name: str) -> str:
    """What ssh's own configuration makes of an alias."""
    try:
        told = subprocess.run(["ssh", "-G", name], capture_output=True, text=True, timeout=_LOOK_UP_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return name
    found = re.search(r"^hostname (\S+)$", told.stdout, re.MULTILINE)
    return found[1] if found else name
