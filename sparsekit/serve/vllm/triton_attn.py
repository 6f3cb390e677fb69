"""sparsekit over vLLM's TRITON_ATTN."""

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from sparsekit.serve.vllm.backend import over

Backend, Builder, Impl = over(TritonAttentionBackend, __name__)
