// Appending to a cache and attending it, against the kernels for packed sequences, on guarded memory whose
// unwritten rows hold NaN.
#include "buffers.h"
#include "catch2_bridge.h"

using namespace nsa_test;

namespace {

constexpr nsa::KeyBlocks kBlocks{8, 4};
constexpr int64_t kBlockSize = 8, kPage = 16, kWindow = 9;
constexpr int kHeadsQ = 4, kHeadsKv = 2, kDimQK = 6, kDimV = 5, kHidden = 7, kSelected = 3;
constexpr int64_t kMostTokens = 3;  // of a sequence and step

struct Layout {
  bool paged, ring;
  int num_threads;
};

template <typename T>
class Cache {
 public:
  Cache(const std::vector<int32_t>& lengths, const Layout& layout)
      : layout_(layout), batch_(static_cast<int64_t>(lengths.size())) {
    for (int32_t n : lengths) capacity_ = std::max<int64_t>(capacity_, (n + kPage - 1) / kPage * kPage);
    width_ = capacity_ / kPage;
    for (int64_t i = 0; i < batch_ * width_; ++i)  // 7 is a unit modulo the number of pages
      table_.push_back(static_cast<int32_t>(i * 7 % (batch_ * width_)));
    const int64_t page = layout.paged ? kPage : capacity_, pages = batch_ * capacity_ / page;
    const int64_t reach = kMostTokens - 1;
    for (int dim : {kDimQK, kDimV}) {
      add(pages, page, dim, layout.paged);
      add(pages, page / kBlocks.stride, dim, layout.paged);
      add(batch_, kWindow + reach, dim, false);
      add(batch_, kBlocks.block + reach, dim, false);
    }
  }

  enum Stream { kSlc, kCmp, kSwa, kTail };
  nsa::CachedRows rows(int kv, Stream stream) const { return views_[static_cast<size_t>(4 * kv + stream)]; }
  nsa::CachedRows window(int kv) const { return rows(kv, layout_.ring ? kSwa : kSlc); }
  int64_t capacity() const { return capacity_; }
  bool intact() const {
    return std::all_of(memory_.begin(), memory_.end(), [](const Guarded<T>& m) { return m.intact(); });
  }

 private:
  void add(int64_t pages, int64_t page_rows, int dim, bool in_table) {
    memory_.emplace_back(pages * page_rows * kHeadsKv * dim);
    nsa::CachedRows view{
        memory_.back().data(), page_rows * kHeadsKv * dim, int64_t{kHeadsKv} * dim, dim, pages, page_rows};
    if (in_table) view.block_table = table_.data();
    if (in_table) view.table_width = width_;
    views_.push_back(view);
  }

  Layout layout_;
  int64_t batch_, capacity_ = 0, width_ = 0;
  std::vector<int32_t> table_;
  std::vector<Guarded<T>> memory_;
  std::vector<nsa::CachedRows> views_;
};

// K or V of every token of the batch: what phi sees, slc, swa; and phi's weights.
template <typename T>
struct Stream {
  int dim;
  Rows<T> cmp, slc, swa, pe, w1, b1, w2, b2;

  Stream(int64_t tokens, int d, uint32_t seed)
      : dim(d),
        cmp(tokens, kHeadsKv, d, 1, 2),
        slc(tokens, kHeadsKv, d, 0, 3),
        swa(tokens, kHeadsKv, d),
        pe(kBlocks.block, 1, d),
        w1(kBlocks.block * d, 1, kHidden),
        b1(1, 1, kHidden),
        w2(kHidden, 1, d),
        b2(1, 1, d) {
    for (Rows<T>* rows : {&cmp, &slc, &swa, &pe, &w1, &b1, &w2, &b2}) rows->randomize(seed++, 0.5);
  }

  nsa::CompressFwdParams phi() const {
    nsa::CompressFwdParams p{};
    p.dtype = dtype_of<T>();
    p.kind = nsa::CompressKind::kMlp;
    p.blocks = kBlocks;
    p.num_heads = kHeadsKv;
    p.head_dim = dim;
    p.hidden_size = kHidden;
    p.pe = pe.view().data;
    p.w1 = w1.view().data;
    p.b1 = b1.view().data;
    p.w2 = w2.view().data;
    p.b2 = b2.view().data;
    return p;
  }

