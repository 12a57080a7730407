"""What scripts/boot is made of."""
