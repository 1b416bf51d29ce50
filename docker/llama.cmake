# Read by CMake as llama.cpp's project begins: its library for command line tools takes half of the
# time of compilation, nothing here uses it, and llama-cpp-python asks for it whatever the flags say.
set(LLAMA_BUILD_COMMON OFF)
