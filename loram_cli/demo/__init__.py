"""The embedded demo: a tiny base model, and the word problems that it learns from."""
