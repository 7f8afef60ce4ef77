from __future__ import annotations

from collections import Counter

import pytest
import torch

from disagg.policies.vocabulary import SamplingConfig
from disagg.runtime.model_sampling import SamplingError, check_sampling, margins, sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = PROBABILITIES.log()[None]


def drawn(config: SamplingConfig, times: int = 2000) -> Counter[int]:
    rows = LOGITS.expand(times, -1)
    return Counter(sample(rows, [config] * times, list(range(times))).tolist())


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    greedy = SamplingConfig(seed=5)
    assert torch.equal(sample(logits, [greedy] * 50, [9] * 50), logits.argmax(-1))


def test_draws_follow_the_distribution() -> None:
    counts = drawn(SamplingConfig(temperature=1.0, seed=1), 4000)
    for token, probability in enumerate(PROBABILITIES.tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)  # four standard errors


def test_temperature_sharpens_and_flattens() -> None:
    cold, hot = drawn(SamplingConfig(temperature=0.25, seed=1)), drawn(SamplingConfig(temperature=4.0, seed=1))
    expected = PROBABILITIES**4 / (PROBABILITIES**4).sum()
    assert cold[1] / 2000 == pytest.approx(float(expected[1]), abs=0.04)
    assert hot[2] > 4 * cold[2]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(drawn(SamplingConfig(temperature=1.0, top_k=2, seed=3))) == {1, 3}


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    assert set(drawn(SamplingConfig(temperature=1.0, top_p=0.64, seed=3))) == {1, 3}
    assert set(drawn(SamplingConfig(temperature=1.0, top_p=0.66, seed=3))) == {1, 3, 4}
    assert set(drawn(SamplingConfig(temperature=1.0, top_p=0.001, seed=3))) == {1}


def test_a_draw_depends_on_seed_and_position_and_not_on_its_row() -> None:
    config = SamplingConfig(temperature=1.0, seed=8)
    logits = torch.randn(40, 200, generator=torch.Generator().manual_seed(2))
    together = sample(logits, [config] * 40, list(range(40)))
    alone = torch.cat([sample(logits[row : row + 1], [config], [row]) for row in reversed(range(40))]).flip(0)
    assert torch.equal(together, alone)
    assert not torch.equal(together, sample(logits, [config] * 40, list(range(1, 41))))
    other = SamplingConfig(temperature=1.0, seed=9)
    assert not torch.equal(together, sample(logits, [other] * 40, list(range(40))))


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = LOGITS.expand(2, -1)
    configs = [SamplingConfig(), SamplingConfig(temperature=1.0, top_k=1)]
    assert sample(logits, configs, [3, 3]).tolist() == [1, 1]


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert sample(logits, [SamplingConfig(temperature=1e-6)], [0]).tolist() == [0]


def test_margins_are_the_gap_between_the_two_greatest() -> None:
    assert margins(torch.tensor([[1.0, 5.0, 3.5], [2.0, 2.0, 1.0]])) == [1.5, 0.0]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (SamplingConfig(beam_width=2), "beam_width 2 is not supported; allowed: 1"),
        (SamplingConfig(temperature=-1.0), "temperature"),
        (SamplingConfig(temperature=float("nan")), "temperature"),
        (SamplingConfig(top_k=-1), "top_k"),
        (SamplingConfig(top_p=0.0), "top_p"),
        (SamplingConfig(top_p=1.5), "top_p"),
    ],
)
def test_a_configuration_out_of_range_is_refused(config: SamplingConfig, why: str) -> None:
    with pytest.raises(SamplingError, match=why):
        check_sampling(config)
