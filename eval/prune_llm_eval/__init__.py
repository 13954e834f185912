"""Quality and speed reports for prune_llm."""
