// Rows behind the last sequence, whose place only the device knows.
#include "cuda/host/launch_kernel.h"
#include "cuda/portable/launch.h"

namespace nsa::cuda::portable {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

template <typename Word>
__device__ void fill(const FillPaddingParams::Rows& rows, int64_t first_row, int64_t num_rows, Word word) {
  const int64_t row_words = rows.row_bytes / static_cast<int64_t>(sizeof(Word));
  Word* const data = static_cast<Word*>(rows.data);
  for (int64_t i = first_row * row_words + int64_t{blockIdx.x} * kThreads + threadIdx.x;
       i < num_rows * row_words; i += int64_t{gridDim.x} * kThreads)
    data[i] = word;
}

// A tensor for each blockIdx.y.
__global__ void __launch_bounds__(kThreads) fill_padding_portable(const FillPaddingParams p) {
  const int64_t first_row = min64(max64(*p.end_row, 0), p.num_rows);
  const FillPaddingParams::Rows& rows = p.rows[blockIdx.y];
  const auto low = static_cast<unsigned>(rows.pattern), high = static_cast<unsigned>(rows.pattern >> 32);
  if (rows.row_bytes % 16 == 0) {
    fill(rows, first_row, p.num_rows, make_uint4(low, high, low, high));
  } else {
    fill(rows, first_row, p.num_rows, low);
  }
}

}  // namespace

Status fill_padding(const FillPaddingParams& p, const Stream& stream) {
  int64_t most = 0;
  for (int t = 0; t < p.num_tensors; ++t) {
    const FillPaddingParams::Rows& rows = p.rows[t];
    if (rows.row_bytes % 4 != 0 || (rows.row_bytes % 16 != 0 && rows.pattern >> 32 != (rows.pattern & ~0u)))
      return Status::error(StatusCode::kUnsupported, "rows of %lld bytes have no CUDA kernel",
                           static_cast<long long>(rows.row_bytes));
    most = max64(most, p.num_rows * rows.row_bytes / (rows.row_bytes % 16 == 0 ? 16 : 4));
  }
  const dim3 grid(static_cast<unsigned>(min64(kMaxBlocks, ceil_div(most, kThreads))),
                  static_cast<unsigned>(p.num_tensors));
  return launch("fill_padding_portable", fill_padding_portable, grid, kThreads, 0, stream, p);
}

}  // namespace nsa::cuda::portable
