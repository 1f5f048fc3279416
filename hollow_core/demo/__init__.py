"""The embedded miniature of Stable Diffusion, its drawn world, and what trained it."""
