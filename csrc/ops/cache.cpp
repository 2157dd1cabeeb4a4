#include "ops/cache.h"

#include <c10/util/Exception.h>

#define NSA_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, "nsa::", op_, ": ", __VA_ARGS__)

namespace nsa::ops {
namespace {

int64_t size_of(const at::Tensor& t, int64_t dim) { return t.sym_size(dim).guard_int(__FILE__, __LINE__); }

}  // namespace

void CacheChecks::sequences(Arg first) const {
  const Arg lengths{"cache_seqlens", args_.cache_seqlens};
  checks_.dim(lengths, 1, "[B]");
  checks_.dtype(lengths, at::kInt);
  checks_.device(lengths, first.tensor.device());
  const int64_t batch = size_of(args_.cache_seqlens, 0);
  if (args_.block_table.has_value()) {
    const Arg table{"block_table", *args_.block_table};
    checks_.dim(table, 2, "[B, pages per sequence]");
    checks_.shape(table, {batch, args_.block_table->sym_size(1)}, "[B, pages per sequence]");
    checks_.dtype(table, at::kInt);
    checks_.device(table, first.tensor.device());
  }
  if (args_.cu_seqlens_q.has_value()) {
    const Arg offsets{"cu_seqlens_q", *args_.cu_seqlens_q};
    checks_.shape(offsets, {batch + 1}, "[B + 1]");
    checks_.dtype(offsets, at::kInt);
    checks_.device(offsets, first.tensor.device());
  } else if (const auto rows = first.tensor.sym_size(0).maybe_as_int(); rows.has_value()) {
    NSA_CHECK(batch == 0 ? *rows == 0 : *rows % batch == 0, first.name, " has ", *rows,
              " rows; without cu_seqlens_q their number must be a multiple of the ", batch,
              " sequences of cache_seqlens");
    const auto longest = args_.max_seqlen_q.maybe_as_int();
    NSA_CHECK(batch == 0 || !longest.has_value() || *rows / batch <= *longest,
              "max_seqlen_q = ", args_.max_seqlen_q, "; each sequence has ",
              *rows / std::max<int64_t>(batch, 1), " rows of ", first.name);
  }
}

void CacheChecks::layout(Arg rows, Arg first) const {
  checks_.alike(first, {rows});
  const at::Tensor& t = rows.tensor;
  if (t.is_meta() || t.numel() == 0) return;
  NSA_CHECK(t.stride(3) == 1 || t.size(3) == 1, rows.name, " has strides ", t.strides(),
            "; its last dimension must be contiguous");
  if (!t.is_cuda()) return;
  const int64_t step = 16 / t.element_size();
  const bool aligned = t.stride(0) % step == 0 && t.stride(1) % step == 0 && t.stride(2) % step == 0 &&
                       reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  NSA_CHECK(aligned, rows.name, " has strides ", t.strides(),
            "; every row must begin on a multiple of 16 bytes");
}

void CacheChecks::pages(Arg rows, Arg first, int64_t page_rows, int64_t heads, int64_t dim) const {
  checks_.dim(rows, 4, "[pages, rows of a page, Hkv, D]");
  const int64_t num_pages =
      args_.block_table.has_value() ? size_of(rows.tensor, 0) : size_of(args_.cache_seqlens, 0);
  checks_.shape(rows, {num_pages, page_rows, heads, dim},
                args_.block_table.has_value() ? "[pages, rows of a page, Hkv, D]"
                                              : "without a block_table [B, rows of a sequence, Hkv, D]");
  layout(rows, first);
}

void CacheChecks::ring(Arg rows, Arg first, int64_t heads, int64_t dim, int64_t least) const {
  checks_.dim(rows, 4, "[B, R, Hkv, D]");
  const int64_t length = size_of(rows.tensor, 1);
  checks_.shape(rows, {size_of(args_.cache_seqlens, 0), length, heads, dim}, "[B, R, Hkv, D]");
  NSA_CHECK(length >= least, rows.name, " keeps ", length, " tokens; expected at least ", least);
  layout(rows, first);
}

int64_t CacheChecks::page_block_size(Arg k_slc_cache, const char* divisor_name, int64_t divisor) const {
  checks_.dim(k_slc_cache, 4, "[pages, page_block_size, Hkv, Dk]");
  const int64_t size = size_of(k_slc_cache.tensor, 1);
  NSA_CHECK(size >= 1 && size % divisor == 0, k_slc_cache.name, " has ", size, " tokens per ",
            args_.block_table.has_value() ? "page" : "sequence", "; expected a multiple of ", divisor_name,
            " = ", divisor);
  return size;
}

int64_t CacheChecks::capacity(Arg k_slc_cache) const {
  const int64_t size = size_of(k_slc_cache.tensor, 1);
  return args_.block_table.has_value() ? size * size_of(*args_.block_table, 1) : size;
}

void CacheChecks::values(Arg first, Arg k_slc_cache) const {
  if (!first.tensor.is_cpu()) return;  // on other devices, values are never read on the host
  const CacheStep step(first.tensor, args_, capacity(k_slc_cache));
  const CachedBatch& seqs = step.seqs;
  if (const int32_t* offsets = seqs.cu_seqlens_q) {
    NSA_CHECK(offsets[0] == 0, "cu_seqlens_q[0] = ", offsets[0], "; expected 0");
    for (int64_t b = 0; b < seqs.batch; ++b) {
      const int64_t count = int64_t{offsets[b + 1]} - offsets[b];
      NSA_CHECK(count >= 0, "cu_seqlens_q decreases from ", offsets[b], " to ", offsets[b + 1], " at index ",
                b + 1, "; expected non-decreasing offsets");
      NSA_CHECK(count <= seqs.max_seqlen_q, "sequence ", b, " of cu_seqlens_q has ", count,
                " tokens; max_seqlen_q = ", seqs.max_seqlen_q, " must be an upper bound");
    }
    NSA_CHECK(offsets[seqs.batch] <= seqs.total_q, "cu_seqlens_q[-1] = ", offsets[seqs.batch],
              " is behind the ", seqs.total_q, " rows of ", first.name);
  }
  const CachedRows pages = step.pages(k_slc_cache.tensor);
  for (int64_t b = 0; b < seqs.batch; ++b) {
    const Sequence seq = seqs.sequence(b);
    if (seq.q_len == 0) continue;
    const int32_t length = seqs.cache_seqlens[b];
    NSA_CHECK(length >= 0 && seq.k_len <= seqs.capacity, "cache_seqlens[", b, "] = ", length, " with ",
              seq.q_len, " new tokens; expected at least 0, and together at most the ", seqs.capacity,
              " tokens that the cache has for a sequence");
    if (pages.block_table == nullptr) continue;
    for (int64_t s = 0; s < seq.k_len; s += pages.page_rows) {
      const int64_t page = pages.page(b, s);
      NSA_CHECK(page >= 0 && page < pages.num_pages, "block_table[", b, ", ", s / pages.page_rows,
                "] = ", page, "; expected a page from 0 to ", pages.num_pages - 1,
                ", since the sequence has ", seq.k_len, " tokens");
    }
  }
}

CacheStep::CacheStep(const at::Tensor& first, const CacheArgs& args, int64_t capacity)
    : cache_seqlens(args.cache_seqlens.contiguous()) {
  seqs.cache_seqlens = cache_seqlens.const_data_ptr<int32_t>();
  seqs.batch = cache_seqlens.numel();
  seqs.total_q = rows_q = first.size(0);
  seqs.max_seqlen_q = args.max_seqlen_q.expect_int();
  seqs.capacity = capacity;
  if (args.block_table.has_value()) block_table = args.block_table->contiguous();
  if (!args.cu_seqlens_q.has_value()) return;
  cu_seqlens_q = args.cu_seqlens_q->contiguous();
  seqs.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  if (cu_seqlens_q.is_cpu()) rows_q = seqs.cu_seqlens_q[seqs.batch];
}

CachedRows CacheStep::ring(const at::Tensor& rows) const {
  // A kernel that appends writes through it; to a kernel that reads, the operator's schema promises not to.
  return {const_cast<void*>(rows.const_data_ptr()),
          rows.stride(0),
          rows.stride(1),
          rows.stride(2),
          rows.size(0),
          rows.size(1)};
}

CachedRows CacheStep::pages(const at::Tensor& rows) const {
  CachedRows result = ring(rows);
  if (!block_table.defined()) return result;
  result.block_table = block_table.const_data_ptr<int32_t>();
  result.table_width = block_table.size(1);
  return result;
}

void check_no_gradients(const char* op, at::TensorList inputs) {
  if (!at::GradMode::is_enabled()) return;
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK(!input.defined() || !input.requires_grad(), "nsa::", op,
                " is for inference and not differentiable; call it under torch.no_grad()");
  }
}

}  // namespace nsa::ops
