"""The table of memory by model size in mezo/sizes.py: python -m benchmarks.sizes"""

from mezo.planning import OPT
from mezo.sizes import estimate

if __name__ == "__main__":
    for name in OPT:
        print(f'    "{name.upper()}": {estimate(name)},', flush=True)
