#include "ops/operator.h"

namespace nsa::ops {

c10::OperatorHandle find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

}  // namespace nsa::ops
