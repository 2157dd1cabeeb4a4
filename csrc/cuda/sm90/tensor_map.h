// Tensor maps: how TMA sees a [rows, heads, dim] tensor.
#pragma once

#include <cuda.h>

#include "nsa/params.h"

namespace nsa::cuda::sm90 {

// Boxes of [rows, heads, 64 columns] with the 128-byte swizzle, for tile/swizzled_tile.cuh. False where the
// tensor does not suit TMA (16-byte alignment, strides below 2^40, something in it) or the driver is too old.
bool make_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows, int heads, int dim,
                     int box_rows, int box_heads);

// The same as boxes of [64-column panels, rows, 64 columns] of one head: whole rows by one order.
bool make_panel_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows, int heads,
                           int dim, int box_rows);

// The same of queries as [rows, KV heads, group, dim]: box_heads may exceed the group, and heads beyond it
// read as zeros.
bool make_group_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows, int heads_kv,
                           int group, int dim, int box_rows, int box_heads);

// The same with a head's rows one after another: boxes of [heads, rows, 64 columns].
bool make_group_by_head_tensor_map(CUtensorMap* map, DType dtype, const RowsView& view, int64_t rows,
                                   int heads_kv, int group, int dim, int box_rows, int box_heads);

}  // namespace nsa::cuda::sm90
