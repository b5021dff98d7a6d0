"""What a method does in a fit: it attaches, guards the optimizers, saves little and loads strictly."""
