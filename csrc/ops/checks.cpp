#include "ops/checks.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <string>

#include "nsa/support.h"
#include "ops/tensors.h"

#define NSA_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, "nsa::", op_, ": ", __VA_ARGS__)

namespace nsa::ops {
namespace {

// True unless the sizes are known to differ.
bool may_be_equal(const c10::SymInt& a, const c10::SymInt& b) {
  return !TORCH_STATICALLY_KNOWN_TRUE(a.sym_ne(b));
}

// True unless a > b is known.
bool may_be_at_most(const c10::SymInt& a, const c10::SymInt& b) {
  return !TORCH_STATICALLY_KNOWN_TRUE(a.sym_gt(b));
}

int concrete_size(const at::Tensor& t, int64_t dim) {
  return static_cast<int>(t.sym_size(dim).guard_int(__FILE__, __LINE__));
}

std::string name_of(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

std::string names_of(unsigned dtypes) {
  std::string names;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    if (dtypes & bit(*find_dtype(dtype))) names += (names.empty() ? "" : ", ") + name_of(dtype);
  }
  return names;
}

std::string head_dim_names(const SupportRow& row) {
  std::ostringstream names;
  for (const HeadDims& dims : row.head_dims) {
    if (dims.qk != 0) names << " (" << dims.qk << ", " << dims.v << ")";
  }
  return names.str();
}

// What a Hopper kernel does, the portable one does as well.
bool runs_on(Path path, c10::DeviceType device) {
  return path == (device == c10::kCPU ? Path::kCpu : Path::kCudaPortable);
}

bool has_head_dims(const SupportRow& row, const AttentionShape& shape) {
  if (row.head_dims[0].qk == 0) return true;
  return std::any_of(std::begin(row.head_dims), std::end(row.head_dims), [&](const HeadDims& dims) {
    return dims.qk == shape.head_dim_qk && (dims.v == shape.head_dim_v || shape.head_dim_v == 0);
  });
}

}  // namespace

at::ScalarType acc_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

AttentionShape Checks::attention(Arg q, Arg k, Arg v) const {
  dim(v, 3, "[rows, Hkv, Dv]");
  AttentionShape shape = attention(q, k);
  alike(q, {v});
  shape.head_dim_v = concrete_size(v.tensor, 2);
  this->shape(v, {k.tensor.sym_size(0), shape.num_heads_kv, shape.head_dim_v}, "[rows of k, Hkv, Dv]");
  NSA_CHECK(shape.head_dim_v > 0, v.name, " has shape ", v.tensor.sym_sizes(),
            "; the head dim must be at least 1");
  supported(q, &shape);
  return shape;
}

AttentionShape Checks::attention(Arg q, Arg k) const {
  dim(q, 3, "[T, Hq, Dk]");
  dim(k, 3, "[rows, Hkv, Dk]");
  alike(q, {k});
  AttentionShape shape;
  shape.num_heads_q = concrete_size(q.tensor, 1);
  shape.num_heads_kv = concrete_size(k.tensor, 1);
  shape.head_dim_qk = concrete_size(q.tensor, 2);
  NSA_CHECK(shape.num_heads_q > 0 && shape.head_dim_qk > 0, q.name, " has shape ", q.tensor.sym_sizes(),
            "; the number of heads and the head dim must be at least 1");
  NSA_CHECK(shape.num_heads_kv > 0 && shape.num_heads_q % shape.num_heads_kv == 0, k.name, " has ",
            shape.num_heads_kv, " heads; their number must divide the ", shape.num_heads_q, " heads of ",
            q.name);
  this->shape(k, {k.tensor.sym_size(0), shape.num_heads_kv, shape.head_dim_qk}, "[rows, Hkv, Dk]");
  supported(q, &shape);
  return shape;
}

void Checks::alike(Arg first, std::initializer_list<Arg> others) const {
  for (const Arg& other : others) {
    device(other, first.tensor.device());
    NSA_CHECK(other.tensor.scalar_type() == first.tensor.scalar_type(), other.name, " has dtype ",
              name_of(other.tensor.scalar_type()), "; expected the dtype of ", first.name, ", ",
              name_of(first.tensor.scalar_type()));
  }
}

void Checks::supported(Arg first, const AttentionShape* shape) const {
  const std::optional<DType> dtype = find_dtype(first.tensor.scalar_type());
  NSA_CHECK(dtype.has_value(), first.name, " has dtype ", name_of(first.tensor.scalar_type()),
            "; allowed are ", names_of(~0u));
  const c10::DeviceType device = first.tensor.device().type();
  if (device == c10::kMeta) return;  // stands for any device
  unsigned dtypes = 0;
  std::string head_dims;
  for (const SupportRow& row : kSupport) {
    if (std::strcmp(row.op, support_row_) != 0 || !runs_on(row.path, device)) continue;
    dtypes |= row.dtypes;
    if (!(row.dtypes & bit(*dtype))) continue;
    if (shape == nullptr || has_head_dims(row, *shape)) return;
    head_dims += head_dim_names(row);
  }
  NSA_CHECK(dtypes != 0, first.name, " is on device ", first.tensor.device(),
            ", which has no kernel; nsa_ext.support_matrix() lists what runs where");
  NSA_CHECK(dtypes & bit(*dtype), first.name, " has dtype ", name_of(first.tensor.scalar_type()),
            "; on device ", first.tensor.device(), " allowed are ", names_of(dtypes),
            " (nsa_ext.support_matrix())");
  NSA_CHECK(false, "head dims (Dk, Dv) = (", shape->head_dim_qk, ", ", shape->head_dim_v, ") of ", first.name,
            " have no kernel on device ", first.tensor.device(), "; there is one for", head_dims,
            " (nsa_ext.support_matrix())");
}

void Checks::dim(Arg arg, int64_t rank, const char* layout) const {
  NSA_CHECK(arg.tensor.defined() && arg.tensor.layout() == c10::kStrided, arg.name,
            " must be a dense tensor ", layout);
  NSA_CHECK(arg.tensor.dim() == rank, arg.name, " has shape ", arg.tensor.sym_sizes(), "; expected ", layout);
}

void Checks::shape(Arg arg, std::initializer_list<c10::SymInt> expected, const char* layout) const {
  dim(arg, static_cast<int64_t>(expected.size()), layout);
  const c10::SymIntArrayRef sizes = arg.tensor.sym_sizes();
  NSA_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), may_be_equal), arg.name, " has shape ",
            sizes, "; expected ", layout, " = ", c10::SymIntArrayRef(expected));
}

