"""Models and tokenizers: loading, adapters, and which of the weights are trained."""
