"""nsa::compressed_attention against the fp64 reference."""

import torch
from cases import Case, Inputs, by_case, by_target
from harness import branch_check


@by_target
@by_case()
def test_equals_reference(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    _, lse = branch_check("compressed_attention", x, "cmp", case.compress)
    assert lse.shape == (case.num_queries, case.heads[0])


@by_target
@by_case("one_sequence", "ragged_with_empty", "chunked_prefill", "l_over_block_size")
def test_first_queries_see_nothing(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    o, lse = branch_check("compressed_attention", x, "cmp", case.compress)
    blind = torch.tensor(
        [row for row, _, t in case.queries_and_positions() if t < case.compress[0] - 1], dtype=torch.long
    )
    assert not o[blind].any() and torch.isneginf(lse[blind]).all()
