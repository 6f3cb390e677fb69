"""sparsekit over vLLM's FLASH_ATTN."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from sparsekit.serve.vllm.backend import over

Backend, Builder, Impl = over(FlashAttentionBackend, __name__)
