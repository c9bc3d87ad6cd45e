"""What align and train share."""
