// phi: overlapping blocks of one stream to one row each, W2 . silu(W1 . vec(X + PE) + b1) + b2, and its
// gradients.
//
// Blocks are unfolded a tile at a time; the overlapping copy of the whole stream never exists. The backward
// avoids shared accumulators: dx is computed by the tile that owns the tokens (blocks that reach into it from
// the left are computed again), dW1 by the token offset in the block, and dPE from the row sums of dZ, since
// vec(X + PE) is linear in PE.
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace nsa::cpu::NSA_CPU_ISA {
namespace {

constexpr int64_t kTileBlocks = 64;
constexpr int64_t kDepth =
    128;  // of a product's slice: 128 x 64 floats of the right operand stay in the first-level cache

template <typename A>
constexpr int64_t pad(int64_t n) {
  return round_up(n, kLanes<A>);
}

template <typename A>
void deep_gemm(int64_t m, int64_t n, int64_t k, GemmOperands<A> g, bool accumulate) {
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    gemm(m, n, min64(kDepth, k - k0), g, accumulate || k0 > 0);
    g.a += kDepth * g.a_col;
    g.b += kDepth * g.ldb;
  }
}

// A parameter matrix [h, rows, cols] as padded accumulators: [h, rows, cols padded], or its transpose [h,
// cols, rows padded].
template <typename A>
struct Matrix {
  Buffer<A> data;
  int64_t ld = 0, head_stride = 0;

  template <typename T>
  Status pack(const T* src, int64_t heads, int64_t rows, int64_t cols, bool transposed) {
    ld = pad<A>(transposed ? rows : cols);
    head_stride = (transposed ? cols : rows) * ld;
    data = Buffer<A>(heads * head_stride);
    if (!data) return out_of_memory();
    for (int64_t i = 0; i < heads * rows; ++i) {
      A* dst = data.get() + i / rows * head_stride;
      const int64_t r = i % rows;
      if (transposed) {
        for (int64_t c = 0; c < cols; ++c) dst[c * ld + r] = convert<A>(src[i * cols + c]);
      } else {
        load_row(dst + r * ld, src + i * cols, cols, ld);
      }
    }
    if (transposed) {
      for (int64_t row = 0; row < heads * cols; ++row) {
        for (int64_t r = rows; r < ld; ++r) data[row * ld + r] = 0;
      }
    }
    return {};
  }
  const A* head(int64_t h) const { return data.get() + h * head_stride; }
};

// A run of blocks of one sequence, for one head.
struct BlockTile {
  int64_t head, b;
  int64_t begin, count;  // blocks
};

struct TileList {
  Buffer<BlockTile> tiles;
  int64_t count = 0;
};

// Every sequence's first count_of(sequence) things in runs of kTileBlocks, head by head.
template <typename Count>
TileList list_tiles(const SequenceBatch& seqs, int num_heads, const Count& count_of) {
  TileList list;
  for (int64_t b = 0; b < seqs.batch; ++b)
    list.count += ceil_div(count_of(seqs.sequence(b)), kTileBlocks) * num_heads;
  list.tiles = Buffer<BlockTile>(list.count);
  if (!list.tiles) return list;
  int64_t n = 0;
  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t b = 0; b < seqs.batch; ++b) {
      const int64_t count = count_of(seqs.sequence(b));
      for (int64_t begin = 0; begin < count; begin += kTileBlocks) {
        list.tiles[n++] = {head, b, begin, min64(kTileBlocks, count - begin)};
      }
    }
  }
  return list;
}

template <typename T>
struct Phi {
  using A = Acc<T>;
  const CompressFwdParams& p;
  int64_t unfolded;  // l * D
  int64_t hidden;    // F, padded
  Matrix<A> w1, w2;
  Buffer<A> pe, b1, b2;

  explicit Phi(const CompressFwdParams& p)
      : p(p), unfolded(p.blocks.block * p.head_dim), hidden(pad<A>(p.hidden_size)) {}

  int64_t heads() const { return p.per_head ? p.num_heads : 1; }
  int64_t parameter_head(int64_t head) const { return p.per_head ? head : 0; }
  int64_t row_of(const Sequence& seq, int64_t block) const { return p.blocks.first_row(seq.k_begin) + block; }
  const T* x_of(const Sequence& seq, int64_t token, int64_t head) const {
    return static_cast<const T*>(p.x.data) + (seq.k_begin + token) * p.x.stride_row + head * p.x.stride_head;
  }

