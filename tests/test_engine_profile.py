"""`benchmarks/engine_profile.py`: what lies between a step and its floor, from the kernels of a profile."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from disagg.runtime.kernel_intervals import DeviceWork

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "engine_profile.py"
TO_HOST = "Memcpy DtoH (Device -> Pinned)"


@pytest.fixture(scope="module")
def script() -> Any:
    import sys

    spec = importlib.util.spec_from_file_location("engine_profile", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def step(start: float) -> list[DeviceWork]:
    return [
        DeviceWork(start, start + 60, "nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT"),
        DeviceWork(start + 55, start + 85, "_split"),  # begins before the product has ended
        DeviceWork(start + 90, start + 94, TO_HOST),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(Params)", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>(Params)", "matrix products"),
        ("_gated_gemv", "matrix products"),
        ("_split", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Traits<cutlass::bfloat16_t>>(Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("_argmax_merge", "argmax"),
        (TO_HOST, "copies and fills"),
        ("something_new", "other: something_new"),
    ],
)
def test_kernels_are_put_under_what_they_do(script: Any, name: str, kind: str) -> None:
    assert script.kind_of(name) == kind


def test_the_kinds_the_gaps_and_the_overlap_add_up_to_the_step(script: Any) -> None:
    work, count, start = script.whole_steps([*step(0), *step(100), *step(200)])
    assert count == 2
    found = script.breakdown("a step", work, count, {"matrix products": 50.0, "attention": 20.0}, start)
    assert found.step_us == pytest.approx((294 - 94) / 2)
    assert sum(us for _, _, us, _ in found.rows()) == pytest.approx(found.step_us)
    assert sum(beyond for *_, beyond in found.rows()) == pytest.approx(found.step_us - 70)
    beyond = {what: more for what, _, _, more in found.rows()}
    assert (beyond["matrix products"], beyond["attention"]) == (pytest.approx(10), pytest.approx(10))
    assert beyond[script.OVERLAP] == pytest.approx(-5)
    assert "floor 70 µs" in found.table()


def test_a_profile_without_whole_steps_is_refused(script: Any) -> None:
    with pytest.raises(RuntimeError, match="1 copies to the host"):
        script.whole_steps(step(0))
