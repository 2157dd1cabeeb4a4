// Rows behind the last sequence.
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace nsa::cpu::NSA_CPU_ISA {

Status fill_padding(const FillPaddingParams& p, const Parallel&) {
  const int64_t begin = min64(max64(*p.end_row, 0), p.num_rows) * p.row_bytes;
  char* const data = static_cast<char*>(p.data);
  constexpr int64_t kStep = sizeof(p.pattern);
  for (int64_t i = begin; i < p.num_rows * p.row_bytes; i += kStep)
    std::memcpy(data + i, &p.pattern, static_cast<size_t>(min64(kStep, p.num_rows * p.row_bytes - i)));
  return {};
}

}  // namespace nsa::cpu::NSA_CPU_ISA
