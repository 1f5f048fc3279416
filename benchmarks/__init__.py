"""What produces every figure that README quotes."""
