// One plain struct per operation and direction: all that a kernel is told, on any device.
//
// T, S: query and key tokens over the whole batch; Hq, Hkv: heads; Dk, Dv: head dims; R: rows of the keys at
// hand (S for tokens, S // compress_stride for compressed blocks); n: num_selected_blocks. "acc" is the
// accumulator type: double for f64, float for all others. Backward kernels write dq (QueryGrads) and ADD into
// dk and dv, which the caller has zeroed, or write them (AttentionGrads::key_results); a null pointer means
// that this gradient is not wanted.
#pragma once

#include <cstdint>

#include "nsa/geometry.h"

namespace nsa {

enum class DType : int8_t { kF32, kF64, kBF16, kF16 };

// [rows, heads, dim] with unit stride in dim; strides in elements.
struct RowsView {
  const void* data = nullptr;
  int64_t stride_row = 0;
  int64_t stride_head = 0;
};

struct Sequence {
  int64_t q_begin, q_len;  // rows of q
  int64_t k_begin, k_len;  // tokens of the key side

  // Position of query i: queries stand at the end of their sequence.
  NSA_HOST_DEVICE constexpr int64_t position(int64_t i) const { return k_len - q_len + i; }
};

// The packed batch. Without offsets it is one sequence of total_q queries and max_seqlen_k keys.
struct SequenceBatch {
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1]
  const int32_t* cu_seqlens_k = nullptr;  // [batch + 1]
  int64_t batch = 1;
  int64_t total_q = 0;
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  int64_t key_rows =
      0;  // R: rows of the key tensors at hand. Devices that cannot check offsets never go beyond

  NSA_HOST_DEVICE Sequence sequence(int64_t b) const {
    if (cu_seqlens_k == nullptr) return {0, total_q, 0, max_seqlen_k};
    return {cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b], cu_seqlens_k[b],
            cu_seqlens_k[b + 1] - cu_seqlens_k[b]};
  }
};

struct AttentionShape {
  int num_heads_q = 0, num_heads_kv = 0;
  int head_dim_qk = 0, head_dim_v = 0;

  NSA_HOST_DEVICE constexpr int group() const { return num_heads_q / num_heads_kv; }
};

// Compressed attention and the sliding window are one family: key i is visible to the query at position t
// iff t - window < keys end position <= t (window <= 0: no lower bound).
struct BandedAttentionFwdParams {
  DType dtype;
  SequenceBatch seqs;
  AttentionShape shape;
  KeyBlocks keys;
  int64_t window;
  double softmax_scale;
  RowsView q;  // [T, Hq, Dk]
  RowsView k;  // [R, Hkv, Dk]
  RowsView v;  // [R, Hkv, Dv]
  void* o;     // [T, Hq, Dv], contiguous
  void* lse;   // [T, Hq], acc, natural log
};

// Where dQ goes. Branches that share q add to one sum in turn, so that nothing has to be zeroed before the
// first nor rounded after the last: the first one writes the sum, the last one reads it and writes the
// result. Every row of a sequence is written, those that see no key too; rows behind the last sequence may
// be.
struct QueryGrads {
  void* sum = nullptr;     // [T, Hq, Dk], acc, contiguous; null: one branch alone makes dQ
  void* result = nullptr;  // [T, Hq, Dk], the dtype of q, contiguous, perhaps the sum itself; null: later
  bool begun = false;      // the sum holds what branches before have given

  NSA_HOST_DEVICE constexpr bool wanted() const { return sum != nullptr || result != nullptr; }
};

// What every attention backward needs beside its forward: dO may come unscaled, with the gate of the branch
// beside it.
struct AttentionGrads {
  RowsView d_o;           // [T, Hq, Dv], the dtype of q
  const void* d_o_scale;  // [T, Hq], acc, >= 0, or null (1): dO of the branch is d_o_scale * d_o
  const void* delta;      // [T, Hq], acc: rowsum of the branch's dO * o
  const void* lse;        // [T, Hq], acc, natural log
  QueryGrads dq;
  void* dk;  // [R, Hkv, Dk], acc, contiguous, added to
  void* dv;  // [R, Hkv, Dv], acc, contiguous, added to
  // dk and dv are results in the dtype of k instead, of which every row is written: where
  // cuda::writes_key_results says so.
  bool key_results = false;
};

