"""Screens over the chat: each takes plain data, and is dismissed with a typed result, or with None by esc."""
