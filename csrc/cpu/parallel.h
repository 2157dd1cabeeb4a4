// Memory and threads of the CPU kernels.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/simd.h"
#include "nsa/launch.h"

namespace nsa::cpu::NSA_CPU_ISA {

// Uninitialised memory, aligned for vectors. Empty (false) when there was none to be had.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  explicit operator bool() const { return data_ != nullptr; }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  void zero(int64_t count) const {
    std::memset(static_cast<void*>(data_), 0, static_cast<size_t>(count) * sizeof(T));
  }

 private:
  T* data_ = nullptr;
};

inline Status out_of_memory() {
  return Status::error(StatusCode::kOutOfMemory, "no memory for a CPU kernel's buffers");
}

// body(scratch, task) for every task in 0 .. num_tasks - 1, in this order as far as there are threads; each
// thread makes one scratch. Which thread takes which task never changes a result.
template <typename MakeScratch, typename Body>
Status parallel_tasks(const Parallel& parallel, int64_t num_tasks, const MakeScratch& make_scratch,
                      const Body& body) {
  struct Context {
    const MakeScratch& make_scratch;
    const Body& body;
    int64_t num_tasks;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
  } context{make_scratch, body, num_tasks};
  auto worker = [](void* pointer, int) {
    Context& c = *static_cast<Context*>(pointer);
    int64_t task = c.next.fetch_add(1);
    if (task >= c.num_tasks) return;
    auto scratch = c.make_scratch();
    if (!scratch) {
      c.failed = true;
      return;
    }
    for (; task < c.num_tasks; task = c.next.fetch_add(1)) c.body(scratch, task);
  };
  const int num_threads = static_cast<int>(min64(parallel.num_threads, num_tasks));
  if (num_threads <= 1 || parallel.run == nullptr) {
    worker(&context, 0);
  } else {
    parallel.run(num_threads, worker, &context);
  }
  return context.failed ? out_of_memory() : Status{};
}

struct NoScratch {
  explicit operator bool() const { return true; }
};

template <typename Body>
Status parallel_tasks(const Parallel& parallel, int64_t num_tasks, const Body& body) {
  return parallel_tasks(
      parallel, num_tasks, [] { return NoScratch{}; }, [&](NoScratch&, int64_t task) { body(task); });
}

}  // namespace nsa::cpu::NSA_CPU_ISA