  Status pack_vector(Buffer<A>& out, const void* src, int64_t rows, int64_t cols) {
    const int64_t ld = pad<A>(cols);
    out = Buffer<A>(rows * ld);
    if (!out) return out_of_memory();
    out.zero(rows * ld);
    if (src) {
      for (int64_t r = 0; r < rows; ++r)
        load_row(&out[r * ld], static_cast<const T*>(src) + r * cols, cols, ld);
    }
    return {};
  }

  Status pack() {
    Status status = w1.pack(static_cast<const T*>(p.w1), heads(), unfolded, p.hidden_size, false);
    if (status.ok()) status = pack_vector(b1, p.b1, heads(), p.hidden_size);
    if (status.ok()) status = pack_vector(pe, p.pe, heads() * p.blocks.block, p.head_dim);
    if (status.ok() && p.kind == CompressKind::kMlp) {
      status = w2.pack(static_cast<const T*>(p.w2), heads(), p.hidden_size, p.head_dim, false);
      if (status.ok()) status = pack_vector(b2, p.b2, heads(), p.head_dim);
    }
    return status;
  }

  // dst[i][0 .. D) = X + PE at one offset of the tile's blocks.
  void unfold_offset(A* dst, int64_t ld, const BlockTile& tile, int64_t offset) const {
    const Sequence seq = p.seqs.sequence(tile.b);
    const A* e = &pe[(parameter_head(tile.head) * p.blocks.block + offset) * pad<A>(p.head_dim)];
    for (int64_t i = 0; i < tile.count; ++i) {
      const T* src = x_of(seq, (tile.begin + i) * p.blocks.stride + offset, tile.head);
      for (int d = 0; d < p.head_dim; ++d) dst[i * ld + d] = convert<A>(src[d]) + e[d];
    }
  }

  // z[i][F padded] = W1 . vec(X + PE) + b1 for the tile's blocks.
  void first_layer(const BlockTile& tile, A* unfold, A* z) const {
    for (int64_t offset = 0; offset < p.blocks.block; ++offset)
      unfold_offset(unfold + offset * p.head_dim, unfolded, tile, offset);
    const A* bias = &b1[parameter_head(tile.head) * hidden];
    for (int64_t i = 0; i < tile.count; ++i)
      std::memcpy(z + i * hidden, bias, static_cast<size_t>(hidden) * sizeof(A));
    deep_gemm<A>(tile.count, hidden, unfolded,
                 {unfold, unfolded, 1, w1.head(parameter_head(tile.head)), w1.ld, z, hidden}, true);
  }
};

template <typename A>
inline Vec<A> sigmoid(Vec<A> x) {
  // Clamped where float's exp2 ends; the sigmoid is 0 in its precision long before.
  const Vec<A> e = x * static_cast<A>(-kLog2e);
  constexpr A kLargest = sizeof(A) == 4 ? 126 : 1022;
  return A(1) / (A(1) + exp2<A>(e > kLargest ? broadcast(kLargest) : e));
}

template <typename A>
struct TileScratch {
  Buffer<A> unfold, z, out;

  TileScratch(int64_t unfolded, int64_t hidden, int64_t out_ld)
      : unfold(kTileBlocks * unfolded), z(kTileBlocks * hidden), out(kTileBlocks * out_ld) {}
  explicit operator bool() const { return unfold && z && out; }
};

template <typename T>
Status mean_forward(const CompressFwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  const TileList list =
      list_tiles(p.seqs, p.num_heads, [&](const Sequence& seq) { return p.blocks.count(seq.k_len); });
  if (!list.tiles) return out_of_memory();
  const Phi<T> phi(p);
  return parallel_tasks(
      parallel, list.count, [&] { return Buffer<A>(p.head_dim); },
      [&](Buffer<A>& sum, int64_t task) {
        const BlockTile tile = list.tiles[task];
        const Sequence seq = p.seqs.sequence(tile.b);
        for (int64_t i = tile.begin; i < tile.begin + tile.count; ++i) {
          sum.zero(p.head_dim);
          for (int64_t offset = 0; offset < p.blocks.block; ++offset) {
            const T* src = phi.x_of(seq, i * p.blocks.stride + offset, tile.head);
            for (int d = 0; d < p.head_dim; ++d) sum[d] += convert<A>(src[d]);
          }
          T* dst = static_cast<T*>(p.out) + (phi.row_of(seq, i) * p.num_heads + tile.head) * p.head_dim;
          for (int d = 0; d < p.head_dim; ++d) dst[d] = convert<T>(sum[d] / static_cast<A>(p.blocks.block));
        }
      });
}

