"""nsa_ext.diagnostics against values computed by hand."""

import math

import pytest
import torch

from nsa_ext import NativeSparseAttention, NSAConfig, diagnostics, reference

CONFIG = NSAConfig(
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    compress_block_size=16,
    compress_stride=8,
    block_size=16,
    num_selected_blocks=4,
    window_size=16,
)


def blocks(*rows):
    """block_indices [T, 1, n]."""
    return torch.tensor(rows, dtype=torch.int32)[:, None]


def test_tokens_read_with_the_defaults():
    config = NSAConfig(hidden_size=1024, num_heads=16, num_kv_heads=1, head_dim=64)
    read = diagnostics.tokens_read(config, 65_536)
    assert (read.compressed, read.selected, read.window, read.full) == (4_096, 1_024, 512, 65_536)
    assert read.total == 5_632 and read.share == 5_632 / 65_536


def test_tokens_read_of_a_short_sequence():
    read = diagnostics.tokens_read(CONFIG, 12)
    assert (read.compressed, read.selected, read.window, read.full) == (0, 12, 12, 12)


def test_gate_means():
    logits = torch.zeros(2, 4, 3)
    logits[0, 1, 2] = math.log(3)  # gates 3/4 and 1/2
    means = diagnostics.gate_means(logits)
    expected = torch.full((3, 4), 0.5)
    expected[2, 1] = 0.625
    torch.testing.assert_close(means, expected)


def test_query_positions():
    cu_seqlens = torch.tensor([0, 3, 3, 5, 5], dtype=torch.int32)
    assert diagnostics.query_positions(cu_seqlens, 7).tolist() == [0, 1, 2, 0, 1, -1, -1]
    assert diagnostics.query_positions(None, 3).tolist() == [0, 1, 2]


def test_forced_blocks():
    # Blocks of 4 tokens; queries in blocks 0, 1 and 5; one initial and two local blocks are forced.
    chosen = blocks([0, -1, -1, -1], [0, 1, -1, -1], [0, 2, 4, 5])
    forced = diagnostics.forced_blocks(chosen, torch.tensor([3, 4, 22]), 4, 1, 2)
    assert forced[:, 0].tolist() == [
        [True] + [False] * 3,
        [True, True, False, False],
        [True, False, True, True],
    ]
    assert diagnostics.forced_share(chosen, forced) == 6 / 7


def test_entropy():
    assert diagnostics.selection_entropy(blocks([0, 1], [2, 3])) == pytest.approx(math.log(4))
    assert diagnostics.selection_entropy(blocks([5, -1], [5, -1])) == 0
    skewed = blocks([0, -1], [0, -1], [0, 1])
    assert diagnostics.selection_entropy(skewed) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )
    two_heads = torch.tensor([[[0, 1], [3, -1]]], dtype=torch.int32)
    assert diagnostics.selection_entropy(two_heads) == pytest.approx(math.log(2) / 2)
    assert diagnostics.selection_entropy(blocks([-1, -1])) == 0


def test_selection_map():
    chosen = blocks([0, -1], [0, -1], [0, 1], [1, -1], [2, 0])
    expected = [[1, 0, 0], [0.5, 1, 0], [1, 0, 1]]
    assert diagnostics.selection_map(chosen, block_size=2).tolist() == expected


def test_recall_of_known_probabilities():
    # Equal keys: each visible token has the same mass.
    q, k = torch.ones(6, 2, 4), torch.ones(6, 1, 4)
    chosen = blocks([0, -1], [0, -1], [0, 1], [1, -1], [0, 2], [-1, -1])
    recall = diagnostics.selection_recall(q, k, chosen, 2, 0.5)
    expected = torch.tensor([1, 1, 1, 2 / 4, 3 / 5, 0])
    torch.testing.assert_close(recall, expected[:, None].expand(-1, 2))


