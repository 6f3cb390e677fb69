"""sparsekit inside serving engines: a prompt's chunk over keys in pages (`prompts`), and vLLM (`vllm`)."""