template <typename T>
Status forward(const CompressFwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  if (p.kind == CompressKind::kMean) return mean_forward<T>(p, parallel);
  const TileList list =
      list_tiles(p.seqs, p.num_heads, [&](const Sequence& seq) { return p.blocks.count(seq.k_len); });
  Phi<T> phi(p);
  const Status status = list.tiles ? phi.pack() : out_of_memory();
  if (!status.ok()) return status;
  const int64_t out_ld = pad<A>(p.head_dim);
  const bool mlp = p.kind == CompressKind::kMlp;
  return parallel_tasks(
      parallel, list.count, [&] { return TileScratch<A>(phi.unfolded, phi.hidden, out_ld); },
      [&](TileScratch<A>& scratch, int64_t task) {
        const BlockTile tile = list.tiles[task];
        const int64_t h = phi.parameter_head(tile.head);
        A *z = scratch.z.get(), *out = z;
        phi.first_layer(tile, scratch.unfold.get(), z);
        if (mlp) {
          for (int64_t i = 0; i < tile.count * phi.hidden; i += kLanes<A>)
            store(z + i, load(z + i) * sigmoid<A>(load(z + i)));
          out = scratch.out.get();
          for (int64_t i = 0; i < tile.count; ++i)
            std::memcpy(out + i * out_ld, &phi.b2[h * out_ld], static_cast<size_t>(out_ld) * sizeof(A));
          gemm<A>(tile.count, out_ld, p.hidden_size,
                  {z, phi.hidden, 1, phi.w2.head(h), phi.w2.ld, out, out_ld}, true);
        }
        const Sequence seq = p.seqs.sequence(tile.b);
        for (int64_t i = 0; i < tile.count; ++i) {
          T* dst = static_cast<T*>(p.out) +
                   (phi.row_of(seq, tile.begin + i) * p.num_heads + tile.head) * p.head_dim;
          for (int d = 0; d < p.head_dim; ++d) dst[d] = convert<T>(out[i * out_ld + d]);
        }
      });
}

// dX of the tokens [tile.begin, + tile.count) * stride of a sequence, from d_unfold_of(block, offset) [D] of
// every block.
inline int64_t first_block_of(const KeyBlocks& blocks, int64_t token) {
  return token < blocks.block ? 0 : (token - blocks.block) / blocks.stride + 1;
}

template <typename T>
Status mean_backward(const CompressBwdParams& bwd, const Parallel& parallel) {
  using A = Acc<T>;
  const CompressFwdParams& p = bwd.fwd;
  if (!bwd.dx) return {};
  const TileList list = list_tiles(p.seqs, p.num_heads, [&](const Sequence& seq) { return seq.k_len; });
  if (!list.tiles) return out_of_memory();
  const Phi<T> phi(p);
  return parallel_tasks(parallel, list.count, [&](int64_t task) {
    const BlockTile tile = list.tiles[task];  // of tokens
    const Sequence seq = p.seqs.sequence(tile.b);
    const int64_t num_blocks = p.blocks.count(seq.k_len);
    for (int64_t token = tile.begin; token < tile.begin + tile.count; ++token) {
      A* dx = static_cast<A*>(bwd.dx) + ((seq.k_begin + token) * p.num_heads + tile.head) * p.head_dim;
      for (int64_t i = first_block_of(p.blocks, token); i < min64(num_blocks, token / p.blocks.stride + 1);
           ++i) {
        const T* d_out = static_cast<const T*>(bwd.d_out.data) + phi.row_of(seq, i) * bwd.d_out.stride_row +
                         tile.head * bwd.d_out.stride_head;
        for (int d = 0; d < p.head_dim; ++d) dx[d] += convert<A>(d_out[d]) / static_cast<A>(p.blocks.block);
      }
    }
  });
}

