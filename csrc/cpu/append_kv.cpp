// Appends a step's tokens to a cache. The blocks that they complete go through the compression of the
// forward: their tokens are copied from the tail and the step into packed sequences, so the work follows the
// tokens appended, and compressed rows are those of training.
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace nsa::cpu::NSA_CPU_ISA {
namespace {

// The blocks of one sequence that a step completes.
struct NewBlocks {
  int64_t first, count;

  NewBlocks(KeyBlocks blocks, const Sequence& seq)
      : first(blocks.count(seq.k_len - seq.q_len)), count(blocks.count(seq.k_len) - first) {}
  int64_t first_token(KeyBlocks blocks) const { return first * blocks.stride; }
  int64_t num_tokens(KeyBlocks blocks) const {
    return count > 0 ? (count - 1) * blocks.stride + blocks.block : 0;
  }
};

template <typename T>
inline T* cached(const CachedRows& rows, int64_t b, int64_t s, int64_t head) {
  return static_cast<T*>(rows.data) + rows.offset(b, s, head);
}

template <typename T>
inline const T* given(const RowsView& rows, int64_t row, int64_t head) {
  return static_cast<const T*>(rows.data) + row * rows.stride_row + head * rows.stride_head;
}

// dst = src with channel c and c + dim / 2 turned by row `position` of the tables.
template <typename A, typename T>
void rotate(T* dst, const T* src, int dim, const A* cos, const A* sin) {
  const int half = dim / 2;
  for (int c = 0; c < half; ++c) {
    const A x = convert<A>(src[c]), y = convert<A>(src[c + half]);
    dst[c] = convert<T>(x * cos[c] - y * sin[c]);
    dst[c + half] = convert<T>(y * cos[c + half] + x * sin[c + half]);
  }
}

template <typename T>
class StreamAppend {
  using A = Acc<T>;
  using Stream = AppendKvParams::Stream;

 public:
  StreamAppend(const AppendKvParams& p, const Stream& stream, bool rotated)
      : p_(p), stream_(stream), blocks_(stream.phi.blocks), rotated_(rotated) {}

  // Compresses the finished blocks, then stores the tokens: the tail that phi needs may be overwritten.
  Status run(const Parallel& parallel) {
    Status status = compress(parallel);
    if (!status.ok()) return status;
    return parallel_tasks(parallel, p_.seqs.batch, [&](int64_t b) {
      store(stream_.slc, stream_.slc_cache, b);
      if (stream_.swa.data != nullptr) store(stream_.swa, stream_.swa_cache, b);
      store(stream_.cmp, stream_.tail, b);
    });
  }

 private:
  Status compress(const Parallel& parallel) {
    const int heads = stream_.phi.num_heads, dim = stream_.phi.head_dim;
    const Buffer<int32_t> offsets(p_.seqs.batch + 1);
    if (!offsets) return out_of_memory();
    offsets[0] = 0;
    int64_t longest = 0;
    for (int64_t b = 0; b < p_.seqs.batch; ++b) {
      const int64_t tokens = NewBlocks(blocks_, p_.seqs.sequence(b)).num_tokens(blocks_);
      offsets[b + 1] = static_cast<int32_t>(offsets[b] + tokens);
      longest = max64(longest, tokens);
    }
    const int64_t tokens = offsets[p_.seqs.batch];
    if (tokens == 0) return {};
    const Buffer<T> x(tokens * heads * dim), out(tokens / blocks_.stride * heads * dim);
    if (!x || !out) return out_of_memory();
    Status status = parallel_tasks(
        parallel, p_.seqs.batch, [&](int64_t b) { gather(b, x.get() + int64_t{offsets[b]} * heads * dim); });
    if (!status.ok()) return status;

    CompressFwdParams phi = stream_.phi;
    phi.seqs = {offsets.get(), offsets.get(), p_.seqs.batch, tokens, longest, longest, tokens};
    phi.x = {x.get(), int64_t{heads} * dim, dim};
    phi.out = out.get();
    phi.num_rows = tokens / blocks_.stride;
    status = NSA_CPU_ISA::compress_forward(phi, parallel);
    if (!status.ok()) return status;
    return parallel_tasks(parallel, p_.seqs.batch, [&](int64_t b) {
      scatter(b, out.get() + blocks_.first_row(offsets[b]) * heads * dim);
    });
  }

  // The tokens of the new blocks, [token][head][dim].
  void gather(int64_t b, T* dst) const {
    const Sequence seq = p_.seqs.sequence(b);
    const NewBlocks blocks(blocks_, seq);
    const int64_t begin = blocks.first_token(blocks_), cached_end = seq.position(0);
    const int dim = stream_.phi.head_dim;
    for (int64_t t = begin; t < begin + blocks.num_tokens(blocks_); ++t) {
      for (int head = 0; head < stream_.phi.num_heads; ++head, dst += dim) {
        const T* src = t < cached_end ? cached<T>(stream_.tail, b, t, head)
                                      : given<T>(stream_.cmp, seq.q_begin + t - cached_end, head);
        std::memcpy(dst, src, static_cast<size_t>(dim) * sizeof(T));
      }
    }
  }

  void scatter(int64_t b, const T* src) const {
    const NewBlocks blocks(blocks_, p_.seqs.sequence(b));
    const int dim = stream_.phi.head_dim;
    for (int64_t i = blocks.first; i < blocks.first + blocks.count; ++i) {
      for (int head = 0; head < stream_.phi.num_heads; ++head, src += dim) {
        T* dst = cached<T>(stream_.cmp_cache, b, blocks_.cached_row(i), head);
        if (rotated_) {
          const int64_t row = i * blocks_.stride * dim;
          rotate(dst, src, dim, static_cast<const A*>(p_.rotary_cos) + row,
                 static_cast<const A*>(p_.rotary_sin) + row);
        } else {
          std::memcpy(dst, src, static_cast<size_t>(dim) * sizeof(T));
        }
      }
    }
  }

  // The step's tokens of one sequence; of those that a ring cannot hold, the last ones.
  void store(const RowsView& src, const CachedRows& dst, int64_t b) const {
    const Sequence seq = p_.seqs.sequence(b);
    const int64_t first = dst.block_table == nullptr ? max64(0, seq.q_len - dst.page_rows) : 0;
    for (int64_t i = first; i < seq.q_len; ++i) {
      for (int head = 0; head < stream_.phi.num_heads; ++head) {
        std::memcpy(cached<T>(dst, b, seq.position(i), head), given<T>(src, seq.q_begin + i, head),
                    static_cast<size_t>(stream_.phi.head_dim) * sizeof(T));
      }
    }
  }

  const AppendKvParams& p_;
  const Stream& stream_;
  KeyBlocks blocks_;
  bool rotated_;
};

}  // namespace

Status append_kv(const AppendKvParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.k.phi.dtype, [&]<typename T>() {
    const Status status = StreamAppend<T>(p, p.k, p.rotary_cos != nullptr).run(parallel);
    return status.ok() ? StreamAppend<T>(p, p.v, false).run(parallel) : status;
  });
}

}  // namespace nsa::cpu::NSA_CPU_ISA
