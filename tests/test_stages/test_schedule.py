"""Learning rate and kd_ratio over the steps."""

from __future__ import annotations

from typing import Any

import pytest

from stages.training.schedule import RatioSchedule, Schedule


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_schedules_warm_up_to_the_peak_and_come_down_as_they_should(kind: Any) -> None:
    factors = [Schedule(kind=kind, steps=20, warmup_steps=4, min_factor=0.1).factor(step) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    after = factors[4:]
    if kind == "constant":
        assert set(after) == {1.0}
    else:
        assert after == sorted(after, reverse=True)
        assert factors[20] == pytest.approx(0.1)
    if kind == "wsd":
        assert factors[4:17] == [1.0] * 13
        assert factors[18] == pytest.approx(0.1 + 0.9 * 0.5)
    if kind == "cosine":
        assert factors[12] == pytest.approx(0.55)


def test_kd_ratio_rises_holds_and_falls_with_the_learning_rate() -> None:
    learning_rate = Schedule(kind="wsd", steps=20, warmup_steps=2, decay_steps=4)
    moving = RatioSchedule(peak=0.8, warmup_steps=4, falls_with=learning_rate)
    ratios = [moving.ratio(step) for step in range(20)]
    assert ratios[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ratios[4:17] == [0.8] * 13
    assert ratios[17:] == pytest.approx([0.6, 0.4, 0.2])
    assert {RatioSchedule(peak=0.8).ratio(step) for step in range(20)} == {0.8}
