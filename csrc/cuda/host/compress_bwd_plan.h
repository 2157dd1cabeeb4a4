// The workspace of phi's backward: sizes from shapes alone, the same on every path.
#pragma once

#include "nsa/params.h"

namespace nsa::cuda {

// Rows are compressed blocks; T is the dtype of x.
struct CompressBwdPlan {
  int64_t* tokens;  // [R]: the first token of a row's block, -1 for a row of no block
  void* dz;         // [R, H, F] T: Z, then dZ; zeros in rows of no block
  void* act;        // [R, H, F] T: silu(Z); kMlp alone
  float* d_w1;      // [h, parts_w1, l * D, F]: partial sums of dW1 without PE
  float* d_w2;      // [h, parts_w2, F, D]: partial sums of dW2
  float* columns;   // [2, h, kColumnParts, width]: partial sums of dZ and of dOut over rows
  float* d_b1;      // [h, F]: the sum of dZ, which dW1 and dPE need beside db1
  int parts_w1, parts_w2, width;
  int64_t bytes;

  static constexpr int kColumnParts = 128;
  static constexpr int kSliceRows = 64;  // rows of a product's slice at most; parts are whole slices

  // With a null base: sizes only.
  CompressBwdPlan(const CompressBwdParams& p, void* base) {
    const CompressFwdParams& f = p.fwd;
    const int64_t heads = f.per_head ? f.num_heads : 1, depth = f.blocks.block * f.head_dim;
    const int64_t slices = ceil_div(f.num_rows, kSliceRows) * (f.per_head ? 1 : f.num_heads);
    const bool mlp = f.kind == CompressKind::kMlp;
    parts_w1 = parts(heads * ceil_div(depth, 128) * ceil_div(f.hidden_size, 256), slices);
    parts_w2 = parts(heads * ceil_div(f.hidden_size, 128) * ceil_div(f.head_dim, 128), slices);
    width = f.hidden_size > f.head_dim ? f.hidden_size : f.head_dim;
    const int64_t hidden_bytes = f.num_rows * f.num_heads * f.hidden_size * 2;
    bytes = 0;
    const auto take = [&](auto*& pointer, int64_t size) {
      pointer =
          base == nullptr ? nullptr : reinterpret_cast<decltype(+pointer)>(static_cast<char*>(base) + bytes);
      bytes += round_up(size, 256);
    };
    take(tokens, f.num_rows * 8);
    take(reinterpret_cast<char*&>(dz), hidden_bytes);
    take(reinterpret_cast<char*&>(act), mlp ? hidden_bytes : 0);
    take(d_w1, heads * parts_w1 * depth * f.hidden_size * 4);
    take(d_w2, mlp ? heads * parts_w2 * f.hidden_size * f.head_dim * 4 : 0);
    take(columns, 2 * heads * kColumnParts * width * 4);
    take(d_b1, heads * f.hidden_size * 4);
  }

 private:
  // Enough thread blocks for a large GPU: the sum over rows is split where the tiles of a product are few.
  static int parts(int64_t tiles, int64_t slices) {
    constexpr int64_t kBlocks = 128;
    return static_cast<int>(max64(1, min64(kBlocks / tiles, slices)));
  }
};

// The sum of dZ over rows is db1, dPE = W1 . db1, and dW1 has a part PE . db1^T.
inline bool needs_hidden_sum(const CompressBwdParams& p) {
  return p.d_b1 != nullptr || p.d_pe != nullptr || (p.d_w1 != nullptr && p.fwd.pe != nullptr);
}

}  // namespace nsa::cuda
