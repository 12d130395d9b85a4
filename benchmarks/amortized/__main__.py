"""``python -m benchmarks.amortized``."""

from benchmarks.amortized.running import main

if __name__ == "__main__":
    main()
