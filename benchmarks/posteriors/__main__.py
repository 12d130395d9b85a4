"""``python -m benchmarks.posteriors``."""

from benchmarks.posteriors.running import main

if __name__ == "__main__":
    main()
