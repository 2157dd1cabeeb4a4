// The Hopper kernel of compressed attention and the sliding window against the naive loops, the portable
// kernel, and, on long sequences, single rows in double.
#include <cmath>

#include "catch2_bridge.h"
#include "cuda/portable/launch.h"
#include "cuda/sm90/launch.h"
#include "device_rows.h"
#include "naive.h"

namespace nsa_test {
namespace {

using nsa::BandedAttentionFwdParams;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Band {
  nsa::KeyBlocks keys;
  int64_t window;
};
const Band kCompressed{{32, 16}, 0};
Band window(int64_t w) { return {{1, 1}, w}; }

// What a kernel finds in shared memory before it writes there.
__global__ void fill_shared(uint32_t value, int count, uint32_t* never) {
  extern __shared__ uint32_t memory[];
  for (int i = threadIdx.x; i < count; i += blockDim.x) memory[i] = value;
  __syncthreads();
  if (memory[(threadIdx.x + 1) % count] != value) *never = value;
}
void leave_in_shared_memory(uint32_t value) {
  int device = 0, bytes = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncSetAttribute(fill_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  fill_shared<<<processors, 512, bytes>>>(value, bytes / 4, nullptr);
}

// One problem on hostile memory: NaN in gaps, in rows of no query, and in keys that no query sees.
template <typename T>
struct Problem {
  const Batch& batch;
  Heads heads;
  Band band;
  NaiveKeys keys;
  int64_t key_rows;
  double scale;
  Rows<BF16> q, k, v;

  Problem(const Batch& b, const Heads& h, const Band& with, double q_size = 1)
      : batch(b),
        heads(h),
        band(with),
        keys(with.window > 0 ? token_window(b, with.window)
                             : compressed(b, with.keys.block, with.keys.stride)),
        key_rows(b.total_k() / with.keys.stride),
        scale(1 / std::sqrt(static_cast<double>(h.dim_qk))),
        q(b.total_q(), h.q, h.dim_qk, 8, 16),
        k(key_rows, h.kv, h.dim_qk, 0, 8),
        v(key_rows, h.kv, h.dim_v, 16, 0) {
    q.randomize(1, q_size);
    k.randomize(2);
    v.randomize(3);
    std::vector<bool> seen(static_cast<size_t>(key_rows), false);
    for (int64_t s = 0; s < b.count(); ++s) {
      const KeyRange range = keys.range(s);
      for (int64_t i = 0; i < b.q_lens[s]; ++i) {
        const Query query{s, b.cu_q[s] + i, b.k_lens[s] - b.q_lens[s] + i, 0};
        for (int64_t key = 0; key < range.count; ++key) {
          if (keys.visible(query, key)) seen[static_cast<size_t>(range.first_row + key)] = true;
        }
      }
    }
    for (int64_t r = 0; r < key_rows; ++r) {
      if (seen[static_cast<size_t>(r)]) continue;
      k.poison_row(r);
      v.poison_row(r);
    }
    for (int64_t r = b.cu_q.back(); r < b.total_q(); ++r) q.poison_row(r);
  }

  struct Output {
    std::vector<double> o, lse;
    bool operator==(const Output&) const = default;
  };

  // launch(params) -> why it failed. Rows of no query are the caller's: they must come back as they were.
  template <typename Launch>
  std::string run(Output* out, const Launch& launch) const {
    const DeviceRows<T> q_rows(q), k_rows(k), v_rows(v);
    const DeviceOffsets offsets(batch);
    const size_t rows = static_cast<size_t>(batch.total_q() * heads.q),
                 padding_begin = batch.cu_q.back() * heads.q;
    std::vector<T> o_before(rows * heads.dim_v, static_cast<T>(static_cast<float>(kNaN)));
    std::vector<float> lse_before(rows, static_cast<float>(kNaN));
    for (size_t i = padding_begin; i < rows; ++i) {
      lse_before[i] = -std::numeric_limits<float>::infinity();
      for (int c = 0; c < heads.dim_v; ++c) o_before[i * heads.dim_v + c] = static_cast<T>(0.f);
    }
    const DeviceArray<T> o(o_before);
    const DeviceArray<float> lse(lse_before);
    BandedAttentionFwdParams p{};
    p.dtype = device_dtype<T>();
    p.seqs = offsets.params(batch, key_rows);
    p.shape = heads.shape();
    p.keys = band.keys;
    p.window = band.window;
    p.softmax_scale = scale;
    p.q = q_rows.view;
    p.k = k_rows.view;
    p.v = v_rows.view;
    p.o = o.data;
    p.lse = lse.data;
    std::string failure = launch(p);
    const cudaError_t error = cudaDeviceSynchronize();
    if (failure.empty() && error != cudaSuccess) failure = cudaGetErrorString(error);
    *out = {to_doubles(o.host()), to_doubles(lse.host())};
    return failure;
  }
  std::string run_sm90(Output* out) const {
    return run(out, [](const BandedAttentionFwdParams& p) -> std::string {
      nsa::Status status;
      if (!nsa::cuda::sm90::banded_attention_forward(p, {}, &status)) return "there is no kernel";
      return status.message;
    });
  }

  // Empty where all is well.
  std::string compare(const Output& out, const std::vector<double>& o, const std::vector<double>& lse,
                      double slack) const {
    const double allowed = std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;
    std::string wrong = mismatch("o", out.o, o, slack * allowed);
    return wrong.empty() ? mismatch("lse", out.lse, lse, slack * bound<float, float>()) : wrong;
  }
  std::string check_naive() const {
    Output out, again;
    leave_in_shared_memory(0);
    std::string failure = run_sm90(&out);
    leave_in_shared_memory(0x447a447a);  // 1,000 in bfloat16, 4.5 in float16
    failure += run_sm90(&again);
    if (!failure.empty()) return failure;
    if (!(out == again)) return "two runs differ";
    const NaiveForward exact = naive_forward(batch, heads, keys, scale, q, k, v);
    return compare(out, exact.o, exact.lse, 1);
  }
  std::string check_portable() const {
    Output out, other;
    std::string failure = run_sm90(&out) + run(&other, [](const BandedAttentionFwdParams& p) -> std::string {
                            return nsa::cuda::portable::banded_attention_forward(p, {}).message;
                          });
    return failure.empty() ? compare(out, other.o, other.lse, 2) : failure;
  }
};

#define CAPTURE_CASE(batch, heads, band)                                                                 \
  CAPTURE(batch.count(), batch.total_q(), batch.total_k(), heads.q, heads.kv, heads.dim_qk, heads.dim_v, \
          band.keys.block, band.keys.stride, band.window)

TEST_CASE("Hopper banded attention equals the naive loops for every group size", "[sm90][banded]") {
  if (!is_hopper()) return;
  const Batch batches[] = {Batch({70}), Batch({33, 0, 5, 61}), Batch({20, 1, 0}, {75, 40, 12}, 6, 9),
                           Batch({13}, {90}, 0, 11, false), Batch({0}, {0}, 3, 18)};
  for (const int group : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 33, 64}) {
    const Heads heads{group * (group < 8 ? 3 : 1), group < 8 ? 3 : 1, 64, 64};
    for (const Batch& batch : batches) {
      for (const Band& band : {kCompressed, window(1), window(37), window(1000), Band{{9, 3}, 0}}) {
        CAPTURE_CASE(batch, heads, band);
        CHECK(Problem<__nv_bfloat16>(batch, heads, band).check_naive() == "");
      }
    }
  }
}

TEMPLATE_TEST_CASE("Hopper banded attention equals the naive loops for every head dim", "[sm90][banded]",
                   __nv_bfloat16, __half) {
  if (!is_hopper()) return;
  const Batch batch({9, 0, 30, 20}, {700, 0, 30, 41}, 5, 100);
  for (const auto& dims : {std::pair{64, 64}, std::pair{128, 128}, std::pair{192, 128}}) {
    for (const int group : {6, 16}) {
      const Heads heads{group, 1, dims.first, dims.second};
      for (const Band& band : {kCompressed, window(100), window(512)}) {
        CAPTURE_CASE(batch, heads, band);
        CHECK(Problem<TestType>(batch, heads, band).check_naive() == "");
        CHECK(Problem<TestType>(batch, heads, band, 1000).check_naive() == "");
      }
    }
  }
}

TEST_CASE("Hopper banded attention at the ends of its tiles", "[sm90][banded]") {
  if (!is_hopper()) return;
  const Heads heads{16, 1, 128, 128};
  for (const int edge : {0, 64, 80, 128, 160, 176, 192, 240, 256, 352, 400, 512, 528}) {
    for (const int keys : {edge - 1, edge, edge + 1}) {
      if (keys < 1) continue;
      for (const int queries : {1, 17}) {
        if (queries > keys) continue;
        const Batch tokens({queries}, {keys}, 0, 30);
        for (const Band& band : {window(176), window(512)}) {
          CAPTURE_CASE(tokens, heads, band);
          CHECK(Problem<__nv_bfloat16>(tokens, heads, band).check_naive() == "");
        }
        const Batch blocks({queries}, {keys * 16 + 16}, 0, 300);
        CAPTURE_CASE(blocks, heads, kCompressed);
        CHECK(Problem<__nv_bfloat16>(blocks, heads, kCompressed).check_naive() == "");
      }
    }
  }
}

TEST_CASE("Hopper banded attention equals the portable kernel on many tiles", "[sm90][banded]") {
  if (!is_hopper()) return;
  const Batch batch({1, 300, 0, 530, 133, 16, 17}, {1, 300, 0, 530, 433, 16, 900}, 70, 40);
  for (const int group : {1, 6, 16, 64}) {
    const Heads heads{group > 16 ? group : 2 * group, group > 16 ? 1 : 2, 128, 128};
    for (const Band& band : {kCompressed, window(512), Band{{8, 8}, 0}}) {
      CAPTURE_CASE(batch, heads, band);
      CHECK(Problem<__nv_bfloat16>(batch, heads, band).check_portable() == "");
    }
  }
}

TEST_CASE("what does not suit TMA is left to the portable kernel", "[sm90][banded]") {
  if (!is_hopper()) return;
  const Batch batch({40});
  const Heads heads{8, 2, 64, 64};
  const Problem<__nv_bfloat16> problem(batch, heads, window(20));
  Problem<__nv_bfloat16>::Output out;
  const auto refuses = [&](auto change) {
    return problem.run(&out, [&](BandedAttentionFwdParams p) -> std::string {
      nsa::Status status;
      change(p);
      return nsa::cuda::sm90::banded_attention_forward(p, {}, &status) ? "took it" : "";
    });
  };
  CHECK(refuses([](auto& p) { p.q.stride_head = 68; }) == "");
  CHECK(refuses([](auto& p) { p.k.stride_row += 4; }) == "");
  CHECK(refuses([](auto& p) { p.v.data = static_cast<const char*>(p.v.data) + 8; }) == "");
  CHECK(refuses([](auto& p) { p.shape.head_dim_qk = p.shape.head_dim_v = 96; }) == "");
}

__global__ void fill_normal(__nv_bfloat16* x, int64_t size, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < size; i += int64_t{gridDim.x} * 256) {
    uint64_t z = (static_cast<uint64_t>(i) + seed * 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 31) * 0x94D049BB133111EBull;
    z ^= z >> 29;
    const float u = ((z & 0xffffff) + 1) * 0x1p-24f, angle = (z >> 24 & 0xffffff) * 0x1p-23f;
    x[i] = __float2bfloat16(sqrtf(-2 * logf(u)) * cospif(angle));
  }
}

// Query `row` of head `head` in double: one block, a thread per column of v; keys [lo, hi).
__global__ void naive_row(const BandedAttentionFwdParams p, int64_t row, int head, int64_t lo, int64_t hi,
                          double* logits, double* o, double* lse) {
  const int dim = p.shape.head_dim_qk, head_kv = head / p.shape.group();
  const auto at = [](const nsa::RowsView& view, int64_t r, int h) {
    return static_cast<const __nv_bfloat16*>(view.data) + r * view.stride_row + h * view.stride_head;
  };
  const __nv_bfloat16* q = at(p.q, row, head);
  for (int64_t i = lo + threadIdx.x; i < hi; i += blockDim.x) {
    const __nv_bfloat16* k = at(p.k, i, head_kv);
    double sum = 0;
    for (int c = 0; c < dim; ++c) sum += static_cast<double>(__bfloat162float(q[c])) * __bfloat162float(k[c]);
    logits[i - lo] = sum * p.softmax_scale;
  }
  __syncthreads();
  double largest = -INFINITY, sum = 0, value = 0;
  for (int64_t i = lo; i < hi; ++i) largest = fmax(largest, logits[i - lo]);
  for (int64_t i = lo; i < hi; ++i) {
    const double weight = exp(logits[i - lo] - largest);
    sum += weight;
    value += weight * __bfloat162float(at(p.v, i, head_kv)[threadIdx.x]);
  }
  o[threadIdx.x] = hi > lo ? value / sum : 0;
  if (threadIdx.x == 0) *lse = hi > lo ? largest + log(sum) : -INFINITY;
}

TEST_CASE("Hopper banded attention on 65,536 tokens, sampled rows", "[sm90][banded][long]") {
  if (!is_hopper()) return;
  constexpr int kTokens = 65536, kDim = 128;
  const Heads heads{32, 2, kDim, kDim};
  DeviceArray<__nv_bfloat16> q(size_t{kTokens} * heads.q * kDim), k(size_t{kTokens} * heads.kv * kDim),
      v(size_t{kTokens} * heads.kv * kDim), o(q.size);
  DeviceArray<float> lse(size_t{kTokens} * heads.q);
  for (auto [x, seed] : {std::pair{&q, 1u}, std::pair{&k, 2u}, std::pair{&v, 3u}})
    fill_normal<<<512, 256>>>(x->data, static_cast<int64_t>(x->size), seed);
  for (const Band& band : {kCompressed, window(512)}) {
    BandedAttentionFwdParams p{};
    p.dtype = nsa::DType::kBF16;
    p.seqs.total_q = p.seqs.max_seqlen_q = p.seqs.max_seqlen_k = kTokens;
    p.seqs.key_rows = kTokens / band.keys.stride;
    p.shape = heads.shape();
    p.keys = band.keys;
    p.window = band.window;
    p.softmax_scale = 0.09;
    p.q = {q.data, heads.q * kDim, kDim};
    p.k = {k.data, heads.kv * kDim, kDim};
    p.v = {v.data, heads.kv * kDim, kDim};
    p.o = o.data;
    p.lse = lse.data;
    nsa::Status status;
    REQUIRE(nsa::cuda::sm90::banded_attention_forward(p, {}, &status));
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    DeviceArray<double> logits(8192), o_row(kDim), lse_row(1);
    std::vector<__nv_bfloat16> actual(kDim);
    float actual_lse;
    double worst = 0, worst_lse = 0;
    for (int i = 0; i < 64; ++i) {
      const int64_t row = i < 8 ? i * 9 : i < 16 ? kTokens - 1 - (i - 8) * 5 : (i * 2654435761u) % kTokens;
      const int head = i * 7 % heads.q;
      naive_row<<<1, kDim>>>(p, row, head, band.keys.begin_visible(row, band.window),
                             band.keys.end_visible(row), logits.data, o_row.data, lse_row.data);
      cudaMemcpy(actual.data(), o.data + (row * heads.q + head) * kDim, kDim * 2, cudaMemcpyDeviceToHost);
      cudaMemcpy(&actual_lse, lse.data + row * heads.q + head, 4, cudaMemcpyDeviceToHost);
      const auto expected = o_row.host();
      for (int c = 0; c < kDim; ++c)
        worst = std::fmax(worst, std::fabs(expected[c] - __bfloat162float(actual[c])));
      const double expected_lse = lse_row.host()[0];
      if (expected_lse != actual_lse) worst_lse = std::fmax(worst_lse, std::fabs(expected_lse - actual_lse));
    }
    CAPTURE(band.window);
    CHECK(worst < 0.02);
    CHECK(worst_lse < 1e-4);
  }
}

}  // namespace
}  // namespace nsa_test