void Checks::dtype(Arg arg, at::ScalarType allowed) const {
  NSA_CHECK(arg.tensor.scalar_type() == allowed, arg.name, " has dtype ", name_of(arg.tensor.scalar_type()),
            "; expected ", name_of(allowed));
}

void Checks::device(Arg arg, c10::Device expected) const {
  NSA_CHECK(arg.tensor.device() == expected, arg.name, " is on device ", arg.tensor.device(),
            "; all tensors must be on one device, here ", expected);
}

void Checks::lse(Arg lse, const at::Tensor& q) const {
  shape(lse, {q.sym_size(0), q.sym_size(1)}, "[T, Hq]");
  dtype(lse, acc_dtype(q.scalar_type()));
  device(lse, q.device());
}

void Checks::like_output(Arg o, const at::Tensor& q, int64_t head_dim_v) const {
  shape(o, {q.sym_size(0), q.sym_size(1), head_dim_v}, "[T, Hq, Dv]");
  dtype(o, q.scalar_type());
  device(o, q.device());
}

void Checks::block_indices(Arg indices, const at::Tensor& q, const AttentionShape& shape) const {
  dim(indices, 3, "[T, Hkv, n]");
  const int num_selected = concrete_size(indices.tensor, 2);
  NSA_CHECK(num_selected >= 1, indices.name, " has shape ", indices.tensor.sym_sizes(),
            "; its last dimension, the number of selected blocks, must be at least 1");
  this->shape(indices, {q.sym_size(0), shape.num_heads_kv, num_selected}, "[T, Hkv, n]");
  dtype(indices, at::kInt);
  device(indices, q.device());
}

void Checks::gate_logits(Arg logits, const at::Tensor& o) const {
  shape(logits, {o.sym_size(0), o.sym_size(1), kNumBranches}, "[T, Hq, 3]");
  const at::ScalarType given = logits.tensor.scalar_type(), acc = acc_dtype(o.scalar_type());
  NSA_CHECK(given == o.scalar_type() || given == acc, logits.name, " has dtype ", name_of(given),
            "; expected the dtype of o, ", name_of(o.scalar_type()), ", or ", name_of(acc));
  device(logits, o.device());
}

