# Included after ggml's project(), when `dbf-gguf build` has asked for -O2: that compiles the programs in three quarters of
# the time of -O3. Models spend their time in ggml's loops, and those get all that the compiler can do.
set(CMAKE_C_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
