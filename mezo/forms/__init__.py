"""How theta + eps z reaches the forward pass, and how a stored weight takes an update."""
