"""sparsekit over vLLM's CPU_ATTN."""

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from sparsekit.serve.vllm.backend import over

Backend, Builder, Impl = over(CPUAttentionBackend, __name__)
