"""sparsekit over vLLM's FLEX_ATTENTION."""

from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

from sparsekit.serve.vllm.backend import over

Backend, Builder, Impl = over(FlexAttentionBackend, __name__)