def test_recall_across_query_tiles():
    generator = torch.Generator().manual_seed(0)
    length, block_size, scale = 2 * diagnostics.QUERY_TILE + 37, 16, 0.4
    q = torch.randn(length, 4, 8, generator=generator)
    k = torch.randn(length, 2, 8, generator=generator)
    num_blocks = -(-length // block_size)
    chosen = torch.randint(-1, num_blocks, (length, 2, 5), generator=generator, dtype=torch.int32)
    logits = scale * torch.einsum("thd,shd->ths", q.double(), k.double().repeat_interleave(2, 1))
    keys = torch.arange(length)
    p = logits.masked_fill((keys > keys[:, None])[:, None], -math.inf).softmax(-1)
    is_chosen = (keys // block_size == chosen[..., None]).any(2).repeat_interleave(2, 1)  # [T, Hq, S]
    expected = (p * is_chosen).sum(-1).float()
    recall = diagnostics.selection_recall(q, k, chosen, block_size, scale)
    torch.testing.assert_close(recall, expected, rtol=1e-5, atol=1e-6)


def test_recall_is_one_if_all_blocks_are_selected():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(200, 4, 8, generator=generator), torch.randn(200, 2, 8, generator=generator)
    everything = torch.arange(13, dtype=torch.int32).expand(200, 2, 13)
    recall = diagnostics.selection_recall(q, k, everything, 16, 0.3)
    torch.testing.assert_close(recall, torch.ones(200, 4))


def test_collect_reports_each_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(NativeSparseAttention(CONFIG), NativeSparseAttention(CONFIG))
    torch.nn.init.constant_(model[1].gate_proj.bias, 0.0)
    x = torch.randn(200, 32)
    reports = diagnostics.collect(model, x)
    assert len(reports) == 2
    torch.testing.assert_close(reports[0].gate_means, torch.full((3, 4), 1 / 3))
    torch.testing.assert_close(reports[1].gate_means, torch.full((3, 4), 0.5))
    for report in reports:
        assert report.selection_map.shape == (13, 13)
        assert torch.equal(report.selection_map.triu(1), torch.zeros(13, 13))
        torch.testing.assert_close(report.selection_map.diagonal(), torch.ones(13))  # the own block is forced
        torch.testing.assert_close(report.selection_map[:, 0], torch.ones(13))
        # Blocks 0, 1, 2 hold 1, 2, 3 forced blocks; from block 3 on, 3 of 4 are.
        own = torch.arange(200) // 16
        selected, forced = (own + 1).clamp(max=4).sum(), (own + 1).clamp(max=3).sum()
        assert report.forced_share == pytest.approx((forced / selected).item())
        assert 0 < report.entropy <= math.log(13)
        assert (
            report.recall.shape == (4,) and (report.recall > 4 / 13 / 2).all() and (report.recall < 1).all()
        )
    assert "recall" in diagnostics.format_table(reports)


def test_collect_looks_into_packed_sequences():
    torch.manual_seed(0)
    layer = NativeSparseAttention(CONFIG)
    x, cu_seqlens = torch.randn(240, 32), torch.tensor([0, 45, 205, 205], dtype=torch.int32)
    (packed,) = diagnostics.collect(layer, x, cu_seqlens=cu_seqlens, max_seqlen=160)
    (alone,) = diagnostics.collect(layer, x[45:205])
    assert packed.selection_map.shape == (10, 10)
    torch.testing.assert_close(packed.selection_map, alone.selection_map)
    torch.testing.assert_close(packed.recall, alone.recall)  # all blocks of the short one are forced
    torch.testing.assert_close(packed.entropy, alone.entropy)


def test_collected_recall_is_that_of_the_reference_selection():
    torch.manual_seed(0)
    layer = NativeSparseAttention(CONFIG)
    seen = []
    original = diagnostics._layer_report

    def keep(call, block_indices):
        seen.append((call, block_indices))
        return original(call, block_indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "_layer_report", keep)
        (report,) = diagnostics.collect(layer.double(), torch.randn(200, 32, dtype=torch.float64))
    ((call, chosen),) = seen
    sizes = (CONFIG.compress_block_size, CONFIG.compress_stride)
    _, lse = reference.compressed_attention(
        call["q"], call["k_cmp"], call["v_cmp"], None, None, 200, 200, *sizes
    )
    expected = reference.select_blocks(
        call["q"], call["k_cmp"], lse, None, None, 200, 200, *sizes, 16, 4, 1, 2
    )
    assert torch.equal(chosen, expected)
    recall = diagnostics.selection_recall(call["q"], call["k_slc"], expected, 16, 8**-0.5)
    torch.testing.assert_close(report.recall, recall[64:].mean(0))


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    reports = diagnostics.collect(NativeSparseAttention(CONFIG), torch.randn(100, 32))
    diagnostics.save_figure(reports, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
