"""What transformers of diffusers are told beside the latents: times, positions, sizes."""
