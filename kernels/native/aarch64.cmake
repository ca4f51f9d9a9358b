# Cross-compiles for Jetson with Debian's or Ubuntu's g++-aarch64-linux-gnu:
#   cmake -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=kernels/native/aarch64.cmake
#   cmake --build build/aarch64 --target omniad_runtime
# JetPack 6 has glibc 2.35 and GLIBCXX 3.4.30. With Debian 12's compiler the library asks for no more than 2.34 and
# 3.4.29; a newer one's may ask for more, and then platform_wheel.py refuses it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
