"""Data as text, as conversations and as tokens."""
