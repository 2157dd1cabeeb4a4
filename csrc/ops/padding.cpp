// Rows behind the last sequence.
#include <cstring>

#include "ops/launch_device.h"
#include "ops/tensors.h"

namespace nsa::ops {
namespace {

template <typename Element>
uint64_t repeated(Element x) {
  uint64_t pattern = 0;
  for (size_t i = 0; i < sizeof(pattern); i += sizeof(x))
    std::memcpy(reinterpret_cast<char*>(&pattern) + i, &x, sizeof(x));
  return pattern;
}

uint64_t pattern_of(at::ScalarType dtype, double value) {
  if (value == 0) return 0;
  switch (dtype) {
    case at::kFloat:
      return repeated(static_cast<float>(value));
    case at::kDouble:
      return repeated(value);
    case at::kInt:
      return repeated(static_cast<int32_t>(value));
    default:
      TORCH_INTERNAL_ASSERT(false, "no padding of ", value, " in ", dtype);
  }
}

}  // namespace

void fill_padding(const at::Tensor& t, const Batch& batch, double value) {
  if (!t.defined() || batch.seqs.cu_seqlens_q == nullptr) return;
  FillPaddingParams params{};
  params.data = t.mutable_data_ptr();
  params.num_rows = t.size(0);
  params.row_bytes = params.num_rows == 0 ? 0 : static_cast<int64_t>(t.nbytes()) / params.num_rows;
  params.end_row = batch.seqs.cu_seqlens_q + batch.seqs.batch;
  params.pattern = pattern_of(t.scalar_type(), value);
  if (params.row_bytes != 0) launch("fill_padding", t.device(), params);
}

}  // namespace nsa::ops
