"""The denoising loop: passes, the denoiser that runs them, guidance, and what a method is to the loop."""