  // The compressed rows of the whole batch.
  Guarded<T> compressed(const Batch& batch, const nsa::cpu::Parallel& parallel) const {
    Guarded<T> out(batch.total_k() / kBlocks.stride * kHeadsKv * dim);
    nsa::CompressFwdParams p = phi();
    p.seqs = batch.params();
    p.seqs.cu_seqlens_q = p.seqs.cu_seqlens_k;
    p.x = cmp.view();
    p.out = out.data();
    p.num_rows = batch.total_k() / kBlocks.stride;
    REQUIRE(nsa::cpu::compress_forward(p, parallel).ok());
    return out;
  }
};

template <typename T>
void offset_rows(nsa::RowsView* view, int64_t rows) {
  view->data = static_cast<const T*>(view->data) + rows * view->stride_row;
}

template <typename T>
void check(const std::vector<int32_t>& lengths, const Layout& layout) {
  const auto parallel = threads(layout.num_threads);
  const int64_t batch_size = static_cast<int64_t>(lengths.size());
  std::vector<int32_t> last;  // tokens of the last step
  for (int32_t n : lengths) last.push_back(std::min<int32_t>(n, n % (kMostTokens + 1)));
  const Batch batch(last, lengths, 2, 0);
  const Stream<T> k(batch.total_k(), kDimQK, 1), v(batch.total_k(), kDimV, 20);
  const Cache<T> cache(lengths, layout);

  // Everything but the last step, a few tokens of one sequence at a time; then the last step of all of them.
  std::vector<int32_t> held(lengths.size(), 0);
  const auto append = [&](const std::vector<int32_t>& counts, const std::vector<int64_t>& first_rows) {
    for (size_t b = 0; b < counts.size(); ++b) {
      std::vector<int32_t> offsets(counts.size() + 1, 0);
      for (size_t i = b + 1; i < offsets.size(); ++i) offsets[i] = counts[b];
      nsa::AppendKvParams p{};
      p.seqs = {held.data(), offsets.data(), batch_size, counts[b], kMostTokens, cache.capacity()};
      for (int kv = 0; kv < 2; ++kv) {
        const Stream<T>& from = kv == 0 ? k : v;
        nsa::AppendKvParams::Stream& to = kv == 0 ? p.k : p.v;
        to.phi = from.phi();
        to.cmp = from.cmp.view();
        to.slc = from.slc.view();
        to.swa = layout.ring ? from.swa.view() : nsa::RowsView{};
        for (nsa::RowsView* view : {&to.cmp, &to.slc, &to.swa}) {
          if (view->data != nullptr) offset_rows<T>(view, first_rows[b]);
        }
        to.slc_cache = cache.rows(kv, Cache<T>::kSlc);
        to.cmp_cache = cache.rows(kv, Cache<T>::kCmp);
        to.swa_cache = cache.rows(kv, Cache<T>::kSwa);
        to.tail = cache.rows(kv, Cache<T>::kTail);
      }
      REQUIRE(nsa::cpu::append_kv(p, parallel).ok());
      held[b] += counts[b];
    }
  };
  for (bool more = true; more;) {
    std::vector<int32_t> counts;
    std::vector<int64_t> rows;
    more = false;
    for (size_t b = 0; b < lengths.size(); ++b) {
      counts.push_back(
          std::min<int32_t>(lengths[b] - last[b] - held[b], static_cast<int32_t>(b % kMostTokens) + 1));
      rows.push_back(batch.cu_k[b] + held[b]);
      more |= counts.back() > 0;
    }
    append(counts, rows);
  }
  std::vector<int32_t> before = held;
  std::vector<int64_t> rows;
  for (size_t b = 0; b < lengths.size(); ++b) rows.push_back(batch.cu_k[b] + held[b]);
  append(last, rows);

  Rows<T> q(batch.total_q(), kHeadsQ, kDimQK, 2, 1), gates(batch.total_q(), kHeadsQ, nsa::kNumBranches);
  q.randomize(40);
  gates.randomize(41);
  for (int64_t r = batch.cu_q.back(); r < batch.total_q(); ++r) q.poison_row(r);
  const int64_t num_rows = batch.total_q() * kHeadsQ;
  Guarded<T> o(num_rows * kDimV);
  Guarded<Acc<T>> lse(nsa::kNumBranches * num_rows);
  Guarded<int32_t> indices(batch.total_q() * kHeadsKv * kSelected);
  nsa::DecodeAttentionParams p{};
  p.dtype = p.gate_dtype = dtype_of<T>();
  p.seqs = {before.data(), batch.cu_q.data(), batch_size, batch.total_q(), kMostTokens, cache.capacity()};
  p.shape = {kHeadsQ, kHeadsKv, kDimQK, kDimV};
  p.compressed = kBlocks;
  p.block_size = kBlockSize;
  p.num_selected_blocks = kSelected;
  p.num_initial_blocks = p.num_local_blocks = 1;
  p.window = kWindow;
  p.softmax_scale = 0.4;
  p.q = q.view();
  p.gate_logits = gates.view().data;
  p.k_cmp = cache.rows(0, Cache<T>::kCmp);
  p.v_cmp = cache.rows(1, Cache<T>::kCmp);
  p.k_slc = cache.rows(0, Cache<T>::kSlc);
  p.v_slc = cache.rows(1, Cache<T>::kSlc);
  p.k_swa = cache.window(0);
  p.v_swa = cache.window(1);
  p.o = o.data();
  p.lse = lse.data();
  p.block_indices = indices.data();
  REQUIRE(nsa::cpu::decode_attention(p, parallel).ok());
  REQUIRE((cache.intact() && o.intact() && lse.intact() && indices.intact()));

  // The same by the kernels of nsa::attention.
  const Guarded<T> k_cmp = k.compressed(batch, parallel), v_cmp = v.compressed(batch, parallel);
  const auto common = [&]<typename Params>(Params params) {
    params.dtype = p.dtype;
    params.seqs = batch.params();
    params.shape = p.shape;
    params.softmax_scale = p.softmax_scale;
    params.q = p.q;
    return params;
  };
  std::vector<Guarded<T>> branch;
  std::vector<Guarded<Acc<T>>> branch_lse;
  for (int i = 0; i < nsa::kNumBranches; ++i) {
    branch.emplace_back(num_rows * kDimV);
    branch_lse.emplace_back(num_rows);
  }
  auto cmp = common(nsa::BandedAttentionFwdParams{});
  cmp.keys = kBlocks;
  cmp.k = {k_cmp.data(), kHeadsKv * kDimQK, kDimQK};
  cmp.v = {v_cmp.data(), kHeadsKv * kDimV, kDimV};
  cmp.o = branch[0].data();
  cmp.lse = branch_lse[0].data();
  REQUIRE(nsa::cpu::banded_attention_forward(cmp, parallel).ok());
  nsa::SelectBlocksParams select{};
  select.scoring = common(nsa::BlockScoresParams{});
  select.scoring.keys = kBlocks;
  select.scoring.block_size = kBlockSize;
  select.scoring.k_cmp = cmp.k;
  select.scoring.lse = cmp.lse;
  select.scoring.num_blocks = (select.scoring.seqs.max_seqlen_k + kBlockSize - 1) / kBlockSize;
  select.num_selected_blocks = kSelected;
  select.num_initial_blocks = select.num_local_blocks = 1;
  Guarded<int32_t> expected_indices(indices.size());
  select.block_indices = expected_indices.data();
  REQUIRE(nsa::cpu::select_blocks(select, parallel).ok());
  auto slc = common(nsa::SelectedAttentionFwdParams{});
  slc.block_size = kBlockSize;
  slc.num_selected_blocks = kSelected;
  slc.k = k.slc.view();
  slc.v = v.slc.view();
  slc.block_indices = expected_indices.data();
  slc.o = branch[1].data();
  slc.lse = branch_lse[1].data();
  REQUIRE(nsa::cpu::selected_attention_forward(slc, parallel).ok());
  auto swa = common(nsa::BandedAttentionFwdParams{});
  swa.window = kWindow;
  swa.k = (layout.ring ? k.swa : k.slc).view();
  swa.v = (layout.ring ? v.swa : v.slc).view();
  swa.o = branch[2].data();
  swa.lse = branch_lse[2].data();
  REQUIRE(nsa::cpu::banded_attention_forward(swa, parallel).ok());
  Guarded<T> expected(num_rows * kDimV);
  nsa::GatedCombineFwdParams combine{};
  combine.dtype = combine.gate_dtype = p.dtype;
  combine.num_rows = int64_t{batch.cu_q.back()} * kHeadsQ;
  combine.head_dim_v = kDimV;
  for (int i = 0; i < nsa::kNumBranches; ++i) combine.o_branch[i] = branch[static_cast<size_t>(i)].data();
  combine.gate_logits = p.gate_logits;
  combine.o = expected.data();
  REQUIRE(nsa::cpu::gated_combine_forward(combine, parallel).ok());

  const auto queries = [&](std::vector<double> values, int64_t per_row) {
    values.resize(static_cast<size_t>(batch.cu_q.back() * per_row));
    return values;
  };
  REQUIRE(queries(indices.values(), kHeadsKv * kSelected) ==
          queries(expected_indices.values(), kHeadsKv * kSelected));
  REQUIRE(mismatch("o", queries(o.values(), kHeadsQ * kDimV), queries(expected.values(), kHeadsQ * kDimV),
                   4 * bound<T, Acc<T>>()) == "");
  for (int64_t i = 0; i < nsa::kNumBranches; ++i) {
    std::vector<double> own = lse.values();
    own.erase(own.begin(), own.begin() + i * num_rows);
    REQUIRE(mismatch("lse", queries(own, kHeadsQ),
                     queries(branch_lse[static_cast<size_t>(i)].values(), kHeadsQ),
                     bound<Acc<T>, Acc<T>>()) == "");
  }
}

}  // namespace

TEST_CASE("a cache that is fed step by step holds what the packed kernels see", "[cache]") {
  const std::vector<int32_t> lengths = {45, 0, 7, 62, 16};
  for (const Layout& layout :
       {Layout{false, false, 1}, Layout{true, false, 2}, Layout{true, true, 1}, Layout{false, true, 3}}) {
    check<double>(lengths, layout);
    check<float>(lengths, layout);
    check<BF16>(lengths, layout);
  }
}

TEST_CASE("a cache without tokens", "[cache]") { check<float>({0, 0}, {true, true, 1}); }