struct BandedAttentionBwdParams {
  DType dtype;
  SequenceBatch seqs;
  AttentionShape shape;
  KeyBlocks keys;
  int64_t window;
  double softmax_scale;
  RowsView q, k, v;
  AttentionGrads grads;
  void* workspace;  // CUDA: workspace_bytes(params) bytes; null on the CPU
};

// The members of the family that share q and dO: as if their backward ran one after the other, so that a
// device may bring q and dO once and keep what is between them of dQ's sum to itself. Their workspaces are
// not used.
struct BandedBranchesBwdParams {
  BandedAttentionBwdParams branch[2];
  // What selected_branch_backward, launched just before, has noted here (SelectedBranchBwdParams::next).
  // early: its last kernel lets one that is made for it begin before it ends itself, when all but this last
  // one has ended. first_made: dK and dV of the first branch, or their parts in the workspace, are made.
  bool early, first_made;
  void* workspace;  // CUDA: workspace_bytes(params) bytes; null on the CPU
};

struct BlockScoresParams {
  DType dtype;
  SequenceBatch seqs;
  AttentionShape shape;  // head_dim_v is not used
  KeyBlocks keys;        // the compressed blocks
  int64_t block_size;
  double softmax_scale;
  RowsView q;          // [T, Hq, Dk]
  RowsView k_cmp;      // [R, Hkv, Dk]
  const void* lse;     // [T, Hq], acc, of the compressed attention
  void* scores;        // [T, Hkv, num_blocks], acc
  int64_t num_blocks;  // ceil(max_seqlen_k / block_size)
};

struct SelectBlocksParams {
  BlockScoresParams scoring;  // its scores pointer is not used
  int num_selected_blocks, num_initial_blocks, num_local_blocks;
  int32_t* block_indices;  // [T, Hkv, n], ascending, -1 = unused
  void* workspace;         // CUDA: workspace_bytes(params) bytes; null on the CPU
};

struct SelectedAttentionFwdParams {
  DType dtype;
  SequenceBatch seqs;
  AttentionShape shape;
  int64_t block_size;
  int num_selected_blocks;
  double softmax_scale;
  RowsView q;  // [T, Hq, Dk]
  RowsView k;  // [S, Hkv, Dk]
  RowsView v;  // [S, Hkv, Dv]
  const int32_t*
      block_indices;  // [T, Hkv, n], a set per row: any order, repeats and numbers out of range are legal
  void* o;            // [T, Hq, Dv], contiguous
  void* lse;          // [T, Hq], acc, natural log
};

struct SelectedAttentionBwdParams {
  DType dtype;
  SequenceBatch seqs;
  AttentionShape shape;
  int64_t block_size;
  int num_selected_blocks;
  double softmax_scale;
  RowsView q, k, v;
  const int32_t* block_indices;
  AttentionGrads grads;
  void* workspace;  // CUDA: workspace_bytes(params) bytes; null on the CPU
};

// Branches in the order cmp, slc, swa.
constexpr int kNumBranches = 3;

struct GatedCombineFwdParams {
  DType dtype;       // of o_branch and o
  DType gate_dtype;  // of gate_logits
  int64_t num_rows;  // T * Hq
  int head_dim_v;
  const void* o_branch[kNumBranches];  // [T * Hq, Dv], contiguous
  const void* gate_logits;             // [T * Hq, 3], contiguous
  void* o;                             // [T * Hq, Dv], contiguous
  // CUDA: where the tokens of the last sequence end (on the device), or null. Rows behind get o = 0, whatever
  // their gates hold.
  const int32_t* end_token;
  int num_heads;  // Hq
};

// The forward of nsa::attention: all branches of the same queries and their gate. Every operation reads the
// others' outputs from where they write them; slc.o may be gate.o, where the selected output is not wanted.
struct AttentionFwdParams {
  BandedAttentionFwdParams cmp;
  SelectBlocksParams select;
  SelectedAttentionFwdParams slc;
  BandedAttentionFwdParams swa;
  GatedCombineFwdParams gate;
  void* workspace = nullptr;  // CUDA: workspace_bytes(params) bytes; null on the CPU
};

