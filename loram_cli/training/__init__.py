"""Data, trainer and adapters. The door to trl and peft."""