template <typename T>
class Backward {
  using A = Acc<T>;

 public:
  Backward(const CompressBwdParams& bwd, const Parallel& parallel)
      : bwd_(bwd),
        p_(bwd.fwd),
        parallel_(parallel),
        phi_(bwd.fwd),
        mlp_(bwd.fwd.kind == CompressKind::kMlp),
        out_ld_(pad<A>(bwd.fwd.head_dim)) {}

  Status run() {
    tiles_ =
        list_tiles(p_.seqs, p_.num_heads, [&](const Sequence& seq) { return p_.blocks.count(seq.k_len); });
    if (!tiles_.tiles) return out_of_memory();
    Status status = phi_.pack();
    if (status.ok())
      status =
          phi_w1_t_.pack(static_cast<const T*>(p_.w1), phi_.heads(), phi_.unfolded, p_.hidden_size, true);
    if (status.ok() && mlp_)
      status = phi_w2_t_.pack(static_cast<const T*>(p_.w2), phi_.heads(), p_.hidden_size, p_.head_dim, true);
    if (status.ok()) status = hidden_grads();
    if (status.ok() && mlp_) status = second_layer_grads();
    if (status.ok()) status = first_layer_grads();
    if (status.ok() && bwd_.dx) status = input_grads();
    return status;
  }

 private:
  A* dz_of(int64_t tile, int64_t i) const { return &dz_[(tile * kTileBlocks + i) * phi_.hidden]; }
  A* act_of(int64_t tile, int64_t i) const { return &act_[(tile * kTileBlocks + i) * phi_.hidden]; }

  void load_d_out(const BlockTile& tile, A* dst) const {
    const Sequence seq = p_.seqs.sequence(tile.b);
    for (int64_t i = 0; i < tile.count; ++i) {
      const T* src = static_cast<const T*>(bwd_.d_out.data) +
                     phi_.row_of(seq, tile.begin + i) * bwd_.d_out.stride_row +
                     tile.head * bwd_.d_out.stride_head;
      load_row(dst + i * out_ld_, src, p_.head_dim, out_ld_);
    }
  }

  // dZ of every block, and silu(Z) for dW2: [tile][block][F padded].
  Status hidden_grads() {
    dz_ = Buffer<A>(tiles_.count * kTileBlocks * phi_.hidden);
    act_ = Buffer<A>(mlp_ ? tiles_.count * kTileBlocks * phi_.hidden : 0);
    if (!dz_ || !act_) return out_of_memory();
    return parallel_tasks(
        parallel_, tiles_.count, [&] { return TileScratch<A>(phi_.unfolded, phi_.hidden, out_ld_); },
        [&](TileScratch<A>& scratch, int64_t task) {
          const BlockTile tile = tiles_.tiles[task];
          A* dz = dz_of(task, 0);
          if (!mlp_) {  // out_ld == hidden
            load_d_out(tile, dz);
            return;
          }
          load_d_out(tile, scratch.out.get());
          phi_.first_layer(tile, scratch.unfold.get(), scratch.z.get());
          const Matrix<A>& w2_t = phi_w2_t_;
          gemm<A>(tile.count, phi_.hidden, p_.head_dim,
                  {scratch.out.get(), out_ld_, 1, w2_t.head(phi_.parameter_head(tile.head)), w2_t.ld, dz,
                   phi_.hidden},
                  false);
          A* act = act_of(task, 0);
          for (int64_t i = 0; i < tile.count * phi_.hidden; i += kLanes<A>) {
            const Vec<A> z = load(&scratch.z[i]), s = sigmoid<A>(z);
            store(act + i, z * s);
            store(dz + i, load(dz + i) * s * (A(1) + z * (A(1) - s)));
          }
        });
  }

  // Runs body(scratch, parameter head, part, tile index) over all tiles that share a parameter, one task a
  // part.
  template <typename Make, typename Body, typename Finish>
  Status over_parts(int64_t parts, const Make& make, const Body& body, const Finish& finish) {
    return parallel_tasks(parallel_, phi_.heads() * parts, make, [&](auto& scratch, int64_t task) {
      const int64_t h = task / parts, part = task % parts;
      for (int64_t tile = 0; tile < tiles_.count; ++tile) {
        if (phi_.parameter_head(tiles_.tiles[tile].head) == h) body(scratch, part, tile);
      }
      finish(scratch, h, part);
    });
  }

