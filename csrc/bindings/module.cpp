// nsa_ext._C: what operators cannot carry. It answers questions about the build: pybind11, but no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "nsa/launch.h"
#include "nsa/support.h"

namespace nsa {

extern const char* const kGitRevision;

}  // namespace nsa

namespace {

namespace py = pybind11;

#ifdef NSA_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// "a,b" -> ["a", "b"]; CMake hands over its lists like this.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

const char* path_name(nsa::Path path) {
  switch (path) {
    case nsa::Path::kCpu:
      return "cpu";
    case nsa::Path::kCudaPortable:
      return "cuda_portable";
    case nsa::Path::kCudaSm90:
      return "cuda_sm90";
  }
  return "unknown";
}

py::dict build_info() {
  py::dict cpu_isa;
  cpu_isa["active"] = nsa::cpu::active_isa();
  cpu_isa["compiled"] = split(NSA_CPU_ISAS);
  py::dict info;
  info["version"] = NSA_VERSION;
  info["git_revision"] = nsa::kGitRevision;
  info["compiler"] = NSA_COMPILER;
  info["torch_version"] = NSA_TORCH_VERSION;
  info["with_cuda"] = kWithCuda;
  info["cuda_version"] = kWithCuda ? py::object(py::str(NSA_CUDA_VERSION)) : py::none();
  info["cuda_architectures"] = split(NSA_CUDA_ARCHS);
  info["cpu_isa"] = cpu_isa;
  return info;
}

py::list support_matrix() {
  struct Named {
    nsa::DType dtype;
    const char* name;
  };
  constexpr Named kDTypes[] = {{nsa::DType::kF32, "float32"},
                               {nsa::DType::kF64, "float64"},
                               {nsa::DType::kBF16, "bfloat16"},
                               {nsa::DType::kF16, "float16"}};
  py::list rows;
  for (const nsa::SupportRow& entry : nsa::kSupport) {
    py::list dtypes, head_dims;
    for (const Named& dtype : kDTypes) {
      if (entry.dtypes & nsa::bit(dtype.dtype)) dtypes.append(dtype.name);
    }
    for (const nsa::HeadDims& dims : entry.head_dims) {
      if (dims.qk == 0) break;
      head_dims.append(py::make_tuple(dims.qk, dims.v));
    }
    const bool is_cpu = entry.path == nsa::Path::kCpu;
    py::dict row;
    row["op"] = entry.op;
    row["path"] = path_name(entry.path);
    row["device"] = is_cpu ? "cpu" : "cuda";
    row["built"] = is_cpu || kWithCuda;
    row["dtypes"] = dtypes;
    row["head_dims"] = head_dims.empty() ? py::object(py::none()) : py::object(head_dims);
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What this build is made of: versions, revision, compiler, CUDA architectures, instruction sets.");
  m.def("support_matrix", &support_matrix,
        "One dict per operator and code path: op, path, device, built, dtypes, head_dims ((Dk, Dv) pairs; "
        "None: any).");
}
