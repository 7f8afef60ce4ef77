"""KV transports between processes whose pages lie on GPUs: on two where there are two, else both on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from disagg.runtime.launcher import launch
from disagg.runtime.transport_facts import gather_facts, transport_problem
from disagg.runtime.transport_world import WorldNeeds, over_ucx

PROGRAMS = Path(__file__).parent / "mpi_programs"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("layouts", ["1 5 16 1 5 4", "2 5 16 1 2,3 8", "1 5 8 8 5 16"])
@pytest.mark.parametrize("backend", ["cuda_ipc", "host", "mpi", "auto"])
def test_kv_on_gpus_arrives_whole_in_any_layout_while_it_is_computed(
    backend: str, layouts: str, capfd: pytest.CaptureFixture[str]
) -> None:
    problem = transport_problem(backend, gather_facts())
    if problem is not None:
        pytest.skip(problem)
    needs = over_ucx() if backend == "mpi" else WorldNeeds()
    args = [f"gpu-{backend}", *layouts.split()]
    ranks = sum(int(args[i]) * len(args[i + 1].split(",")) for i in (1, 4))
    code = launch(
        str(PROGRAMS / "progressive.py"),
        args,
        ranks,
        timeout_s=300,
        pml=needs.pml,
        fault_tolerant=needs.fault_tolerant,
        env=needs.env,
    )
    assert code == 0
    assert capfd.readouterr().out.count("progressive transfers") == ranks


def test_mpi_with_device_memory_over_the_wrong_layer_is_refused_before_it_can_crash(
    capfd: pytest.CaptureFixture[str],
) -> None:
    problem = transport_problem("mpi", gather_facts())
    if problem is not None:
        pytest.skip(problem)
    # The program ends well: what a rank says before MPI_Abort is not always passed on.
    assert launch(str(PROGRAMS / "refused.py"), (), 2, timeout_s=120) == 0
    captured = capfd.readouterr()
    assert captured.out.count("refused: this MPI world runs over pml 'ob1'") == 2, captured
    assert captured.out.count("crashes the process") == 2


def test_the_death_of_an_exporter_in_mid_read_is_told() -> None:
    program = Path(__file__).parent / "gpu_programs" / "exporter_dies.py"
    found = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120, check=False)
    print(found.stdout)
    assert found.returncode == 0, found.stderr
    assert "the reader's device works: True" in found.stdout
