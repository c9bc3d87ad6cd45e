"""A run's models to talk to: OpenAI's protocol over HTTP, and a conversation in the terminal."""
