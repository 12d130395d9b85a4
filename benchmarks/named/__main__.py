"""``python -m benchmarks.named``."""

from benchmarks.named.running import main

if __name__ == "__main__":
    main()