void Checks::at_least(const char* name, int64_t value, int64_t least) const {
  constexpr int64_t kMost = 1 << 30;
  NSA_CHECK(value >= least && value <= kMost, name, " = ", value, "; expected a number from ", least, " to ",
            kMost);
}

void Checks::positive(const char* name, double value) const {
  NSA_CHECK(std::isfinite(value) && value > 0, name, " = ", value, "; expected a finite number above 0");
}

void Checks::compression(const char* block_name, int64_t block_size, const char* stride_name,
                         int64_t stride) const {
  at_least(block_name, block_size, 1);
  at_least(stride_name, stride, 1);
  NSA_CHECK(block_size % stride == 0, stride_name, " = ", stride, " does not divide ", block_name, " = ",
            block_size, "; expected a divisor of it");
}

void Checks::selection_block(int64_t block_size, int64_t compress_stride) const {
  at_least("block_size", block_size, 1);
  NSA_CHECK(block_size % compress_stride == 0, "compress_stride = ", compress_stride,
            " does not divide block_size = ", block_size, "; expected a divisor of it");
}

void Checks::selection(int64_t num_selected, int64_t num_initial, int64_t num_local) const {
  at_least("num_selected_blocks", num_selected, 1);
  at_least("num_initial_blocks", num_initial, 0);
  at_least("num_local_blocks", num_local, 0);
  NSA_CHECK(num_initial + num_local <= num_selected, "num_initial_blocks = ", num_initial,
            " and num_local_blocks = ", num_local, " are more than num_selected_blocks = ", num_selected,
            "; their sum may be at most that");
}

void Checks::offsets(const char* name, const at::Tensor& cu_seqlens, c10::Device device) const {
  const Arg arg{name, cu_seqlens};
  dim(arg, 1, "[B + 1]");
  NSA_CHECK(may_be_at_most(1, cu_seqlens.sym_size(0)), name, " is empty; expected [B + 1] offsets");
  dtype(arg, at::kInt);
  this->device(arg, device);
}

void Checks::offset_values(const char* name, const at::Tensor& cu_seqlens, const c10::SymInt& rows,
                           const char* rows_name, const char* max_name, const c10::SymInt& max_seqlen) const {
  const at::Tensor contiguous = cu_seqlens.contiguous();
  const int32_t* offsets = contiguous.const_data_ptr<int32_t>();
  const int64_t batch = contiguous.numel() - 1;
  const int64_t longest = max_seqlen.expect_int();
  NSA_CHECK(offsets[0] == 0, name, "[0] = ", offsets[0], "; expected 0");
  for (int64_t b = 0; b < batch; ++b) {
    NSA_CHECK(offsets[b] <= offsets[b + 1], name, " decreases from ", offsets[b], " to ", offsets[b + 1],
              " at index ", b + 1, "; expected non-decreasing offsets");
    NSA_CHECK(offsets[b + 1] - offsets[b] <= longest, "sequence ", b, " of ", name, " has ",
              offsets[b + 1] - offsets[b], " tokens; ", max_name, " = ", longest, " must be an upper bound");
  }
  NSA_CHECK(offsets[batch] <= rows.expect_int(), name, "[-1] = ", offsets[batch], " is behind the ", rows,
            " rows of ", rows_name);
}

