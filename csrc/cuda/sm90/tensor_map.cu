#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "cuda/sm90/tensor_map.h"

namespace nsa::cuda::sm90 {
namespace {

// Found at run time, so that the library loads where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const auto function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000,
                                                               cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) pointer = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(pointer);
  }();
  return function;
}

template <int kRank>
bool encode(CUtensorMap* map, DType dtype, const void* data, const cuuint64_t (&size)[kRank],
            const int64_t (&stride)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  cuuint64_t stride_bytes[kRank - 1];
  for (int i = 0; i < kRank; ++i) {
    if (size[i] == 0 || size[i] > (uint64_t{1} << 32) || box[i] > 256) return false;
  }
  for (int i = 0; i < kRank - 1; ++i) {
    stride_bytes[i] = static_cast<cuuint64_t>(stride[i]) * 2;
    if (stride[i] <= 0 || stride_bytes[i] % 16 || stride_bytes[i] >= (uint64_t{1} << 40)) return false;
  }
  if (reinterpret_cast<uintptr_t>(data) % 16 || encode_function() == nullptr) return false;
  cuuint32_t element_strides[kRank];
  for (cuuint32_t& s : element_strides) s = 1;
  const auto type = dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_function()(map, type, kRank, const_cast<void*>(data), size, stride_bytes, box,
                           element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

constexpr cuuint32_t kColumns = 64;  // 128 bytes: the span of the swizzle

}  // namespace

bool make_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows, int heads, int dim,
                     int box_rows, int box_heads) {
  // A stride that is never used may be anything: a tensor of one head, or of one row.
  const int64_t head = heads == 1 ? dim : view.stride_head, row = rows == 1 ? head * heads : view.stride_row;
  return encode<3>(
      map, dtype, view.data,
      {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(rows)},
      {head, row}, {kColumns, static_cast<cuuint32_t>(box_heads), static_cast<cuuint32_t>(box_rows)});
}

bool make_panel_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows, int heads,
                           int dim, int box_rows) {
  const int64_t head = heads == 1 ? dim : view.stride_head, row = rows == 1 ? head * heads : view.stride_row;
  return encode<4>(map, dtype, view.data,
                   {kColumns, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(rows),
                    static_cast<cuuint64_t>(dim / kColumns)},
                   {head, row, kColumns},
                   {kColumns, 1, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(dim / kColumns)});
}

bool make_group_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows, int heads_kv,
                           int group, int dim, int box_rows, int box_heads) {
  const int heads = heads_kv * group;
  const int64_t head = heads == 1 ? dim : view.stride_head, row = rows == 1 ? head * heads : view.stride_row;
  return encode<4>(map, dtype, view.data,
                   {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(group),
                    static_cast<cuuint64_t>(heads_kv), static_cast<cuuint64_t>(rows)},
                   {head, head * group, row},
                   {kColumns, static_cast<cuuint32_t>(box_heads), 1, static_cast<cuuint32_t>(box_rows)});
}

bool make_group_by_head_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows,
                                   int heads_kv, int group, int dim, int box_rows, int box_heads) {
  const int heads = heads_kv * group;
  const int64_t head = heads == 1 ? dim : view.stride_head, row = rows == 1 ? head * heads : view.stride_row;
  return encode<4>(map, dtype, view.data,
                   {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(rows),
                    static_cast<cuuint64_t>(group), static_cast<cuuint64_t>(heads_kv)},
                   {row, head, head * group},
                   {kColumns, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_heads), 1});
}

}  // namespace nsa::cuda::sm90
