"""The step on CUDA: Triton kernels that give the bits of `reference_step`, one launch for many parameters.

`launch` is what the optimizer calls; it needs Triton and is imported on CUDA only. `kernel` holds the step, `codes`
what is stored, `arithmetic` the operations that make the bits come out equal.
"""
