"""How many points are taken at once."""

import pytest

from pyro_flows.support.numbers.tensors import rows_for


@pytest.mark.parametrize(
    ("numbers", "rows"), [(1, 1024), (1000, 128), (30_000, 16), (100_000, 8), (1_000_000, 4), (10_000_000, 1)]
)
def test_points_share_the_data_of_a_model_unless_memory_is_mapped_anew_for_it(numbers, rows):
    assert rows_for(numbers) == rows
