"""The C++ kernels of the backend "cpu" and the library they are built to; all that knows C++ and ctypes.

kernels.cpp includes common.h once, and vectors.h, scan.h, conv.h and norm.h once for each instruction set.
"""
