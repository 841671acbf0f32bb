"""Limits, and the search for the highest rate that meets them."""

from __future__ import annotations

import pytest
from vllm_puzzle.bench.efficiency.slo import Slo, attains, max_rate, next_rate
from vllm_puzzle.model_configs.schema import ConfigError


def test_flags_are_milliseconds_by_vllms_names() -> None:
    assert Slo.parse(["ttft:500", "tpot:12.5", "e2el:4000"]) == Slo(ttft=0.5, tpot=0.0125, e2e=4.0)
    assert Slo.parse(["ttfat:1500"]).limits() == {"ttfat": 1.5}


@pytest.mark.parametrize(
    "items", [["ttft"], ["itl:5"], ["ttft:fast"], ["ttft:0"], ["e2e:1", "e2el:2"], [], ["ttft:nan"]]
)
def test_a_flag_that_is_no_limit_is_refused_in_one_line(items: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^SLO.*found.*allowed") as caught:
        Slo.parse(items)
    assert "\n" not in str(caught.value)


def test_attainment_is_shown_beyond_doubt() -> None:
    assert not attains(10, 10), "ten of ten leave a doubt"
    assert attains(100, 100) and not attains(96, 100) and attains(980, 1000)
    assert attains(930, 1000, share=0.9) and not attains(0, 0)


def test_a_rate_above_one_that_failed_does_not_count() -> None:
    probes = {1.0: (200, 200), 2.0: (199, 200), 4.0: (150, 200), 5.0: (200, 200)}
    assert max_rate(probes) == 2.0
    assert max_rate({1.0: (100, 200)}) is None and max_rate({}) is None


@pytest.mark.parametrize("capacity", [0.3, 1.0, 3.7, 9.9, 16.0, 20.0])
def test_bisection_ends_within_its_tolerance_of_the_capacity(capacity: float) -> None:
    probes: dict[float, tuple[int, int]] = {}
    while (rate := next_rate(probes, 1.0, 16.0)) is not None:
        probes[rate] = (1000 if rate <= capacity else 500, 1000)
        assert len(probes) <= 11, "both ends, then nine halvings from 15 to a twentieth of 1"
    found = max_rate(probes)
    if capacity < 1:
        assert found is None
    else:
        assert found is not None and found <= capacity
        assert found == 16.0 or capacity < found / 0.95
