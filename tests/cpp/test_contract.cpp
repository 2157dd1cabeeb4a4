// dispatch.h, status.h, support.h and the instruction-set choice.
#include <cstdlib>
#include <set>
#include <string>

#include "catch2_bridge.h"
#include "nsa/dispatch.h"
#include "nsa/launch.h"
#include "nsa/support.h"

TEST_CASE("dispatch passes a run-time value on as a template argument", "[dispatch]") {
  int seen = 0;
  const nsa::Status status = nsa::dispatch<64, 96, 128>("head_dim", 96, [&]<int D>() {
    seen = D;
    return nsa::Status{};
  });
  CHECK(status.ok());
  CHECK(seen == 96);
}

TEST_CASE("dispatch names the value and lists what is allowed", "[dispatch]") {
  bool called = false;
  const nsa::Status status = nsa::dispatch<64, 128>("head_dim", 80, [&]<int>() {
    called = true;
    return nsa::Status{};
  });
  CHECK_FALSE(called);
  CHECK(status.code == nsa::StatusCode::kUnsupported);
  const std::string message = status.message;
  for (const char* part : {"head_dim", "80", "64, 128"}) CHECK(message.find(part) != std::string::npos);
}

TEST_CASE("dispatch hands the callee's error through", "[dispatch]") {
  const nsa::Status status = nsa::dispatch<1, 2>(
      "x", 2, []<int N>() { return nsa::Status::error(nsa::StatusCode::kDeviceError, "failed %d", N); });
  CHECK(status.code == nsa::StatusCode::kDeviceError);
  CHECK(std::string(status.message) == "failed 2");
}

TEST_CASE("a status is ok by default and cuts a long message", "[status]") {
  CHECK(nsa::Status{}.ok());
  const std::string text(1000, 'x');
  const nsa::Status status = nsa::Status::error(nsa::StatusCode::kInvalidValue, "%s", text.c_str());
  CHECK_FALSE(status.ok());
  CHECK(std::string(status.message) == text.substr(0, sizeof(status.message) - 1));
}

TEST_CASE("the support table has one CPU row per operator, for any head dim", "[support]") {
  std::multiset<std::string> on_cpu;
  for (const nsa::SupportRow& row : nsa::kSupport) {
    if (row.path != nsa::Path::kCpu) continue;
    on_cpu.insert(row.op);
    CHECK((row.dtypes & nsa::bit(nsa::DType::kF32)) != 0);
    CHECK((row.dtypes & nsa::bit(nsa::DType::kF64)) != 0);
    CHECK((row.dtypes & nsa::bit(nsa::DType::kBF16)) != 0);
    CHECK((row.dtypes & nsa::bit(nsa::DType::kF16)) == 0);
    CHECK(row.head_dims[0].qk == 0);
  }
  const std::multiset<std::string> expected = {
      "compress",           "compressed_attention",     "block_scores",  "select_blocks",
      "selected_attention", "sliding_window_attention", "gated_combine", "attention",
      "append_kv",          "decode_attention"};
  CHECK(on_cpu == expected);
}

TEST_CASE("the instruction set is what the environment asks for, where the machine has it", "[isa]") {
  const std::string active = nsa::cpu::active_isa();
  const char* asked = std::getenv("NSA_CPU_ISA");
  INFO(active);
  CHECK((active == "generic" || active == "avx2" || active == "avx512"));
  if (asked != nullptr && std::string(asked) == "generic") CHECK(active == "generic");
#if defined(__x86_64__)
  if (asked != nullptr && std::string(asked) == "avx2" && __builtin_cpu_supports("avx2"))
    CHECK(active == "avx2");
#endif
}

TEST_CASE("launchers refuse a dtype that they have no kernel for", "[status]") {
  nsa::DeltaParams p{};
  p.dtype = nsa::DType::kF16;
  CHECK(nsa::cpu::attention_delta(p, {}).code == nsa::StatusCode::kUnsupported);
}
