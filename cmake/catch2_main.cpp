// The main function of a test program with Catch2 version 2; version 3 has it in a library.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
