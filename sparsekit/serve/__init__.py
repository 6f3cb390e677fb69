"""sparsekit inside serving engines: a prompt's chunk over keys that lie in pages (`pages`, `prompts`), and vLLM (`vllm`)."""
