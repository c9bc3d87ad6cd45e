"""Models and adapters in other tools' formats: GGUF, which llama.cpp and Ollama read."""
