# Compilers and flags. Every target of ours links nsa_settings.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

find_package(Threads REQUIRED)

find_program(NSA_CCACHE ccache)
if(NSA_CCACHE)
  foreach(language CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER ${NSA_CCACHE})
    endif()
  endforeach()
endif()

# The prefix maps keep the folders of the building machine out of error messages (__FILE__ in torch's checks).
add_library(nsa_settings INTERFACE)
target_compile_options(nsa_settings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>
  $<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xcompiler -Wall>")
if(NSA_SANITIZE)
  target_compile_options(nsa_settings INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined> $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g>)
  target_link_options(nsa_settings INTERFACE -fsanitize=address,undefined)
endif()

# All members, in their order: an ISA-independent copy of an inline function (a member of std::vector, say) must
# come before the copies that were compiled for AVX, because the linker keeps the first it meets.
function(nsa_link_whole_archive target archive)
  add_dependencies(${target} ${archive})
  target_link_libraries(${target} PRIVATE
    "-Wl,--whole-archive" $<TARGET_FILE:${archive}> "-Wl,--no-whole-archive" Threads::Threads)
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS $<TARGET_FILE:${archive}>)
endfunction()

# For the same reason nobody else may bind to our copies of the standard library's inline functions.
function(nsa_export_only_our_symbols target)
  set(script ${PROJECT_SOURCE_DIR}/cmake/exports.map)
  target_link_options(${target} PRIVATE -Wl,--version-script=${script})
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
endfunction()

