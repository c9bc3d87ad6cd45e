"""What is where, and whether it is whole."""