// What no query of a sequence owns: the rows from *end_row on, which lies where the data does.
struct FillPaddingParams {
  struct Rows {
    void* data;  // [num_rows, row_bytes], contiguous
    int64_t row_bytes;
    uint64_t pattern;  // 8 bytes, the element once or repeated
  };
  static constexpr int kMaxTensors = 8;

  Rows rows[kMaxTensors];
  int num_tensors;
  int64_t num_rows;
  const int32_t* end_row;
};

// One pass over dO and the three outputs gives every gate gradient and every delta:
// dg_b = rowsum(dO * o_b), d_logits_b = dg_b * g_b * (1 - g_b), delta_b = g_b * dg_b. Any output may be null.
struct GatedCombineBwdParams {
  DType dtype;
  DType gate_dtype;
  int64_t num_tokens;
  int num_heads, head_dim_v;
  RowsView d_o;                        // [T, Hq, Dv]
  const void* o_branch[kNumBranches];  // [T * Hq, Dv], contiguous
  const void* gate_logits;             // [T * Hq, 3], contiguous
  void* d_o_branch[kNumBranches];      // [T * Hq, Dv], the dtype of o: g_b * dO
  void* d_gate_logits;                 // [T * Hq, 3], the dtype of gate_logits
  void* gates[kNumBranches];           // [T * Hq], acc: g_b
  void* delta[kNumBranches];           // [T * Hq], acc
  // CUDA: where the tokens of the last sequence end (on the device), or null. Rows behind get zeros, whatever
  // dO and their gates hold.
  const int32_t* end_token;
};

// The backward of the gate, and of selected attention, which needs what the gate's writes: a device may do
// beside the gate's what needs the choice of blocks alone.
struct SelectedBranchBwdParams {
  GatedCombineBwdParams gate;
  SelectedAttentionBwdParams slc;
  // What comes next, all but where its dQ goes, or null. A device may begin with it, which is noted there.
  BandedBranchesBwdParams* next;
};

// delta = rowsum(dO * o), for the branches when they are used alone.
struct DeltaParams {
  DType dtype;
  int64_t num_tokens;
  int num_heads, head_dim_v;
  RowsView d_o;   // [T, H, Dv]
  const void* o;  // [T, H, Dv], contiguous
  void* delta;    // [T, H], acc
};

enum class CompressKind : int8_t { kMlp, kLinear, kMean };

// CUDA splits W1 . vec(PE), which enters the first layer as a bias, into so many partial sums.
constexpr int kCompressBiasParts = 32;

// phi of one stream. h is 1 (parameters shared over heads) or H.
struct CompressFwdParams {
  DType dtype;
  CompressKind kind;
  SequenceBatch seqs;  // cu_seqlens_q = cu_seqlens_k = the offsets of x
  KeyBlocks blocks;
  int num_heads, head_dim, hidden_size;  // hidden_size = F; equals head_dim for kLinear
  bool per_head;                         // h == H
  RowsView x;                            // [S, H, D]
  const void* pe;                        // [h, l, D], contiguous, or null
  const void* w1;                        // [h, l * D, F], contiguous
  const void* b1;                        // [h, F] or null
  const void* w2;                        // [h, F, D]
  const void* b2;                        // [h, D] or null
  void* out;                             // [S // d, H, D], zeroed by the caller: rows of no block stay zero
  int64_t num_rows;                      // S // d
  void* workspace;                       // CUDA: [h, kCompressBiasParts, F] floats; null on the CPU
};

struct CompressBwdParams {
  CompressFwdParams fwd;  // its out pointer is not used
  RowsView d_out;         // [S // d, H, D]
  // [S, H, D], contiguous, zeroed by the caller; null = not wanted. The CPU adds to it in acc. CUDA writes it
  // in the dtype of x: no other gradient goes there, and a copy in fp32 would cost as much as the products.
  void* dx;
  void* d_pe;  // acc, the parameters' shapes, added to; null = not wanted
  void* d_w1;
  void* d_b1;
  void* d_w2;
  void* d_b2;
  void* workspace;  // CUDA: workspace_bytes(params) bytes; null on the CPU
};

