// The backward of compressed attention and the sliding window on a GPU, every path, against naive loops.
#include <cstdlib>

#include "attention_check.h"
#include "catch2_bridge.h"
#include "cuda/ptx/mma.cuh"
#include "device_memory.h"

using namespace nsa_test;

namespace {

struct Band {
  nsa::KeyBlocks keys;
  int64_t window;
};

constexpr Band kCompressed{{32, 16}, 0};
Band sliding(int64_t window) { return {{1, 1}, window}; }

// Values of 8 mantissa bits, which both storage types hold.
template <typename T>
std::vector<T> stored(const Guarded<BF16>& memory) {
  std::vector<T> out;
  for (int64_t i = 0; i < memory.size(); ++i)
    out.push_back(static_cast<T>(static_cast<float>(memory.get(i))));
  return out;
}

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;

// One problem on the device; dk and dv start at kBefore, since kernels add.
template <typename T>
class DeviceProblem {
 public:
  static constexpr float kBefore = 0.5f;

  DeviceProblem(const Batch& batch, const Heads& heads, const Band& band, bool scaled)
      : band_(band),
        problem_(batch, heads,
                 band.keys.stride == 1 && band.keys.block == 1
                     ? token_window(batch, band.window)
                     : compressed(batch, band.keys.block, band.keys.stride),
                 batch.total_k() / band.keys.stride, 5, 8),
        q_(stored<T>(problem_.q.memory())),
        k_(stored<T>(problem_.k.memory())),
        v_(stored<T>(problem_.v.memory())),
        d_o_(stored<T>(problem_.d_o.memory())),
        cu_q_(batch.cu_q),
        cu_k_(batch.cu_k),
        forward_(
            naive_forward(batch, heads, problem_.keys, problem_.scale, problem_.q, problem_.k, problem_.v)) {
    const int64_t rows = batch.total_q() * heads.q;
    if (scaled) {
      for (int64_t r = 0; r < rows; ++r) factors_.push_back(0.25 + 0.5 * static_cast<double>(r % 3));
    }
    std::vector<float> delta;
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int c = 0; c < heads.dim_v; ++c) {
        sum += problem_.d_o(r / heads.q, static_cast<int>(r % heads.q), c) * forward_.o[r * heads.dim_v + c];
      }
      delta.push_back(static_cast<float>(scaled ? factors_[r] * sum : sum));
    }
    delta_ = std::make_unique<DeviceArray<float>>(delta);
    lse_ = std::make_unique<DeviceArray<float>>(std::vector<float>(forward_.lse.begin(), forward_.lse.end()));
    factor_ = std::make_unique<DeviceArray<float>>(std::vector<float>(factors_.begin(), factors_.end()));
  }

  struct Gradients {
    std::vector<float> dq, dk, dv;  // dq: of `branches` equal ones
    std::string error;
    bool operator==(const Gradients&) const = default;
  };

  // NaN, but for the padding, which the caller fills.
  std::vector<float> nan_queries() const {
    const Batch& batch = problem_.batch;
    const int64_t row = problem_.heads.q * problem_.heads.dim_qk;
    std::vector<float> nan(static_cast<size_t>(batch.total_q() * row), std::nanf(""));
    if (batch.offsets) std::fill(nan.begin() + int64_t{batch.cu_q.back()} * row, nan.end(), 0.f);
    return nan;
  }
  DeviceArray<T> result_of(const std::vector<float>& values) const {
    std::vector<T> stored;
    for (const float x : values) stored.push_back(static_cast<T>(x));
    return DeviceArray<T>(stored);
  }
  std::vector<float> before(int dim) const {
    return std::vector<float>(static_cast<size_t>(problem_.k.rows() * problem_.heads.kv * dim), kBefore);
  }

  // All but dq and the workspace.
  nsa::BandedAttentionBwdParams params(unsigned wanted, void* dk, void* dv) const {
    auto p = problem_.template common<nsa::BandedAttentionBwdParams>();
    p.dtype = kIsHalf<T> ? nsa::DType::kF16 : nsa::DType::kBF16;
    if (problem_.batch.offsets) p.seqs.cu_seqlens_q = cu_q_.data;
    if (problem_.batch.offsets) p.seqs.cu_seqlens_k = cu_k_.data;
    p.seqs.key_rows = problem_.k.rows();
    p.keys = band_.keys;
    p.window = band_.window;
    p.q.data = q_.data;
    p.k.data = k_.data;
    p.v.data = v_.data;
    p.grads.d_o = problem_.d_o.view();
    p.grads.d_o.data = d_o_.data;
    p.grads.d_o_scale = factors_.empty() ? nullptr : factor_->data;
    p.grads.delta = delta_->data;
    p.grads.lse = lse_->data;
    p.grads.dk = wanted & 2 ? dk : nullptr;
    p.grads.dv = wanted & 4 ? dv : nullptr;
    return p;
  }

  // branches: 1 writes dq at once; more add to one sum in turn, of which the last one makes dq. 0: the sum of
  // one, not rounded.
  Gradients run(unsigned wanted, int branches = 1) const {
    const Heads& heads = problem_.heads;
    const DeviceArray<float> sum(nan_queries());
    const DeviceArray<T> dq(result_of(nan_queries()));
    const DeviceArray<float> dk(before(heads.dim_qk)), dv(before(heads.dim_v));
    nsa::BandedAttentionBwdParams p = params(wanted, dk.data, dv.data);
    // NaN in the workspace: what is read there must have been written before.
    const DeviceArray<float> workspace(
        std::vector<float>(static_cast<size_t>(nsa::cuda::workspace_bytes(p) / 4), std::nanf("")));
    p.workspace = workspace.data;
    nsa::Status status;
    for (int b = 0; b < std::max(1, branches) && status.ok(); ++b) {
      if (wanted & 1) {
        p.grads.dq = {branches == 1 ? nullptr : sum.data, b + 1 == branches ? dq.data : nullptr, b > 0};
      }
      status = nsa::cuda::banded_attention_backward(p, {});
    }
    const cudaError_t error = cudaDeviceSynchronize();
    Gradients out{branches == 0 ? sum.host() : std::vector<float>{}, dk.host(), dv.host(),
                  status.ok() ? "" : status.message};
    if (branches > 0) {
      for (const T x : dq.host()) out.dq.push_back(static_cast<float>(x));
    }
    if (error != cudaSuccess) out.error = cudaGetErrorString(error);
    return out;
  }

  // dk and dv as results, NaN before: every row must be written.
  Gradients run_results(unsigned wanted) const {
    const auto nan = [&](int dim) {
      return result_of(std::vector<float>(static_cast<size_t>(problem_.k.rows() * problem_.heads.kv * dim),
                                          std::nanf("")));
    };
    const DeviceArray<T> dk(nan(problem_.heads.dim_qk)), dv(nan(problem_.heads.dim_v));
    nsa::BandedAttentionBwdParams p = params(wanted, dk.data, dv.data);
    p.grads.key_results = true;
    if (!nsa::cuda::writes_key_results(p)) return {{}, {}, {}, "no results"};
    const DeviceArray<float> workspace(
        std::vector<float>(static_cast<size_t>(nsa::cuda::workspace_bytes(p) / 4), std::nanf("")));
    p.workspace = workspace.data;
    const nsa::Status status = nsa::cuda::banded_attention_backward(p, {});
    const cudaError_t error = cudaDeviceSynchronize();
    Gradients out{{}, {}, {}, status.ok() ? "" : status.message};
    if (error != cudaSuccess) out.error = cudaGetErrorString(error);
    for (const T x : dk.host()) out.dk.push_back(static_cast<float>(x));
    for (const T x : dv.host()) out.dv.push_back(static_cast<float>(x));
    return out;
  }

  NaiveBackward exact() const {
    return naive_backward(problem_.batch, problem_.heads, problem_.keys, problem_.scale, problem_.q,
                          problem_.k, problem_.v, problem_.d_o, factors_, forward_);
  }

  std::string check(unsigned wanted = 7) const {
    const NaiveBackward exact = this->exact();
    const Gradients actual = run(wanted);
    if (!actual.error.empty()) return actual.error;
    if (wanted == 7 && run(wanted) != actual) return "differs from run to run";
    std::string wrong = compare("dk", change(actual.dk), exact.dk, wanted & 2) +
                        compare("dv", change(actual.dv), exact.dv, wanted & 4);
    if (wanted & 6) {
      const Gradients results = run_results(wanted);
      if (!results.error.empty()) return wrong + results.error;
      if (wanted & 2) wrong += compare("dk as result", results.dk, exact.dk, true);
      if (wanted & 4) wrong += compare("dv as result", results.dv, exact.dv, true);
    }
    if (!(wanted & 1)) return wrong;
    wrong += compare("dq", actual.dq, exact.dq, true);
    if (wanted != 7) return wrong;
    // dq alone, once per case: the sum of one, then one of two and of three.
    for (const int branches : {0, 2, 3}) {
      const Gradients several = run(1, branches);
      if (!several.error.empty()) return wrong + several.error;
      std::vector<double> sum = exact.dq;
      for (double& x : sum) x *= std::max(1, branches);
      wrong += compare("dq of several branches", several.dq, sum, true);
    }
    return wrong;
  }

  // Of two branches, which agree in q and dO since they have one seed. wanted: of the keys of each. begun:
  // the sum of dq holds that of this branch already.
  std::string check_with(const DeviceProblem& other, unsigned wanted, unsigned wanted_other,
                         bool begun) const {
    const Heads& heads = problem_.heads;
    Gradients actual[2][2];  // run, branch; dq: the first's
    for (auto& [first, second] : actual) {
      const DeviceArray<float> sum(nan_queries());
      const DeviceArray<T> dq(result_of(nan_queries()));
      const DeviceArray<float> dk(before(heads.dim_qk)), dv(before(heads.dim_v));
      const DeviceArray<float> dk_other(other.before(heads.dim_qk)), dv_other(other.before(heads.dim_v));
      nsa::BandedBranchesBwdParams p{};
      p.branch[0] = params(wanted, dk.data, dv.data);
      p.branch[1] = other.params(wanted_other, dk_other.data, dv_other.data);
      p.branch[1].q = p.branch[0].q;
      p.branch[1].grads.d_o = p.branch[0].grads.d_o;
      const DeviceArray<float> workspace(
          std::vector<float>(static_cast<size_t>(nsa::cuda::workspace_bytes(p) / 4), std::nanf("")));
      p.workspace = workspace.data;
      nsa::Status status;
      if (begun) {
        nsa::BandedAttentionBwdParams before = params(0, nullptr, nullptr);
        before.grads.dq = {sum.data, nullptr, false};
        status = nsa::cuda::banded_attention_backward(before, {});
      }
      p.branch[0].grads.dq = {sum.data, nullptr, begun};
      p.branch[1].grads.dq = {sum.data, dq.data, true};
      if (status.ok()) status = nsa::cuda::banded_branches_backward(p, {});
      const cudaError_t error = cudaDeviceSynchronize();
      if (!status.ok()) return status.message;
      if (error != cudaSuccess) return cudaGetErrorString(error);
      first = {{}, dk.host(), dv.host(), ""};
      second = {{}, dk_other.host(), dv_other.host(), ""};
      for (const T x : dq.host()) first.dq.push_back(static_cast<float>(x));
    }
    const auto& [first, second] = actual[0];
    if (!(first == actual[1][0]) || !(second == actual[1][1])) return "differs from run to run";
    const NaiveBackward exact = this->exact(), exact_other = other.exact();
    std::vector<double> dq = exact.dq;
    for (size_t i = 0; i < dq.size(); ++i) dq[i] = (begun ? 2 : 1) * dq[i] + exact_other.dq[i];
    return compare("dq", first.dq, dq, true) + compare("dk", change(first.dk), exact.dk, wanted & 2) +
           compare("dv", change(first.dv), exact.dv, wanted & 4) +
           compare("dk of the other", change(second.dk), exact_other.dk, wanted_other & 2) +
           compare("dv of the other", change(second.dv), exact_other.dv, wanted_other & 4);
  }

 private:
  // P and dS are rounded to the storage type; the errors of a sum are a fraction of its largest terms.
  std::string compare(const char* name, const std::vector<float>& actual, std::vector<double> exact,
                      bool wanted) const {
    if (!wanted) std::fill(exact.begin(), exact.end(), 0.);
    return mismatch(name, std::vector<double>(actual.begin(), actual.end()), exact,
                    kIsHalf<T> ? 0x1p-10 : 0x1p-7);
  }
  static std::vector<float> change(std::vector<float> gradient) {
    for (float& x : gradient) x -= kBefore;
    return gradient;
  }

  Band band_;
  AttentionProblem<BF16> problem_;
  DeviceArray<T> q_, k_, v_, d_o_;
  DeviceArray<int32_t> cu_q_, cu_k_;
  NaiveForward forward_;
  std::vector<double> factors_;
  std::unique_ptr<DeviceArray<float>> delta_, lse_, factor_;
};

