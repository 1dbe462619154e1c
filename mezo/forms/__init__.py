"""How theta + eps z reaches the forward pass, and how an update is applied to a stored weight."""
