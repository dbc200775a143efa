"""What one image needs: scenes, tokens, LoRA files, methods, the denoising loop and the pipeline classes."""
