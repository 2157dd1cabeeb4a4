// What a launcher returns: it never throws and never exits, so that any host (LibTorch or not) can decide
// what to do.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace nsa {

enum class StatusCode { kOk, kUnsupported, kInvalidValue, kOutOfMemory, kDeviceError };

struct Status {
  StatusCode code = StatusCode::kOk;
  char message[240] = {};

  bool ok() const { return code == StatusCode::kOk; }

  __attribute__((format(printf, 2, 3))) static Status error(StatusCode code, const char* format, ...) {
    Status status;
    status.code = code;
    va_list args;
    va_start(args, format);
    std::vsnprintf(status.message, sizeof(status.message), format, args);
    va_end(args);
    return status;
  }
};

}  // namespace nsa
