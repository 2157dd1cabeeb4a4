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

void fill_padding(std::initializer_list<Padded> tensors, const Batch& batch) {
  if (batch.seqs.cu_seqlens_q == nullptr) return;
  FillPaddingParams params{};
  params.num_rows = batch.seqs.total_q;
  params.end_row = batch.seqs.cu_seqlens_q + batch.seqs.batch;
  for (const auto& [tensor, value] : tensors) {
    if (!tensor.defined() || tensor.numel() == 0) continue;
    TORCH_INTERNAL_ASSERT(params.num_tensors < FillPaddingParams::kMaxTensors);
    params.rows[params.num_tensors++] = {tensor.mutable_data_ptr(),
                                         static_cast<int64_t>(tensor.nbytes()) / params.num_rows,
                                         pattern_of(tensor.scalar_type(), value)};
  }
  if (params.num_tensors != 0) launch("fill_padding", batch.cu_seqlens_q.device(), params);
}

}  // namespace nsa::ops
