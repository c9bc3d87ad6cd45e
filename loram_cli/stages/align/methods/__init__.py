"""The methods of alignment: one file each, and one line in the table."""
