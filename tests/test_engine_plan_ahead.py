"""Plans that an engine takes over while the steps before them have not been read: the device's own tokens carry on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from disagg.core.commands import Joined, RunSteps
from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.engine import Engine, JoinedFeed, PendingStep, PlanFeed
from disagg.runtime.model_batch import Decode, DecodeBatch
from disagg.runtime.model_place import Place
from disagg.runtime.weights import random_weights
from tests.fused_models import SHAPES, fused_engine
from tests.tiny_models import MIN_MARGIN, Script, make_engine, prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = SHAPES["llama"]
# (who leaves, who joins, steps): holes at the beginning and at the end of the batch, one that comes later, one that stays
PLANS: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((), (0, 1, 2), 2),
    ((0,), (3,), 1),
    ((1, 3), (), 2),
]


def prefilled(engine: Engine) -> Script:
    """Four requests whose prompts are computed in one step."""
    script = Script([engine])
    texts = prompts(SHAPE, [9, 6, 3, 12], seed=8)
    for request, text in enumerate(texts):
        script.reserve(request, len(text) + 8)
    script.run(chunks=[(request, 0, text, True) for request, text in enumerate(texts)])
    return script


def take_over(engine: Engine, script: Script, plans: Sequence[tuple[tuple[int, ...], tuple[int, ...], int]]) -> None:
    """All plans one behind the other; the tokens are read when the last step has been launched."""
    pending: list[PendingStep] = []
    decoding: list[int] = []
    for number, (left, joined, num_steps) in enumerate(plans, 100):
        decoding = [request for request in decoding if request not in left] + list(joined)
        engine.begin(
            RunSteps(
                number,
                number,
                1,
                num_steps,
                left,
                tuple(Joined(r, script.kv[r], script.blocks[r]) for r in joined),
                num_decodes=len(decoding),
            ),
            PlanFeed(tuple(JoinedFeed(r, script.tokens[r][-1]) for r in joined)),
        )
        pending += [engine.launch() for _ in range(num_steps)]
    for step in pending:
        for request, token in step.result():
            script.tokens[request].append(token)


def test_plans_taken_over_before_any_token_is_read_give_the_tokens_of_one_after_the_other() -> None:
    weights = random_weights(Place.of(SHAPE), 3, DEVICE)
    plain = make_engine(SHAPE, weights, record_margins=True, device=DEVICE)
    script = prefilled(plain)
    for left, joined, num_steps in PLANS:
        script.run(left=left, joined=joined, num_steps=num_steps)
    assert min(margin for _, margin in plain.margins) > MIN_MARGIN
    behind = fused_engine(SHAPE, weights, device=DEVICE)
    ahead = prefilled(behind)
    take_over(behind, ahead, PLANS)
    assert ahead.tokens == script.tokens
    assert [len(ahead.tokens[request]) for request in range(4)] == [3, 4, 6, 2]


def test_one_that_left_and_comes_back_goes_on_from_the_token_that_the_host_brings() -> None:
    pytest.importorskip("triton")
    from disagg.runtime.device_batch import DeviceBatch

    device = torch.device(DEVICE)
    own, batch = DeviceBatch(4, 1, 3, device), DecodeBatch(device)
    for request, token in ((7, 70), (8, 80), (9, 90)):
        batch.join(Joined(request, 4, (request, request + 10)), token, SamplingConfig())
    own.sync(batch)
    own.tokens[:3] += 1  # a step has run, of which the host knows no token
    for decode in batch:
        decode.num_kv_tokens += 1
    batch.leave(7)
    batch.leave(9)
    batch.join(Joined(9, 5, (3,)), 55, SamplingConfig())
    own.sync(batch)
    slots: list[Decode] = own.decodes
    assert [decode.request_id for decode in slots] == [8, 9]
    assert own.tokens[:2].tolist() == [81, 55]
    assert own.positions.tolist() == [5, 5, -1, -1]
    assert own.tables[:2, :2].tolist() == [[8, 18], [3, 0]]
