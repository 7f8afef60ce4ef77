"""Hosts of a run as users write them, and which rank goes where."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from disagg.experiments.cluster import world_size
from disagg.experiments.experiment_file import load_experiment
from disagg.experiments.run_hardware import hardware_spec
from disagg.runtime.hosts import (
    Host,
    HostError,
    Placing,
    check_hosts,
    is_local,
    local_first,
    parse_hosts,
    read_hostfile,
    slurm_hosts,
)
from disagg.runtime.launcher import LaunchError

EXPERIMENT = """
schema_version: 1
name: hosts
model: {id: llama-3.1-8b}
backend: hardware
device: cuda
cluster:
  profile: spec:h200
  context_servers: {num_instances: 2, tensor_parallel_size: 2}
  generation_servers: {num_instances: 1, tensor_parallel_size: 4}
  cache_transceiver: {backend: mpi}
policy: {router: round_robin}
workload:
  dataset: {type: synthetic, isl: 64, osl: 8}
  max_tokens: 16
  phases: [{name: profiling, type: poisson, rate: 4, requests: 10}]
"""


def test_hosts_are_read_with_their_slots() -> None:
    assert parse_hosts("a:4,b.example:2") == (Host("a", 4), Host("b.example", 2))
    assert parse_hosts("a,a,b") == (Host("a", 2), Host("b", 1))


@pytest.mark.parametrize(
    "text", ["", ",", "a,,b", "a:0", "a:x", "a:-1", "a:99999999", "-oProxyCommand=x", "a b", "a;b"]
)
def test_a_host_written_wrongly_is_refused_by_its_flag(text: str) -> None:
    with pytest.raises(HostError, match="--host"):
        parse_hosts(text)


def test_a_hostfile_is_read_as_open_mpi_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# the rack\na slots=4 max_slots=8\n\nb   # one\nb\n")
    assert read_hostfile(file) == (Host("a", 4), Host("b", 2))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a slots=4\nb cores=2\n", r"hosts:2: unknown word 'cores=2'"),
        ("a slots=many\n", r"hosts:1: slots of host a must be a whole number"),
        ("\n\n$(reboot)\n", r"hosts:3: '\$\(reboot\)' is no host name"),
        ("# nobody\n", r"names no host"),
        ("\udcff", r"is not UTF-8"),
    ],
)
def test_a_wrong_line_of_a_hostfile_is_named(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "hosts"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(HostError, match=told):
        read_hostfile(file)


def test_a_hostfile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"--hostfile .*nowhere: cannot be read"):
        read_hostfile(tmp_path / "nowhere")


def test_the_orchestrator_takes_no_slot() -> None:
    placing = Placing((Host("a", 2), Host("b", 2)))
    assert placing.arguments == ["a:3", "b:2"]
    assert placing.rank_hosts(5) == [("a", None), ("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert placing.rank_hosts(3) == [("a", None), ("a", 0), ("a", 1)]


def test_too_few_slots_are_told_with_what_there_is() -> None:
    with pytest.raises(LaunchError, match=r"need 5 ranks, and the hosts have 4 slots \(a:2, b:2\)"):
        Placing((Host("a", 2), Host("b", 2))).rank_hosts(6)


def test_devices_are_counted_on_each_host_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(EXPERIMENT)
    config = load_experiment(file).experiment
    assert world_size(config) == 9
    one_host = [placement.device_ids for placement in hardware_spec(config).placements]
    assert one_host == [(0, 1), (2, 3), (4, 5, 6, 7)]
    two_hosts = [p.device_ids for p in hardware_spec(config, Placing((Host("a", 4), Host("b", 4)))).placements]
    assert two_hosts == [(0, 1), (2, 3), (0, 1, 2, 3)]


def test_this_machine_comes_first_whatever_the_order() -> None:
    here = socket.gethostname()
    assert is_local(here)
    assert is_local("localhost")
    assert not is_local("nowhere.invalid")
    assert local_first((Host("nowhere.invalid"), Host(here)))[0].name == here


def test_an_unknown_host_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises((HostError, LaunchError), match=r"host nowhere\.invalid is"):
        check_hosts(Placing((Host("nowhere.invalid"),)))


def test_an_agent_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="--launch-agent"):
        check_hosts(Placing((Host("nowhere.invalid"),), str(tmp_path / "agent")))


def test_a_slurm_allocation_names_its_hosts_and_tasks(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-3]" ] && printf "node1\\nnode2\\nnode3\\n"\n')
    scontrol.chmod(0o755)
    env = {
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_TASKS_PER_NODE": "4(x2),3",
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    assert slurm_hosts(env) == (Host("node1", 4), Host("node2", 4), Host("node3", 3))


def test_one_node_or_no_allocation_needs_no_hosts() -> None:
    assert slurm_hosts({}) is None
    assert slurm_hosts({"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}) is None


def test_an_allocation_that_scontrol_cannot_name_says_what_to_do() -> None:
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "PATH": "/nonexistent"}
    with pytest.raises(HostError, match=r"scontrol cannot name its hosts .*allowed: --host"):
        slurm_hosts(env)
