"""The table of memory by model size in mezo/memory/sizes.py: python -m benchmarks.sizes"""

from mezo.memory.plan import OPT
from mezo.memory.sizes import estimate

if __name__ == "__main__":
    for name in OPT:
        print(f'    "{name.upper()}": {estimate(name)},', flush=True)