template <typename T>
std::string check_band(const Batch& batch, const Heads& heads, const Band& band, unsigned wanted = 7,
                       bool scaled = false) {
  const DeviceProblem<T> problem(batch, heads, band, scaled);
  std::string wrong;
  for (const char* path : {"portable", "best"}) {
    setenv("NSA_CUDA_PATH", path, 1);
    const std::string result = problem.check(wanted);
    if (!result.empty()) wrong += std::string(path) + ": " + result + "; ";
  }
  unsetenv("NSA_CUDA_PATH");
  return wrong;
}

bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

}  // namespace

TEMPLATE_TEST_CASE("banded backward of every head dim", "[banded_bwd]", __nv_bfloat16, __half) {
  if (!has_device()) return;
  for (const auto& [dim_qk, dim_v] : {std::pair{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}}) {
    for (const Band& band : {sliding(37), sliding(1), kCompressed, Band{{8, 8}, 0}}) {
      CAPTURE(dim_qk, band.keys.block, band.window);
      CHECK(check_band<TestType>(Batch({150, 0, 83}), {8, 2, dim_qk, dim_v}, band) == "");
    }
  }
}

TEST_CASE("banded backward of every group size", "[banded_bwd]") {
  if (!has_device()) return;
  for (const int group : {1, 2, 3, 5, 6, 7, 8, 12, 16, 24, 31, 32, 48, 64}) {
    for (const Band& band : {sliding(20), Band{{16, 8}, 0}}) {
      CAPTURE(group, band.keys.block);
      CHECK(check_band<__nv_bfloat16>(Batch({70, 41}), {group, 1, 64, 64}, band) == "");
      if (group % 5 == 1) CHECK(check_band<__nv_bfloat16>(Batch({50}), {2 * group, 2, 128, 128}, band) == "");
    }
  }
}

