"""The objectives of training: one file each, and one line in the table."""
