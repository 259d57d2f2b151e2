"""Merged weights into other formats: GGUF for llama.cpp, and a folder that Ollama takes."""
