// The Hopper kernel of selected attention, and the portable one beside it, against naive loops.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "attention_check.h"
#include "catch2_bridge.h"
#include "cuda/portable/launch.h"
#include "cuda/sm90/launch.h"
#include "device_memory.h"
#include "random_indices.h"

namespace nsa::cuda {
namespace {

using nsa_test::Batch, nsa_test::BF16, nsa_test::DeviceArray, nsa_test::Heads;

uint16_t to_bits(double x, DType dtype) {
  if (dtype == DType::kBF16) return nsa_test::from_double<BF16>(x).bits;
  return static_cast<__half_raw>(__float2half(static_cast<float>(x))).x;
}

double from_bits(uint16_t bits, DType dtype) {
  if (dtype == DType::kBF16) return nsa_test::to_double(BF16{bits});
  __half_raw raw;
  raw.x = bits;
  return __half2float(raw);
}

// A copy on the device with gaps of NaN between heads and rows; strides suit TMA.
struct DeviceRows {
  static constexpr int kHeadGap = 8, kRowGap = 24;
  int64_t stride_head, stride_row;
  DeviceArray<uint16_t> memory;

  DeviceRows(const nsa_test::Rows<BF16>& rows, DType dtype)
      : stride_head(rows.dim() + kHeadGap),
        stride_row(rows.heads() * stride_head + kRowGap),
        memory(values(rows, dtype, stride_head, stride_row)) {}
  RowsView view() const { return {memory.data, stride_row, stride_head}; }

  static std::vector<uint16_t> values(const nsa_test::Rows<BF16>& rows, DType dtype, int64_t stride_head,
                                      int64_t stride_row) {
    std::vector<uint16_t> out(static_cast<size_t>(rows.rows() * stride_row), to_bits(std::nan(""), dtype));
    for (int64_t r = 0; r < rows.rows(); ++r) {
      for (int h = 0; h < rows.heads(); ++h) {
        for (int c = 0; c < rows.dim(); ++c)
          out[static_cast<size_t>(r * stride_row + h * stride_head + c)] = to_bits(rows(r, h, c), dtype);
      }
    }
    return out;
  }
};

Status run_sm90(const SelectedAttentionFwdParams& p) {
  Status status;
  if (!sm90::selected_attention_forward(p, {}, &status))
    return Status::error(StatusCode::kUnsupported, "there is no Hopper kernel");
  return status;
}

Status run_portable(const SelectedAttentionFwdParams& p) {
  return portable::selected_attention_forward(p, {});
}

using Run = Status (*)(const SelectedAttentionFwdParams&);

// Runs on device copies of what p points to on the host.
struct OnDevice {
  const nsa_test::AttentionProblem<BF16>& problem;
  const std::vector<int32_t>& indices;
  int64_t block_size;
  int n;
  DType dtype;
  Run run;

