"""sparsekit inside serving engines: a prompt's chunk over keys in pages (`pages`, `prompts`), and vLLM (`vllm`)."""
