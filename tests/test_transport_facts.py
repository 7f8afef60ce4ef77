"""Which transport can work where, and which one `auto` takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from disagg.runtime import transport_facts, transport_world
from disagg.runtime.executor_spec import ModelSource, check_spec
from disagg.runtime.launcher import LaunchError
from disagg.runtime.transport import BACKENDS, TransportError, _carrier
from disagg.runtime.transport_facts import (
    TransportFacts,
    choose_backend,
    cuda_mpi_problem,
    gather_facts,
    pml_of,
    transport_problem,
)
from disagg.runtime.transport_world import WorldNeeds, over_ucx, world_needs
from tests.runtime_programs.clusters import cluster, context, generation
from tests.tiny_models import SHAPES

PAIR = cluster(ModelSource(SHAPES["llama"], seed=3), [context(), generation()])


def facts(
    *, peers: bool = True, ucx: bool = True, cuda: bool = True, triton: bool = True, libcuda: bool = True
) -> TransportFacts:
    access = tuple(tuple(a == b or peers for b in range(2)) for a in range(2))
    folder = "/site/libucx/lib" if ucx else None
    return TransportFacts(
        cuda, 2, access, libcuda, triton, folder, "1.22.0", None if cuda else "torch finds no GPU here"
    )


def test_with_everything_there_every_transport_works() -> None:
    assert [transport_problem(backend, facts()) for backend in BACKENDS] == [None] * len(BACKENDS)


@pytest.mark.parametrize(
    ("backend", "here", "words"),
    [
        ("cuda_ipc", facts(peers=False), "read each other's memory.*allowed here: mpi, host"),
        ("cuda_ipc", facts(libcuda=False), "libcuda.so.1"),
        ("mpi", facts(ucx=False), "pip install libucx-cu13.*or choose cuda_ipc or host"),
        ("host", facts(cuda=False), "torch finds no GPU here; allowed here: device: cpu"),
        ("host", facts(triton=False), "pip install triton"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(backend: str, here: TransportFacts, words: str) -> None:
    problem = transport_problem(backend, here)
    assert problem is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem)


def test_on_a_cpu_all_but_cuda_ipc_work_without_looking_at_gpus() -> None:
    nothing = TransportFacts()
    problems = {backend: transport_problem(backend, nothing, "cpu") for backend in BACKENDS}
    assert [name for name, problem in problems.items() if problem] == ["cuda_ipc"]
    assert "cuda_ipc needs device: cuda, not cpu; allowed here: mpi, host, auto" in str(problems["cuda_ipc"])


@pytest.mark.parametrize(
    ("here", "one_host", "pml", "expected"),
    [
        (facts(), True, "ob1", "cuda_ipc"),
        (facts(), True, None, "cuda_ipc"),
        (facts(peers=False), True, None, "mpi"),
        (facts(peers=False), True, "ob1", "host"),
        (facts(peers=False, ucx=False), True, None, "host"),
        (facts(), False, "ucx", "mpi"),
        (facts(), False, "ob1", "host"),
    ],
)
def test_auto_takes_the_best_that_works(here: TransportFacts, one_host: bool, pml: str | None, expected: str) -> None:
    backend, why = choose_backend(here, "cuda", one_host=one_host, pml=pml)
    assert backend == expected
    assert why


def test_auto_looks_only_at_the_gpus_that_are_used() -> None:
    lonely = facts(peers=False)
    assert choose_backend(lonely, "cuda", one_host=True, pml="ob1", devices=[1, 1])[0] == "cuda_ipc"
    assert choose_backend(lonely, "cpu", one_host=True, pml="ob1")[0] == "mpi"


def test_a_rank_looks_at_the_gpus_that_its_world_was_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three GPUs the third reads nobody, and no rank is on it."""
    access = ((True, True, False), (True, True, False), (False, False, True))
    here = replace(facts(), num_devices=3, peer_access=access)
    placed = tuple(replace(p, device_ids=(n,)) for n, p in enumerate(PAIR.placements))
    roster = check_spec(replace(PAIR, device="cuda", transport="auto", placements=placed))
    assert world_needs(roster, one_host=True, facts=here) == WorldNeeds()
    hosts = ("here", "here", "here")
    assert roster.devices_on("here", hosts) == (0, 1)
    assert roster.devices_on("there", ("here", "here", "there")) == (1,)

    def carrier(device: torch.device, description: str) -> Any:
        return description

    monkeypatch.setattr(transport_facts, "gather_facts", lambda: here)
    monkeypatch.setattr("disagg.runtime.transport_cuda_ipc.cuda_carrier", carrier)
    progress: Any = SimpleNamespace(hostnames=hosts)
    for backend in ("auto", "cuda_ipc"):
        found: Any = _carrier(backend, progress, torch.device("cuda:0"), True, roster.devices_on("here", hosts))
        assert "cuda_ipc" in found


