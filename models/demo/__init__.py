"""The demo pair: a tiny guide and model, the scenes they answer questions about, and their training."""
