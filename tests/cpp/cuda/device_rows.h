// Host tensors of the naive loops on the device, gaps and garbage included.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <vector>

#include "buffers.h"
#include "device_memory.h"

namespace nsa_test {

template <typename T>
constexpr nsa::DType device_dtype() {
  return std::is_same_v<T, __half> ? nsa::DType::kF16 : nsa::DType::kBF16;
}

// The values are those of bf16, which fp16 holds as well.
template <typename T>
std::vector<T> device_values(const Guarded<BF16>& memory) {
  std::vector<T> values(static_cast<size_t>(memory.size()));
  for (int64_t i = 0; i < memory.size(); ++i)
    values[static_cast<size_t>(i)] = static_cast<T>(static_cast<float>(memory.get(i)));
  return values;
}

template <typename T>
struct DeviceRows {
  DeviceArray<T> memory;
  nsa::RowsView view;

  explicit DeviceRows(const Rows<BF16>& rows)
      : memory(device_values<T>(rows.memory())),
        view{memory.data, rows.view().stride_row, rows.view().stride_head} {}
};

template <typename T>
std::vector<double> to_doubles(const std::vector<T>& values) {
  std::vector<double> out;
  for (const T& x : values) out.push_back(static_cast<double>(static_cast<float>(x)));
  return out;
}

// Offsets on the device; null without them.
struct DeviceOffsets {
  DeviceArray<int32_t> q, k;

  explicit DeviceOffsets(const Batch& batch) : q(batch.cu_q), k(batch.cu_k) {}
  nsa::SequenceBatch params(const Batch& batch, int64_t key_rows) const {
    nsa::SequenceBatch seqs = batch.params();
    if (batch.offsets) {
      seqs.cu_seqlens_q = q.data;
      seqs.cu_seqlens_k = k.data;
    }
    seqs.key_rows = key_rows;
    return seqs;
  }
};

}  // namespace nsa_test
