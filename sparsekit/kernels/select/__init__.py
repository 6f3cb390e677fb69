"""q, k -> plan. Each file in torch is the definition; its Triton twin, `x_triton.py`, runs on CUDA devices."""
