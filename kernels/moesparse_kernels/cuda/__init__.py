"""2:4 experts on the sparse tensor cores of NVIDIA GPUs, in CUDA C++ that is compiled on the machine of its user.

grouped_mma_sp.cu   the kernel
plan.py             launch sizes
nvrtc.py            compiles it, once for a machine
driver.py           loads and launches it
grouped.py          the grouped GEMM, with the arguments of `grouped_nm`
check.py            whether it may run on a device: it has been compared with plain torch there

There is bf16 and fp16. Not there: 8-bit values. Their instruction is mma.sp.m16n8k64: a unit of 64 rows x 256 columns
would hold the same 8 KB, with 2 KB of metadata, of which every lane has a word for each instruction. e4m3 runs on sm_89
and newer, with a scale for each row where the bias is added; int8 on sm_80 and newer, with sums in int32. They need an
order in tensor_core_orders.py, an instruction beside those of bf16 and fp16 in the kernel, and a row in `plan.KERNELS`.
"""
