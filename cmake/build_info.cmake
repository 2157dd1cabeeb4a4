# What nsa_ext.build_info() reports. The git revision is looked up in every build; a changed one compiles one tiny file.
function(nsa_add_build_info target)
  set(revision_source ${PROJECT_BINARY_DIR}/revision.cpp)
  add_custom_target(nsa_revision BYPRODUCTS ${revision_source}
    COMMAND ${CMAKE_COMMAND} -DSOURCE_DIR=${PROJECT_SOURCE_DIR} -DOUTPUT=${revision_source}
            -P ${PROJECT_SOURCE_DIR}/cmake/write_revision.cmake)
  add_library(nsa_revision_object OBJECT ${revision_source})
  add_dependencies(nsa_revision_object nsa_revision)

  list(JOIN NSA_CPU_ISAS "," isas)
  set(architectures "")
  if(NSA_WITH_CUDA)
    list(JOIN NSA_CUDA_ARCHS "," architectures)
    target_compile_definitions(${target} PRIVATE NSA_WITH_CUDA)
  endif()
  target_compile_definitions(${target} PRIVATE
    NSA_VERSION="${PROJECT_VERSION}" NSA_TORCH_VERSION="${NSA_TORCH_VERSION}" NSA_CPU_ISAS="${isas}"
    NSA_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}" NSA_CUDA_ARCHS="${architectures}"
    NSA_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
  target_link_libraries(${target} PRIVATE nsa_revision_object)
endfunction()
