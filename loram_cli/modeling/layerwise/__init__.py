"""A model of which one decoder layer at a time is in memory."""