  struct Rows {
    Buffer<A> in, sum;
    int64_t ld, count;
    Rows(int64_t in_size, int64_t count, int64_t ld) : in(in_size), sum(count * ld), ld(ld), count(count) {
      if (sum) sum.zero(count * ld);
    }
    explicit operator bool() const { return in && sum; }
    // dst [rows][cols] += the sums, which start at zero again.
    void flush(A* dst, int64_t rows, int64_t cols) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) dst[r * cols + c] += sum[r * ld + c];
      }
      sum.zero(count * ld);
    }
  };

  Status second_layer_grads() {
    if (!bwd_.d_w2 && !bwd_.d_b2) return {};
    constexpr int64_t kPart = 64;  // rows of dW2
    const int64_t parts = ceil_div(p_.hidden_size, kPart);
    return over_parts(
        parts, [&] { return Rows(kTileBlocks * out_ld_, kPart + 1, out_ld_); },
        [&](Rows& rows, int64_t part, int64_t index) {
          const BlockTile tile = tiles_.tiles[index];
          load_d_out(tile, rows.in.get());
          const int64_t count = min64(kPart, p_.hidden_size - part * kPart);
          if (bwd_.d_w2) {
            gemm<A>(count, out_ld_, tile.count,
                    {act_of(index, 0) + part * kPart, 1, phi_.hidden, rows.in.get(), out_ld_, rows.sum.get(),
                     out_ld_},
                    true);
          }
          if (bwd_.d_b2 && part == 0)
            add_rows(rows.sum.get() + kPart * out_ld_, rows.in.get(), tile.count, out_ld_);
        },
        [&](Rows& rows, int64_t h, int64_t part) {
          const int64_t count = min64(kPart, p_.hidden_size - part * kPart);
          if (bwd_.d_b2 && part == 0) {
            for (int d = 0; d < p_.head_dim; ++d)
              static_cast<A*>(bwd_.d_b2)[h * p_.head_dim + d] += rows.sum[kPart * out_ld_ + d];
          }
          A* d_w2 = static_cast<A*>(bwd_.d_w2);
          rows.flush(d_w2 ? d_w2 + (h * p_.hidden_size + part * kPart) * p_.head_dim : nullptr,
                     d_w2 ? count : 0, p_.head_dim);
        });
  }

  // sum[0 .. ld) += the rows of a tile, added up on their own first.
  static void add_rows(A* sum, const A* rows, int64_t count, int64_t ld) {
    for (int64_t c = 0; c < ld; c += kLanes<A>) {
      Vec<A> tile_sum{};
      for (int64_t i = 0; i < count; ++i) tile_sum += load(rows + i * ld + c);
      store(sum + c, load(sum + c) + tile_sum);
    }
  }

  // dW1 by token offset; db1, and dPE = W1 . db1, by the way.
  Status first_layer_grads() {
    const int64_t hidden = phi_.hidden, dim = p_.head_dim;
    if (bwd_.d_b1 || bwd_.d_pe) {
      const Status status = over_parts(
          1, [&] { return Rows(0, 1, hidden); },
          [&](Rows& rows, int64_t, int64_t index) {
            add_rows(rows.sum.get(), dz_of(index, 0), tiles_.tiles[index].count, hidden);
          },
          [&](Rows& rows, int64_t h, int64_t) {
            if (A* d_pe = static_cast<A*>(bwd_.d_pe)) {
              for (int64_t i = 0; i < phi_.unfolded; ++i) {
                const A* w = phi_.w1.head(h) + i * phi_.w1.ld;
                Vec<A> sum{};
                for (int64_t f = 0; f < hidden; f += kLanes<A>) sum += load(w + f) * load(&rows.sum[f]);
                d_pe[h * phi_.unfolded + i] += reduce_sum<A>(sum);
              }
            }
            A* d_b1 = static_cast<A*>(bwd_.d_b1);
            rows.flush(d_b1 ? d_b1 + h * p_.hidden_size : nullptr, d_b1 ? 1 : 0, p_.hidden_size);
          });
      if (!status.ok()) return status;
    }
    if (!bwd_.d_w1) return {};
    return over_parts(
        p_.blocks.block, [&] { return Rows(kTileBlocks * dim, dim, hidden); },
        [&](Rows& rows, int64_t offset, int64_t index) {
          const BlockTile tile = tiles_.tiles[index];
          phi_.unfold_offset(rows.in.get(), dim, tile, offset);
          gemm<A>(dim, hidden, tile.count,
                  {rows.in.get(), 1, dim, dz_of(index, 0), hidden, rows.sum.get(), hidden}, true);
        },
        [&](Rows& rows, int64_t h, int64_t offset) {
          rows.flush(static_cast<A*>(bwd_.d_w1) + (h * phi_.unfolded + offset * dim) * p_.hidden_size, dim,
                     p_.hidden_size);
        });
  }

  // A tile owns kTileBlocks * stride tokens (the last tile of a sequence all that follow).
  Status input_grads() {
    const KeyBlocks blocks = p_.blocks;
    const int64_t halo = ceil_div(blocks.block, blocks.stride) - 1;
    const int64_t ld = phi_w1_t_.ld, max_rows = kTileBlocks + halo;
    struct Scratch {
      Buffer<A> dz, unfold;
      explicit operator bool() const { return dz && unfold; }
    };
    return parallel_tasks(
        parallel_, tiles_.count,
        [&] {
          return Scratch{Buffer<A>(max_rows * phi_.hidden), Buffer<A>(max_rows * ld)};
        },
        [&](Scratch& scratch, int64_t task) {
          const BlockTile tile = tiles_.tiles[task];
          const Sequence seq = p_.seqs.sequence(tile.b);
          const bool last = tile.begin + tile.count == blocks.count(seq.k_len);
          const int64_t token_begin = tile.begin * blocks.stride;
          const int64_t token_end = last ? seq.k_len : (tile.begin + tile.count) * blocks.stride;
          const int64_t first = max64(0, tile.begin - halo), count = tile.begin + tile.count - first;
          // Tiles of one sequence and head follow each other in the list, so blocks to the left are in the
          // tiles before.
          for (int64_t i = 0; i < count; ++i) {
            const int64_t back = ceil_div(max64(0, tile.begin - (first + i)), kTileBlocks);
            const int64_t in_tile = first + i - (tile.begin - back * kTileBlocks);
            std::memcpy(&scratch.dz[i * phi_.hidden], dz_of(task - back, in_tile),
                        static_cast<size_t>(phi_.hidden) * sizeof(A));
          }
          gemm<A>(count, ld, p_.hidden_size,
                  {scratch.dz.get(), phi_.hidden, 1, phi_w1_t_.head(phi_.parameter_head(tile.head)), ld,
                   scratch.unfold.get(), ld},
                  false);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t block_begin = (first + i) * blocks.stride;
            for (int64_t token = max64(block_begin, token_begin);
                 token < min64(block_begin + blocks.block, token_end); ++token) {
              const A* src = &scratch.unfold[i * ld + (token - block_begin) * p_.head_dim];
              A* dx =
                  static_cast<A*>(bwd_.dx) + ((seq.k_begin + token) * p_.num_heads + tile.head) * p_.head_dim;
              for (int d = 0; d < p_.head_dim; ++d) dx[d] += src[d];
            }
          }
        });
  }

  const CompressBwdParams& bwd_;
  const CompressFwdParams& p_;
  const Parallel& parallel_;
  Phi<T> phi_;
  const bool mlp_;
  const int64_t out_ld_;
  Matrix<A> phi_w1_t_, phi_w2_t_;
  TileList tiles_;
  Buffer<A> dz_, act_;
};

}  // namespace

Status compress_forward(const CompressFwdParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() { return forward<T>(p, parallel); });
}

Status compress_backward(const CompressBwdParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.fwd.dtype, [&]<typename T>() {
    return p.fwd.kind == CompressKind::kMean ? mean_backward<T>(p, parallel) : Backward<T>(p, parallel).run();
  });
}

}  // namespace nsa::cpu::NSA_CPU_ISA
