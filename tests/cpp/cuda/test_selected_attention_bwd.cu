// The backward of selected attention on a GPU: the lists of who chose which block, and gradients against
// naive loops.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

#include "attention_check.h"
#include "catch2_bridge.h"
#include "cuda/common/invert_blocks.h"
#include "device_memory.h"

namespace nsa_test {
namespace {

bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// Random sets with repeats, disorder, -1, numbers past the own block, and extreme numbers.
std::vector<int32_t> random_choices(const Batch& batch, int heads_kv, int n, int64_t block_size,
                                    uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> indices(static_cast<size_t>(batch.total_q() * heads_kv * n), 0);
  const int32_t wild[] = {-1, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min(),
                          1 << 26};
  for_each_query(batch, {heads_kv, heads_kv, 1, 1}, [&](const Query& query, int g) {
    const int64_t own = query.position / block_size;
    for (int slot = 0; slot < n; ++slot) {
      int32_t j = static_cast<int32_t>(generator() % static_cast<uint32_t>(own + 2));
      if (generator() % 6 == 0) j = wild[generator() % 5];
      if (generator() % 4 == 0) j = 0;  // a list that is long enough to be split
      if (query.row % 9 == 4) j = -1;
      indices[static_cast<size_t>((query.row * heads_kv + g) * n + slot)] = j;
    }
  });
  return indices;
}

nsa::SequenceBatch on_device(const Batch& batch, const DeviceArray<int32_t>& cu_q,
                             const DeviceArray<int32_t>& cu_k) {
  nsa::SequenceBatch seqs = batch.params();
  if (batch.offsets) seqs.cu_seqlens_q = cu_q.data, seqs.cu_seqlens_k = cu_k.data;
  seqs.key_rows = batch.total_k();
  return seqs;
}

// Rows as a kernel may find them: every row begins at a multiple of 16 bytes, with NaN between.
struct DeviceRows {
  static constexpr int kHeadGap = 8, kRowGap = 16;
  DeviceArray<uint16_t> memory;
  int64_t stride_row, stride_head;

  explicit DeviceRows(const Rows<BF16>& rows)
      : memory(repack(rows)),
        stride_row(rows.heads() * (rows.dim() + kHeadGap) + kRowGap),
        stride_head(rows.dim() + kHeadGap) {}
  nsa::RowsView view() const { return {memory.data, stride_row, stride_head}; }

  static std::vector<uint16_t> repack(const Rows<BF16>& rows) {
    const int64_t head = rows.dim() + kHeadGap, row = rows.heads() * head + kRowGap;
    std::vector<uint16_t> out(static_cast<size_t>(rows.rows() * row), 0x7fc0);
    for (int64_t r = 0; r < rows.rows(); ++r) {
      for (int h = 0; h < rows.heads(); ++h) {
        for (int c = 0; c < rows.dim(); ++c)
          out[static_cast<size_t>(r * row + h * head + c)] = from_double<BF16>(rows(r, h, c)).bits;
      }
    }
    return out;
  }
};

// A gradient on the device between canaries. It begins as the one on the host, plus kBefore where kernels
// add.
template <typename T>
class DeviceGrad {
 public:
  static constexpr T kBefore = 1;

  DeviceGrad(void* host, int64_t size, bool added)
      : host_(static_cast<T*>(host)),
        size_(static_cast<size_t>(host == nullptr ? 0 : size)),
        added_(added),
        initial_(host_, host_ + size_),
        memory_(with_canaries()) {}
  T* data() const { return host_ == nullptr ? nullptr : memory_.data + kCanary; }
  std::vector<T> values() const {
    const std::vector<T> all = memory_.host();
    return {all.begin() + kCanary, all.end() - kCanary};
  }
  bool take_back() const {
    const std::vector<T> all = memory_.host();
    for (size_t i = 0; i < size_; ++i)
      host_[i] = static_cast<T>(added_ ? all[kCanary + i] - kBefore : all[kCanary + i]);
    return std::count(all.begin(), all.begin() + kCanary, T{7}) == kCanary &&
           std::count(all.end() - kCanary, all.end(), T{7}) == kCanary;
  }
  void restore() const { std::copy(initial_.begin(), initial_.end(), host_); }

 private:
  static constexpr int kCanary = 64;
  std::vector<T> with_canaries() const {
    std::vector<T> all(kCanary, T{7});
    for (const T x : initial_) all.push_back(static_cast<T>(added_ ? x + kBefore : x));
    all.insert(all.end(), kCanary, T{7});
    return all;
  }

