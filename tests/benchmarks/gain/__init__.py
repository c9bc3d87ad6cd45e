"""What small models keep of full LoRA's gain, on a real base."""