void Checks::sequences(const at::Tensor& q, const SequenceArgs& args) const {
  NSA_CHECK(may_be_at_most(0, args.max_seqlen_q), "max_seqlen_q = ", args.max_seqlen_q,
            "; expected at least 0");
  NSA_CHECK(may_be_at_most(0, args.max_seqlen_k), "max_seqlen_k = ", args.max_seqlen_k,
            "; expected at least 0");
  NSA_CHECK(args.cu_seqlens_q.has_value() == args.cu_seqlens_k.has_value(),
            args.cu_seqlens_q.has_value() ? "cu_seqlens_k" : "cu_seqlens_q", " is None but ",
            args.cu_seqlens_q.has_value() ? "cu_seqlens_q" : "cu_seqlens_k",
            " is not; expected both or neither");
  if (!args.cu_seqlens_q.has_value()) {
    NSA_CHECK(may_be_at_most(q.sym_size(0), args.max_seqlen_q), "max_seqlen_q = ", args.max_seqlen_q,
              "; without cu_seqlens_q expected at least the ", q.sym_size(0), " rows of q");
    NSA_CHECK(may_be_at_most(q.sym_size(0), args.max_seqlen_k), "q has ", q.sym_size(0),
              " rows, more than the max_seqlen_k = ", args.max_seqlen_k, " keys; expected at most as many");
    return;
  }
  const at::Tensor& cu_q = *args.cu_seqlens_q;
  const at::Tensor& cu_k = *args.cu_seqlens_k;
  offsets("cu_seqlens_q", cu_q, q.device());
  offsets("cu_seqlens_k", cu_k, q.device());
  shape({"cu_seqlens_k", cu_k}, {cu_q.sym_size(0)}, "[B + 1]");
  if (!cu_q.is_cpu()) return;  // on other devices, values are never read on the host
  offset_values("cu_seqlens_q", cu_q, q.sym_size(0), "q", "max_seqlen_q", args.max_seqlen_q);
  // The rows of the keys are checked with each key tensor.
  offset_values("cu_seqlens_k", cu_k, INT32_MAX, "k", "max_seqlen_k", args.max_seqlen_k);
  const at::Tensor q_contiguous = cu_q.contiguous(), k_contiguous = cu_k.contiguous();
  const int32_t* q_offsets = q_contiguous.const_data_ptr<int32_t>();
  const int32_t* k_offsets = k_contiguous.const_data_ptr<int32_t>();
  for (int64_t b = 0; b + 1 < q_contiguous.numel(); ++b) {
    const int32_t q_len = q_offsets[b + 1] - q_offsets[b], k_len = k_offsets[b + 1] - k_offsets[b];
    NSA_CHECK(q_len <= k_len, "sequence ", b, " has ", q_len, " queries in cu_seqlens_q but ", k_len,
              " keys in cu_seqlens_k; expected at most as many queries as keys");
  }
}

void Checks::key_rows(Arg k, const SequenceArgs& args, KeyBlocks keys) const {
  const std::optional<int64_t> rows = k.tensor.sym_size(0).maybe_as_int();
  const std::optional<int64_t> max_seqlen = args.max_seqlen_k.maybe_as_int();
  if (!rows.has_value() || !max_seqlen.has_value()) return;
  if (!args.cu_seqlens_k.has_value()) {
    NSA_CHECK(keys.count(*max_seqlen) <= *rows, k.name, " has ", *rows, " rows; max_seqlen_k = ", *max_seqlen,
              " needs at least ", keys.count(*max_seqlen));
    return;
  }
  if (!args.cu_seqlens_k->is_cpu()) return;
  const at::Tensor contiguous = args.cu_seqlens_k->contiguous();
  const int32_t* offsets = contiguous.const_data_ptr<int32_t>();
  for (int64_t b = 0; b + 1 < contiguous.numel(); ++b) {
    const int64_t count = keys.count(offsets[b + 1] - offsets[b]);
    const int64_t end = keys.first_row(offsets[b]) + count;
    NSA_CHECK(count == 0 || end <= *rows, k.name, " has ", *rows, " rows; sequence ", b,
              " of cu_seqlens_k, tokens ", offsets[b], " to ", offsets[b + 1], ", needs at least ", end);
  }
}

void Checks::token_sequences(Arg x, const std::optional<at::Tensor>& cu_seqlens,
                             const c10::SymInt& max_seqlen) const {
  const c10::SymInt rows = x.tensor.sym_size(0);
  NSA_CHECK(may_be_at_most(0, max_seqlen), "max_seqlen = ", max_seqlen, "; expected at least 0");
  if (!cu_seqlens.has_value()) {
    NSA_CHECK(may_be_at_most(max_seqlen, rows), "max_seqlen = ", max_seqlen,
              "; without cu_seqlens expected at most the ", rows, " rows of ", x.name);
    return;
  }
  offsets("cu_seqlens", *cu_seqlens, x.tensor.device());
  if (cu_seqlens->is_cpu()) offset_values("cu_seqlens", *cu_seqlens, rows, x.name, "max_seqlen", max_seqlen);
}

}  // namespace nsa::ops
