"""A stage turns an input directory into an output directory."""
