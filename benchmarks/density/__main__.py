"""``python -m benchmarks.density``."""

from benchmarks.density.running import main

if __name__ == "__main__":
    main()