def test_device_memory_is_given_to_mpi_only_over_ucx_with_its_cuda_module() -> None:
    assert "pml 'ob1'" in str(cuda_mpi_problem("ob1", "libucp.so libuct_cuda.so"))
    assert "no libucp" in str(cuda_mpi_problem("ucx", ""))
    assert "UCX_MODULE_DIR" in str(cuda_mpi_problem("ucx", "libucp.so.0"))
    assert cuda_mpi_problem("ucx", "libucp.so.0 libuct_cuda.so.0") is None


def test_the_layer_of_mpi_is_read_from_the_environment() -> None:
    assert pml_of({}) == "ob1"
    assert pml_of({"OMPI_MCA_pml": "ucx"}) == "ucx"


def test_facts_are_gathered_on_any_machine() -> None:
    found = gather_facts()
    assert found.num_devices == len(found.peer_access)
    assert found.has_cuda or found.why_no_cuda


def test_cuda_ipc_on_a_cpu_and_a_throttle_of_nothing_are_refused_before_anything_starts() -> None:
    with pytest.raises(TransportError, match="cuda_ipc needs device: cuda, not cpu; allowed here: mpi, host, auto"):
        check_spec(replace(PAIR, transport="cuda_ipc"))
    with pytest.raises(TransportError, match="throttle_gb_per_s 0 must be positive"):
        check_spec(replace(PAIR, throttle_gb_per_s=0.0))


def test_a_cluster_on_gpus_is_refused_where_they_cannot_do_what_it_wants() -> None:
    def needs(transport: str, here: TransportFacts) -> WorldNeeds:
        return world_needs(check_spec(replace(PAIR, transport=transport, device="cuda")), one_host=True, facts=here)

    assert needs("cuda_ipc", facts()) == needs("auto", facts()) == needs("host", facts(ucx=False)) == WorldNeeds()
    for transport, here, words in (
        ("cuda_ipc", facts(peers=False), "read each other's memory"),
        ("mpi", facts(ucx=False), "libucx-cu13"),
        ("auto", facts(cuda=False), "no GPU"),
    ):
        with pytest.raises(TransportError, match=rf"cache_transceiver.backend {transport}: .*{words}"):
            needs(transport, here)


def test_a_cluster_on_cpus_needs_nothing_of_its_world() -> None:
    assert world_needs(check_spec(replace(PAIR, transport="auto")), one_host=True) == WorldNeeds()


def test_a_world_over_ucx_finds_the_wheel_before_any_other_ucx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_world, "find_ucx", lambda: "/site/libucx/lib")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/other")
    world = over_ucx()
    assert (world.pml, world.fault_tolerant) == ("ucx", False)  # ULFM crashes over UCX
    assert world.env["LD_LIBRARY_PATH"].split(":") == ["/site/libucx/lib", "/other"]
    assert world.env["UCX_MODULE_DIR"] == "/site/libucx/lib/ucx"


def test_a_world_over_ucx_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_world, "find_ucx", lambda: None)
    with pytest.raises(LaunchError, match="pip install libucx-cu13"):
        over_ucx()
