"""How the models embedded in the package were trained: prepare -> causal or masked."""
