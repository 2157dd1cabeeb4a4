# The torch of the target Python, as imported targets: nsa_torch, nsa_torch_cuda, nsa_torch_openmp, nsa_pybind11.
# torch's own TorchConfig.cmake is not used: that of a CUDA build stops on a machine without a CUDA toolkit.
find_program(NSA_PYTHON NAMES python3 python DOC "The Python to build for; its torch is the torch to build against")
set(info_script ${PROJECT_SOURCE_DIR}/cmake/torch_info.py)
set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${info_script})
execute_process(COMMAND ${NSA_PYTHON} -I ${info_script}
                OUTPUT_VARIABLE info ERROR_VARIABLE problem RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "${problem}")
endif()
string(REGEX MATCHALL "[^\n]+" info_lines "${info}")
foreach(line ${info_lines})
  string(REGEX MATCH "^([A-Z0-9_]+)=(.*)$" matched "${line}")
  set(NSA_${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
endforeach()
message(STATUS "torch ${NSA_TORCH_VERSION} of ${NSA_PYTHON}")

if(NOT EXISTS ${NSA_PYTHON_INCLUDE}/Python.h)
  message(FATAL_ERROR "${NSA_PYTHON_INCLUDE} has no Python.h: install the headers of this Python (Debian: python3-dev)")
endif()

add_library(nsa_torch INTERFACE)
target_include_directories(nsa_torch SYSTEM INTERFACE
  ${NSA_TORCH_INCLUDE} ${NSA_TORCH_INCLUDE}/torch/csrc/api/include)
target_compile_options(nsa_torch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${NSA_TORCH_INCLUDE}/=>)
target_compile_definitions(nsa_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${NSA_TORCH_CXX11_ABI})
target_link_libraries(nsa_torch INTERFACE ${NSA_TORCH_LIB}/libtorch_cpu.so ${NSA_TORCH_LIB}/libc10.so)

# What the operators need of torch's CUDA side: streams and device guards.
add_library(nsa_torch_cuda INTERFACE)
target_link_libraries(nsa_torch_cuda INTERFACE ${NSA_TORCH_LIB}/libc10_cuda.so)

# at::parallel_for is a header and becomes OpenMP code of ours, which must run on the threads of torch's own OpenMP
# runtime and not bring a second one. So -fopenmp is for the compiler only, and the linker gets torch's library.
add_library(nsa_torch_openmp INTERFACE)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND NSA_TORCH_OPENMP MATCHES "gomp")
  message(WARNING "Clang has no code generation for GCC's OpenMP runtime, which this torch uses: "
                  "the CPU operators will run on one thread. Build with GCC for speed.")
elseif(NSA_TORCH_OPENMP)
  target_compile_options(nsa_torch_openmp INTERFACE -fopenmp)
  target_link_libraries(nsa_torch_openmp INTERFACE ${NSA_TORCH_OPENMP})
else()
  find_package(OpenMP REQUIRED COMPONENTS CXX)
  target_link_libraries(nsa_torch_openmp INTERFACE OpenMP::OpenMP_CXX)
endif()

add_library(nsa_pybind11 INTERFACE)
target_include_directories(nsa_pybind11 SYSTEM INTERFACE ${NSA_TORCH_INCLUDE} ${NSA_PYTHON_INCLUDE})
