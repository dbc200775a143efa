"""What methods cost next to the plain pipeline: worked out, and measured."""
