"""Counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgs.metrics import Histogram


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([1, 25, 50, 75, 99, 100]))
def test_percentiles_are_numpys_inverted_cdf(values: list[int], percent: int) -> None:
    expected = np.percentile(values, percent, method="inverted_cdf")
    assert Histogram(values).percentile(percent) == expected


@pytest.mark.parametrize("percent", [1, 50, 100])
def test_an_empty_histogram_has_percentile_zero(percent: int) -> None:
    assert Histogram().percentile(percent) == 0
    assert Histogram().count == 0
