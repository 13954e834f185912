from prune_llm.cli import main

main(prog_name="prune-llm")
