"""Hugging Face folders in and out: a table of names, pure tensor functions, and streamed safetensors."""
