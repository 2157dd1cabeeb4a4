// From run-time values to template arguments, without macros.
#pragma once

#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "nsa/status.h"

namespace nsa {

// Calls f.template operator()<V>() for the V among Values that equals value; otherwise the error lists what
// is allowed.
template <int... Values, typename F>
Status dispatch(const char* name, int value, F&& f) {
  Status status;
  bool found = false;
  ((value == Values ? (found = true, status = f.template operator()<Values>(), true) : false) || ...);
  if (found) return status;
  char allowed[128] = {};
  int used = 0;
  ((used += std::snprintf(allowed + used, sizeof(allowed) - used, "%s%d", used ? ", " : "", Values)), ...);
  return Status::error(StatusCode::kUnsupported, "%s = %d has no kernel here; there is one for %s", name,
                       value, allowed);
}

}  // namespace nsa
