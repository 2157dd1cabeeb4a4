// Memory for kernel tests: storage types, arrays between a canary and a guard page, threads.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "nsa/launch.h"

namespace nsa_test {

struct BF16 {
  uint16_t bits;
};

template <typename T>
double to_double(T x) {
  if constexpr (std::is_same_v<T, BF16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
  } else {
    return x;
  }
}

template <typename T>
T from_double(double x) {
  if constexpr (std::is_same_v<T, BF16>) {
    if (std::isnan(x)) return {0x7fc0};
    const uint32_t u = std::bit_cast<uint32_t>(static_cast<float>(x));
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  } else {
    return static_cast<T>(x);
  }
}

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr nsa::DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return nsa::DType::kF64;
  if constexpr (std::is_same_v<T, float>) return nsa::DType::kF32;
  return nsa::DType::kBF16;
}

template <typename T>
double epsilon() {
  return std::is_same_v<T, BF16> ? 0x1p-7 : static_cast<double>(std::numeric_limits<Acc<T>>::epsilon());
}

// An array whose last byte is the last one before a page that cannot be touched, with a canary in front.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t body = (bytes + kCanary + page - 1) / page * page;
    mapped_ = body + page;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + body, page, PROT_NONE) != 0)
      throw std::runtime_error("no guard page");
    front_ = body - bytes;
    std::memset(base_, kPattern, front_);
    data_ = reinterpret_cast<T*>(base_ + front_);
    fill(std::numeric_limits<double>::quiet_NaN());
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  Guarded(Guarded&& other) noexcept
      : count_(other.count_),
        mapped_(other.mapped_),
        front_(other.front_),
        base_(other.base_),
        data_(other.data_) {
    other.base_ = nullptr;
  }
  ~Guarded() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }

  T* data() const { return data_; }
  int64_t size() const { return count_; }
  void fill(double x) {
    for (int64_t i = 0; i < count_; ++i) data_[i] = convert(x);
  }
  void set(int64_t i, double x) { data_[i] = convert(x); }
  double get(int64_t i) const { return to_double(data_[i]); }
  std::vector<double> values() const {
    std::vector<double> out(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; ++i) out[static_cast<size_t>(i)] = get(i);
    return out;
  }
  bool intact() const {
    for (size_t i = 0; i < front_; ++i) {
      if (base_[i] != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kCanary = 256;
  static constexpr unsigned char kPattern = 0xA5;

  static T convert(double x) {
    if constexpr (std::is_integral_v<T>) {
      return std::isnan(x) ? std::numeric_limits<T>::max() : static_cast<T>(x);
    } else {
      return from_double<T>(x);
    }
  }

  int64_t count_;
  size_t mapped_ = 0, front_ = 0;
  unsigned char* base_ = nullptr;
  T* data_ = nullptr;
};

// [rows, heads, dim] with gaps between heads and rows; gaps hold NaN.
template <typename T>
class Rows {
 public:
  Rows(int64_t rows, int heads, int dim, int head_gap = 0, int row_gap = 0)
      : rows_(rows),
        heads_(heads),
        dim_(dim),
        stride_head_(dim + head_gap),
        stride_row_(heads * stride_head_ + row_gap),
        memory_(rows == 0 ? 0 : (rows - 1) * stride_row_ + (heads - 1) * stride_head_ + dim) {}

  void randomize(uint32_t seed, double scale = 1) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0, scale);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int h = 0; h < heads_; ++h) {
        for (int c = 0; c < dim_; ++c) memory_.set(at(r, h, c), normal(generator));
      }
    }
  }
  void poison_row(int64_t r) {
    for (int h = 0; h < heads_; ++h) {
      for (int c = 0; c < dim_; ++c) memory_.set(at(r, h, c), std::numeric_limits<double>::quiet_NaN());
    }
  }
  double operator()(int64_t r, int h, int c) const { return memory_.get(at(r, h, c)); }
  nsa::RowsView view() const { return {memory_.data(), stride_row_, stride_head_}; }
  Guarded<T>& memory() { return memory_; }
  const Guarded<T>& memory() const { return memory_; }
  int64_t rows() const { return rows_; }
  int heads() const { return heads_; }
  int dim() const { return dim_; }

 private:
  int64_t at(int64_t r, int h, int c) const { return r * stride_row_ + h * stride_head_ + c; }

  int64_t rows_;
  int heads_, dim_;
  int64_t stride_head_, stride_row_;
  Guarded<T> memory_;
};

