// Rows behind the last sequence.
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace nsa::cpu::NSA_CPU_ISA {

Status fill_padding(const FillPaddingParams& p, const Parallel&) {
  const int64_t first_row = min64(max64(*p.end_row, 0), p.num_rows);
  for (int t = 0; t < p.num_tensors; ++t) {
    const FillPaddingParams::Rows& rows = p.rows[t];
    const int64_t end = p.num_rows * rows.row_bytes;
    char* const data = static_cast<char*>(rows.data);
    constexpr int64_t kStep = sizeof(rows.pattern);
    for (int64_t i = first_row * rows.row_bytes; i < end; i += kStep)
      std::memcpy(data + i, &rows.pattern, static_cast<size_t>(min64(kStep, end - i)));
  }
  return {};
}

}  // namespace nsa::cpu::NSA_CPU_ISA
