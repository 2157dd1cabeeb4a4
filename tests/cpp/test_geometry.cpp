// The integer arithmetic of the specification, checked by hand and against counting.
#include "catch2_bridge.h"
#include "nsa/geometry.h"

using nsa::KeyBlocks;

TEST_CASE("compressed blocks of a sequence, by hand", "[geometry]") {
  constexpr KeyBlocks blocks{32, 16};
  CHECK(blocks.count(0) == 0);
  CHECK(blocks.count(31) == 0);
  CHECK(blocks.count(32) == 1);
  CHECK(blocks.count(47) == 1);
  CHECK(blocks.count(48) == 2);
  CHECK(blocks.count(64) == 3);
  CHECK(blocks.first_row(0) == 0);
  CHECK(blocks.first_row(47) == 2);
}

TEST_CASE("visibility, by hand", "[geometry]") {
  constexpr KeyBlocks blocks{32, 16};
  CHECK(blocks.end_visible(-1) == 0);
  CHECK(blocks.end_visible(30) == 0);
  CHECK(blocks.end_visible(31) == 1);
  CHECK(blocks.end_visible(46) == 1);
  CHECK(blocks.end_visible(47) == 2);
  constexpr KeyBlocks tokens{1, 1};
  CHECK(tokens.end_visible(9) == 10);
  CHECK(tokens.begin_visible(9, 4) == 6);  // keys 6, 7, 8, 9: the query's own included
  CHECK(tokens.begin_visible(3, 4) == 0);
  CHECK(tokens.begin_visible(4, 4) == 1);
  CHECK(tokens.begin_visible(9, 1) == 9);
  CHECK(tokens.begin_visible(9, 0) == 0);
}

TEST_CASE("visibility equals its definition for every small shape", "[geometry]") {
  int wrong = 0;
  for (int64_t length = 1; length <= 7; ++length) {
    for (int64_t stride = 1; stride <= length; ++stride) {
      const KeyBlocks blocks{length, stride};
      for (int64_t t = 0; t < 30; ++t) {
        for (int64_t window = 0; window < 12; ++window) {
          for (int64_t i = 0; i < 40; ++i) {
            const int64_t end = i * stride + length - 1;
            const bool visible = end <= t && (window == 0 || end > t - window);
            wrong += visible != (i >= blocks.begin_visible(t, window) && i < blocks.end_visible(t));
          }
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("compressed rows of neighbouring sequences never overlap", "[geometry]") {
  int wrong = 0;
  for (int64_t length = 1; length <= 6; ++length) {
    for (int64_t stride = 1; stride <= length; ++stride) {
      const KeyBlocks blocks{length, stride};
      for (int64_t begin = 0; begin < 20; ++begin) {
        for (int64_t seqlen = 0; seqlen < 20; ++seqlen) {
          const int64_t end = blocks.first_row(begin) + blocks.count(seqlen);
          wrong += end > blocks.first_row(begin + seqlen);
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("overlap weights are 1, 2, 2, 2, 1 for the defaults", "[geometry]") {
  constexpr KeyBlocks blocks{32, 16};
  for (int64_t j = 1; j < 5; ++j) {
    const int64_t expected[] = {0, 1, 2, 2, 2, 1, 0};
    for (int64_t k = 0; k < 7; ++k) CHECK(nsa::overlap(4 * j - 2 + k, j, blocks, 64) == 16 * expected[k]);
  }
  CHECK(nsa::overlap(0, 0, blocks, 64) == 32);
  // l over l': one block covers several selection blocks, each in full.
  for (int64_t j = 0; j < 4; ++j) CHECK(nsa::overlap(0, j, {64, 16}, 16) == 16);
  CHECK(nsa::overlap(0, 4, {64, 16}, 16) == 0);
}

TEST_CASE("overlap equals counting tokens", "[geometry]") {
  int wrong = 0;
  for (const KeyBlocks& blocks : {KeyBlocks{6, 2}, KeyBlocks{3, 3}, KeyBlocks{9, 3}}) {
    for (int64_t block_size : {6, 12}) {
      for (int64_t i = 0; i < 20; ++i) {
        for (int64_t j = 0; j < 8; ++j) {
          int64_t shared = 0;
          for (int64_t s = i * blocks.stride; s < i * blocks.stride + blocks.block; ++s)
            shared += s / block_size == j;
          wrong += shared != nsa::overlap(i, j, blocks, block_size);
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("rounding helpers", "[geometry]") {
  CHECK(nsa::ceil_div(0, 64) == 0);
  CHECK(nsa::ceil_div(1, 64) == 1);
  CHECK(nsa::ceil_div(64, 64) == 1);
  CHECK(nsa::ceil_div(65, 64) == 2);
  CHECK(nsa::round_up(65, 64) == 128);
  CHECK(nsa::ceil_div((1LL << 40) + 1, 2) == (1LL << 39) + 1);
}
