// Rows behind the last sequence, whose place only the device knows.
#include "cuda/host/launch_kernel.h"
#include "cuda/portable/launch.h"

namespace nsa::cuda::portable {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    fill_padding_portable(Word* data, int64_t num_rows, int64_t row_words, const int32_t* end_row,
                          Word word) {
  const int64_t end = num_rows * row_words;
  int64_t i = min64(max64(*end_row, 0), num_rows) * row_words + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (; i < end; i += int64_t{gridDim.x} * kThreads) data[i] = word;
}

template <typename Word>
Status fill(const FillPaddingParams& p, Word word, const Stream& stream) {
  const int64_t row_words = p.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks = min64(kMaxBlocks, ceil_div(p.num_rows * row_words, kThreads));
  return launch("fill_padding_portable", fill_padding_portable<Word>, dim3(static_cast<unsigned>(blocks)),
                kThreads, 0, stream, static_cast<Word*>(p.data), p.num_rows, row_words, p.end_row, word);
}

}  // namespace

Status fill_padding(const FillPaddingParams& p, const Stream& stream) {
  const auto low = static_cast<unsigned>(p.pattern), high = static_cast<unsigned>(p.pattern >> 32);
  if (p.row_bytes % 16 == 0) return fill(p, make_uint4(low, high, low, high), stream);
  if (p.row_bytes % 4 == 0 && low == high) return fill(p, low, stream);
  return Status::error(StatusCode::kUnsupported, "rows of %lld bytes have no CUDA kernel",
                       static_cast<long long>(p.row_bytes));
}

}  // namespace nsa::cuda::portable