  Status operator()(SelectedAttentionFwdParams p) const {
    const Batch& batch = problem.batch;
    const DeviceRows q(problem.q, dtype), k(problem.k, dtype), v(problem.v, dtype);
    const DeviceArray<int32_t> cu_q(batch.cu_q), cu_k(batch.cu_k), blocks(indices);
    const int64_t rows = batch.total_q() * p.shape.num_heads_q;
    std::vector<uint16_t> o_host(static_cast<size_t>(rows * p.shape.head_dim_v));
    auto* o_out = static_cast<BF16*>(p.o);
    for (size_t i = 0; i < o_host.size(); ++i) o_host[i] = to_bits(nsa_test::to_double(o_out[i]), dtype);
    auto* lse_out = static_cast<float*>(p.lse);
    const DeviceArray<uint16_t> o(o_host);
    const DeviceArray<float> lse(std::vector<float>(lse_out, lse_out + rows));
    p.dtype = dtype;
    p.q = q.view();
    p.k = k.view();
    p.v = v.view();
    if (p.seqs.cu_seqlens_q != nullptr) {
      p.seqs.cu_seqlens_q = cu_q.data;
      p.seqs.cu_seqlens_k = cu_k.data;
    }
    p.seqs.key_rows = problem.k.rows();
    p.block_size = block_size;
    p.num_selected_blocks = n;
    p.block_indices = blocks.data;
    p.o = o.data;
    p.lse = lse.data;
    const Status status = run(p);
    if (!status.ok()) return status;
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return Status::error(StatusCode::kDeviceError, "%s", cudaGetErrorString(error));
    o_host = o.host();
    for (size_t i = 0; i < o_host.size(); ++i)
      o_out[i] = nsa_test::from_double<BF16>(from_bits(o_host[i], dtype));
    const std::vector<float> lse_host = lse.host();
    std::copy(lse_host.begin(), lse_host.end(), lse_out);
    return status;
  }
};

std::string check(const Batch& batch, const Heads& heads, int64_t block_size, int n,
                  DType dtype = DType::kBF16, Run run = run_sm90) {
  const std::vector<int32_t> indices = nsa_test::random_indices(batch, heads.kv, n, block_size, 5);
  nsa_test::AttentionProblem<BF16> problem(
      batch, heads, nsa_test::selected(batch, indices, heads.kv, n, block_size), batch.total_k(), 23);
  return problem.check_forward<SelectedAttentionFwdParams>(
      OnDevice{problem, indices, block_size, n, dtype, run});
}

const Batch kRagged({33, 0, 5, 101});
const Batch kChunks({20, 1, 0, 40}, {75, 40, 12, 190}, 6, 9);

TEST_CASE("selected attention on Hopper equals the naive loops for every group", "[sm90][selected]") {
  if (!nsa_test::is_hopper()) return;
  for (int group : {1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64}) {
    const int heads_kv = group < 8 ? 2 : 1;
    for (const Batch& batch : {kRagged, kChunks}) {
      CAPTURE(group, batch.total_k());
      CHECK(check(batch, {group * heads_kv, heads_kv, 64, 64}, 64, 2) == "");
    }
  }
}

TEST_CASE("selected attention on Hopper equals the naive loops for every head dim, block and dtype",
          "[sm90][selected]") {
  if (!nsa_test::is_hopper()) return;
  const Heads all_heads[] = {{8, 1, 64, 64}, {16, 1, 128, 128}, {8, 2, 192, 128}};
  for (const Heads& heads : all_heads) {
    for (int64_t block_size : {32, 64, 128}) {
      for (DType dtype : {DType::kBF16, DType::kF16}) {
        CAPTURE(heads.q, heads.dim_qk, block_size, dtype == DType::kF16);
        CHECK(check(kChunks, heads, block_size, 3, dtype) == "");
      }
    }
  }
}

TEST_CASE("selected attention on Hopper takes any number of blocks and any batch", "[sm90][selected]") {
  if (!nsa_test::is_hopper()) return;
  for (int n : {1, 2, 5, 16, 64}) {
    CAPTURE(n);
    CHECK(check(kChunks, {4, 1, 64, 64}, 32, n) == "");
    CHECK(check(Batch({13}, {700}, 0, 11, false), {16, 1, 128, 128}, 64, n) == "");
  }
  CHECK(check(Batch({0, 0, 3}, {0, 7, 3}, 3, 18), {16, 1, 128, 128}, 64, 4) == "");
  CHECK(check(Batch({1}), {16, 1, 128, 128}, 64, 4) == "");
  CHECK(check(Batch({300}), {16, 1, 128, 128}, 64, 3) == "");
}

TEST_CASE("the portable kernel passes the same", "[sm90][selected]") {
  if (!nsa_test::is_hopper()) return;
  for (int group : {1, 3, 16, 24, 64})
    CHECK(check(kChunks, {group, 1, 64, 64}, 64, 2, DType::kBF16, run_portable) == "");
  CHECK(check(kRagged, {16, 1, 128, 128}, 32, 16, DType::kF16, run_portable) == "");
}

TEST_CASE("selected attention on Hopper says where it has no kernel", "[sm90][selected]") {
  SelectedAttentionFwdParams p{};
  Status status;
  p.dtype = DType::kBF16;
  p.shape.num_heads_q = p.shape.num_heads_kv = 1;
  p.shape.head_dim_qk = p.shape.head_dim_v = 96;
  p.block_size = 64;
  p.num_selected_blocks = 1;
  CHECK_FALSE(sm90::selected_attention_forward(p, {}, &status));
  p.shape.head_dim_qk = p.shape.head_dim_v = 128;
  p.block_size = 16;
  CHECK_FALSE(sm90::selected_attention_forward(p, {}, &status));
}

// Long sequences: values and choices come from hashes, so that rows can be checked one by one.
__host__ __device__ uint32_t hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

__host__ __device__ __nv_bfloat16 hashed_value(uint32_t i, uint32_t seed) {
  const uint32_t h = hash(i * 2654435761u + seed);
  const int sum = (h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24);
  return __float2bfloat16((sum - 510) / 148.f);
}

__global__ void fill_hashed(__nv_bfloat16* data, int64_t size, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += gridDim.x * blockDim.x)
    data[i] = hashed_value(static_cast<uint32_t>(i), seed);
}

// The first block, the own one, the one before it, and others: fresh ones for each token, or for each `run`
// of tokens.
std::vector<int32_t> hashed_indices(int tokens, int heads, int n, int block_size, int run) {
  std::vector<int32_t> indices;
  for (int t = 0; t < tokens; ++t) {
    for (int g = 0; g < heads; ++g) {
      const int own = t / block_size;
      for (int slot = 0; slot < n; ++slot) {
        const uint32_t any = hash((t / run * heads + g) * 64 + slot);
        indices.push_back(slot == 0   ? 0
                          : slot == 1 ? own
                          : slot == 2 ? own - 1
                                      : static_cast<int>(any % (own + 1)));
      }
    }
  }
  return indices;
}

void check_long(int tokens, int heads_kv, int group, int run) {
  constexpr int kDim = 128, kBlock = 64, kN = 16;
  const int heads_q = heads_kv * group;
  const auto indices = hashed_indices(tokens, heads_kv, kN, kBlock, run);
  const DeviceArray<int32_t> blocks(indices);
  const int64_t q_size = int64_t{tokens} * heads_q * kDim, k_size = int64_t{tokens} * heads_kv * kDim;
  const DeviceArray<__nv_bfloat16> q(q_size), k(k_size), v(k_size), o(q_size);
  const DeviceArray<float> lse(int64_t{tokens} * heads_q);
  fill_hashed<<<1024, 256>>>(q.data, q_size, 1);
  fill_hashed<<<1024, 256>>>(k.data, k_size, 2);
  fill_hashed<<<1024, 256>>>(v.data, k_size, 3);
  SelectedAttentionFwdParams p{};
  p.dtype = DType::kBF16;
  p.seqs.total_q = p.seqs.max_seqlen_q = p.seqs.max_seqlen_k = p.seqs.key_rows = tokens;
  p.shape.num_heads_q = heads_q;
  p.shape.num_heads_kv = heads_kv;
  p.shape.head_dim_qk = p.shape.head_dim_v = kDim;
  p.block_size = kBlock;
  p.num_selected_blocks = kN;
  p.softmax_scale = 1 / std::sqrt(static_cast<double>(kDim));
  p.q = {q.data, int64_t{heads_q} * kDim, kDim};
  p.k = {k.data, int64_t{heads_kv} * kDim, kDim};
  p.v = {v.data, int64_t{heads_kv} * kDim, kDim};
  p.block_indices = blocks.data;
  p.o = o.data;
  p.lse = lse.data;
  const Status status = run_sm90(p);
  CHECK(std::string(status.message) == "");
  REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
  const auto lse_host = lse.host();
  std::vector<__nv_bfloat16> row(kDim);
  for (int sample = 0; sample < 48; ++sample) {
    const int t = sample < 8 ? tokens - 1 - sample : static_cast<int>(hash(sample) % tokens);
    const int head = static_cast<int>(hash(sample + 999) % heads_q), g = head / group;
    std::vector<int> chosen(indices.begin() + (int64_t{t} * heads_kv + g) * kN,
                            indices.begin() + (int64_t{t} * heads_kv + g + 1) * kN);
    std::sort(chosen.begin(), chosen.end());
    chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    double sum = 0, expected[kDim] = {};
    const auto value = [&](int64_t r, int heads, int h, int c, uint32_t seed) {
      return static_cast<double>(
          __bfloat162float(hashed_value(static_cast<uint32_t>((r * heads + h) * kDim + c), seed)));
    };
    double query[kDim];
    for (int c = 0; c < kDim; ++c) query[c] = value(t, heads_q, head, c, 1);
    for (int block : chosen) {
      for (int s = block * kBlock; block >= 0 && s < (block + 1) * kBlock && s <= t; ++s) {
        double logit = 0;
        for (int c = 0; c < kDim; ++c) logit += query[c] * value(s, heads_kv, g, c, 2);
        const double weight = std::exp(logit * p.softmax_scale);
        sum += weight;
        for (int c = 0; c < kDim; ++c) expected[c] += weight * value(s, heads_kv, g, c, 3);
      }
    }
    const int64_t at = int64_t{t} * heads_q + head;
    cudaMemcpy(row.data(), o.data + at * kDim, kDim * 2, cudaMemcpyDeviceToHost);
    double worst = 0;
    for (int c = 0; c < kDim; ++c)
      worst = std::max(worst, std::fabs(__bfloat162float(row[c]) - expected[c] / sum));
    CAPTURE(t, head);
    CHECK(worst < 0x1p-8);
    CHECK(lse_host[at] == Approx(std::log(sum)).epsilon(1e-5));
  }
}

TEST_CASE("selected attention on Hopper over long sequences", "[sm90][selected]") {
  if (!nsa_test::is_hopper()) return;
  for (int run : {1, 5, 64}) {
    CAPTURE(run);
    check_long(4003, 2, 16, run);
    check_long(65536, 1, 16, run);
  }
  check_long(32768, 1, 4, 8);
}

}  // namespace
}  // namespace nsa::cuda