// Packed sequences with rows of padding behind the last one; offsets = false: one sequence without
// cu_seqlens.
struct Batch {
  std::vector<int32_t> q_lens, k_lens;
  int64_t pad_q = 0, pad_k = 0;
  bool offsets = true;
  std::vector<int32_t> cu_q{0}, cu_k{0};

  Batch(std::vector<int32_t> q, std::vector<int32_t> k, int64_t padding_q = 0, int64_t padding_k = 0,
        bool with_offsets = true)
      : q_lens(std::move(q)),
        k_lens(std::move(k)),
        pad_q(padding_q),
        pad_k(padding_k),
        offsets(with_offsets) {
    for (int32_t n : q_lens) cu_q.push_back(cu_q.back() + n);
    for (int32_t n : k_lens) cu_k.push_back(cu_k.back() + n);
  }
  explicit Batch(std::vector<int32_t> lens) : Batch(lens, lens) {}

  int64_t total_q() const { return cu_q.back() + pad_q; }
  int64_t total_k() const { return cu_k.back() + pad_k; }
  int64_t count() const { return static_cast<int64_t>(k_lens.size()); }
  nsa::SequenceBatch params() const {
    nsa::SequenceBatch seqs;
    seqs.cu_seqlens_q = offsets ? cu_q.data() : nullptr;
    seqs.cu_seqlens_k = offsets ? cu_k.data() : nullptr;
    seqs.batch = count();
    seqs.total_q = total_q();
    for (int32_t n : q_lens) seqs.max_seqlen_q = std::max<int64_t>(seqs.max_seqlen_q, n);
    for (int32_t n : k_lens) seqs.max_seqlen_k = std::max<int64_t>(seqs.max_seqlen_k, n);
    return seqs;
  }
};

inline nsa::cpu::Parallel threads(int n) {
  return {n, [](int num_threads, void (*body)(void*, int), void* context) {
            std::vector<std::thread> team;
            for (int i = 1; i < num_threads; ++i) team.emplace_back(body, context, i);
            body(context, 0);
            for (std::thread& thread : team) thread.join();
          }};
}

// Empty when every actual value is within bound of the expected one (NaN and Inf in the same places), else
// the worst.
inline std::string mismatch(const char* name, const std::vector<double>& actual,
                            const std::vector<double>& expected, double bound) {
  if (actual.size() != expected.size()) return std::string(name) + ": different sizes";
  double largest = 1, worst = 0;
  size_t worst_at = 0;
  for (double x : expected) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const bool same = std::isfinite(expected[i]) ? std::isfinite(actual[i]) : actual[i] == expected[i];
    const double error = !same ? std::numeric_limits<double>::infinity()
                               : (std::isfinite(expected[i]) ? std::fabs(actual[i] - expected[i]) : 0);
    if (error > worst) worst = error, worst_at = i;
  }
  if (worst <= bound * largest) return {};
  return std::string(name) + ": element " + std::to_string(worst_at) + " of " +
         std::to_string(actual.size()) + " is " + std::to_string(actual[worst_at]) + ", expected " +
         std::to_string(expected[worst_at]) + ", error " + std::to_string(worst / largest) + " > " +
         std::to_string(bound) + " of the largest";
}

// What rounding to the storage type and a few hundred accumulator roundings make of values of size one.
template <typename Stored, typename A>
double bound() {
  return epsilon<Stored>() + 128 * static_cast<double>(std::numeric_limits<A>::epsilon());
}

}  // namespace nsa_test