// One stream of an inference cache: row s of sequence b is row s % page_rows of page
// block_table[b][s / page_rows]. Without a table, page b is sequence b's, and keeps its last page_rows rows.
struct CachedRows {
  void* data = nullptr;  // [num_pages, page_rows, H, D], unit stride in D; strides in elements
  int64_t stride_page = 0, stride_row = 0, stride_head = 0;
  int64_t num_pages = 0, page_rows = 1;
  const int32_t* block_table = nullptr;  // [B, table_width]
  int64_t table_width = 0;

  NSA_HOST_DEVICE int64_t page(int64_t b, int64_t s) const {
    return block_table == nullptr ? b : block_table[b * table_width + s / page_rows];
  }
  NSA_HOST_DEVICE int64_t offset(int64_t b, int64_t s, int64_t head) const {
    return page(b, s) * stride_page + s % page_rows * stride_row + head * stride_head;
  }
};

// The sequences of a cache and the tokens that a step adds to each: those stand behind the cached ones.
struct CachedBatch {
  const int32_t* cache_seqlens = nullptr;  // [B], tokens before the step
  const int32_t* cu_seqlens_q = nullptr;   // [B + 1], the step's tokens; null: T / B for each sequence
  int64_t batch = 0;
  int64_t total_q = 0;       // T
  int64_t max_seqlen_q = 0;  // any upper bound
  int64_t capacity = 0;      // tokens that a sequence may have

  NSA_HOST_DEVICE Sequence sequence(int64_t b) const {
    const int64_t each = cu_seqlens_q == nullptr ? total_q / batch : 0;
    const int64_t begin = cu_seqlens_q == nullptr ? b * each : cu_seqlens_q[b];
    const int64_t count = cu_seqlens_q == nullptr ? each : cu_seqlens_q[b + 1] - begin;
    return {begin, count, 0, cache_seqlens[b] + count};
  }
};

// Writes a step's tokens to a cache, with the compressed blocks that they complete.
struct AppendKvParams {
  struct Stream {  // K or V
    RowsView cmp;  // [T, Hkv, D], what phi sees
    RowsView slc;  // [T, Hkv, D]
    RowsView swa;  // [T, Hkv, D]; data = null: the window reads slc
    CachedRows cmp_cache, slc_cache, swa_cache;
    CachedRows tail;        // what phi sees of the last tokens, at least l - 1
    CompressFwdParams phi;  // dtype, kind, blocks, heads, dims and weights alone
  };
  CachedBatch seqs;
  Stream k, v;
  const void* rotary_cos;  // [rotary_rows, Dk], acc: rotates block i of K by row i * d; or null
  const void* rotary_sin;
  int64_t rotary_rows;
  void* workspace;  // CUDA: workspace_bytes(params) bytes; null on the CPU
};

// The most query tokens of a sequence in decode_attention.
constexpr int64_t kMaxDecodeTokens = 16;

// Attention of a step's tokens, which the cache holds already: three branches and the gate.
struct DecodeAttentionParams {
  DType dtype;
  DType gate_dtype;
  CachedBatch seqs;
  AttentionShape shape;
  KeyBlocks compressed;
  int64_t block_size;
  int num_selected_blocks, num_initial_blocks, num_local_blocks;
  int64_t window;
  double softmax_scale;
  RowsView q;               // [T, Hq, Dk]
  const void* gate_logits;  // [T, Hq, 3], contiguous
  CachedRows k_cmp, v_cmp;  // block i at row compressed.cached_row(i)
  CachedRows k_slc, v_slc;
  CachedRows k_swa, v_swa;  // a ring of at least window - 1 + max_seqlen_q tokens, or all of them
  void* o;                  // [T, Hq, Dv], contiguous
  int32_t* block_indices;   // [T, Hkv, n], ascending, -1 = unused
  void* lse;                // [3, T, Hq], acc: cmp, slc, swa
  void* workspace;          // CUDA: workspace_bytes(params) bytes; null on the CPU
};

}  // namespace nsa
