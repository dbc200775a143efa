"""What a run would do, without denoising."""
