"""One VLM on llama.cpp: encode, prefill, decode and attention. Knows nothing of guides, pruning or pairs."""
