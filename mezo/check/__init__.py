"""`mezo check`: whether a model, a prompt and data will learn, and at which rate."""
