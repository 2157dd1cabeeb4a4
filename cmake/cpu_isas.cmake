# nsa_cpu: csrc/cpu/*.cpp compiled once per instruction set, each into its own namespace, and dispatch.cpp, which
# picks one of them at run time.
file(GLOB cpu_sources CONFIGURE_DEPENDS csrc/cpu/*.cpp)
set(dispatch_source ${PROJECT_SOURCE_DIR}/csrc/cpu/dispatch.cpp)
list(REMOVE_ITEM cpu_sources ${dispatch_source})

set(NSA_CPU_ISAS generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND NSA_CPU_ISAS avx2 avx512)
endif()
set(isa_flags_avx2 -mavx2 -mfma -mf16c)
set(isa_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c)

set(optimization -O3)
if(NSA_SANITIZE)
  set(optimization -O1)  # builds in a fraction of the time, and keeps the reports readable
endif()

set(isa_objects)
set(isa_definitions)
foreach(isa ${NSA_CPU_ISAS})
  add_library(nsa_cpu_${isa} OBJECT ${cpu_sources})
  target_link_libraries(nsa_cpu_${isa} PRIVATE nsa_contract)
  target_compile_definitions(nsa_cpu_${isa} PRIVATE NSA_CPU_ISA=${isa})
  target_compile_options(nsa_cpu_${isa} PRIVATE ${optimization} -ffp-contract=fast ${isa_flags_${isa}})
  set_target_properties(nsa_cpu_${isa} PROPERTIES CXX_VISIBILITY_PRESET hidden)
  list(APPEND isa_objects $<TARGET_OBJECTS:nsa_cpu_${isa}>)
  string(TOUPPER ${isa} upper)
  list(APPEND isa_definitions NSA_HAS_${upper})
endforeach()

add_library(nsa_cpu STATIC ${dispatch_source} ${isa_objects})
target_link_libraries(nsa_cpu PRIVATE nsa_contract)
target_compile_definitions(nsa_cpu PRIVATE ${isa_definitions})
