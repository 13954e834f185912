"""The OpenAI-compatible server of prune_llm."""