TEST_CASE("banded backward of chunks, padding, short and empty sequences", "[banded_bwd]") {
  if (!has_device()) return;
  const Batch batches[] = {Batch({33, 0, 5, 61}),
                           Batch({20, 1, 0}, {75, 40, 12}, 6, 9),
                           Batch({13}, {90}, 0, 11, false),
                           Batch({70, 3}, {333, 150}, 20, 64),
                           Batch({}),
                           Batch({0}, {0}, 3, 18),
                           Batch({200}, {200}, 70, 130)};
  for (const Batch& batch : batches) {
    for (const Band& band : {sliding(1), sliding(37), sliding(1000), kCompressed, Band{{16, 16}, 0}}) {
      for (const int dim : {64, 128}) {
        CAPTURE(batch.count(), batch.total_k(), band.keys.block, band.window, dim);
        CHECK(check_band<__nv_bfloat16>(batch, {8, 2, dim, dim}, band, 7, true) == "");
      }
    }
  }
}

TEST_CASE("banded backward over many tiles and splits", "[banded_bwd]") {
  if (!has_device()) return;
  for (const Band& band : {sliding(129), kCompressed, Band{{8, 8}, 0}, sliding(100000)}) {
    CAPTURE(band.keys.block, band.window);
    CHECK(check_band<__nv_bfloat16>(Batch({401, 150}, {401, 202}), {6, 2, 64, 64}, band) == "");
    CHECK(check_band<__half>(Batch({600}), {4, 1, 128, 128}, band, 7, true) == "");
  }
}

