"""The roadtrip world, video files, latents on disk and the Grain input pipeline."""
