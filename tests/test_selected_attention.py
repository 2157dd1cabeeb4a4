"""nsa::selected_attention against the fp64 reference."""

import pytest
import torch
from cases import Case, Inputs, by_case, by_target
from harness import branch_check, op
from tolerance import assert_close


@by_target
@by_case()
def test_equals_reference(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    indices = {"block_indices": x.block_indices()}
    branch_check("selected_attention", x, "slc", (case.block_size,), extra=indices)


@by_target
@by_case("one_sequence", "ragged_with_empty", "chunked_prefill", "odd_strides")
def test_a_row_of_indices_is_a_set(case: Case, device: str, dtype: torch.dtype) -> None:
    """Order, repeats, and how the row is padded do not change a single bit."""
    x = Inputs(case, dtype, device)
    own = case.own_blocks()[:, None, None].expand(-1, case.heads[1], -1)
    tidy = torch.cat([(own - 1).clamp(min=-1), own, torch.full_like(own, -1), torch.full_like(own, -1)], -1)
    wild = torch.cat([own, torch.full_like(own, -5), own, (own - 1).clamp(min=-1)], -1)

    def attend(indices: torch.Tensor) -> torch.Tensor:
        indices = indices.int().contiguous().to(device)
        return op("selected_attention")(
            x.q, x.keys("slc"), x.values("slc"), indices, *x.cu, case.block_size, x.scale
        )[0]

    assert torch.equal(attend(tidy), attend(wild))


@by_target
def test_indices_out_of_range_are_ignored(device: str, dtype: torch.dtype) -> None:
    x = Inputs(Case("", (150,), dims=(64, 64), packed=False), dtype, device)
    indices = torch.tensor([-1, -(2**31), 2**31 - 1, 2**25], dtype=torch.int32, device=device).expand(
        150, 1, 4
    )
    o, lse = op("selected_attention")(
        x.q, x.keys("slc"), x.values("slc"), indices.contiguous(), *x.cu, 64, x.scale
    )
    assert not o.any() and torch.isneginf(lse).all()


@by_target
@pytest.mark.parametrize("num_tokens", [63, 64, 65, 200])
def test_all_blocks_is_full_causal_attention(num_tokens: int, device: str, dtype: torch.dtype) -> None:
    x = Inputs(Case("", (num_tokens,), packed=False, heads=(4, 2), dims=(64, 64)), dtype, device)
    blocks = -(-num_tokens // 64)
    indices = (
        torch.arange(blocks, dtype=torch.int32, device=device).expand(num_tokens, 2, blocks).contiguous()
    )
    q, k, v = x.q, x.keys("slc"), x.values("slc")
    o, _ = op("selected_attention")(q, k, v, indices, *x.cu, 64, x.scale)

    def full(dtype: torch.dtype) -> torch.Tensor:
        q_, k_, v_ = (t.cpu().to(dtype).transpose(0, 1)[None] for t in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q_, k_, v_, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    exact, baseline = full(torch.float64), full(dtype)
    assert_close("o", o, exact, baseline)
