"""The algorithm on MLX: Apple silicon first; Linux through ``mlx[cpu]`` or ``mlx[cuda13]``. Imports no torch."""