  T* host_;
  size_t size_;
  bool added_;
  std::vector<T> initial_;
  DeviceArray<T> memory_;
};

std::vector<float> host_floats(const void* data, int64_t size) {
  const float* values = static_cast<const float*>(data);
  return values == nullptr ? std::vector<float>(1) : std::vector<float>(values, values + size);
}

struct SelectedCase {
  Batch batch;
  Heads heads;
  int64_t block_size;
  int n;
};

// Runs the kernels on device copies of what params on the host say, twice.
nsa::Status run_on_device(const SelectedCase& c, const AttentionProblem<BF16>& problem,
                          const std::vector<int32_t>& indices, nsa::SelectedAttentionBwdParams p) {
  const DeviceArray<int32_t> cu_q(c.batch.cu_q), cu_k(c.batch.cu_k), blocks(indices);
  const DeviceRows q(problem.q), k(problem.k), v(problem.v), d_o(problem.d_o);
  const int64_t rows = c.batch.total_q() * c.heads.q;
  const DeviceArray<float> lse(host_floats(p.grads.lse, rows)), delta(host_floats(p.grads.delta, rows)),
      factor(host_floats(p.grads.d_o_scale, rows));
  p.seqs = on_device(c.batch, cu_q, cu_k);
  p.q = q.view(), p.k = k.view(), p.v = v.view(), p.grads.d_o = d_o.view();
  p.block_size = c.block_size;
  p.num_selected_blocks = c.n;
  p.block_indices = blocks.data;
  p.grads.lse = lse.data, p.grads.delta = delta.data;
  if (p.grads.d_o_scale != nullptr) p.grads.d_o_scale = factor.data;
  const int64_t size_k = c.batch.total_k() * c.heads.kv * c.heads.dim_qk,
                size_v = c.batch.total_k() * c.heads.kv * c.heads.dim_v;
  const nsa::AttentionGrads wanted = p.grads;

  std::vector<float> first[3];
  std::vector<uint16_t> first_dq;
  for (int run = 0; run < 2; ++run) {
    const DeviceGrad<uint16_t> dq(wanted.dq.result, rows * c.heads.dim_qk, false);
    const DeviceGrad<float> dq_sum(wanted.dq.sum, rows * c.heads.dim_qk, false);
    const DeviceGrad<float> dk(wanted.dk, size_k, true), dv(wanted.dv, size_v, true);
    p.grads.dq.sum = dq_sum.data(), p.grads.dq.result = dq.data();
    p.grads.dk = dk.data(), p.grads.dv = dv.data();
    const DeviceArray<unsigned char> workspace(static_cast<size_t>(nsa::cuda::workspace_bytes(p)) + 1);
    cudaMemset(workspace.data, 0xff, workspace.size);
    p.workspace = workspace.data;
    const nsa::Status status = nsa::cuda::selected_attention_backward(p, {});
    if (!status.ok()) return status;
    if (cudaDeviceSynchronize() != cudaSuccess)
      return nsa::Status::error(nsa::StatusCode::kDeviceError, "%s", cudaGetErrorString(cudaGetLastError()));
    unsigned char behind = 0;
    cudaMemcpy(&behind, workspace.data + workspace.size - 1, 1, cudaMemcpyDeviceToHost);
    if (behind != 0xff)
      return nsa::Status::error(nsa::StatusCode::kDeviceError, "wrote behind the workspace");
    const DeviceGrad<float>* grads[] = {&dq_sum, &dk, &dv};
    bool repeated = true, beside = !dq.take_back();
    for (int i = 0; i < 3; ++i) {
      beside |= !grads[i]->take_back();
      if (run == 0) {
        first[i] = grads[i]->values();
        grads[i]->restore();
      } else {
        repeated &= first[i] == grads[i]->values();
      }
    }
    if (run == 0) {
      first_dq = dq.values();
      dq.restore();
    } else {
      repeated &= first_dq == dq.values();
    }
    if (beside) return nsa::Status::error(nsa::StatusCode::kDeviceError, "wrote beside a gradient");
    if (!repeated)
      return nsa::Status::error(nsa::StatusCode::kDeviceError, "a gradient is not repeated bit by bit");
  }
  return {};
}

std::string check_selected(const SelectedCase& c, unsigned wanted = 7, bool scaled = false) {
  const std::vector<int32_t> indices = random_choices(c.batch, c.heads.kv, c.n, c.block_size, 5);
  const AttentionProblem<BF16> problem(
      c.batch, c.heads, selected(c.batch, indices, c.heads.kv, c.n, c.block_size), c.batch.total_k(), 23);
  return problem.check_backward<nsa::SelectedAttentionBwdParams>(
      [&](const auto& p) { return run_on_device(c, problem, indices, p); }, wanted, scaled,
      2 * epsilon<BF16>());
}

// Both paths: where there is no Hopper kernel for it, the same one twice.
template <typename Check>
void on_each_path(const Check& check) {
  for (const char* path : {"portable", "best"}) {
    CAPTURE(path);
    setenv("NSA_CUDA_PATH", path, 1);
    CHECK(check() == "");
  }
  unsetenv("NSA_CUDA_PATH");
}

void check_lists(const Batch& batch, int heads_kv, int64_t block_size, int n, int key_tile) {
  const std::vector<int32_t> indices = random_choices(batch, heads_kv, n, block_size, 11);
  const DeviceArray<int32_t> cu_q(batch.cu_q), cu_k(batch.cu_k), blocks(indices);
  nsa::SelectedAttentionBwdParams p{};
  p.seqs = on_device(batch, cu_q, cu_k);
  p.shape = Heads{heads_kv, heads_kv, 64, 64}.shape();
  p.block_size = block_size;
  p.num_selected_blocks = n;
  p.block_indices = blocks.data;
  const nsa::cuda::InvertPlan plan(p, key_tile);
  int64_t bytes = 0;
  nsa::cuda::BlockLists(p, plan, &bytes);
  const DeviceArray<unsigned char> workspace(static_cast<size_t>(bytes));
  p.workspace = workspace.data;
  bytes = 0;
  const nsa::cuda::BlockLists lists(p, plan, &bytes);
  REQUIRE(nsa::cuda::invert_blocks(p, plan, lists, {}).ok());
  REQUIRE(cudaDeviceSynchronize() == cudaSuccess);

  // (KV head, first key of the tile, chunk) -> entries in the order of tokens.
  using Key = std::tuple<int, int64_t, int64_t>;
  std::map<Key, std::vector<uint32_t>> expected, actual;
  std::map<Key, int64_t> keys, shifts;
  for_each_query(batch, {heads_kv, heads_kv, 1, 1}, [&](const Query& query, int g) {
    const int32_t* row = &indices[static_cast<size_t>((query.row * heads_kv + g) * n)];
    for (int slot = 0; slot < n; ++slot) {
      if (row[slot] < 0 || row[slot] > query.position / block_size) continue;
      if (std::find(row, row + slot, row[slot]) != row + slot) continue;
      for (int64_t begin = row[slot] * block_size; begin < (row[slot] + 1) * block_size; begin += key_tile) {
        if (begin >= batch.k_lens[query.sequence]) continue;
        const Key key{g, batch.cu_k[query.sequence] + begin, query.row / plan.chunk_tokens};
        expected[key].push_back(static_cast<uint32_t>(query.row % plan.chunk_tokens) |
                                static_cast<uint32_t>(slot) << nsa::cuda::kEntrySlotShift);
        keys[key] = std::min<int64_t>(key_tile, batch.k_lens[query.sequence] - begin);
        shifts[key] = query.position - query.row + 1 - begin;
      }
    }
  });

  const auto read = [](auto* out, const auto* device, int64_t count) {
    out->resize(static_cast<size_t>(count));
    cudaMemcpy(out->data(), device, out->size() * sizeof(*device), cudaMemcpyDeviceToHost);
  };
  std::vector<uint32_t> entries;
  std::vector<nsa::cuda::WorkItem> items;
  std::vector<int> num_items, num_splits, splits;
  read(&entries, lists.entries, batch.total_q() * heads_kv * n);
  read(&num_items, lists.num_items, plan.num_chunks);
  read(&num_splits, lists.num_splits, plan.num_chunks);
  int wrong = 0;
  for (int64_t chunk = 0; chunk < plan.num_chunks; ++chunk) {
    REQUIRE(num_items[chunk] <= plan.max_items);
    read(&items, lists.items + chunk * plan.max_items, num_items[chunk]);
    read(&splits, lists.splits + chunk * plan.max_splits, num_splits[chunk]);
    std::map<Key, std::vector<nsa::cuda::WorkItem>> pieces;
    std::vector<int> leaders;
    for (size_t i = 0; i < items.size(); ++i) {
      const auto& item = items[i];
      const Key key{item.head, item.key_row, chunk};
      std::vector<uint32_t>& list = actual[key];
      const uint32_t* begin = &entries[static_cast<size_t>(item.head * batch.total_q() * n + item.first)];
      list.insert(list.end(), begin, begin + item.count);
      wrong += item.num_keys != keys[key] || item.shift != shifts[key];
      wrong += item.count < 1 || item.count > nsa::cuda::kMaxItemTokens;
      pieces[key].push_back(item);
      if (item.followers > 0) leaders.push_back(static_cast<int>(i));
    }
    wrong += leaders != splits;
    // The sums of a list that is split lie one after another, and nobody else's there.
    std::set<int> partials;
    for (const auto& [key, list] : pieces) {
      wrong += list[0].followers != static_cast<int>(list.size()) - 1;
      if (list.size() == 1) wrong += list[0].partial != -1;
      for (size_t i = 0; list.size() > 1 && i < list.size(); ++i) {
        wrong += list[i].partial != list[0].partial + static_cast<int>(i) || list[i].partial < 0;
        wrong += list[i].partial >= plan.max_partials || !partials.insert(list[i].partial).second;
        wrong += i > 0 && list[i].followers != 0;
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(actual == expected);
}

}  // namespace

TEST_CASE("block_indices turned around are the lists of who chose which block", "[cuda][selected_bwd]") {
  if (!has_device()) return;
  check_lists(Batch({70}), 2, 32, 3, 32);
  check_lists(Batch({33, 0, 5, 300}), 1, 64, 5, 64);
  check_lists(Batch({20, 1, 0, 100}, {75, 40, 12, 700}, 6, 9), 3, 128, 4, 64);
  check_lists(Batch({13}, {90}, 0, 11, false), 2, 64, 7, 32);
  check_lists(Batch({}), 2, 64, 4, 64);
  check_lists(Batch({0}, {0}, 3, 18), 2, 64, 4, 64);
  check_lists(Batch({20000, 3, 18000}), 2, 32, 4, 32);  // several chunks of rows and ranges of blocks
  check_lists(Batch({150000}), 1, 64, 2, 64);           // more rows than thread blocks sort at a time
  check_lists(Batch(std::vector<int32_t>(500, 37)), 2, 32, 16, 32);
}

TEST_CASE("gradients of selected attention equal the naive loops on a GPU", "[cuda][selected_bwd]") {
  if (!has_device()) return;
  const Batch batches[] = {Batch({200}), Batch({33, 0, 5, 161}), Batch({60, 1, 0}, {275, 40, 12}, 6, 9),
                           Batch({13}, {90}, 0, 11, false)};
  for (const auto& dims : {std::pair{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}}) {
    for (const auto& heads : {std::pair{2, 2}, {6, 2}, {16, 1}}) {
      for (int64_t block_size : {32, 64, 128}) {
        const Batch& batch = batches[(heads.first + block_size / 32 + dims.first / 32) % 4];
        CAPTURE(dims.first, heads.first, block_size, batch.count());
        const SelectedCase c{batch, {heads.first, heads.second, dims.first, dims.second}, block_size, 4};
        on_each_path([&] { return check_selected(c); });
      }
    }
  }
}

TEST_CASE("gradients of selected attention for every size of a group", "[cuda][selected_bwd]") {
  if (!has_device()) return;
  for (int group : {1, 2, 3, 4, 5, 7, 8, 11, 12, 16, 24, 31, 32, 48, 64}) {
    CAPTURE(group);
    const SelectedCase c{Batch({90, 41}), {group, 1, 64, 64}, 64, 3};
    on_each_path([&] { return check_selected(c); });
  }
  on_each_path([&] { return check_selected({Batch({130}), {40, 1, 128, 128}, 64, 2}); });
}

TEST_CASE("gradients of selected attention over split lists and chunks of rows", "[cuda][selected_bwd]") {
  if (!has_device()) return;
  on_each_path([&] { return check_selected({Batch({2500, 301}), {4, 2, 64, 64}, 64, 6}); });
  on_each_path([&] { return check_selected({Batch({700}), {16, 1, 128, 128}, 64, 8}); });
  on_each_path([&] { return check_selected({Batch({8500, 31}), {1, 1, 64, 64}, 128, 4}); });
  on_each_path([&] { return check_selected({Batch({700}), {2, 1, 128, 128}, 32, 64}); });
}

TEST_CASE("each subset of the gradients, with dO scaled or not, on a GPU", "[cuda][selected_bwd]") {
  if (!has_device()) return;
  for (unsigned wanted = 0; wanted < 8; ++wanted) {
    for (bool scaled : {false, true}) {
      for (int dim : {64, 128, 256}) {
        CAPTURE(wanted, scaled, dim);
        const SelectedCase c{Batch({140, 31}), {12, 1, dim, dim}, 64, 3};
        on_each_path([&] { return check_selected(c, wanted, scaled); });
      }
    }
  }
}

TEST_CASE("selected attention without a query or a key has no gradient", "[cuda][selected_bwd]") {
  if (!has_device()) return;
  for (const Batch& batch : {Batch({}), Batch({0}, {0}, 3, 18), Batch({0, 0}), Batch({0, 9}, {40, 9})}) {
    on_each_path([&] { return check_selected({batch, {4, 2, 64, 64}, 64, 4}); });
  }
}

}  // namespace nsa_test
