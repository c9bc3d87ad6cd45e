"""Flags, environment, settings file, recipe and run directory, made into one spec."""