TEST_CASE("banded backward computes each subset of gradients, with dO scaled or not", "[banded_bwd]") {
  if (!has_device()) return;
  for (unsigned wanted = 0; wanted < 8; ++wanted) {
    for (const bool scaled : {false, true}) {
      CAPTURE(wanted, scaled);
      CHECK(check_band<__nv_bfloat16>(Batch({40, 91}), {4, 2, 128, 128}, sliding(9), wanted, scaled) == "");
      CHECK(check_band<__nv_bfloat16>(Batch({400, 91}), {4, 2, 64, 64}, {{8, 8}, 0}, wanted, scaled) == "");
      CHECK(check_band<__nv_bfloat16>(Batch({70}), {2, 1, 256, 256}, sliding(30), wanted, scaled) == "");
    }
  }
}

TEST_CASE("banded backward of two branches that share q", "[banded_bwd]") {
  if (!has_device()) return;
  const Batch batches[] = {Batch({33, 0, 5, 161}), Batch({20, 1, 0}, {75, 40, 12}, 6, 16),
                           Batch({13}, {90}, 0, 0, false), Batch({400, 31})};
  const auto check = [&]<typename T>(const Batch& batch, const Heads& heads, const Band& first,
                                     const Band& second) {
    const DeviceProblem<T> problem(batch, heads, first, true), other(batch, heads, second, true);
    std::string wrong;
    for (const char* path : {"portable", "best"}) {
      setenv("NSA_CUDA_PATH", path, 1);
      for (const auto& [wanted, wanted_other] : {std::pair{6u, 6u}, {0u, 0u}, {4u, 2u}}) {
        for (const bool begun : {false, true}) {
          const std::string result = problem.check_with(other, wanted, wanted_other, begun);
          if (!result.empty()) wrong += std::string(path) + ": " + result + "; ";
        }
      }
    }
    unsetenv("NSA_CUDA_PATH");
    return wrong;
  };
  for (const Batch& batch : batches) {
    CAPTURE(batch.count(), batch.total_k());
    for (const auto& [dim_qk, dim_v] : {std::pair{64, 64}, {128, 128}, {192, 128}}) {
      CAPTURE(dim_qk);
      CHECK(check.operator()<__nv_bfloat16>(batch, {8, 2, dim_qk, dim_v}, kCompressed, sliding(37)) == "");
    }
    CHECK(check.operator()<__half>(batch, {6, 2, 128, 128}, sliding(100), Band{{16, 8}, 0}) == "");
    CHECK(check.operator()<__nv_bfloat16>(batch, {16, 1, 128, 128}, Band{{8, 8}, 0}, sliding(129)) == "");
  }
}

TEST_CASE("banded backward adds fixed parts whatever the shape, within its workspace", "[banded_bwd]") {
  nsa::BandedAttentionBwdParams p{};
  p.shape = {64, 4, 128, 128};
  p.keys = {32, 16};
  for (const int64_t length : {64, 4096, 65536, 1 << 20}) {
    p.seqs.total_q = p.seqs.max_seqlen_q = p.seqs.max_seqlen_k = length;
    p.seqs.key_rows = length / 16;
    CHECK(nsa::cuda::workspace_bytes(p) <= int64_t{512} << 20);
  }
}
