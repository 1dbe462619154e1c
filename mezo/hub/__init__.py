"""Run logs and adapters on the Hugging Face hub."""
