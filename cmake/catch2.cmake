# Catch2 of version 2 or 3: the system's, else version 2 from its repository. Tests include tests/cpp/catch2_bridge.h.
find_package(Catch2 3 QUIET)
if(Catch2_FOUND)
  set(catch2_target Catch2::Catch2WithMain)
else()
  find_path(NSA_CATCH2_INCLUDE catch2/catch.hpp)
  if(NOT NSA_CATCH2_INCLUDE)
    message(STATUS "Catch2 is not installed: fetching it")
    include(FetchContent)
    FetchContent_Declare(catch2_v2
      URL https://github.com/catchorg/Catch2/archive/refs/tags/v2.13.10.tar.gz
      URL_HASH SHA256=d54a712b7b1d7708bc7a819a8e6e47b2fde9536f487b89ccbca295072a7d9943
      SOURCE_SUBDIR single_include)  # a folder without a CMakeLists.txt: the header is all that is wanted
    FetchContent_MakeAvailable(catch2_v2)
    set(NSA_CATCH2_INCLUDE ${catch2_v2_SOURCE_DIR}/single_include)
  endif()
  add_library(nsa_catch2 STATIC ${PROJECT_SOURCE_DIR}/cmake/catch2_main.cpp)
  target_include_directories(nsa_catch2 SYSTEM PUBLIC ${NSA_CATCH2_INCLUDE})
  target_compile_options(nsa_catch2 PRIVATE -O0)  # a large file whose speed does not matter
  set(catch2_target nsa_catch2)
endif()

function(nsa_add_catch2_executable name)
  add_executable(${name} ${ARGN})
  target_include_directories(${name} PRIVATE tests/cpp)
  target_link_libraries(${name} PRIVATE ${catch2_target} nsa_contract)
endfunction()
