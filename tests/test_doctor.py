"""`disagg doctor`: what it reads of other programs, what it advises, and the whole of it on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from disagg.experiments import cli
from disagg.experiments.cli_doctor import _about
from disagg.runtime.doctor import Diagnosis, TransportRow, advise
from disagg.runtime.doctor_facts import (
    GpuFacts,
    MachineFacts,
    missing_remedies,
    read_nvlink,
    read_ompi_info,
    read_pcie,
    ucx_remedies,
)
from disagg.runtime.doctor_paths import PathRow, peer_rate

NVLINK = """\
GPU 0: NVIDIA H200 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H200 (UUID: GPU-2)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
GPU 2: NVIDIA L4 (UUID: GPU-3)
"""
OMPI = """\
mca:pml:ob1:version:"mca:2.1.0"
mca:pml:ob1:version:"component:5.0.11"
mca:pml:ucx:version:"mca:2.1.0"
mca:btl:tcp:version:"mca:2.1.0"
ompi:version:full:5.0.11
option:threads:"posix (MPI_THREAD_MULTIPLE: yes, OPAL support: yes, OMPI progress: no, Event lib: yes)"
options:ft_mpi_support:no
"""
MACHINE = MachineFacts(
    "3.12.1", "Linux", {"torch": "2.11.0", "mpi4py": "4.1.2"}, {}, mpiexec="/usr/bin/mpiexec", mpi_threads=True
)
GPUS = (
    GpuFacts(0, "NVIDIA H200", 2**37, 2**36, (1,), 478.0, 63.0, "PCIe 5.0 x16"),
    GpuFacts(1, "NVIDIA H200", 2**37, 2**36, (0,), 398.0, 31.5, "PCIe 4.0 x16"),
    GpuFacts(2, "NVIDIA L4", 2**34, 2**33, (), None, 15.75, "PCIe 4.0 x8"),
)
WORKS = [TransportRow("mpi", "cpu"), TransportRow("cuda_ipc", "cuda", "no GPU")]


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("1.15.0", ["UCX_MEMTYPE_CACHE", "UCX_RNDV_FRAG_MEM_TYPE"]),
        ("1.17.0", ["UCX_MEMTYPE_CACHE", "UCX_RNDV_FRAG_MEM_TYPE"]),
        ("1.18.1", ["UCX_CUDA_COPY_ASYNC_MEM_TYPE", "UCX_CUDA_COPY_DMABUF", "UCX_MEMTYPE_CACHE"]),
        ("1.19.0", []),
        ("1.22.0", []),
        ("2.0", []),
        ("unknown", []),
        (None, []),
    ],
)
def test_each_ucx_has_the_remedies_of_its_version(version: str | None, names: list[str]) -> None:
    assert sorted(ucx_remedies(version)) == names


def test_how_tensor_parallel_ranks_sum_is_told_where_there_are_gpus_to_do_so() -> None:
    facts = replace(MACHINE, sums="NCCL: cuda:0 and cuda:2 are not joined by NVLink")
    told = [dict(_about(Diagnosis(each, [], [], []))) for each in (MACHINE, facts)]
    assert [each.get("tensor-parallel ranks sum") for each in told] == [None, facts.sums]


def test_only_remedies_that_are_not_set_are_missing() -> None:
    settings = {"UCX_MEMTYPE_CACHE": "n", "UCX_CUDA_COPY_DMABUF": "yes"}
    assert missing_remedies("1.18", settings) == {"UCX_CUDA_COPY_ASYNC_MEM_TYPE": "cuda", "UCX_CUDA_COPY_DMABUF": "no"}


def test_nvlink_rates_are_summed_over_the_links_that_are_up() -> None:
    assert read_nvlink(NVLINK) == {0: pytest.approx(53.124), 1: pytest.approx(26.562)}
    assert read_nvlink("") == {}


def test_pcie_rates_follow_from_generation_and_width() -> None:
    found = read_pcie("0, 5, 16\n1, 4, 8\n2, [N/A], [N/A]\n3, 9, 16\n")
    assert found == {
        0: (pytest.approx(63.0, abs=0.1), "PCIe 5.0 x16"),
        1: (pytest.approx(15.75, abs=0.1), "PCIe 4.0 x8"),
        3: (None, "PCIe 9.0 x16"),
    }


def test_the_words_of_ompi_info_are_understood() -> None:
    assert read_ompi_info(OMPI) == {
        "mpi_version": "Open MPI 5.0.11",
        "mpi_threads": True,
        "mpi_fault_tolerant": False,
        "mpi_components": ("btl tcp", "pml ob1", "pml ucx"),
    }
    assert read_ompi_info("nonsense")["mpi_version"] is None


def test_a_peer_copy_should_give_what_the_slower_side_s_link_gives() -> None:
    assert peer_rate(GPUS[0], GPUS[1]) == (398.0, "NVLink, sum of links")
    assert peer_rate(GPUS[0], GPUS[2]) == (15.75, "PCIe, through host memory")
    assert peer_rate(GPUS[0], replace(GPUS[2], pcie_gb_per_s=None)) == (None, "")


def texts(facts: MachineFacts, transports: list[TransportRow] = WORKS, paths: list[PathRow] | None = None) -> list[Any]:
    return list(advise(facts, transports, paths or []))


def test_a_healthy_machine_without_a_gpu_gets_no_advice() -> None:
    assert texts(MACHINE) == []


@pytest.mark.parametrize(
    ("changes", "transports", "paths", "told", "code"),
    [
        ({"mpiexec": None, "mpiexec_problem": "none found"}, WORKS, [], "no mpiexec", 3),
        ({"versions": {"mpi4py": "4"}}, WORKS, [], "torch is not installed", 3),
        ({"mpi_threads": False}, WORKS, [], "does not allow threads", 3),
        (
            {},
            [TransportRow("mpi", "cpu", "broken"), TransportRow("host", "cpu", "broken")],
            [],
            "no transport works",
            3,
        ),
        ({}, WORKS, [PathRow("MPI host message, 64 MiB", None, "GB/s", problem="ended with 1")], "ended with 1", 3),
        ({}, WORKS, [PathRow("cuda:0 memory copy", None, "GB/s", problem="out of memory")], "out of memory", 0),
        ({}, WORKS, [PathRow("cuda:0 to cuda:1", 20.0, "GB/s", 478.0, "NVLink")], "20 of 478 GB/s", 0),
        ({"mpi_fault_tolerant": False}, WORKS, [], "no ULFM", 0),
        ({"gpus": GPUS, "ucx_version": "1.17.0"}, WORKS, [], "UCX 1.17.0 is slow or wrong", 0),
        ({"gpus": GPUS}, WORKS, [], "no UCX was found", 0),
        ({"shared_memory_bytes": 64 << 20}, WORKS, [], "/dev/shm holds 64 MiB", 0),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(
    changes: dict[str, Any], transports: list[TransportRow], paths: list[PathRow], told: str, code: int
) -> None:
    facts = replace(MACHINE, **changes)
    advice = texts(facts, transports, paths)
    assert any(told in each.text for each in advice)
    assert all(each.remedy for each in advice)
    assert Diagnosis(facts, transports, paths, advice).exit_code == code


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["disagg", "doctor", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return code if isinstance(code, int) else 0

    return call


@pytest.mark.mpi
def test_this_machine_is_measured_and_can_run(doctor: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert doctor("--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["exit_code"] == 0
    assert told["facts"]["mpi_version"].startswith("Open MPI")
    paths = {path["name"]: path for path in told["paths"]}
    message = paths["MPI host message, 64 MiB"]
    assert message["measured"] > 0.05
    assert message["ratio"] == pytest.approx(message["measured"] / message["expected"])
    assert 0 < paths["MPI host message, 8 bytes, one way"]["measured"] < 1e6
    transports = {(row["device"], row["backend"]): row["problem"] for row in told["transports"]}
    assert transports["cpu", "mpi"] is None
    assert "needs device: cuda" in transports["cpu", "cuda_ipc"]
    assert all(problem for (device, _), problem in transports.items() if device == "cuda") or told["facts"]["gpus"]


def test_quick_measures_nothing_and_prints_every_section(
    doctor: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor("--quick") == 0
    printed = capsys.readouterr().out
    for words in ("this machine", "KV transports", "mpiexec", "UCX", "driver", "ULFM"):
        assert words in printed
    assert "64 MiB" not in printed


def test_a_machine_without_mpiexec_ends_with_3_and_says_so(
    doctor: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("DISAGG_MPIEXEC", str(tmp_path / "nothing"))
    assert doctor() == 3
    printed = capsys.readouterr().out
    assert "PROBLEM: there is no mpiexec" in printed
    assert "Traceback" not in printed


def test_another_format_is_refused(doctor: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--format", "xml") == 2
    assert "--format xml" in capsys.readouterr().err
